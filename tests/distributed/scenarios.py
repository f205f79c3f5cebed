"""What the workers train: tiny models in float64, with groups that lie on two ranks and completions of all lengths."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny_dia
import torch
from conftest import make_tokenizer
from datasets import Dataset
from peft import LoraConfig
from test_musicgen import make_musicgen, make_t5_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

from trl_drcd import CFGDistillDiversityConfig, CFGDistillDiversityTrainer
from trl_drcd.audio.codecs import delay
from trl_drcd.policies.dia import LORA_TARGETS as DIA_TARGETS
from trl_drcd.policies.musicgen import LORA_TARGETS

PROMPTS = ["a slow tune for flute", "fast drum", "harp", "a fast tune for harp", "slow drum"]
GLOBAL_BATCH, GROUP = 12, 4  # on 2 and on 4 processes, a group lies on two of them


@dataclass
class Scenario:
    """One training run; the same global batches on any number of processes."""

    overrides: dict[str, Any] = field(default_factory=dict)
    family: str = "llama"
    lora: bool = False
    pinned: bool = True
    evaluates: bool = True
    saves: bool = False
    accumulate: int = 1
    double: bool = True


MUSIC = {"max_completion_length": 9}
SCENARIOS = {
    "full": Scenario(saves=True),
    "lora": Scenario(lora=True, saves=True),
    "critic": Scenario({"diversity_credit": "critic", "gae_lambda": 0.9}),
    "critic_hidden": Scenario({"diversity_credit": "critic", "gae_lambda": 0.9, "diversity_hidden_states": True}),
    "accumulate": Scenario(accumulate=3, evaluates=False),
    "apart": Scenario({"max_grad_norm": 0.5, "max_grad_norm_diversity": 0.25}, accumulate=3, evaluates=False),
    "apart_lora": Scenario({"max_grad_norm": 0.5, "max_grad_norm_diversity": 0.25}, lora=True, evaluates=False),
    # No token of the last rows is scored, and the head has a bias that only scored tokens reach
    "masked": Scenario(
        {"mask_truncated_completions": True, "gradient_checkpointing": True}, family="phi", evaluates=False
    ),
    "tied": Scenario({"gradient_checkpointing": True}, family="tied", evaluates=False),
    # Rows of a head that is the embedding too: the allowed ones alone get a gradient from the loss
    "allowed": Scenario({"allowed_token_ids": ["2", "4..12"]}, family="tied"),
    "reused": Scenario({"num_iterations": 2}, evaluates=False),
    # From a folder, as a recipe loads it: FSDP2 then fills the first process's weights alone, ZeRO-3 none's
    "loaded": Scenario(family="folder", evaluates=False),
    "sampled": Scenario(pinned=False, evaluates=True),
    "bf16": Scenario({"bf16": True}, double=False, evaluates=False),
    "musicgen": Scenario(MUSIC, family="musicgen"),
    "musicgen_lora": Scenario(MUSIC, family="musicgen", lora=True, saves=True),
    "musicgen_sampled": Scenario(MUSIC, family="musicgen", pinned=False),
    "dia": Scenario(MUSIC, family="dia"),
    "dia_lora": Scenario(MUSIC, family="dia", lora=True),
}


def make_llama(tokenizer, **overrides):
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    settings = shape | tokens | {"initializer_range": 0.4, "tie_word_embeddings": False} | overrides
    kind, config = (PhiForCausalLM, PhiConfig) if overrides.pop("phi", False) else (LlamaForCausalLM, LlamaConfig)
    settings.pop("phi", None)
    torch.manual_seed(0)
    return kind(config(**settings)).double()


def loudness(audio: list[tuple[torch.Tensor, int]]) -> torch.Tensor:
    """An embedder of waveforms."""
    beginnings = [torch.nn.functional.pad(x, (0, 20))[:20].view(4, 5).mean(1) for x, _ in audio]
    return torch.stack([torch.stack([x.abs().mean(), *b]) for (x, _), b in zip(audio, beginnings, strict=True)])


def bag_of_words(texts: list[str]) -> torch.Tensor:
    """A fixed random vector per word, summed: an embedder that looks at what was sampled."""
    vectors = torch.randn(64, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.stack([vectors[[0] + [1 + sum(map(ord, w)) % 63 for w in t.split()]].sum(0) for t in texts])


def length(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """An extra reward."""
    return [float(len(ids)) for ids in completion_ids]


def pinned_completion(mode: str, rollout: int, row: int, vocabulary: int) -> list[int]:
    """
    Ids for a row of the global batch: 0 to 8 of them, of all lengths, some with an eos at their end.

    In the second rollout the last quarter of the rows, all that the last of four processes has, is empty; where
    truncated completions are masked, none of these rows has a token to score in the first either.
    """
    generator = torch.Generator().manual_seed(1000 * rollout + row + (500 if mode == "eval" else 0))
    size = int(torch.randint(0, 9, (1,), generator=generator))
    ids = torch.randint(4, vocabulary, (size,), generator=generator).tolist()
    if row >= GLOBAL_BATCH * 3 // 4:
        return [] if rollout == 2 else (ids or [5])
    return [*ids[:7], 2]


def pinned_codes(mode: str, rollout: int, row: int, codes: int, books: int) -> list[int]:
    """The same for a MusicGen: random codes in the delayed layout, which is as long for every row."""
    generator = torch.Generator().manual_seed(1000 * rollout + row + (500 if mode == "eval" else 0))
    return delay(torch.randint(codes, (1, 7, books), generator=generator), codes).flatten().tolist()


def pinned_speech(mode: str, rollout: int, row: int, layout: Any) -> list[int]:
    """The same for a Dia: random codes of 1 to 4 frames and an eos, or of 5 frames, which end by their length."""
    generator = torch.Generator().manual_seed(1000 * rollout + row + (500 if mode == "eval" else 0))
    frames, delays = int(torch.randint(1, 6, (1,), generator=generator)), layout.delays.tolist()
    steps = torch.full((frames + max(delays), len(delays)), layout.pad_id)
    for k, late in enumerate(delays):
        steps[late : late + frames, k] = torch.randint(layout.eos_id, (frames,), generator=generator)
    if frames < 5:
        steps[frames, 0] = layout.eos_id
    return steps.flatten().tolist()


def make_trainer(scenario: Scenario, folder: Path) -> CFGDistillDiversityTrainer:
    """The trainer of a scenario, with this process's share of the global batch."""
    processes, tokenizer = int(os.environ.get("WORLD_SIZE", 1)), make_tokenizer()
    on_cpu = "ACCELERATE_TORCH_DEVICE" not in os.environ
    settings = {
        "max_steps": 3,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": GLOBAL_BATCH // scenario.accumulate // processes,
        "gradient_accumulation_steps": scenario.accumulate,
        "per_device_eval_batch_size": GLOBAL_BATCH // processes,
        "num_generations": GROUP,
        "max_completion_length": 8,
        "diversity_coef": 5.0,
        "diversity_warmup_steps": 2,
        "diversity_credit": "sequence",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": on_cpu,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "model_init_kwargs": {"dtype": "auto"} if scenario.family == "folder" else None,
    }
    args = CFGDistillDiversityConfig(str(folder), **(settings | scenario.overrides))
    music, speech = scenario.family == "musicgen", scenario.family == "dia"
    if music or speech:
        tokenizer = make_t5_tokenizer() if music else tiny_dia.make_tokenizer()
    targets = {"musicgen": LORA_TARGETS, "dia": DIA_TARGETS}
    families = {"llama": {}, "tied": {"tie_word_embeddings": True}, "phi": {"phi": True}}
    model: Any = str(folder / "base")
    if music:
        model = make_musicgen().double()
    elif speech:
        model = tiny_dia.make_dia().double()
    elif scenario.family != "folder":
        model = make_llama(tokenizer, **families[scenario.family])
        model = model if scenario.double else model.float()
    elif int(os.environ.get("RANK", 0)) == 0:
        make_llama(tokenizer).save_pretrained(model)
    args.distributed_state.wait_for_everyone()
    return CFGDistillDiversityTrainer(
        model=model,
        reward_funcs=[length],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * 4}),
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS}),  # 5 groups of 4: the last batch of 12 is not full
        processing_class=tokenizer,
        embedder=loudness if music or speech else bag_of_words,
        peft_config=LoraConfig(r=2, lora_alpha=8, target_modules=targets.get(scenario.family))
        if scenario.lora
        else None,
    )
