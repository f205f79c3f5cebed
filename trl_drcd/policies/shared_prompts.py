"""
Rows that share a prompt: each distinct prompt goes through a causal LM once, with gradients.

The `G` completions of a group have one prompt, and without prompts of their own all unconditional rows have the null
prompt. Causal attention makes keys and values of a prompt independent of what follows, so those of the distinct
prompts are computed once and repeated; autograd sums their gradients over the rows.

Letters: `B` sequences, `P` prompt tokens, `S` completion tokens, `H` hidden size.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from accelerate.utils import is_compiled_module
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from trl_drcd.sampling.streams import cache_argument, distinct_rows, refusal


def shared_refusal(model: Any) -> str | None:
    """
    Why the rows of a causal LM cannot share the forward of a prompt; `None` if they can.

    Args:
        model (`PreTrainedModel`): Without PEFT's wrapper.
    """
    if is_compiled_module(model):
        return "a compiled model is compiled for one forward"
    if (reason := refusal(model)) is not None:
        return reason
    if model.base_model is model:
        return f"`base_model` of {type(model).__name__} is itself"
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers):
        return f"{type(model).__name__} has layers without full attention"
    if getattr(model.config, "alibi", False) or any("alibi" in name for name in dir(type(model.base_model))):
        return f"{type(model).__name__} has ALiBi positions, whose masked rows are not finite in a padded prompt"
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        return "with FSDP2 every process must run the same number of forwards"
    if model.training and model.is_gradient_checkpointing:
        return "gradient checkpointing keeps no keys and values"
    return None


def distinct_prompts(prompt_ids: torch.Tensor, prompt_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Indices of the first row of each distinct prompt, and of each row's prompt among these.

    Args:
        prompt_ids, prompt_mask (`torch.Tensor`): int64, shape `(B, P)`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: int64, `(distinct,)` and `(B,)`.
    """
    different, index = distinct_rows(torch.cat([prompt_ids, prompt_mask], dim=1).tolist())
    first = [index.tolist().index(place) for place in range(len(different))]
    return torch.tensor(first, device=prompt_ids.device), index.to(prompt_ids.device)


def shared_hidden_states(
    backbone: Any,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    first: torch.Tensor,
    index: torch.Tensor,
) -> torch.Tensor:
    """
    Last hidden states that predict the completions, as those of one forward on all rows.

    Args:
        backbone (`PreTrainedModel`): Returns hidden states after the final norm; [`shared_refusal`] is `None`.
        prompt_ids, prompt_mask (`torch.Tensor`): Left-padded, int64, shape `(B, P)`.
        completion_ids, completion_mask (`torch.Tensor`): Right-padded, int64, shape `(B, S)`.
        first, index (`torch.Tensor`): Of [`distinct_prompts`].

    Returns:
        `torch.Tensor`: Shape `(B, S, H)`.
    """
    takes_positions = "position_ids" in inspect.signature(backbone.forward).parameters
    mask = torch.cat([prompt_mask, completion_mask[:, :-1]], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=backbone.config)

    def forward(ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": True}
        inputs[str(cache_argument(backbone))] = cache
        if takes_positions:
            inputs["position_ids"] = positions
        hidden: torch.Tensor = backbone(**inputs).last_hidden_state
        return hidden

    length = prompt_ids.shape[1]
    of_prompts = forward(prompt_ids[first], prompt_mask[first], positions[first, :length])[:, -1:]
    hidden = of_prompts[index]
    if completion_ids.shape[1] == 1:
        return hidden
    cache.batch_select_indices(index)
    return torch.cat([hidden, forward(completion_ids[:, :-1], mask, positions[:, length:])], dim=1)
