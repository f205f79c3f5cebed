"""
Allowed tokens: the part of a vocabulary that completions are made of, such as the audio ids of a language model.

Sampling, KL, log-probabilities and entropy are those of the softmax over these tokens alone, of student and teacher
alike. A saved model has the others as `suppress_tokens` in its generation config, which `generate` sets to -inf.

Letters: `V` vocabulary, `V'` allowed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from trl_drcd.validation.messages import short_repr
from trl_drcd.validation.token_ids import EXAMPLE


def resolve_token_ids(
    entries: Sequence[str], tokenizer: PreTrainedTokenizerBase, vocabulary: int, eos_token_ids: Sequence[int]
) -> torch.Tensor:
    """
    The token ids that the entries of `allowed_token_ids` stand for.

    Args:
        entries (`Sequence[str]`): See [`~trl_drcd.validation.token_ids.as_entries`].
        tokenizer (`PreTrainedTokenizerBase`): Maps names of tokens to ids.
        vocabulary (`int`): V, rows of the model's head.
        eos_token_ids (`Sequence[int]`): Ids that end a completion; one of them must be allowed.

    Returns:
        `torch.Tensor`: Sorted and distinct, int64, shape `(V',)`.

    Raises:
        ValueError: If a token is unknown or outside the vocabulary, a range has its ends in the wrong order, fewer
            than two tokens are named, or none of them ends a completion.
    """
    parts = [torch.arange(*_bounds(entry, tokenizer, vocabulary)) for entry in entries]
    allowed = torch.cat(parts).unique()
    if len(allowed) < 2:
        raise ValueError(f"`allowed_token_ids` names only {allowed.tolist()}; give at least two tokens")
    ends = torch.isin(torch.tensor(sorted(set(eos_token_ids)), dtype=torch.long), allowed)
    if not ends.any():
        raise ValueError(
            f"`allowed_token_ids` has none of the ids that end a completion, {sorted(set(eos_token_ids))} (of "
            "`processing_class` and of the model's generation config); add the one that the model was trained to end "
            "with"
        )
    return allowed


def _bounds(entry: str, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> tuple[int, int]:
    """First id of an entry, and its last id plus one."""
    ends = [entry] if _is_token(entry, tokenizer) else entry.split("..", 1)
    ids = [_id_of(end.strip(), entry, tokenizer) for end in ends]
    first, last = ids[0], ids[-1]
    if last < first:
        raise ValueError(
            f"`allowed_token_ids` has the range {short_repr(entry)}, ids {first} to {last}; swap its ends"
        )
    if last >= vocabulary:
        raise ValueError(
            f"`allowed_token_ids` has {short_repr(entry)}, but the model's vocabulary ends at {vocabulary - 1}; "
            f"{EXAMPLE}"
        )
    return first, last + 1


def _is_token(name: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    return name in tokenizer.get_vocab()


def _id_of(name: str, entry: str, tokenizer: PreTrainedTokenizerBase) -> int:
    if name.isdecimal():
        return int(name)
    if not _is_token(name, tokenizer):
        raise ValueError(
            f"`allowed_token_ids` has {short_repr(entry)}: {short_repr(name)} is not a token of the tokenizer; "
            f"{EXAMPLE}"
        )
    token_id = tokenizer.convert_tokens_to_ids(name)
    assert isinstance(token_id, int)  # one name, one id
    return token_id


def complement(token_ids: Sequence[int] | torch.Tensor, vocabulary: int) -> torch.Tensor:
    """The ids below `vocabulary` that are not among these, sorted, int64."""
    kept = torch.ones(vocabulary, dtype=torch.bool)
    ids = torch.as_tensor(token_ids, dtype=torch.long).cpu()
    kept[ids[(ids >= 0) & (ids < vocabulary)]] = False
    return kept.nonzero().flatten()


def own_allowed_token_ids(model: Any, vocabulary: int) -> torch.Tensor | None:
    """The tokens that the model's generation config does not suppress, int64 `(V',)`; `None` if it suppresses none."""
    suppressed = getattr(getattr(model, "generation_config", None), "suppress_tokens", None)
    return complement(suppressed, vocabulary) if suppressed else None


class AllowedTokens:
    """
    Maps token ids to their places among the allowed ids, and holds the allowed ids.

    Args:
        token_ids (`torch.Tensor`): int64 `(V',)`; sorted and distinct.
    """

    def __init__(self, token_ids: torch.Tensor):
        self._token_ids = token_ids

    def on(self, device: Any) -> torch.Tensor:
        """The allowed ids, int64 `(V',)`, moved to a device; they stay there for the next call."""
        self._token_ids = self._token_ids.to(device)
        return self._token_ids

    def places(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """
        The place of each id among the allowed ones, in `[0, V')`.

        Args:
            ids (`torch.Tensor`): int64, any shape.
            mask (`torch.Tensor`): True where an id is scored, same shape; elsewhere the result is arbitrary.

        Returns:
            `torch.Tensor`: int64, the shape of `ids`.

        Raises:
            ValueError: If an id that is scored is not allowed.
        """
        allowed = self.on(ids.device)
        found = torch.searchsorted(allowed, ids.contiguous()).clamp(max=len(allowed) - 1)
        if (wrong := (allowed[found] != ids) & mask).any():
            raise ValueError(
                f"a completion has the tokens {ids[wrong].unique()[:8].tolist()}, which `allowed_token_ids` does not "
                "have, so their probability is 0; sample the completions with the same `allowed_token_ids`"
            )
        return found
