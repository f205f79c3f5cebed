"""
Score completions under frozen models: KL to the guided teacher, entropy, and log-likelihood.

Letters: `B` sequences, `S` steps, `K` codebooks, `N` scored tokens, `V` vocabulary, `H` hidden size. KL, entropy and
log-likelihoods are in nats. The full `(N, V)` logits are never materialised.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from trl_drcd.evaluation.sampling import Prompt, Samples
from trl_drcd.guidance import EarlySteps, guide_hidden_states, guide_logits, left_pad, scales_of_tokens, step_scales
from trl_drcd.heads import Head
from trl_drcd.losses import sum_per_sequence, token_log_probs, token_terms
from trl_drcd.policies import Policy

Padded = tuple[torch.Tensor, torch.Tensor]
"""Token ids and their mask, each int64 `(B, S)`."""


class SequenceTerms(NamedTuple):
    """Per-sequence sums over tokens, shape `(B,)`: `kl` and `entropy` in nats, and the number of `tokens`."""

    kl: torch.Tensor
    entropy: torch.Tensor
    tokens: torch.Tensor


@dataclass
class _GuidedHead(Head):
    """
    Guides the logits, for a head that is not affine; takes both streams' hidden states and gamma, `(N, 2H + 1)`.
    """

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        cond, uncond = hidden[:, :-1].chunk(2, -1)
        return guide_logits(super().logits(cond), super().logits(uncond), hidden[:, -1:])


def right_pad(sequences: list[list[int]]) -> Padded:
    """Completion ids and mask, int64 `(B, S)`."""
    rows = [torch.tensor(sequence) for sequence in sequences]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return ids, (torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])).long()


def _predictions(
    policy: Policy,
    model: Any,
    prompts: list[list[int]],
    negative_prompts: list[list[int]],
    completion: Padded,
    guidance_scale: float,
    early: EarlySteps | None = None,
    read: dict[object, torch.Tensor] | None = None,
) -> list[tuple[torch.Tensor, Head]]:
    """
    For each codebook, the hidden states of its scored tokens and the head that maps them to (guided) logits.

    `read` keeps what a model has read of this completion: the base is often the teacher, too.
    """
    streams = [prompts, negative_prompts] if guidance_scale != 1 else [prompts]
    read = {} if read is None else read
    hidden = []
    for stream in streams:
        key = id(model), tuple(map(tuple, stream))
        if key not in read:
            ids, attention = left_pad(stream, 0)
            inputs = ids.to(model.device), attention.to(model.device), *completion
            read[key] = policy.hidden_states(model, *inputs)
        hidden.append(read[key])
    _, mask = policy.ids_and_mask(*completion)
    scales = step_scales(guidance_scale, early, mask.shape[1], mask)
    predictions = []
    for k, head in enumerate(policy.heads(model)):
        states = [(stream if stream.ndim == 3 else stream[:, :, k])[mask[..., k]] for stream in hidden]
        if len(states) == 1:
            predictions.append((states[0], head))
            continue
        scale = scales_of_tokens(scales, mask[..., k])
        if head.softcap is None:
            predictions.append((guide_hidden_states(states[0], states[1], scale), head))
        else:
            column = torch.as_tensor(scale, device=mask.device).expand(len(states[0]), 1)
            dtype = torch.promote_types(states[0].dtype, torch.float32)  # bfloat16 would round gamma
            both = torch.cat([part.to(dtype) for part in (*states, column)], -1)
            predictions.append((both, _GuidedHead(**vars(head))))
    return predictions


def _batches(
    samples: Samples, batch_size: int, device: Any, description: str | None
) -> Iterator[tuple[slice, Padded]]:
    """Batches of the completions, padded, on the device; with a progress bar if it has a `description`."""
    starts = range(0, len(samples.token_ids), batch_size)
    for first in tqdm(starts, desc=description, unit="batch", disable=description is None):
        part = slice(first, first + batch_size)
        ids, mask = right_pad(samples.token_ids[part])
        yield part, (ids.to(device), mask.to(device))


@torch.no_grad()
def teacher_terms(
    model: Any,
    teacher: Any,
    tokenizer: PreTrainedTokenizerBase,
    samples: Samples,
    guidance_scale: float = 3.0,
    negative_prompt: Prompt | None = None,
    temperature: float = 0.99,
    model_guidance_scale: float = 1.0,
    batch_size: int = 64,
    description: str | None = None,
    model_negative_prompt: Prompt | None = None,
    model_early: EarlySteps | None = None,
) -> SequenceTerms:
    """
    KL(model || guided teacher) along the given completions, Eq. (2) of https://huggingface.co/papers/2410.06084.

    Its mean over completions sampled from the model at this temperature is an unbiased estimate of the KL between the
    two distributions over whole sequences.

    Args:
        model (`PreTrainedModel`): The student, of any family.
        teacher (`PreTrainedModel`): The teacher's model, of the same vocabulary.
        tokenizer (`PreTrainedTokenizerBase`): Tokenizer of both.
        samples ([`Samples`]): Prompts and completions, of at least one token each.
        guidance_scale (`float`, *optional*, defaults to 3.0): gamma of the teacher.
        negative_prompt (*optional*): x^- of the teacher for prompts without their own; `None` is the null prompt.
        temperature (`float`, *optional*, defaults to 0.99): T of both.
        model_guidance_scale (`float`, *optional*, defaults to 1.0): gamma of the model itself, if it sampled with
            guidance.
        batch_size (`int`, *optional*, defaults to 64): Sequences per batch.
        description (`str`, *optional*): Name of the progress bar; `None` shows none.
        model_negative_prompt (*optional*): x^- of the model's guidance for prompts without their own.
        model_early ([`~trl_drcd.guidance.EarlySteps`], *optional*): Early steps of the model's own guidance. The
            teacher has none.

    Returns:
        [`SequenceTerms`]: Each of shape `(B,)`, float32 on the CPU.

    Raises:
        ValueError: If the vocabularies differ.
    """
    policy = samples.policy(model, tokenizer)
    taught = samples.prompt_ids(policy, guided=True)
    prompts = samples.prompt_ids(policy, guided=model_guidance_scale != 1)
    negatives, own_negatives = (
        samples.negative_prompt_ids(policy, default) if scale != 1 else prompts  # unused without guidance
        for default, scale in ((negative_prompt, guidance_scale), (model_negative_prompt, model_guidance_scale))
    )
    model.eval(), teacher.eval()
    parts = []
    for part, completion in _batches(samples, batch_size, model.device, description):
        read: dict[object, torch.Tensor] = {}
        given = prompts[part], own_negatives[part], completion, model_guidance_scale, model_early, read
        ours = _predictions(policy, model, *given)
        theirs = _predictions(policy, teacher, taught[part], negatives[part], completion, guidance_scale, read=read)
        ids, mask = policy.ids_and_mask(*completion)
        sums = torch.zeros(2, len(ids), device=ids.device)
        for k, ((states, head), (guided, teacher_head)) in enumerate(zip(ours, theirs, strict=True)):
            scored = mask[..., k]

            def logits(rows: slice, guided: torch.Tensor = guided, head: Head = teacher_head) -> torch.Tensor:
                return head.logits(guided[rows])

            terms = token_terms(states, head, ids[..., k][scored], logits, temperature)
            sums += torch.stack([sum_per_sequence(term, scored[..., None]) for term in (terms.kl, terms.entropy)])
        parts.append((*sums.cpu(), mask.sum((1, 2)).float().cpu()))
    return SequenceTerms(*(torch.cat(term) for term in zip(*parts, strict=True)))


@torch.no_grad()
def log_likelihoods(
    model: Any,
    policy: Policy,
    samples: Samples,
    prompts: list[list[int]],
    batch_size: int = 64,
    description: str | None = None,
) -> torch.Tensor:
    """
    Log-likelihood `log p(completion | prompt)` of each completion, at temperature 1, without guidance.

    Args:
        model (`PreTrainedModel`): Of any family.
        policy ([`~trl_drcd.policies.Policy`]): Its policy.
        samples ([`Samples`]): The completions; their own prompts are ignored.
        prompts (`list[list[int]]`): Token ids that each completion is conditioned on.
        batch_size (`int`, *optional*, defaults to 64): Completions per batch.
        description (`str`, *optional*): Name of the progress bar; `None` shows none.

    Returns:
        `torch.Tensor`: Shape `(B,)`, nats, float32 on the CPU.
    """
    parts = []
    for part, completion in _batches(samples, batch_size, model.device, description):
        ids, mask = policy.ids_and_mask(*completion)
        total = torch.zeros(len(ids), device=model.device)
        given = _predictions(policy, model, prompts[part], [], completion, guidance_scale=1.0)
        for k, (states, head) in enumerate(given):
            scored = mask[..., k]
            total += sum_per_sequence(token_log_probs(states, head, ids[..., k][scored]), scored[..., None])
        parts.append(total.cpu())
    return torch.cat(parts)
