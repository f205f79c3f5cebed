"""
Random stand-ins for the tiny models and data sets of TRL's tests, which are on the Hub: no network is needed.

Models and tokenizers are laid out as a Hub cache, so that every `from_pretrained` of their names finds them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

OWNER = "trl-internal-testing"
WORDS = 8192
LAYERS: dict[str, dict[str, Any]] = {
    "cohere2": {},
    "glm4_moe": {"n_routed_experts": 4, "first_k_dense_replace": 1, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2},
    "nemotron_h": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 4,
        "chunk_size": 8,
        "n_routed_experts": 4,
        "moe_shared_expert_intermediate_size": 16,
        "num_hidden_layers": 4,
    },
    "llama": {},
}
CAUSAL = {
    "tiny-Cohere2ForCausalLM": "cohere2",
    "tiny-Glm4MoeForCausalLM": "glm4_moe",
    "tiny-GptOssForCausalLM": "gpt_oss",
    "tiny-Qwen2ForCausalLM-2.5": "qwen2",
    "tiny-Qwen3ForCausalLM": "qwen3",
    "tiny-Qwen3MoeForCausalLM": "qwen3_moe",
    "tiny-NemotronHForCausalLM-nano": "nemotron_h",
}
CLASSIFIERS = {
    "tiny-Qwen2ForSequenceClassification-2.5": "qwen2",
    "tiny-Qwen3ForSequenceClassification": "qwen3",
    "tiny-LlamaForSequenceClassification-3.2": "llama",
}
# Of vision-language models the configuration: they are refused for their images before they are loaded. One test loads
# the model itself
LOADED_VISION = "qwen2_5_vl"
VISION = {
    "tiny-Gemma3ForConditionalGeneration": "gemma3",
    "tiny-Gemma4ForConditionalGeneration": "gemma4",
    "tiny-LlavaNextForConditionalGeneration": "llava_next",
    "tiny-Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "tiny-Qwen2VLForConditionalGeneration": "qwen2_vl",
    "tiny-Qwen3_5ForConditionalGeneration-NoThink": "qwen3_5",
    "tiny-Qwen3_5MoeForConditionalGeneration-3.6": "qwen3_5_moe",
}
TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM


class RemoteConfig(LlamaConfig):
    model_type = "remote"


class RemoteForCausalLM(LlamaForCausalLM):
    config_class = RemoteConfig
"""
# Of TRL's data set, as some tests name them
LINES = [
    "Beautiful is better than", "Explicit is", "Simple is better", "Complex", "Flat is better than",
    "Sparse is better", "Readability", "Special cases aren't special", "Although practicality beats",
    "Errors should never", "Unless explicitly", "In the face of ambiguity, refuse", "There should be one",
    "Although that way may not", "Now is better", "If the implementation is", "Namespaces are",
]  # fmt: skip


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Of bytes, with the turns of ChatML; and of words that no text has, so that few completions end by themselves."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"{number:b}" for number in range(2, WORDS))]
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        bos_token="<|endoftext|>",  # what guidance takes for an empty prompt
        additional_special_tokens=["<|im_start|>"],
        padding_side="left",
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_config(kind: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Two layers of width 16."""
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "moe_intermediate_size": 16,
        "max_position_embeddings": 4096, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id, "initializer_range": 0.2,
    }  # fmt: skip
    known = vars(CONFIG_MAPPING[kind]())
    return CONFIG_MAPPING[kind](**{k: v for k, v in (sizes | LAYERS[kind]).items() if k in known}, num_labels=1)


def write_cache(cache: Path) -> None:
    """All stand-ins in `cache`, the folder that `HF_HUB_CACHE` names."""
    tokenizer = make_tokenizer()
    for name, kind in CAUSAL.items():
        model = AutoModelForCausalLM.from_config(make_config(kind, tokenizer))
        save(cache, name, tokenizer, model)
    for name, kind in CLASSIFIERS.items():
        model = AutoModelForSequenceClassification.from_config(make_config(kind, tokenizer))
        save(cache, name, tokenizer, model)
    folder = save(
        cache, "tiny-RemoteForCausalLM", tokenizer, AutoModelForCausalLM.from_config(make_config("llama", tokenizer))
    )
    config = json.loads((folder / "config.json").read_text()) | {
        "model_type": "remote",
        "architectures": ["RemoteForCausalLM"],
        "auto_map": {"AutoConfig": "remote.RemoteConfig", "AutoModelForCausalLM": "remote.RemoteForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "remote.py").write_text(REMOTE)
    for name, kind in VISION.items():
        if kind == LOADED_VISION:
            save(cache, name, tokenizer, AutoModelForImageTextToText.from_config(make_vision_config(kind)))
        elif kind in CONFIG_MAPPING:
            CONFIG_MAPPING[kind]().save_pretrained(snapshot(cache, name))


def make_vision_config(kind: str) -> Any:
    """One layer of width 16 for images, one for texts."""
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "vocab_size": 300}  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16}
    return CONFIG_MAPPING[kind](text_config=text, vision_config=vision)


def snapshot(cache: Path, name: str) -> Path:
    """The folder of a model's files in a Hub cache, with what else makes it one."""
    commit = "0" * 40
    repository = cache / f"models--{OWNER}--{name}"
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return folder


def save(cache: Path, name: str, tokenizer: PreTrainedTokenizerFast, model: Any) -> Path:
    """A model with its tokenizer; weights that are spread, so that a step is seen."""
    torch.manual_seed(0)
    folder = snapshot(cache, name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load_dataset(name: str, config: str, split: str | None = None, streaming: bool = False, times: int = 1) -> Any:
    """
    In place of `datasets.load_dataset`: prompts of one line, as texts or turns, with images where asked for.

    `times`: that often; the paper's batch, which is our default, takes 32 prompts.
    """

    def row(line: str) -> dict[str, Any]:
        prompt = line if config.startswith("standard") else [{"role": "user", "content": line}]
        image = Image.new("RGB", (8, 8))
        images = {"zen-image": {"image": image}, "zen-multi-image": {"images": [image, image]}}
        return {"prompt": prompt} | images.get(name.split("/")[1], {})

    parts = {which: Dataset.from_list([row(line) for line in LINES * times]) for which in ("train", "test")}
    if streaming:
        streams: dict[str, IterableDataset] = {which: part.to_iterable_dataset() for which, part in parts.items()}
        return streams[split] if split else IterableDatasetDict(streams)
    return parts[split] if split else DatasetDict(parts)
