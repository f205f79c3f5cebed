"""
Peak memory and time of the loss of one batch, from last hidden states to their gradient, at two sizes of vocabulary.

- `ours`: `losses.weighted_terms`: reverse KL to the guided teacher and log-probability of the sampled token, in chunks
  of tokens, with the gradient computed in the same pass;
- `TRL`: `ChunkedDivergenceFunction`, the loss of TRL's `DistillationTrainer`, with the same guided teacher: only
  reverse KL, on tiles of tokens x vocabulary;
- `dense`: the definition: three `(N, V)` logits, `log_softmax`, autograd.

The head is trained too: its gradient is part of the work. Each runs in a fresh process with one thread, and all must
give the same KL. Peak memory is the peak resident set minus the resident set with the inputs in place (so the head's
gradient counts, the head does not); on a GPU, `max_memory_allocated` likewise. `processor` is processor time.

    python benchmarks/loss_memory.py --output benchmarks/results/loss_memory.json
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tqdm import tqdm
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from trl_drcd.evaluation.tables import markdown_table
from trl_drcd.files import write_text
from trl_drcd.guidance import guide_hidden_states, guide_logits
from trl_drcd.losses import Head, guided_logits, reverse_kl, weighted_terms

HIDDEN, GUIDANCE, TEMPERATURE = 576, 3.0, 0.99  # the width of SmolLM2-135M
METHODS = ("ours", "TRL", "dense")


def ours(hidden, cond, uncond, weight, ids, weights):
    head = Head(weight)
    teacher = guided_logits(Head(weight.detach()), cond, uncond, GUIDANCE)
    terms = weighted_terms(hidden, head, ids, teacher, *weights, TEMPERATURE)
    return terms.loss, terms.kl.mean()


def trl(hidden, cond, uncond, weight, ids, weights):
    teacher = guide_hidden_states(cond, uncond, GUIDANCE)
    kl, _ = ChunkedDivergenceFunction.apply(hidden, weight, None, teacher, weight.detach(), None, 1.0, TEMPERATURE)
    return (weights[0] * kl).sum(), kl.detach().mean()


def dense(hidden, cond, uncond, weight, ids, weights):
    logits = hidden @ weight.T
    with torch.no_grad():
        teacher = guide_logits(cond @ weight.T, uncond @ weight.T, GUIDANCE)
    kl = reverse_kl(logits, teacher, TEMPERATURE)
    log_probs = (logits / TEMPERATURE).log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
    return (weights[0] * kl + weights[1] * log_probs).sum(), kl.detach().mean()


def memory(peak: bool) -> float:
    """MiB: the most that ever was, or what is in use now."""
    if torch.cuda.is_available():
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM" if peak else "VmRSS"))


def measure(method: str, tokens: int, vocabulary: int) -> dict[str, float]:
    """Memory, seconds and KL of one method, in this process, which has done nothing else."""
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    hidden, cond, uncond = (torch.randn(tokens, HIDDEN, device=device) for _ in range(3))
    hidden = (0.7 * cond + 0.3 * hidden).requires_grad_()
    weight = (torch.randn(vocabulary, HIDDEN, device=device) / HIDDEN**0.5).requires_grad_()
    ids = torch.randint(vocabulary, (tokens,), device=device)
    weights = torch.full((tokens,), 1 / tokens, device=device), torch.randn(tokens, device=device) / tokens
    before = memory(peak=False)
    wall, processor = time.perf_counter(), time.process_time()
    loss, kl = {"ours": ours, "TRL": trl, "dense": dense}[method](hidden, cond, uncond, weight, ids, weights)
    loss.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return {
        "MiB": memory(peak=True) - before,
        "seconds": time.perf_counter() - wall,
        "processor": time.process_time() - processor,
        "kl": kl.item(),
    }


def main() -> None:
    """Measures, prints a table, writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512, help="scored tokens")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[49_152, 256_000])
    parser.add_argument("--output", type=Path, help="JSON file of the result")
    args = parser.parse_args()
    rows = {}
    jobs = [(method, vocabulary) for vocabulary in args.vocabularies for method in METHODS]
    for method, vocabulary in tqdm(jobs):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            rows[method, vocabulary] = pool.submit(measure, method, args.tokens, vocabulary).result()
        if abs(rows[method, vocabulary]["kl"] / rows["ours", vocabulary]["kl"] - 1) > 1e-3:
            raise RuntimeError(f"{method} and ours differ in the KL: {rows}")
    table = {}
    for (method, vocabulary), row in rows.items():
        mine = rows["ours", vocabulary]
        table[f"{method}, V = {vocabulary:,}"] = {
            "peak MiB": round(row["MiB"]),
            "seconds": round(row["seconds"], 2),
            "processor seconds": round(row["processor"], 2),
            "memory / ours": round(row["MiB"] / mine["MiB"], 2),
            "processor time / ours": round(row["processor"] / mine["processor"], 2),
        }
    print(f"{args.tokens} tokens, hidden size {HIDDEN}, float32, torch {torch.__version__}\n")
    print(markdown_table(table))
    if args.output:
        write_text(args.output, json.dumps({"tokens": args.tokens, "hidden": HIDDEN, "table": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
