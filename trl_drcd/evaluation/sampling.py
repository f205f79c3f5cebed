"""Sample completions of a list of prompts, with or without classifier-free guidance, and time it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from trl_drcd.guidance import EarlySteps
from trl_drcd.policies import Policy, policy_for, teacher_prompt_ids
from trl_drcd.prompts import Prompt

Completion = str | tuple[torch.Tensor, int]
"""A text, or a waveform, float32 on the CPU, `(T,)` or `(2, T)`, and its sampling rate in Hz."""


@dataclass
class Samples:
    """
    Completions of `P` prompts, `samples_per_prompt` of each; completions of one prompt are contiguous.

    Args:
        prompts (`list`): The `P` prompts, texts or conversations.
        token_ids (`list[list[int]]`): The `P * samples_per_prompt` completions, each up to and including its eos.
        samples_per_prompt (`int`): Completions per prompt.
        seconds (`float`): Sampling time, seconds.
        negative_prompts (`list`, *optional*): Each prompt's own x^- of Eq. (1), `None` where it has none.
        chat_template_kwargs (`dict`, *optional*): Passed to the chat template that rendered the conversations.
        teacher_prompts (`list`, *optional*): Read in place of each prompt by a model with guidance; `None` where it
            reads the prompt.
        allowed_token_ids (`torch.Tensor`, *optional*): Tokens of completions, int64 `(V',)`; by default those that a
            model's generation config does not suppress.
    """

    prompts: list[Prompt]
    token_ids: list[list[int]]
    samples_per_prompt: int
    seconds: float
    negative_prompts: list[Prompt | None] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    teacher_prompts: list[Prompt | None] | None = None
    allowed_token_ids: torch.Tensor | None = None

    @property
    def repeated_prompts(self) -> list[Prompt]:
        """The prompt of each completion."""
        return [prompt for prompt in self.prompts for _ in range(self.samples_per_prompt)]

    def first(self, count: int) -> Samples:
        """The first `count` samples of each prompt."""
        kept = [ids for i, ids in enumerate(self.token_ids) if i % self.samples_per_prompt < count]
        return replace(self, token_ids=kept, samples_per_prompt=min(count, self.samples_per_prompt))

    @property
    def tokens_per_second(self) -> float:
        """
        Completion ids per second, excluding what a batch computes after a sequence's eos.

        With several codebooks the ids of all count, including the few ids that hold no code.
        """
        return sum(map(len, self.token_ids)) / self.seconds

    def policy(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> Policy:
        """The policy of a model, with the chat template arguments and allowed tokens of these samples."""
        return policy_for(model, tokenizer, self.chat_template_kwargs, self.allowed_token_ids)

    def prompt_ids(self, policy: Policy, guided: bool = False) -> list[list[int]]:
        """Token ids of each completion's prompt, as the model reads it without or with guidance."""
        if guided and self.teacher_prompts is not None:
            return teacher_prompt_ids(policy, self._rows("teacher_prompt", self.teacher_prompts))
        return tokenize_prompts(policy, self.repeated_prompts)

    def negative_prompt_ids(self, policy: Policy, default: Prompt | None) -> list[list[int]]:
        """Token ids of each completion's x^-: the prompt's own, else `default`; `None` is the null prompt."""
        own = self.negative_prompts or [None] * len(self.prompts)
        rows = self._rows("negative_prompt", own)
        if self.teacher_prompts is not None:  # of which a null prompt may take its length
            rows = [
                row | read for row, read in zip(rows, self._rows("teacher_prompt", self.teacher_prompts), strict=True)
            ]
        return policy.negative_prompt_ids(rows, default)

    def _rows(self, column: str, values: Sequence[Prompt | None]) -> list[dict[str, Any]]:
        """A row of each completion: its prompt and one more column."""
        rows = [{"prompt": prompt, column: value} for prompt, value in zip(self.prompts, values, strict=True)]
        return [row for row in rows for _ in range(self.samples_per_prompt)]


