"""
Measure text models on held-out prompts beside the base, without and with guidance: a table, JSON lines, completions.

    python recipes/compare_text.py --models quality=outputs/text_quality diversity=outputs/text_diversity

Of each model: the KL to the guided teacher along its own samples; how much its completions tell about their prompts,
under a sentence encoder (word vectors) and under the frozen base; how much the completions of a prompt differ, under
the encoder that was rewarded and under one that was not; entropy; tokens per second. What is measured already is kept,
so a second call goes on after an interruption.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from trl_drcd._files import write_text
from trl_drcd._run import distinct, load_prompts
from trl_drcd.embedders import SentenceEmbedder
from trl_drcd.evaluation.metrics import diversity_within_prompts, per_prompt, teacher_terms
from trl_drcd.evaluation.sampling import sample_prompts
from trl_drcd.evaluation.tables import compare
from trl_drcd.evaluation.text import prompt_information

HERE = Path(__file__).resolve().parent
TEMPERATURE, SEED = 0.99, 0
COLUMNS = {
    "kl": "KL to guided teacher (nats)",
    "adherence": "adherence (word vectors)",
    "quality": "information on the prompt (nats)",
    "diversity": "diversity (MiniLM, rewarded)",
    "diversity_second": "diversity (word vectors)",
    "entropy_per_token": "entropy (nats/token)",
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="outputs/smollm2", help="the base model")
    parser.add_argument("--models", nargs="*", default=[], metavar="NAME=FOLDER", help="trained models or adapters")
    parser.add_argument("--dataset", default=str(HERE / "text_prompts" / "test.jsonl"), help="held-out prompts")
    parser.add_argument("--embedder", default="outputs/minilm", help="the sentence encoder that was rewarded")
    parser.add_argument("--judge", default="outputs/wordllama", help="a sentence encoder that training never saw")
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="of the teacher")
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts to measure on")
    parser.add_argument("--samples", type=int, default=8, help="samples of each prompt, at least 2")
    parser.add_argument("--max_new_tokens", type=int, default=40, help="largest length of a completion")
    parser.add_argument("--batch_size", type=int, default=64, help="sequences at one time")
    parser.add_argument("--output", type=Path, default=Path("outputs/text"), help="folder of the results")
    return parser.parse_args(argv)


def load(folder: str) -> Any:
    """A model or an adapter on its base, in bfloat16."""
    kind = AutoPeftModelForCausalLM if (Path(folder) / "adapter_config.json").exists() else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.bfloat16).eval()


def request(prompt: Any) -> str:
    """What the user asked for: a text prompt, or the last user's turn of a conversation."""
    return prompt if isinstance(prompt, str) else [t["content"] for t in prompt if t["role"] == "user"][-1]


@torch.no_grad()
def measure(folder: str, guidance_scale: float, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Values of each prompt, the completions, and the speed of one model."""
    base, model = load(args.base), load(folder)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    prompts = distinct(load_prompts("dataset", args.dataset, "test")["prompt"], args.prompts)
    samples = sample_prompts(
        model, tokenizer, prompts, args.samples, guidance_scale, temperature=TEMPERATURE, seed=SEED,
        max_new_tokens=args.max_new_tokens, batch_size=args.batch_size, description=f"sample {name}",
    )  # fmt: skip
    terms = teacher_terms(
        model, base, tokenizer, samples, args.guidance_scale, temperature=TEMPERATURE,
        model_guidance_scale=guidance_scale, batch_size=args.batch_size, description=f"KL     {name}",
    )  # fmt: skip
    texts = tokenizer.batch_decode(samples.token_ids, skip_special_tokens=True)
    requests = [request(prompt) for prompt in samples.repeated_prompts]
    judge, embedder = SentenceEmbedder(args.judge), SentenceEmbedder(args.embedder)
    judged = judge(texts)
    values = {
        "kl": per_prompt(terms.kl, args.samples),
        "adherence": per_prompt((judge(requests) * judged).sum(-1), args.samples),
        "quality": per_prompt(
            prompt_information(base, tokenizer, requests, texts, description=f"judge  {name}"), args.samples
        ),
        "diversity": diversity_within_prompts(embedder(texts), args.samples),
        "diversity_second": diversity_within_prompts(judged, args.samples),
        "entropy_per_token": per_prompt(terms.entropy / terms.tokens, args.samples),
    }
    return {
        "settings": settings_of(folder, args),
        "values": {key: value.tolist() for key, value in values.items()},
        "tokens_per_second": samples.tokens_per_second,
        "requests": requests,
        "completions": texts,
    }


def settings_of(folder: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a measurement depends on."""
    names = ("base", "dataset", "embedder", "judge", "guidance_scale", "prompts", "samples", "max_new_tokens")
    return {"model": folder} | {name: getattr(args, name) for name in (*names, "batch_size")}


def side_by_side(measured: dict[str, dict[str, Any]], samples: int, prompts: int = 8, shown: int = 2) -> str:
    """The first completions of some prompts by each model, as Markdown."""
    first = next(iter(measured.values()))
    sections = []
    step = max(1, len(first["requests"]) // samples // prompts) * samples
    for row in range(0, min(len(first["requests"]), step * prompts), step):
        lines = [f"## {first['requests'][row]}"]
        for name, one in measured.items():
            texts = (" ".join(text.split()) for text in one["completions"][row : row + min(shown, samples)])
            lines.append(f"**{name}**\n\n" + "\n".join(f"- {text}" for text in texts))
        sections.append("\n\n".join(lines))
    return "# Completions, side by side\n\n" + "\n\n".join(sections) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Measures what is not measured yet, then writes the tables."""
    args = parse(argv)
    if wrong := [word for word in args.models if not re.fullmatch(r"[\w.+ -]+=.+", word)]:
        raise SystemExit(
            f"compare_text.py: error: --models has {wrong[0]!r}; give NAME=FOLDER, a name of letters and digits"
        )
    logging.disable_progress_bar()
    models = {"base": (args.base, 1.0), "base with CFG": (args.base, args.guidance_scale)}
    models |= {name: (folder, 1.0) for name, _, folder in (word.partition("=") for word in args.models)}
    measured = {}
    for name, (folder, guidance_scale) in models.items():
        file = args.output / "measured" / f"{name.replace(' ', '_')}.json"
        kept = json.loads(file.read_text()) if file.exists() else {}
        if kept.get("settings") != settings_of(folder, args):
            kept = measure(folder, guidance_scale, name, args)
            write_text(file, json.dumps(kept))
        measured[name] = kept | {"about": {"model": Path(folder).name, "guidance_scale": guidance_scale}}
    about = f"{args.prompts} held-out prompts x {args.samples} samples of at most {args.max_new_tokens} tokens, "
    about += f"temperature {TEMPERATURE}, seed {SEED}; mean and 95 % bootstrap interval over prompts."
    shared = {"temperature": TEMPERATURE, "seed": SEED, "prompts": args.prompts, "samples_per_prompt": args.samples}
    _, lines, tables = compare(measured, COLUMNS, about, shared)
    write_text(args.output / "results.jsonl", lines)
    write_text(args.output / "results.md", tables)
    write_text(args.output / "samples.md", side_by_side(measured, args.samples))
    print(tables)


if __name__ == "__main__":
    main()
