"""
What the tests of the real vLLM run, each in a process of its own, since an engine keeps process groups and memory:

    python tests/real_vllm/worker.py colocate BASE FOLDER [--lora]
    python tests/real_vllm/worker.py first_rollout BASE FOLDER SEED
    python tests/real_vllm/worker.py serve_checkpoint MODEL
    python tests/real_vllm/worker.py serve_adapters BASE ADAPTER...

The last line of the output is a JSON object.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

for name, value in {
    "VLLM_CPU_CI_ENV": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
}.items():  # fmt: skip
    os.environ.setdefault(name, value)
# Read by vLLM, hence before the imports; the tests' own helpers are then found
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig, PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

PROMPTS = ["a slow tune for flute", "fast drum", "harp", "a fast tune for harp"]
STEPS, TOKENS = 3, 16


def plain_linear(layer: Any, remove_weight: bool) -> None:
    """On a CPU vLLM packs the weights of linear layers, after which TRL could not load new ones."""
    layer.cpu_linear = torch.nn.functional.linear


def colocated_trainer(base: str, folder: str, **settings: Any) -> Any:
    """A trainer whose rollouts come from a vLLM in this process."""
    import trl.generation.vllm_generation as generation
    import vllm
    import vllm.model_executor.layers.utils as layers
    from test_trainer import make_trainer

    layers.dispatch_cpu_unquantized_gemm = plain_linear
    generation.LLM = partial(vllm.LLM, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=2**26)
    return make_trainer(
        folder, AutoTokenizer.from_pretrained(base), model=base, use_vllm=True, vllm_mode="colocate",
        vllm_max_model_length=64, diversity_coef=1.0, max_completion_length=TOKENS, temperature=0.99, **settings,
    )  # fmt: skip


def first_rollout(base: str, folder: str, seed: str) -> list[list[int]]:
    """Completions of the first rollout of a run with this seed; of one prompt, so that its order does not matter."""
    rows = Dataset.from_dict({"prompt": PROMPTS[:1] * 8})
    trainer = colocated_trainer(base, folder, dataset=rows, seed=int(seed), max_steps=1)
    found, inner = [], trainer.vllm_generation.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        result = inner(*args, **kwargs)
        found.extend(list(completion) for completion in result[1])
        return result

    trainer.vllm_generation.generate = generate
    trainer.train()
    return found


def colocate(base: str, folder: str, *options: str) -> dict[str, Any]:
    """Train with colocated rollouts; compare vLLM's log-probs of what it sampled with the student's and the base's."""
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=True) if "--lora" in options else None
    rate = float(os.environ.get("DRCD_VLLM_RATE", "2e-2"))
    trainer = colocated_trainer(base, folder, learning_rate=rate, max_steps=STEPS, peft_config=lora)
    generator, seen = trainer.vllm_generation, []
    generator.logprobs, inner = 0, generator.generate

    def generate(prompts: Any, *args: Any, **kwargs: Any) -> Any:
        result = inner(prompts, *args, **kwargs)
        for prompt, completion, found in zip(prompts, result[1], result[2], strict=True):
            own, teacher = (log_probs(trainer, list(prompt), list(completion), base) for base in (False, True))
            drawn = torch.tensor([one[0] for one in found])
            seen.append([trainer.state.global_step, *(float((x - drawn).abs().max()) for x in (own, teacher))])
        return result

    generator.generate = generate
    trainer.train()
    worst = [[max(row[i] for row in seen if row[0] == step) for i in (1, 2)] for step in range(STEPS)]
    return {"student": [row[0] for row in worst], "base": [row[1] for row in worst]}


@torch.no_grad()
def log_probs(trainer: Any, prompt: list[int], completion: list[int], base: bool) -> torch.Tensor:
    """Log-probabilities of a completion under the student or the frozen base, as the loss defines them."""
    from trl_drcd.compat.trl_private import use_adapter

    student, teacher, ids = trainer.model, trainer.teacher, torch.tensor([prompt + completion])
    adapter_off = base and teacher.copy is None
    with use_adapter(student, None) if adapter_off else nullcontext():
        logits = (teacher.model(student) if base else student)(ids).logits
    scores = (logits[0, len(prompt) - 1 : -1].float() / trainer.temperature).log_softmax(-1)
    return scores.gather(1, torch.tensor(completion)[:, None])[:, 0]


def engine(model: str, **settings: Any) -> Any:
    """A vLLM of a model in float32."""
    import vllm

    return vllm.LLM(
        model=model, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=8,
        kv_cache_memory_bytes=2**26, **settings,
    )  # fmt: skip


def greedy_prompts(model: str) -> list[list[int]]:
    """Token ids of the prompts."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [list(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]


def of_vllm(llm: Any, prompts: list[list[int]], adapter: str | None = None) -> list[list[int]]:
    """Greedy tokens by vLLM."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    request = LoRARequest(adapter, 1 + abs(hash(adapter)) % 10_000, adapter) if adapter else None
    given = [{"prompt_token_ids": ids} for ids in prompts]
    out = llm.generate(
        given, SamplingParams(temperature=0, max_tokens=TOKENS), use_tqdm=False, lora_request=request
    )  # fmt: skip
    return [list(one.outputs[0].token_ids) for one in out]


@torch.no_grad()
def of_transformers(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens by transformers, without any setting of the model's own generation config but its end."""
    rows = []
    for ids in prompts:
        out = model.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=TOKENS, top_k=None, top_p=None, temperature=None
        )
        rows.append(out[0, len(ids) :].tolist())
    return rows


def serve_checkpoint(model: str) -> dict[str, Any]:
    """Greedy tokens of a checkpoint by both."""
    prompts = greedy_prompts(model)
    own = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    return {"transformers": of_transformers(own, prompts), "vllm": of_vllm(engine(model), prompts)}


def serve_adapters(base: str, *adapters: str) -> dict[str, Any]:
    """Greedy tokens of each adapter by both; one engine serves all."""
    prompts = greedy_prompts(base)
    ranks = [json.loads((Path(folder) / "adapter_config.json").read_text())["r"] for folder in adapters]
    largest = next(rank for rank in (8, 16, 32, 64, 128, 256) if rank >= max(ranks))
    llm = engine(base, enable_lora=True, max_lora_rank=largest, max_loras=1)
    found: dict[str, Any] = {"transformers": [], "vllm": []}
    for folder in adapters:
        own = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        found["transformers"].append(of_transformers(PeftModel.from_pretrained(own, folder).eval(), prompts))
        found["vllm"].append(of_vllm(llm, prompts, folder))
    return found


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
