"""What a completion tells about its prompt under a frozen model, for evaluation alone: never a reward."""

from __future__ import annotations

from typing import Any

import torch
from tqdm import tqdm

from trl_drcd.evaluation.metrics import completion_logits, right_pad
from trl_drcd.evaluation.sampling import Samples, tokenize_prompts
from trl_drcd.guidance import left_pad
from trl_drcd.losses import LOGITS_PER_CHUNK, sum_per_sequence
from trl_drcd.policies import CausalLMPolicy, policy_for

# A plain document, so that any causal LM reads it, with or without a chat template
FRAME = "Text: {completion}\n\nThis text was written for the request: "


@torch.no_grad()
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
    frames = [FRAME.format(completion=text.strip()) for text in completions]
    empty = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    pairs = [*zip(frames, prompts, strict=True), *((FRAME.format(completion=""), prompt) for prompt in empty)]
    scores = []
    starts = range(0, len(pairs), batch_size)
    for first in tqdm(starts, desc=description, unit="batch", disable=description is None):
        scores.append(_log_likelihood(model, tokenizer, pairs[first : first + batch_size]))
    given, alone = torch.cat(scores).split([len(prompts), len(empty)])
    return given - alone[[empty[prompt] for prompt in prompts]]


def _log_likelihood(model: Any, tokenizer: Any, pairs: list[tuple[str, str]]) -> torch.Tensor:
    """log p(continuation | text) of each pair, nats, `(B,)`."""
    # Without special tokens in between: the continuation goes on in the same document
    policy = CausalLMPolicy(tokenizer)
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    prompt_ids = [start + tokenizer(text, add_special_tokens=False)["input_ids"] for text, _ in pairs]
    targets = [tokenizer(target, add_special_tokens=False)["input_ids"] for _, target in pairs]
    prompt, prompt_mask = (tensor.to(model.device) for tensor in left_pad(prompt_ids, 0))
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(t) for t in targets], batch_first=True).to(model.device)
    mask = (torch.arange(ids.shape[1]) < torch.tensor([[len(t)] for t in targets])).to(model.device)
    hidden = policy.hidden_states(model, prompt, prompt_mask, ids, mask.long())[mask]
    (head,) = policy.heads(model)
    rows = max(1, LOGITS_PER_CHUNK // head.weight.shape[0])
    parts = [
        head.logits(chunk).log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)
        for chunk, target in zip(hidden.split(rows), ids[mask].split(rows), strict=True)
    ]
    total = torch.zeros(len(pairs), device=model.device).index_add(0, mask.nonzero()[:, 0], torch.cat(parts).float())
    return total.cpu()


@torch.no_grad()
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
    policy = policy_for(model, tokenizer)
    rows = [{"prompt": prompt} for prompt in samples.repeated_prompts]
    streams = [tokenize_prompts(policy, samples.repeated_prompts), policy.negative_prompt_ids(rows, None)]
    parts = []
    starts = range(0, len(rows), batch_size)
    for first in tqdm(starts, desc=description, unit="batch", disable=description is None):
        part = slice(first, first + batch_size)
        completion = tuple(tensor.to(model.device) for tensor in right_pad(samples.token_ids[part]))
        ids, mask = policy.ids_and_mask(*completion)
        given, alone = (
            completion_logits(policy, model, [stream[part]], completion, guidance_scale=1.0) for stream in streams
        )
        total = torch.zeros(len(ids), device=model.device)
        for k in range(len(given)):
            valid = mask[..., k]
            scores = _log_p(given[k], ids[..., k][valid]) - _log_p(alone[k], ids[..., k][valid])
            total += sum_per_sequence(scores, valid[..., None])
        parts.append(total.cpu())
    return torch.cat(parts)


def _log_p(logits: Any, targets: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the targets, nats, float32; logits exist in chunks."""
    rows = max(1, LOGITS_PER_CHUNK // logits(slice(0, 1)).shape[-1])
    return torch.cat([
        logits(slice(i, i + rows)).float().log_softmax(-1).gather(-1, targets[i : i + rows, None]).squeeze(-1)
        for i in range(0, len(targets), rows)
    ])  # fmt: skip
