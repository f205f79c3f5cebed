"""Training runs of a few seconds, music and text, full and LoRA, in which everything that has a state has one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_drcd import CFGDistillDiversityConfig, CFGDistillDiversityTrainer
from trl_drcd.audio import MusicEmbedder
from trl_drcd.audio.codecs import SpectralCodec

WORLDS = ("text", "text_lora", "music", "music_lora")
PROMPTS = ["a slow tune", "a fast tune", "a tune", "slow", "fast tune", "a slow fast tune", "fast"]
AUDIO = [f"<a{k}_{c}>" for k in range(2) for c in range(8)]


def tokenizer() -> PreTrainedTokenizerFast:
    """Four words and the tokens of 2 codebooks of 8 entries."""
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "<audio>", *AUDIO, "a", "slow", "fast", "tune"]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A <audio>", special_tokens=[("<s>", 1), ("<audio>", 4)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def model(vocabulary: int, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def bag_of_words(texts: list[str]) -> torch.Tensor:
    """A fixed random vector per word, summed."""
    vectors = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    return torch.stack([vectors[[0] + [1 + sum(map(ord, w)) % 63 for w in t.split()]].sum(0) for t in texts])


def noisy_length(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """A reward that depends on the random states of Python and NumPy as well."""
    return [len(ids) / 12 + 0.1 * random.random() + 0.1 * float(np.random.rand()) for ids in completion_ids]  # noqa: NPY002


def settings(output: Path, **changed: Any) -> CFGDistillDiversityConfig:
    """
    12 updates with a checkpoint every 2nd.

    A rollout takes 2 of 5 prompts and serves 3 updates of 2 forwards, so most checkpoints fall in the midst of a
    rollout, and an epoch has 6 updates. beta rises all along, and an evaluation samples in between.
    """
    defaults = {
        "max_steps": 12, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "steps_per_generation": 2, "num_iterations": 3, "num_generations": 4, "max_completion_length": 12,
        "save_steps": 2, "save_total_limit": 2, "eval_strategy": "steps", "eval_steps": 5,
        "per_device_eval_batch_size": 4, "diversity_coef": 5.0, "diversity_warmup_steps": 20, "learning_rate": 3e-3,
        "lr_scheduler_type": "cosine", "logging_steps": 1, "report_to": "none", "bf16": False, "use_cpu": True,
        "gradient_checkpointing": False, "disable_tqdm": True, "diversity_hidden_states": True,
    }  # fmt: skip
    return CFGDistillDiversityConfig(str(output), **(defaults | changed))


def make_trainer(world: str, output: Path, **changed: Any) -> CFGDistillDiversityTrainer:
    """The trainer of one of `WORLDS`; keywords that are no settings go to the trainer."""
    words = tokenizer()
    music = world.startswith("music")
    torch.manual_seed(0)
    arguments = {k: changed.pop(k) for k in list(changed) if k in CFGDistillDiversityConfig.__dataclass_fields__}
    codec = SpectralCodec(torch.randn(2, 8, 96), iterations=2) if music else None
    embedder = (
        MusicEmbedder(hidden_size=16, num_layers=1, num_heads=2, feed_forward_size=16) if music else bag_of_words
    )
    lora = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.0) if world.endswith("lora") else None
    defaults = {
        "model": model(len(words)),
        "embedder": embedder, "codec": codec, "peft_config": lora, "reward_funcs": [noisy_length],
        "train_dataset": Dataset.from_dict({"prompt": PROMPTS[:5]}),
        "eval_dataset": Dataset.from_dict({"prompt": PROMPTS[:2]}),
    }  # fmt: skip
    return CFGDistillDiversityTrainer(
        args=settings(output, **arguments),
        processing_class=words,
        **(defaults | changed),
    )


def weights(folder: Path) -> bytes:
    """Content of the file with the trained weights."""
    name = "adapter_model.safetensors" if (folder / "adapter_config.json").exists() else "model.safetensors"
    return (folder / name).read_bytes()
