"""Rollouts by vLLM: what TRL's way to use it would cut, drift or draw without saying so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.logging import get_logger
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from transformers import PreTrainedModel

from trl_drcd.config import CFGDistillDiversityConfig
from trl_drcd.policies.causal_lm import without_peft

logger = get_logger(__name__)


def check_vllm(student: PreTrainedModel | PeftModel, args: CFGDistillDiversityConfig) -> None:
    """
    Refuse an adapter on weights of half precision, or on one of two weights that vLLM ties; say where `seed` does not
    reach.

    TRL merges the adapter into the weights for each sync and takes it out again. In bfloat16 what is left is not the
    base any more, and the base is the teacher. Where the configuration ties embedding and head, vLLM reads the
    embedding for both.

    Args:
        student (`PreTrainedModel` or `PeftModel`): Loaded, unwrapped.
        args ([`CFGDistillDiversityConfig`]): The trainer's.

    Raises:
        ValueError: If the base would drift, or vLLM would sample from another model.
    """
    if not args.use_vllm:
        return
    half = {p.dtype for p in student.parameters()} & {torch.bfloat16, torch.float16}
    if isinstance(student, PeftModel) and half:
        raise ValueError(
            f"`use_vllm=True` with an adapter on a model in {half.pop()}: each sync merges the adapter into the base "
            "and takes it out again, which rounds the base, the teacher, a little further. Load the model in float32 "
            "(`dtype='float32'`), or train all weights"
        )
    base: Any = without_peft(student)
    tied = getattr(base.config.get_text_config(), "tie_word_embeddings", False)
    adapters = student.peft_config.values() if isinstance(student, PeftModel) else []
    if tied and not all(getattr(one, "ensure_weight_tying", False) for one in adapters):
        ends = base.get_input_embeddings(), base.get_output_embeddings()
        if any(isinstance(end, BaseTunerLayer | ModulesToSaveWrapper) for end in ends):
            raise ValueError(
                "`use_vllm=True` with an adapter on the embedding or the head of a model that ties them: PEFT unties "
                "them, and vLLM reads one for both, so that it would sample from another model. Leave them out of the "
                "adapter, or set its `ensure_weight_tying=True`"
            )
    if args.vllm_mode == "server":
        logger.warning(
            f"a vLLM server draws from a random state of its own: `seed={args.seed}` does not reach its rollouts"
        )


def check_vllm_lengths(prompt_ids: Sequence[Sequence[int]], args: CFGDistillDiversityConfig) -> None:
    """
    Refuse prompts after which vLLM would end completions early.

    Args:
        prompt_ids (`Sequence[Sequence[int]]`): Token ids of prompts.
        args ([`CFGDistillDiversityConfig`]): With `vllm_max_model_length` and `max_completion_length`.

    Raises:
        ValueError: If the longest one does not fit with its completion.
    """
    limit = args.vllm_max_model_length if args.use_vllm else None
    longest = max(map(len, prompt_ids), default=0)
    if limit is not None and longest + (args.max_completion_length or 0) > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and `max_completion_length={args.max_completion_length}` do not fit "
            f"`vllm_max_model_length={limit}`, where vLLM would cut the completion; raise it, or leave it out"
        )
