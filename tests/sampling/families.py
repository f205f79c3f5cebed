"""Tiny random causal LMs of several architectures, over 13 tokens, whose logits are spread."""

from __future__ import annotations

import torch
from transformers import (
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OpenAIGPTConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3NextConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from trl_drcd.policies import CausalLMPolicy

VOCABULARY, EOS, PAD = 13, 2, 0
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": EOS}
SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "llama, grouped keys": lambda: LlamaConfig(**TOKENS, **SIZE, num_key_value_heads=1),
    "gpt2": lambda: GPT2Config(**TOKENS, n_embd=16, n_layer=2, n_head=2, n_positions=32),
    "opt, no position_ids": lambda: OPTConfig(
        **TOKENS, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32,
        word_embed_proj_dim=16,
    ),
    "bloom, alibi": lambda: BloomConfig(**TOKENS, hidden_size=16, n_layer=2, n_head=2),
    "qwen2": lambda: Qwen2Config(**TOKENS, **SIZE, num_key_value_heads=2),
    "mistral, window of 3": lambda: MistralConfig(**TOKENS, **SIZE, num_key_value_heads=2, sliding_window=3),
    "gemma2, softcap and windows": lambda: Gemma2Config(
        **TOKENS, **SIZE, num_key_value_heads=2, head_dim=8, sliding_window=3, final_logit_softcapping=2.0,
        query_pre_attn_scalar=8,
    ),
    "qwen3-next, linear attention": lambda: Qwen3NextConfig(
        **TOKENS, **SIZE, num_key_value_heads=2, head_dim=8, layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        decoder_sparse_step=10,
    ),
}  # fmt: skip
# What the loop does not know to feed
OTHERS = {
    "mamba": lambda: MambaConfig(**TOKENS, hidden_size=16, num_hidden_layers=2, state_size=4),
    "gpt": lambda: OpenAIGPTConfig(**TOKENS, n_embd=16, n_layer=2, n_head=2, n_positions=32),
    "phi3": lambda: Phi3Config(**TOKENS, **SIZE, num_key_value_heads=2),
}


def make(name: str, seed: int = 0):
    """A model of a family, in evaluation mode."""
    torch.manual_seed(seed)
    config = (CONFIGS | OTHERS)[name]()
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.25)
    return model


class NoTokenizer:
    """A policy needs one for negative prompts, and for what ends a completion beside the model's own eos."""

    eos_token_id = None


def policy() -> CausalLMPolicy:
    return CausalLMPolicy(NoTokenizer())
