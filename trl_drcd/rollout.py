"""How the student samples: by the policy's own loop, or by TRL where vLLM or settings of `generate` are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.distributed import DistributedBackend
from trl.models import unwrap_model_for_generation

from trl_drcd.config import CFGDistillDiversityConfig
from trl_drcd.distributed import whole_weights
from trl_drcd.guidance import left_pad
from trl_drcd.policies import Policy
from trl_drcd.reliability.guard import BatchGuard
from trl_drcd.reliability.processes import report_status
from trl_drcd.sampling import Rollout, static_cache
from trl_drcd.validation.before_loading import leaves_sampling_to_trl
from trl_drcd.validation.once_loaded import check_lengths
from trl_drcd.validation.vllm import check_vllm_lengths


class StudentSampler:
    """
    Samples completions of the student, without guidance, at the temperature at which they are scored.

    Args:
        policy ([`~trl_drcd.policies.Policy`]): Of the model's family.
        args ([`CFGDistillDiversityConfig`]): `temperature`, `max_completion_length`, `use_vllm` and others.
        tokenizer (`PreTrainedTokenizerBase`): Its padding token fills up prompts.
        eos_token_ids (`list[int]`): Each ends a completion; the tokenizer's stands for an empty one.
        guard ([`~trl_drcd.reliability.guard.BatchGuard`]): Notes where logits are not finite.
        accelerator (`Accelerator`): Of the launch.
    """

    def __init__(
        self,
        policy: Policy,
        args: CFGDistillDiversityConfig,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: list[int],
        guard: BatchGuard,
        accelerator: Accelerator,
    ) -> None:
        self.policy, self.args = policy, args
        self.tokenizer, self.eos_token_ids = tokenizer, eos_token_ids
        self.guard, self.accelerator = guard, accelerator
        self.max_length = int(args.max_completion_length or 0)  # `check_before_loading` refuses 0
        self._latest: Rollout | None = None
        self._completions: list[list[int]] = []  # of the latest rollout

    def rollout(
        self,
        wrapped: Any,
        prompt_ids: list[list[int]],
        own: Callable[[list[list[int]]], list[list[int]]],
        by_trl: Callable[[], list[list[int]]],
    ) -> list[list[int]]:
        """
        One completion of each prompt, token ids, never empty: RLOO looks at the last token of each.

        Args:
            wrapped: The student as wrapped by Accelerate; every process must call this.
            prompt_ids (`list[list[int]]`): Prompts, without padding.
            own (`Callable`): The trainer's way, from prompts to completions.
            by_trl (`Callable`): TRL's way, for what is left to it: vLLM, settings of `generate`.

        Raises:
            ValueError: If a prompt and its completion do not fit the model, or vLLM's `vllm_max_model_length`.
        """
        self.check_lengths(wrapped, prompt_ids, "a prompt")
        self._latest = None
        with self.precision():
            ids = self.by_trl(wrapped, prompt_ids, by_trl) if self.leaves_it_to_trl() else own(prompt_ids)
        if ids is not self._completions:
            self._latest = None  # `own` has sampled in parts, or otherwise
        return [row or [self.tokenizer.eos_token_id] for row in ids]

    @contextmanager
    def model(self, wrapped: Any) -> Iterator[PreTrainedModel]:
        """
        The unwrapped student; sharded weights are gathered once, so call it on every process.

        Gradient checkpointing stays on: in evaluation mode, in which it samples, it does nothing. TRL turns it off and
        on again, for which transformers adds one more hook to the embeddings each time.
        """
        generation: Any = nullcontext(self.accelerator.unwrap_model(wrapped))
        if DistributedBackend(self.accelerator).is_zero3:
            checkpointing: Any = self.args.gradient_checkpointing_kwargs
            generation = unwrap_model_for_generation(
                wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=checkpointing,
            )
        with generation as model, whole_weights(model):
            # A compiled model's own: decoding has a shape for each step
            yield self.accelerator.unwrap_model(model, keep_torch_compile=False)

    def sample(self, wrapped: Any, prompt_ids: list[list[int]]) -> list[list[int]]:
        """Token ids of one completion of each prompt, by the policy's own loop."""
        report_status("it samples")
        with self.model(wrapped) as model, static_cache(self.args.cache_implementation == "static"):
            rollout = self.policy.rollout(
                model,
                prompt_ids,
                temperature=self.args.temperature,
                max_new_tokens=self.max_length,
                eos_token_ids=self.eos_token_ids,
            )
        report_status("it has sampled")
        self.guard.note_not_finite(~rollout.finite, prompt_ids)
        self._latest, self._completions = rollout, rollout.completions()
        return self._completions

    def by_trl(
        self, wrapped: Any, prompt_ids: list[list[int]], generate: Callable[[], list[list[int]]]
    ) -> list[list[int]]:
        """
        What TRL's `generate` returns; the logits of transformers are watched meanwhile.

        Raises:
            ValueError: If a prompt and its completion are longer than `vllm_max_model_length`.
        """
        check_vllm_lengths(prompt_ids, self.args)
        student = self.accelerator.unwrap_model(wrapped)
        weights = nullcontext() if self.args.use_vllm else whole_weights(student)
        with weights, self.guard.watched_sampling(self.policy.sampled_from(student), prompt_ids):
            return generate()

    def leaves_it_to_trl(self) -> bool:
        """Whether vLLM, continuous batching, or settings of `generate` ask for TRL's own way."""
        return self.policy.rolls_out_with_trl and bool(leaves_sampling_to_trl(self.args))

    def taken(self) -> Rollout | None:
        """The latest rollout of the policy's own loop, which is then forgotten; `None` of TRL's."""
        latest, self._latest = self._latest, None
        return latest

    def precision(self) -> Any:
        """Autocast around a whole rollout casts the weights once, not per token; vLLM has a precision of its own."""
        return nullcontext() if self.args.use_vllm else self.accelerator.autocast()

    def check_lengths(self, wrapped: Any, prompt_ids: list[list[int]], what: str) -> None:
        """
        Refuse prompts that leave no room for a completion, or that the encoder has no room for.

        Raises:
            ValueError: If one is too long for the model's positions.
        """
        check_lengths(self.policy, prompt_ids, what, self.max_length, self.accelerator.unwrap_model(wrapped))

    def padded(self, wrapped: Any, prompt_ids: list[list[int]], what: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask of prompts of the teacher, left-padded, `(B, P)`; refuses those that are too long."""
        self.check_lengths(wrapped, prompt_ids, what)
        ids, mask = left_pad(prompt_ids, self.tokenizer.pad_token_id)
        return ids.to(self.accelerator.device), mask.to(self.accelerator.device)


def seed_colocated_vllm(args: CFGDistillDiversityConfig, accelerator: Accelerator) -> None:
    """
    Seed the rollouts of a colocated vLLM with the run's `seed`.

    Such an engine draws from torch's generators, in this process. TRL starts it with the number of the process in
    place of the seed, so that all runs would sample alike. Processes that share an engine must draw alike.

    Args:
        args ([`CFGDistillDiversityConfig`]): `use_vllm`, `vllm_mode`, `vllm_tensor_parallel_size`, `seed`.
        accelerator (`Accelerator`): Of the launch.
    """
    if args.use_vllm and args.vllm_mode == "colocate":
        set_seed(args.seed + accelerator.process_index // args.vllm_tensor_parallel_size)


def no_log_probs(input_ids: torch.Tensor, logits_to_keep: int) -> tuple[torch.Tensor, None, None]:
    """In place of the log-probabilities that TRL computes after sampling, with one more forward, and nobody reads."""
    return torch.zeros(input_ids.shape[0], logits_to_keep, device=input_ids.device), None, None
