"""Pointwise mutual information of prompt and completion under a frozen model; for evaluation only, never a reward."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from trl_drcd.evaluation.likelihood import log_likelihoods
from trl_drcd.evaluation.sampling import Samples
from trl_drcd.policies import CausalLMPolicy

# Plain text, which suits any causal LM, with or without a chat template
FRAME = "Text: {completion}\n\nThis text was written for the request: "


def prompt_information(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    completions: list[str],
    batch_size: int = 32,
    description: str | None = None,
) -> torch.Tensor:
    """
    Pointwise mutual information of prompt and completion, `log p(prompt | completion) - log p(prompt)`, in nats.

    The model scores the prompt as the continuation of a plain document that contains the completion; for `log
    p(prompt)` the document contains no text. High if the prompt can be inferred from the completion. Guidance raises
    the other direction, `log p(completion | prompt) - log p(completion)`; training never computes this one.

    Args:
        model (`PreTrainedModel`): A causal LM; the frozen base.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        prompts (`list[str]`): `N` prompts, none empty.
        completions (`list[str]`): Their `N` completions.
        batch_size (`int`, *optional*, defaults to 32): Pairs per batch.
        description (`str`, *optional*): Name of the progress bar; `None` shows none.

    Returns:
        `torch.Tensor`: Shape `(N,)`, nats, float32 on the CPU.

    Raises:
        ValueError: If the numbers of prompts and completions differ.
    """
    if len(prompts) != len(completions):
        raise ValueError(
            f"`prompts` and `completions` must have the same length, got {len(prompts)} and {len(completions)}"
        )
    empty = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    texts = [
        *(FRAME.format(completion=text.strip()) for text in completions),
        *[FRAME.format(completion="")] * len(empty),
    ]
    # No special tokens in between: the request continues the same document
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    documents = [start + tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    requests = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in [*prompts, *empty]]
    asked = Samples(list(texts), requests, 1, seconds=0.0)
    scores = log_likelihoods(model, CausalLMPolicy(tokenizer), asked, documents, batch_size, description)
    given, alone = scores.split([len(prompts), len(empty)])
    return given - alone[[empty[prompt] for prompt in prompts]]


def forward_information(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    samples: Samples,
    batch_size: int = 64,
    description: str | None = None,
) -> torch.Tensor:
    """
    Pointwise mutual information from completion likelihoods: `log p(completion | prompt) - log p(completion)`.

    For models that cannot score prompts, such as models of music. Computed under the frozen base at temperature 1,
    with the null prompt in the second term. By Bayes' rule it equals [`prompt_information`] for a model consistent in
    both directions. Guidance raises this quantity directly, so it is not an independent judge of guidance.

    Args:
        model (`PreTrainedModel`): The frozen base, of any family.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        samples ([`Samples`]): Prompts and completions.
        batch_size (`int`, *optional*, defaults to 64): Completions per batch.
        description (`str`, *optional*): Name of the progress bar; `None` shows none.

    Returns:
        `torch.Tensor`: Shape `(B,)`, nats per sequence, float32 on the CPU.
    """
    policy = samples.policy(model, tokenizer)
    null = policy.negative_prompt_ids([{"prompt": prompt} for prompt in samples.repeated_prompts], None)
    given, alone = (
        log_likelihoods(model, policy, samples, prompts, batch_size, description)
        for prompts in (samples.prompt_ids(policy), null)
    )
    return given - alone
