"""What a completion tells about its prompt under a frozen model, for evaluation alone: never a reward."""

from __future__ import annotations

from typing import Any

import torch

from trl_drcd.evaluation.likelihood import log_likelihoods
from trl_drcd.evaluation.sampling import Samples
from trl_drcd.policies import CausalLMPolicy

# A plain document, so that any causal LM reads it, with or without a chat template
FRAME = "Text: {completion}\n\nThis text was written for the request: "


def prompt_information(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    completions: list[str],
    batch_size: int = 32,
    description: str | None = None,
) -> torch.Tensor:
    """
    Pointwise mutual information of prompt and completion, `log p(prompt | completion) - log p(prompt)`, in nats.

    Under a frozen language model that reads the completion in a plain document and is then asked for the request; for
    `log p(prompt)` the document's text is empty. High where the prompt could be told from the completion. It is the
    reverse of what guidance raises, `log p(completion | prompt) - log p(completion)`, and training never computes it.

    Args:
        model (`PreTrainedModel`): A causal LM; the frozen base.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        prompts (`list[str]`): `N` requests, none empty.
        completions (`list[str]`): Their `N` completions.
        batch_size (`int`, *optional*, defaults to 32): Pairs at one time.
        description (`str`, *optional*): Name of the progress bar; `None` shows none.

    Returns:
        `torch.Tensor`: Shape `(N,)`, nats, float32 on the CPU.

    Raises:
        ValueError: If there are not as many prompts as completions.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"got {len(prompts)} `prompts` for {len(completions)} `completions`; expected one for each")
    empty = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    texts = [
        *(FRAME.format(completion=text.strip()) for text in completions),
        *[FRAME.format(completion="")] * len(empty),
    ]
    # Without special tokens in between: the request goes on in the same document
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    documents = [start + tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    requests = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in [*prompts, *empty]]
    asked = Samples(list(texts), requests, 1, seconds=0.0)
    scores = log_likelihoods(model, CausalLMPolicy(tokenizer), asked, documents, batch_size, description)
    given, alone = scores.split([len(prompts), len(empty)])
    return given - alone[[empty[prompt] for prompt in prompts]]


def forward_information(
    model: Any, tokenizer: Any, samples: Samples, batch_size: int = 64, description: str | None = None
) -> torch.Tensor:
    """
    Pointwise mutual information as a model of music can give it: `log p(completion | prompt) - log p(completion)`.

    Under the frozen base, its null prompt in the second term, at temperature 1, in nats. By Bayes' rule it would be
    [`prompt_information`] if the model knew both directions. It is what guidance itself raises, so it says how far
    guidance has got, and is no independent judge.

    Args:
        model (`PreTrainedModel`): The frozen base, a causal LM or a MusicGen.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        samples ([`Samples`]): Prompts and completions.
        batch_size (`int`, *optional*, defaults to 64): Completions at one time.
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
