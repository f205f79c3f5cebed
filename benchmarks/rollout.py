"""
Sampling by the decode loop against transformers' `generate`, with and without guidance, alternating in one run.

- `musiclm`: the shipped model (5.7 M parameters), 4 prompts x 8 completions of 200 tokens;
- `smollm2`: SmolLM2-135M-Instruct from recipes/text/get_smollm2.py, 4 prompts of 128 tokens x 8 completions of 64;
- `musicgen-tiny`: random weights, 16 sequences of 128 steps;
- `musicgen-small`: random weights of the published architecture, few sequences and steps.

Both get the same prompts, sample the same number of tokens from the same distribution (no truncation, no penalty; no
sequence may end), and start from the same random state. The baseline is `generate` with `do_sample`, with guidance
`generate(guidance_scale=3)`; for MusicGen without the audio codec. Reported are medians over the rounds of wall
clock and of processor time, which is meaningful on a busy machine, and the ratios theirs / ours.
`of peak`: operations of ours (2 per decoder weight and new token) relative to the throughput of one large
matrix product with the same threads. `limit / theirs`: tokens/s of the products of these steps, with packed weights,
and of their attention to the completion and to a causal LM's prompt, without all else: no loop of these kernels gets
there. With `--static`, ours has a static cache and compiled steps (CUDA graphs on a GPU), compiled before anything
is timed. `difference`: largest difference between the log-probabilities that the loop sampled from and those of one
forward over the finished sequences.

    OMP_NUM_THREADS=1 python benchmarks/rollout.py --output benchmarks/results/rollout.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from musicgen_memory import published
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
    T5Config,
)

from trl_drcd.compat.products import linear, pack, packed_product, product_library
from trl_drcd.evaluation.sampling import tokenize_prompts
from trl_drcd.evaluation.tables import markdown_table
from trl_drcd.files import write_text
from trl_drcd.guidance import ancestral_generation_config, guide_logits, left_pad
from trl_drcd.policies import CausalLMPolicy, MusicgenPolicy
from trl_drcd.prompts import load_prompts
from trl_drcd.sampling import static_cache
from trl_drcd.sampling.compiled import compiling

ROOT = Path(__file__).parents[1]
MUSICLM = ROOT / "recipes" / "tiny_music" / "models" / "musiclm"
MUSIC_PROMPTS = ROOT / "recipes" / "tiny_music" / "data" / "train_prompts.jsonl"
TEXT_PROMPTS = ROOT / "recipes" / "text" / "prompts" / "validation.jsonl"
GUIDANCE, TEMPERATURE, GROUP = 3.0, 0.99, 8
PROMPTS_OWN = ("encoder_attn.k_proj", "encoder_attn.v_proj")  # layers that only the prompt goes through


@dataclass
class World:
    """A model, its prompts, groups contiguous, as many negative prompts, and the steps to sample."""

    policy: Any
    model: Any
    prompts: list[list[int]]
    negatives: list[list[int]]
    steps: int

    @property
    def decoder(self) -> Any:
        """What reads every new token."""
        return self.model.decoder if isinstance(self.policy, MusicgenPolicy) else self.model

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The matrices that every new token is multiplied with; those for a prompt's keys and values are not."""
        layers = {name: layer for name, layer in self.decoder.named_modules() if isinstance(layer, torch.nn.Linear)}
        return {name: layer.weight for name, layer in layers.items() if not name.endswith(PROMPTS_OWN)}