def tokenize_prompts(policy: Policy, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of prompts, texts or conversations, as the trainer renders them."""
    # Negative prompts are rendered exactly as prompts, including template and generation marker
    return policy.negative_prompt_ids([{"prompt": p, "negative_prompt": p} for p in prompts], None)


def sample_prompts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    samples_per_prompt: int = 1,
    guidance_scale: float = 1.0,
    negative_prompt: Prompt | None = None,
    temperature: float = 0.99,
    max_new_tokens: int = 200,
    batch_size: int = 64,
    seed: int = 0,
    description: str | None = None,
    negative_prompts: Sequence[Prompt | None] | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    teacher_prompts: Sequence[Prompt | None] | None = None,
    allowed_token_ids: torch.Tensor | None = None,
    early: EarlySteps | None = None,
) -> Samples:
    """
    Sample completions of every prompt, without truncation or penalties.

    The same seed and `batch_size` give the same samples. The caller's random state is restored.

    Args:
        model (`PreTrainedModel`): A causal LM, a MusicGen or a Dia.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        prompts (`list`): Texts or conversations.
        samples_per_prompt (`int`, *optional*, defaults to 1): Completions per prompt.
        guidance_scale (`float`, *optional*, defaults to 1.0): gamma of Eq. (1) of
            https://huggingface.co/papers/2410.06084; 1 turns guidance off.
        negative_prompt (*optional*): x^- of Eq. (1) for prompts without their own; `None` is the null prompt.
        temperature (`float`, *optional*, defaults to 0.99): Sampling temperature, above 0.
        max_new_tokens (`int`, *optional*, defaults to 200): Largest number of completion tokens; for MusicGen
            and Dia, decoder steps.
        batch_size (`int`, *optional*, defaults to 64): Sequences per batch (twice as many rows with guidance).
        seed (`int`, *optional*, defaults to 0): Random seed of the draws.
        description (`str`, *optional*): Name of the progress bar; `None` shows none.
        negative_prompts (`list`, *optional*): Each prompt's own x^-, `None` where it has none.
        chat_template_kwargs (`dict`, *optional*): Passed to the chat template of conversations.
        teacher_prompts (`list`, *optional*): What is read with guidance in place of each prompt, `None` where it is
            the prompt.
        allowed_token_ids (`torch.Tensor`, *optional*): Tokens of completions, sorted, int64 `(V',)`; by default those
            that the model's generation config does not suppress.
        early ([`~trl_drcd.guidance.EarlySteps`], *optional*): The first steps, with a guidance scale of their own.

    Returns:
        [`Samples`]: `len(prompts) * samples_per_prompt` completions.

    Raises:
        ValueError: If `prompts` is empty, `samples_per_prompt` is below 1, or `negative_prompts` or `teacher_prompts`
            do not have one entry per prompt.
    """
    if not prompts or samples_per_prompt < 1:
        raise ValueError(
            f"`prompts` must not be empty and `samples_per_prompt` must be at least 1, got {len(prompts)} prompts and "
            f"`samples_per_prompt={samples_per_prompt}`"
        )
    for name, column in {"negative_prompts": negative_prompts, "teacher_prompts": teacher_prompts}.items():
        if column is not None and len(column) != len(prompts):
            raise ValueError(f"`{name}` must have one entry per prompt ({len(prompts)}), got {len(column)} entries")
    negatives, taught = (None if own is None else list(own) for own in (negative_prompts, teacher_prompts))
    samples = Samples(
        list(prompts), [], samples_per_prompt, 0.0, negatives, chat_template_kwargs, taught, allowed_token_ids
    )
    policy = samples.policy(model, tokenizer)
    ids = samples.prompt_ids(policy, guided=guidance_scale != 1)
    negative_ids = samples.negative_prompt_ids(policy, negative_prompt) if guidance_scale != 1 else None
    was_training = model.training
    model.eval()
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        with tqdm(total=len(ids), desc=description, unit="sample", disable=description is None) as bar:
            for first in range(0, len(ids), batch_size):
                part = slice(first, first + batch_size)
                rollout = policy.rollout(
                    model, ids[part], negative_ids and negative_ids[part], guidance_scale, temperature, max_new_tokens,
                    early=early,
                )  # fmt: skip
                samples.token_ids += rollout.completions()
                bar.update(len(ids[part]))
    samples.seconds = time.perf_counter() - start
    model.train(was_training)
    return samples
