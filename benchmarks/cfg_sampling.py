"""
Tokens per second of sampling with classifier-free guidance, against transformers' own and against no guidance.

- `no guidance`: `generate` on the conditional prompts only, half the work of guidance;
- `transformers`: `generate(guidance_scale=..., negative_prompt_ids=...)`, whose
  `UnbatchedClassifierFreeGuidanceLogitsProcessor` runs the unconditional stream in a second forward;
- `ours`: the decode loop, both streams in one batch.

All sample the same number of tokens for the same left-padded prompts (no sequence may end) in the model's own dtype.
They run alternately; medians over the rounds. `processor` is processor time, which is meaningful on a busy machine.
The model is SmolLM2 from recipes/text/get_smollm2.py unless `--model` is given.

    OMP_NUM_THREADS=1 python benchmarks/cfg_sampling.py --output benchmarks/results/cfg_sampling.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rollout import processor_name
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_drcd.evaluation.sampling import tokenize_prompts
from trl_drcd.evaluation.tables import markdown_table
from trl_drcd.files import write_text
from trl_drcd.guidance import ancestral_generation_config, left_pad
from trl_drcd.policies import CausalLMPolicy
from trl_drcd.prompts import load_prompts

PROMPTS = Path(__file__).parents[1] / "recipes" / "text" / "prompts" / "validation.jsonl"
GUIDANCE, TEMPERATURE = 3.0, 0.99


def samplers(policy, model, prompts: list[list[int]], negatives: list[list[int]], tokens: int) -> dict:
    """Name to a function that samples `tokens` tokens for each prompt."""
    ids, mask = (tensor.to(model.device) for tensor in left_pad(prompts, 0))
    negative_ids, negative_mask = (tensor.to(model.device) for tensor in left_pad(negatives, 0))
    config = ancestral_generation_config(model.generation_config, TEMPERATURE, max_new_tokens=tokens)
    guided = ancestral_generation_config(
        model.generation_config, TEMPERATURE, max_new_tokens=tokens, guidance_scale=GUIDANCE
    )
    negative = {"negative_prompt_ids": negative_ids, "negative_prompt_attention_mask": negative_mask}
    return {
        "no guidance": lambda: model.generate(ids, attention_mask=mask, generation_config=config),
        "transformers": lambda: model.generate(ids, attention_mask=mask, generation_config=guided, **negative),
        "ours": lambda: policy.rollout(model, prompts, negatives, GUIDANCE, TEMPERATURE, tokens, []).ids,
    }


def measure(sample, device: torch.device) -> tuple[float, float, int]:
    """Seconds by the wall clock and of the processor, and the tokens sampled."""
    start = time.perf_counter(), time.process_time()
    output = sample()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start[0], time.process_time() - start[1], output.shape[0]


def main() -> None:
    """Measures, prints a table, writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/smollm2", help="a causal LM with a chat template")
    parser.add_argument("--batch", type=int, default=32, help="sequences, twice as many rows with guidance")
    parser.add_argument("--tokens", type=int, default=24, help="tokens of each sequence")
    parser.add_argument("--rounds", type=int, default=3, help="each measures all three")
    parser.add_argument("--output", type=Path, help="JSON file of the result")
    args = parser.parse_args()
    if not Path(args.model).is_dir() and args.model == parser.get_default("model"):
        raise SystemExit(f"{args.model} is not there. Run: python recipes/text/get_smollm2.py")
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = AutoModelForCausalLM.from_pretrained(args.model).to(device).eval()
    model.generation_config.eos_token_id = None  # all sequences get their full length
    policy = CausalLMPolicy(AutoTokenizer.from_pretrained(args.model))
    rows = load_prompts("prompts", str(PROMPTS), "train")["prompt"]
    rows = [rows[i % len(rows)] for i in range(args.batch)]
    negatives = policy.negative_prompt_ids([{"prompt": row} for row in rows], None)
    prompts = tokenize_prompts(policy, rows)

    seconds: dict = {}
    for name, sample in samplers(policy, model, prompts, negatives, 2).items():  # warm up
        measure(sample, device)
        seconds[name] = []
    for _ in tqdm(range(args.rounds), desc="rounds"):
        for name, sample in samplers(policy, model, prompts, negatives, args.tokens).items():
            *times, sequences = measure(sample, device)
            assert sequences == args.batch
            seconds[name].append(times)
    wall, processor = ({n: statistics.median(t[i] for t in ts) for n, ts in seconds.items()} for i in (0, 1))
    total = args.batch * args.tokens
    table = {
        name: {
            "tokens/s": round(total / wall[name], 1),
            "tokens per processor second": round(total / processor[name], 1),
            "processor time / no guidance": round(processor[name] / processor["no guidance"], 2),
            "processor time / transformers": round(processor[name] / processor["transformers"], 2),
        }
        for name in seconds
    }
    print(f"{device}, {model.dtype}, {args.batch} sequences x {args.tokens} tokens, {args.rounds} rounds\n")
    print(markdown_table(table))
    if args.output:
        settings = {
            "device": str(device),
            "dtype": str(model.dtype),
            "threads": torch.get_num_threads(),
            "processor": processor_name(),
        }
        settings |= {"torch": torch.__version__, "batch": args.batch, "tokens": args.tokens, "rounds": args.rounds}
        write_text(
            args.output, json.dumps({"settings": settings, "seconds": seconds, "table": table}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