def causal_world(folder: str | Path, prompts: Path, steps: int, length: int | None, device: torch.device) -> World:
    """A causal LM in float32; prompts of `length` tokens where it is given (repeated or cut), else as they are."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    model.generation_config.eos_token_id = None  # all sequences get their full length
    policy = CausalLMPolicy(AutoTokenizer.from_pretrained(folder))
    texts = load_prompts("prompts", str(prompts), "train")["prompt"][:4]
    ids = tokenize_prompts(policy, texts)
    if length is not None:
        ids = [(row * length)[:length] for row in ids]
    rows = [{"prompt": text} for text in texts for _ in range(GROUP)]
    return World(
        policy, model, [row for row in ids for _ in range(GROUP)], policy.negative_prompt_ids(rows, None), steps
    )


def musicgen_world(config: MusicgenConfig, sequences: int, steps: int, device: torch.device) -> World:
    """A MusicGen with random weights; two prompts of 12 tokens and the null condition."""
    torch.manual_seed(0)
    model = MusicgenForConditionalGeneration(config).to(device).eval()
    tokenizer = SimpleNamespace(pad_token_id=0)
    policy = MusicgenPolicy(tokenizer, config)
    model.generation_config.update(pad_token_id=policy.mask_id, decoder_start_token_id=policy.mask_id, max_length=1500)
    prompts = torch.randint(1, config.text_encoder.vocab_size, (2, 12)).tolist()
    rows = [prompts[2 * n // sequences] for n in range(sequences)]
    return World(policy, model, rows, [[]] * sequences, steps)


def tiny_musicgen() -> MusicgenConfig:
    """About 3 M weights of the decoder, its vocabulary and codebooks those of the published models."""
    text = T5Config(vocab_size=1000, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    decoder = MusicgenDecoderConfig(
        hidden_size=192, num_hidden_layers=4, num_attention_heads=4, ffn_dim=768, vocab_size=2048
    )
    return MusicgenConfig(text_encoder=text, audio_encoder=published("small").audio_encoder, decoder=decoder)


def ours(world: World, guidance_scale: float) -> Any:
    """The decode loop."""
    return world.policy.rollout(
        world.model, world.prompts, world.negatives, guidance_scale, TEMPERATURE, world.steps, eos_token_ids=[]
    )


@torch.no_grad()
def theirs(world: World, guidance_scale: float) -> Any:
    """`generate` from the same distribution."""
    model, device = world.model, world.model.device
    ids, mask = (tensor.to(device) for tensor in left_pad(world.prompts, 0))
    settings: dict[str, Any] = {"max_new_tokens": world.steps, "guidance_scale": guidance_scale}
    config = ancestral_generation_config(model.generation_config, TEMPERATURE, **settings)
    if isinstance(world.policy, MusicgenPolicy):
        silence = SimpleNamespace(audio_values=torch.zeros(1, 1, 1))
        with mock.patch.object(model.audio_encoder, "decode", lambda *args, **kwargs: silence):
            return model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    negative = {}
    if guidance_scale != 1:
        negative_ids, negative_mask = (tensor.to(device) for tensor in left_pad(world.negatives, 0))
        negative = {"negative_prompt_ids": negative_ids, "negative_prompt_attention_mask": negative_mask}
    return model.generate(ids, attention_mask=mask, generation_config=config, **negative)


COLUMNS = {"table": "row", "seconds": "seconds"}


@torch.no_grad()
def largest_difference(world: World, guidance_scale: float) -> float:
    """Of log-probabilities, between what one rollout sampled from and what scoring gives for its tokens; nats."""
    policy, model = world.policy, world.model
    rollout = ours(world, guidance_scale)
    completion = torch.tensor(rollout.completions(), device=model.device)
    prompts = [world.prompts] if guidance_scale == 1 else [world.prompts, world.negatives]
    ones = torch.ones_like(completion)
    streams = []
    for side in prompts:
        prompt = [tensor.to(model.device) for tensor in left_pad(side, 0)]
        streams.append(policy.hidden_states(model, *prompt, completion, ones))
    ids, mask = policy.ids_and_mask(completion, ones)
    worst = 0.0
    for k, head in enumerate(policy.heads(model)):
        for row in range(len(completion)):  # one at a time: the logits of all would not fit
            logits = [head.logits(stream[row]) for stream in streams]
            guided = guide_logits(logits[0], logits[-1], guidance_scale) / TEMPERATURE
            valid = mask[row, :, k]
            scored = guided.log_softmax(-1)[valid].gather(1, ids[row, valid, k][:, None])[:, 0]
            worst = max(worst, (scored - rollout.log_probs[row, valid, k]).abs().max().item())
    return worst


def processor_name() -> str:
    """The processor's name, where Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def timed(function: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds by the wall clock, and of the processor."""
    torch.manual_seed(0)
    start = time.perf_counter(), time.process_time()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def peak(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Multiplications and additions a second of a large matrix product, the best of ten."""
    a = torch.randn(1024, 1024, device=device, dtype=dtype)
    return 2 * 1024**3 / min(timed(lambda: linear(a, a), device)[0] for _ in range(10))


@torch.no_grad()
def limit(world: World, guidance_scale: float) -> Callable[[], None]:
    """The products and the attention of all steps, with the kernels that the loop has for them, ready to be timed."""
    config, sequences, device = world.decoder.config, len(world.prompts), world.model.device
    rows = sequences * (1 if guidance_scale == 1 else 2)
    read = 0 if isinstance(world.policy, MusicgenPolicy) else len(world.prompts[0])
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    products: list[Callable[[], Any]] = []
    for name, weight in world.weights.items():
        x = torch.randn(sequences if "lm_head" in name else rows, weight.shape[1], device=device)  # guided before it
        if weight.device.type == "cpu" and product_library():
            products.append(partial(packed_product, x, pack(weight, len(x)), weight, None, len(x)))
        else:
            products.append(partial(torch.nn.functional.linear, x, weight))
    cache = torch.randn(config.num_hidden_layers, 2, rows, kept, read + world.steps, size, device=device)
    query = torch.randn(rows, kept, heads // kept, size, device=device)

    @torch.no_grad()
    def steps() -> None:
        for step in range(1, world.steps):
            for product in products:
                product()
            for keys, values in cache[..., : read + step, :]:
                torch.nn.functional.scaled_dot_product_attention(query, keys, values)

    return steps


def compare(world: World, guidance_scale: float, rounds: int, device: torch.device, bar: tqdm) -> dict[str, Any]:
    """Medians of both, which take turns, and their ratios."""
    seconds: dict[str, list] = {"theirs": [], "ours": []}
    short = World(world.policy, world.model, world.prompts, world.negatives, 6)
    theirs(short, guidance_scale)
    ours(world if compiling() else short, guidance_scale)
    for _ in range(rounds):
        for name, sample in (("theirs", theirs), ("ours", ours)):
            seconds[name].append(timed(lambda sample=sample: sample(world, guidance_scale), device))
            bar.update()
    (wall, processor) = ({name: statistics.median(t[i] for t in ts) for name, ts in seconds.items()} for i in (0, 1))
    books = getattr(world.policy, "num_codebooks", 1)
    tokens = len(world.prompts) * world.steps
    done = 2 * sum(weight.numel() for weight in world.weights.values()) * tokens * (1 if guidance_scale == 1 else 2)
    least = min(timed(limit(world, guidance_scale), device)[0] for _ in range(2))
    row = {
        "theirs, s": round(wall["theirs"], 2),
        "ours, s": round(wall["ours"], 2),
        "tokens/s / theirs": round(wall["theirs"] / wall["ours"], 2),
        "limit / theirs": round(wall["theirs"] / least, 2),
        "processor time / theirs": round(processor["ours"] / processor["theirs"], 2),
        "ours, tokens/s": round(tokens * books / wall["ours"]),
        "of peak": round(done / wall["ours"] / peak(device), 2),
        "difference": f"{largest_difference(world, guidance_scale):.0e}",
    }
    return {"row": row, "seconds": seconds}


def in_columns(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What [`compare`] gave for each model, as a `table` of rows and the `seconds` of each round."""
    return {column: {key: result[part] for key, result in results.items()} for column, part in COLUMNS.items()}


def main() -> None:
    """Measures, prints a table, writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", default=str(ROOT / "outputs" / "smollm2"), help="its folder")
    parser.add_argument("--only", nargs="+", help="names of models")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--static", action="store_true", help="ours with a static cache and compiled steps")
    parser.add_argument("--small", type=int, nargs=2, default=(8, 128), help="musicgen-small's sequences and steps")
    parser.add_argument("--output", type=Path, help="JSON file of the result")
    args = parser.parse_args()
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    worlds: dict[str, Callable[[], World]] = {
        "musiclm": lambda: causal_world(MUSICLM, MUSIC_PROMPTS, 200, None, device),
        "smollm2": lambda: causal_world(args.smollm2, TEXT_PROMPTS, 64, 128, device),
        "musicgen-tiny": lambda: musicgen_world(tiny_musicgen(), 16, 128, device),
        "musicgen-small": lambda: musicgen_world(published("small"), *args.small, device),
    }
    names = args.only or list(worlds)
    if "smollm2" in names and not Path(args.smollm2).is_dir():
        raise SystemExit(f"{args.smollm2} is not there. Run: python recipes/text/get_smollm2.py")
    results: dict[str, Any] = {}
    settings = {"device": str(device), "threads": torch.get_num_threads(), "processor": processor_name()}
    settings |= {"torch": torch.__version__, "rounds": args.rounds, "small": list(args.small), "static": args.static}
    bar = tqdm(total=len(names) * 4 * args.rounds, desc="samplings")
    for name in names:
        world = worlds[name]()
        for guidance_scale in (1.0, GUIDANCE):
            key = name if guidance_scale == 1 else f"{name}, guidance {guidance_scale:g}"
            with static_cache(args.static):
                results[key] = compare(world, guidance_scale, args.rounds, device, bar)
            tqdm.write(f"{key}: {results[key]['row']}")
            if args.output:  # after each row, so that an interrupted run leaves what it has measured
                write_text(args.output, json.dumps({"settings": settings, **in_columns(results)}, indent=1) + "\n")
    bar.close()
    table = in_columns(results)["table"]
    print(f"{device}, {torch.get_num_threads()} threads, {args.rounds} rounds\n\n{markdown_table(table)}")


if __name__ == "__main__":
    main()
