"""
Tokens per processor second of vLLM serving the shipped base, the base with guidance (two requests a sample, and one
logits processor that draws for both), and the distilled model, which needs none; and of this package's own loop.

    make vllm                                       # sets up .venv-vllm
    OMP_NUM_THREADS=1 .venv-vllm/bin/python benchmarks/real_vllm/serving.py --output benchmarks/results/serving.json

Guidance in vLLM is right only as long as both requests of a pair are in each step, hence as many slots as requests.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

for name, value in {
    "VLLM_CPU_CI_ENV": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
}.items():  # fmt: skip
    os.environ.setdefault(name, value)
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.v1.sample.logits_processor import LogitsProcessor  # noqa: E402

from trl_drcd.guidance import guide_logits  # noqa: E402
from trl_drcd.policies import policy_for  # noqa: E402

BASE = ROOT / "recipes/tiny_music/models/musiclm"
DISTILLED = ROOT / "results/music/runs/beta0_s0"
PROMPTS = ["a slow tune for flute", "a hornpipe for piano", "an irish reel", "a march in D major"]
SCALE, TEMPERATURE = 3.0, 0.99


class Guidance(LogitsProcessor):
    """Eq. (1) of the two requests of each pair, and one draw for both."""

    alone = 0

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self.rows: dict[int, dict[str, Any]] = {}

    def is_argmax_invariant(self) -> bool:
        """Guidance changes the most probable token."""
        return False

    def update_state(self, update: Any) -> None:
        """Follow the requests that come, go and move."""
        if update is None:
            return
        for row in update.removed:
            self.rows.pop(row, None)
        for row, params, _, _ in update.added:
            self.rows.pop(row, None)
            if params.extra_args and "pair" in params.extra_args:
                self.rows[row] = params.extra_args
        for a, b, how in update.moved:
            first, second = self.rows.pop(a, None), self.rows.pop(b, None)
            if first is not None:
                self.rows[b] = first
            if how.name == "SWAP" and second is not None:
                self.rows[a] = second

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Leave only the drawn token of each pair."""
        pairs: dict[int, dict[str, int]] = {}
        for row, extra in self.rows.items():
            pairs.setdefault(extra["pair"], {})[extra["role"]] = row
        whole = [pair for pair in pairs.values() if len(pair) == 2]
        Guidance.alone += len(pairs) - len(whole)
        if not whole:
            return logits
        cond, uncond = (torch.tensor([pair[role] for pair in whole]) for role in ("cond", "uncond"))
        guided = guide_logits(logits[cond], logits[uncond], SCALE) / TEMPERATURE
        tokens = torch.multinomial(guided.softmax(-1, dtype=torch.float64), 1)
        forced = torch.full_like(guided, -torch.inf).scatter_(1, tokens, 0.0)
        logits[cond], logits[uncond] = forced, forced
        return logits


def processor_seconds() -> float:
    """Of this process, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def rate(sample: Callable[[], int]) -> float:
    """Tokens per processor second of one call."""
    began = processor_seconds()
    return sample() / (processor_seconds() - began)


def vllm_sampler(folder: str, prompts: list[list[int]], null: list[int], args: Any, guided: bool) -> Callable[[], int]:
    """A call that samples and returns the number of tokens; of guidance, those of one request of each pair."""
    llm = LLM(
        model=folder, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=2 * args.sequences,
        kv_cache_memory_bytes=2**30, logits_processors=[Guidance] if guided else None,
    )  # fmt: skip

    def sample() -> int:
        settings: dict[str, Any] = {"max_tokens": args.tokens, "ignore_eos": True}
        if guided:
            roles = (("cond", None), ("uncond", null))
            requests = [
                (own or ids, SamplingParams(temperature=0, extra_args={"pair": i, "role": role}, **settings))
                for i, ids in enumerate(prompts)
                for role, own in roles
            ]
        else:
            requests = [(ids, SamplingParams(temperature=TEMPERATURE, **settings)) for ids in prompts]
        out = llm.generate(
            [{"prompt_token_ids": ids} for ids, _ in requests], [params for _, params in requests], use_tqdm=False
        )
        return sum(len(one.outputs[0].token_ids) for one in out) // (2 if guided else 1)

    return sample


def own_sampler(folder: str, prompts: list[list[int]], null: list[int], args: Any, guided: bool) -> Callable[[], int]:
    """The same by this package's loop."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    policy = policy_for(model, tokenizer)
    others = {"negative_prompt_ids": [null] * len(prompts), "guidance_scale": SCALE} if guided else {}

    def sample() -> int:
        drawn = policy.rollout(
            model, prompts, temperature=TEMPERATURE, max_new_tokens=args.tokens, **others
        ).completions()
        return sum(map(len, drawn))

    return sample


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    prompts = [list(tokenizer(PROMPTS[i % len(PROMPTS)])["input_ids"]) for i in range(args.sequences)]
    null = list(tokenizer("")["input_ids"])
    with tempfile.TemporaryDirectory() as folder:
        base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        PeftModel.from_pretrained(base, DISTILLED).merge_and_unload().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        rows = {"base": (str(BASE), False), "guided (two rows)": (str(BASE), True), "distilled": (folder, False)}
        samplers = {
            (name, by): make(model, prompts, null, args, guided)
            for name, (model, guided) in rows.items()
            for by, make in (("vllm", vllm_sampler), ("ours", own_sampler))
        }
        for sample in samplers.values():
            sample()  # warm-up
        rates: dict[tuple[str, str], list[float]] = {key: [] for key in samplers}
        for _ in range(args.rounds):  # in turn, since the speed of a machine wanders
            for key, sample in samplers.items():
                rates[key].append(rate(sample))
    assert Guidance.alone == 0, "a pair was apart"
    table = {name: {by: round(statistics.median(rates[name, by]), 1) for by in ("vllm", "ours")} for name in rows}
    print(json.dumps(table, indent=1))
    if args.output:
        settings = {"sequences": args.sequences, "tokens": args.tokens, "torch": torch.__version__}
        args.output.write_text(json.dumps({"tokens_per_processor_second": table, **settings}, indent=1) + "\n")


if __name__ == "__main__":
    main()
