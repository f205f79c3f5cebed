"""
A family of one's own, in the smallest form that trains: a Llama over text and frames of `K` codes, and depth layers.

The Llama gives one hidden state for each step; inside a step, the state that predicts code `k` also depends on the
codes before it, so that each codebook has hidden states of its own, `(B, S, K, H)`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from trl_drcd.guidance import left_pad, stacked_prompts
from trl_drcd.heads import Head
from trl_drcd.losses import guided_logits
from trl_drcd.policies import CausalLMPolicy, without_peft
from trl_drcd.sampling import Rollout, draw, evaluating


class ToyPolicy(CausalLMPolicy):
    """What differs from a causal LM; prompts, negative prompts and dropout are as there."""

    rolls_out_with_trl = False  # TRL and vLLM cannot sample it
    num_codebooks = 3

    def prompt_vocabulary(self, model: Any) -> int:
        return without_peft(model).get_input_embeddings().num_embeddings

    def sampled_from(self, model: Any) -> nn.Module:
        return without_peft(model).model

    def _steps(self, flat: torch.Tensor) -> torch.Tensor:
        return flat.unflatten(1, (-1, self.num_codebooks))  # (B, S * K) -> (B, S, K)

    def hidden_states(self, model, prompt_ids, prompt_mask, completion_ids, completion_mask) -> torch.Tensor:
        """Shape `(B, S, K, H)`."""
        return without_peft(model).hidden_states(prompt_ids, prompt_mask, self._steps(completion_ids))

    def own_logits(self, model: Any, prompt_ids: torch.Tensor, completion_ids: torch.Tensor) -> torch.Tensor:
        """Shape `(S, K, V)`; through the model's own forward, wrapped or not."""
        return model(input_ids=prompt_ids, codes=self._steps(completion_ids)).logits[0]

    def heads(self, model: Any) -> list[Head]:
        return [Head(head.weight, head.bias) for head in without_peft(model).lm_heads]

    def ids_and_mask(self, completion_ids, completion_mask) -> tuple[torch.Tensor, torch.Tensor]:
        return self._steps(completion_ids), self._steps(completion_mask).bool()

    @torch.no_grad()
    def rollout(
        self,
        model,
        prompt_ids,
        negative_prompt_ids=None,
        guidance_scale=1.0,
        temperature=1.0,
        max_new_tokens=20,
        eos_token_ids=None,
        early=None,
    ) -> Rollout:
        """Steps one after the other, in each its codes one after the other; without a cache, as it is a toy."""
        toy, heads = without_peft(model), self.heads(model)
        ids, mask = left_pad(stacked_prompts(prompt_ids, negative_prompt_ids, guidance_scale), 0)
        codes = torch.zeros(len(prompt_ids), max_new_tokens, self.num_codebooks, dtype=torch.long)
        log_probs, finite = torch.zeros(codes.shape), torch.ones(len(codes), dtype=torch.bool)
        with evaluating(model):
            for step in range(max_new_tokens):
                for k, head in enumerate(heads):
                    given = codes[:, : step + 1].repeat(len(ids) // len(codes), 1, 1)
                    last = toy.hidden_states(ids, mask, given)[:, -1, k]
                    cond, *uncond = last.split(len(codes))
                    scale = early.scale_at(step, guidance_scale) if early else guidance_scale
                    logits = guided_logits(head, cond, uncond[0] if uncond else None, scale)(slice(None))
                    new = draw(logits, torch.rand(len(codes), dtype=torch.float64), temperature)
                    codes[:, step, k], log_probs[:, step, k] = new.tokens, new.log_probs
                    finite &= new.finite
        return Rollout(codes, log_probs, torch.ones_like(codes, dtype=torch.bool), finite)


class ToyConfig(LlamaConfig):
    """`codebook_size` is that of each of the `K` codebooks; `vocab_size` that of the text."""

    model_type = "toy_depth"
    drcd_policy = ToyPolicy  # by this the trainer, the evaluation and all others find the family


class ToyModel(LlamaPreTrainedModel, GenerationMixin):
    """The model, as somebody else may have published it."""

    config_class = ToyConfig

    def __init__(self, config: ToyConfig):
        super().__init__(config)
        size, books = config.hidden_size, ToyPolicy.num_codebooks
        self.model = LlamaModel(config)
        self.codes = nn.ModuleList([nn.Embedding(config.codebook_size, size) for _ in range(books)])
        self.depth = nn.Linear(size, size)
        self.lm_heads = nn.ModuleList([nn.Linear(size, config.codebook_size) for _ in range(books)])
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_heads

    def hidden_states(self, prompt_ids, prompt_mask, codes) -> torch.Tensor:
        """Of prompts `(B, P)` and codes `(B, S, K)`: `(B, S, K, H)`, what predicts each code."""
        before = sum(table(codes[:, :-1, k]) for k, table in enumerate(self.codes))
        mask = torch.cat([prompt_mask, torch.ones_like(codes[:, :-1, 0])], dim=1)
        state = self.model(
            inputs_embeds=torch.cat([self.model.embed_tokens(prompt_ids), before], dim=1),
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state[:, -codes.shape[1] :]
        of_codebooks = []
        for k, table in enumerate(self.codes):
            of_codebooks.append(state + torch.tanh(self.depth(state)))
            state = state + table(codes[..., k])
        return torch.stack(of_codebooks, dim=2)

    def forward(self, input_ids, attention_mask=None, codes=None, **kwargs):
        from transformers.modeling_outputs import CausalLMOutput

        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = self.hidden_states(input_ids, mask, codes)
        return CausalLMOutput(logits=torch.stack([head(hidden[:, :, k]) for k, head in enumerate(self.lm_heads)], 2))


AutoConfig.register("toy_depth", ToyConfig)
AutoModelForCausalLM.register(ToyConfig, ToyModel)
