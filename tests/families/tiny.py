"""Tiny random causal LMs of many architectures, with every dropout that their configurations know turned on."""

from __future__ import annotations

import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

# Each configuration takes what it has of these
SMALL = {
    "vocab_size": 19, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "word_embed_proj_dim": 32, "embedding_size": 32, "lru_width": 32,
    "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 4,
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_seq_len": 64, "state_size": 4,
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "query_pre_attn_scalar": 8, "sliding_window": 32,
    "attention_window_size": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "interleaved_sliding_window": 32,
}  # fmt: skip
# Where two layers of the default pattern would leave out a kind
LAYERS = {
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "llama4_text": {"num_experts_per_tok": 1, "intermediate_size_mlp": 48, "num_local_experts": 2},
}
RIGHT = (
    "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "qwen3_next", "gemma", "gemma2", "gemma3_text",
    "phi", "phi3", "opt", "gpt2", "gpt_neox", "gptj", "gpt_bigcode", "starcoder2", "bloom", "falcon", "mpt",
    "stablelm", "olmo2", "cohere", "granite", "granitemoe", "nemotron", "mamba",
    "modernbert-decoder", "smollm3", "lfm2", "gpt_oss", "nanochat", "hyperclovax", "inkling_text", "llama4_text",
)  # fmt: skip
# Refused by the self-check, and what its message says
REFUSED = {
    "bert": "not a supported function of its output embeddings",
    "roberta": "not a supported function of its output embeddings",
    "bart": "left padding changes its output",
    "rwkv": "left padding changes its output",
    "recurrent_gemma": "left padding changes its output",
}


def config_of(name: str):
    """A small configuration of a family, dropout 0.3 wherever it has one."""
    kind = CONFIG_MAPPING[name]
    default = kind()
    known = {*vars(default), *default.attribute_map}
    sizes = {key: value for key, value in (SMALL | LAYERS.get(name, {})).items() if key in known}
    if name in REFUSED:
        sizes |= {key: value for key, value in {"is_decoder": True}.items() if key in known}
        sizes |= {key: 2 for key in ("decoder_layers", "encoder_layers") if key in known}
        sizes |= {key: 48 for key in ("decoder_ffn_dim", "encoder_ffn_dim") if key in known}
        sizes |= {key: 4 for key in ("decoder_attention_heads", "encoder_attention_heads") if key in known}
    config = kind(**sizes)
    for key, value in vars(config).items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.3)
    return config


def make(name: str, seed: int = 0, **overrides):
    """A model whose logits are spread, in evaluation mode."""
    torch.manual_seed(seed)
    config = config_of(name)
    for key, value in overrides.items():
        setattr(config, key, value)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() in (2, 3):  # 3 of experts
                parameter.normal_(std=0.25)
            elif parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model
