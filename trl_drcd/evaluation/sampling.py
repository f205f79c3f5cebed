"""Samples of a grid of prompts, with or without classifier-free guidance, and what they cost."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from trl_drcd.policies import Policy, policy_for


@dataclass
class Samples:
    """
    Completions of `P` prompts, `samples_per_prompt` of each, those of a prompt contiguous.

    Args:
        prompts (`list`): The `P` prompts.
        token_ids (`list[list[int]]`): The `P * samples_per_prompt` completions, each up to and with its eos.
        samples_per_prompt (`int`): Completions of each prompt.
        seconds (`float`): Time spent sampling.
    """

    prompts: list[Any]
    token_ids: list[list[int]]
    samples_per_prompt: int
    seconds: float

    @property
    def repeated_prompts(self) -> list[Any]:
        """The prompt of each completion."""
        return [prompt for prompt in self.prompts for _ in range(self.samples_per_prompt)]

    @property
    def tokens_per_second(self) -> float:
        """
        Completion ids per second; what a batch computes after a sequence's eos does not count.

        MusicGen's are those of all codebooks, the few without a code included.
        """
        return sum(map(len, self.token_ids)) / self.seconds


def tokenize_prompts(policy: Policy, prompts: list[Any]) -> list[list[int]]:
    """Token ids of prompts, texts or conversations, as the trainer renders them."""
    # A prompt reads as a negative prompt does, template and generation marker included
    return policy.negative_prompt_ids([{"prompt": p, "negative_prompt": p} for p in prompts], None)


def sample_prompts(
    model: Any,
    tokenizer: Any,
    prompts: list[Any],
    samples_per_prompt: int = 1,
    guidance_scale: float = 1.0,
    negative_prompt: Any = None,
    temperature: float = 0.99,
    max_new_tokens: int = 200,
    batch_size: int = 64,
    seed: int = 0,
    description: str | None = None,
) -> Samples:
    """
    Sample completions of every prompt, without truncation or penalties.

    The same seed and `batch_size` give the same samples; the caller's random state is left as it was.

    Args:
        model (`PreTrainedModel`): A causal LM or a MusicGen.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        prompts (`list`): Texts or conversations.
        samples_per_prompt (`int`, *optional*, defaults to 1): Completions of each prompt.
        guidance_scale (`float`, *optional*, defaults to 1.0): gamma of Eq. (1) of
            https://huggingface.co/papers/2410.06084; 1 is off.
        negative_prompt (*optional*): x^- of Eq. (1); `None` is the null prompt.
        temperature (`float`, *optional*, defaults to 0.99): Above 0.
        max_new_tokens (`int`, *optional*, defaults to 200): Largest number of completion tokens; for MusicGen,
            decoder steps.
        batch_size (`int`, *optional*, defaults to 64): Sequences at one time (twice as many rows with guidance).
        seed (`int`, *optional*, defaults to 0): Of the draws.
        description (`str`, *optional*): Name of the progress bar; `None` shows none.

    Returns:
        [`Samples`]: `len(prompts) * samples_per_prompt` completions.

    Raises:
        ValueError: If there is no prompt, or `samples_per_prompt` is not at least 1.
    """
    if not prompts or samples_per_prompt < 1:
        raise ValueError(
            f"`prompts` must not be empty and `samples_per_prompt` at least 1, got {len(prompts)} prompts and "
            f"{samples_per_prompt}"
        )
    policy = policy_for(model, tokenizer)
    rows = [{"prompt": prompt} for prompt in prompts for _ in range(samples_per_prompt)]
    ids = tokenize_prompts(policy, [row["prompt"] for row in rows])
    negative_ids = policy.negative_prompt_ids(rows, negative_prompt) if guidance_scale != 1 else None
    was_training, completions = model.training, []
    model.eval()
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        with tqdm(total=len(rows), desc=description, unit="sample", disable=description is None) as bar:
            for first in range(0, len(rows), batch_size):
                part = slice(first, first + batch_size)
                output = policy.sample(
                    model, ids[part], negative_ids and negative_ids[part], guidance_scale, temperature, max_new_tokens
                )
                completions += output
                bar.update(len(output))
    seconds = time.perf_counter() - start
    model.train(was_training)
    return Samples(list(prompts), completions, samples_per_prompt, seconds)
