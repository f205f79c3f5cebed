"""
The diversity reward, Eq. (3) and (7) of https://huggingface.co/papers/2410.06084, and its unbiased advantages.

Letters: `P` prompts, `G` generations per prompt, `B = P * G`, `D` embedding size. Distances have no unit and lie in
[0, 2].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import PartialState
from accelerate.utils import gather

from trl_drcd.reliability.batches import raise_together, row_problems
from trl_drcd.reliability.processes import report_status

# Lengths outside of this lose digits, or all of them, in the squares of float32
SHORT, LONG = 1e-15, 1e15


def one_channel(completions: Sequence[Any]) -> list[Any]:
    """Completions as embedders and judges read them: of sounds with several channels, `(C, T)`, the mean `(T,)`."""
    return [
        (item[0].mean(0), item[1]) if isinstance(item, tuple) and getattr(item[0], "ndim", 1) == 2 else item
        for item in completions
    ]


def _without_direction(embeddings: torch.Tensor) -> torch.Tensor:
    """Which vectors are zero, infinite or NaN: boolean `(B,)`."""
    return ~embeddings.isfinite().all(-1) | (embeddings == 0).all(-1)


def unit_vectors(embeddings: torch.Tensor) -> torch.Tensor:
    """Vectors `(..., D)` of length one, however long they are; NaN where one has no direction."""
    lengths = embeddings.norm(dim=-1, keepdim=True)
    extreme = ~((lengths > SHORT) & (lengths < LONG))
    if extreme.any():
        largest = embeddings.abs().amax(-1, keepdim=True)
        embeddings = torch.where(extreme, embeddings / largest, embeddings)
        lengths = embeddings.norm(dim=-1, keepdim=True)
    return embeddings / lengths


def unit_groups(embeddings: torch.Tensor, num_generations: int) -> torch.Tensor:
    """
    Embeddings of length one, after the checks that all functions below share.

    Args:
        embeddings (`torch.Tensor`): Shape `(B, D)`, the groups of one prompt contiguous; need not be normalised.
        num_generations (`int`): Group size `G`; at least 2, and divides `B`.

    Returns:
        `torch.Tensor`: Shape `(P, G, D)`, float32 at least.

    Raises:
        ValueError: If `B` is not a multiple of `num_generations`, or an embedding has no length.
    """
    if num_generations < 2:
        raise ValueError(f"`num_generations` must be at least 2 to compare generations, got {num_generations}")
    if embeddings.ndim != 2 or embeddings.shape[0] == 0 or embeddings.shape[0] % num_generations:
        raise ValueError(
            f"`embeddings` must have shape (B, D) with B a multiple of `num_generations` ({num_generations}), got "
            f"{tuple(embeddings.shape)}"
        )
    embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    bad = _without_direction(embeddings)
    if bad.any():
        rows = bad.nonzero().flatten().tolist()
        raise ValueError(
            f"`embeddings` of rows {rows[:8]} have no direction (zero, infinite or NaN), so their cosine distance is "
            "undefined: the embedder must return a finite vector of non-zero length for every completion"
        )
    return unit_vectors(embeddings).view(-1, num_generations, embeddings.shape[1])


def pairwise_cosine_distance(embeddings: torch.Tensor, num_generations: int) -> torch.Tensor:
    """
    `1 - cos(E(y_i), E(y_j))` between the completions of each prompt.

    Eq. (3) of https://huggingface.co/papers/2410.06084.

    Args:
        embeddings (`torch.Tensor`): Shape `(B, D)`, the groups of one prompt contiguous; need not be normalised.
        num_generations (`int`): Group size `G`; at least 2, and divides `B`.

    Returns:
        `torch.Tensor`: Shape `(P, G, G)`, symmetric, zero on the diagonal, in `[0, 2]`.

    Raises:
        ValueError: If `B` is not a multiple of `num_generations`, or an embedding has no length.
    """
    unit = unit_groups(embeddings, num_generations)
    distance = (1 - unit @ unit.mT).clamp(0, 2)
    return distance * ~torch.eye(num_generations, dtype=torch.bool, device=distance.device)


def group_diversity(embeddings: torch.Tensor, num_generations: int) -> torch.Tensor:
    """
    Mean cosine distance of each completion to the other completions of its prompt: `r_j = mean_{i != j} d_ij`.

    The per-sample share of Eq. (7) of https://huggingface.co/papers/2410.06084; its mean over a group is Eq. (7).

    Args:
        embeddings (`torch.Tensor`): Shape `(B, D)`, the groups of one prompt contiguous; need not be normalised.
        num_generations (`int`): Group size `G`; at least 2, and divides `B`.

    Returns:
        `torch.Tensor`: Shape `(B,)`, no unit, in `[0, 2]`.

    Raises:
        ValueError: If `B` is not a multiple of `num_generations`, or an embedding has no length.
    """
    return pairwise_cosine_distance(embeddings, num_generations).sum(-1).flatten() / (num_generations - 1)


def diversity_advantages(embeddings: torch.Tensor, num_generations: int) -> torch.Tensor:
    """
    `r_j` minus a baseline that does not depend on `y_j`: `A_j = mean_{i != j} d_ij - mean_{i < k; i, k != j} d_ik`.

    With it `E[A_j * grad log p(y_j)]` is one half of the gradient of Eq. (3), at every G, as the paper's Eq. (4) is at
    two samples. The leave-one-out mean of the other rewards would still hold `d_ij`, and with it a share of `y_j`'s
    own reward: its advantage is `(G - 2) / (G - 1)` of this one. At `G = 2` no pair is left without j: the baseline
    there is the mean distance of the other prompts of the batch (0 where there is no other prompt).

    Args:
        embeddings (`torch.Tensor`): Shape `(B, D)` of the global batch (of all processes), groups contiguous.
        num_generations (`int`): Group size `G`; at least 2, and divides `B`.

    Returns:
        `torch.Tensor`: Shape `(B,)`, no unit.

    Raises:
        ValueError: If `B` is not a multiple of `num_generations`, or an embedding has no length.
    """
    distance = pairwise_cosine_distance(embeddings, num_generations)
    to_others = distance.sum(-1)  # (P, G), sum over i of d_ij
    reward = to_others / (num_generations - 1)
    total = to_others.sum(-1, keepdim=True) / 2  # (P, 1), sum over pairs
    if num_generations > 2:
        pairs_without_j = (num_generations - 1) * (num_generations - 2) / 2
        baseline = (total - to_others) / pairs_without_j
    elif (prompts := distance.shape[0]) > 1:
        baseline = ((total.sum() - total) / (prompts - 1)).expand_as(reward)
    else:
        baseline = torch.zeros_like(reward)
    return (reward - baseline).flatten()


class Embedder(Protocol):
    """
    E of Eq. (3) of https://huggingface.co/papers/2410.06084: called with a list, returns one vector per item.

    The items are strings for text, and `(waveform, sampling_rate)` pairs for audio (waveform float, 1-D; rate in Hz).
    The vectors have shape `(len(inputs), D)`, are finite, have a length above 0, and need not be normalised.
    """

    def __call__(self, inputs: list[Any], /) -> torch.Tensor: ...


class AudioDecoder(Protocol):
    """
    Anything that makes audio of token ids: the `codec` of a model whose completions are music.

    It may have a method `draft` for the critic: `draft(token_ids, lengths)` gives, for each number of ids in
    `lengths`, a list of what the beginnings of the streams sound like, in less time than `decode` takes for each
    ([`~trl_drcd.critic.embed_prefixes`]).
    """

    def decode(self, token_ids: list[list[int]]) -> list[tuple[torch.Tensor, int]]:
        """Waveforms (float32, 1-D) with their sampling rates in Hz, one per sequence of token ids."""


class ScoredRollout(NamedTuple):
    """
    The diversity of a rollout, of all processes: `embeddings (B, D)`, and of [`group_diversity`] the `rewards (B,)`.
    """

    embeddings: torch.Tensor
    rewards: torch.Tensor


class DiversityReward:
    """
    TRL reward callable: mean cosine distance of each completion to the others of its prompt, across all processes.

    Reward functions are called with the rows of one process, while a group may be spread over several: the embeddings
    are gathered first, so that any number of processes gives the same rewards. [`CFGDistillDiversityTrainer`]
    subtracts the unbiased baseline itself ([`diversity_advantages`]); in another trainer the baseline is that
    trainer's.

    Args:
        embedder (`Callable`): E. Called with a list of strings, or of `(waveform, sampling_rate)` pairs where there is
            a codec; returns `(len, D)`.
        num_generations (`int`, *optional*, defaults to 4): Group size `G`.
        codec (`AudioDecoder`, *optional*): Turns completion ids into audio; without it completions are text.
    """

    __name__ = "diversity"

    def __init__(self, embedder: Any, num_generations: int = 4, codec: AudioDecoder | None = None):
        if not callable(embedder):
            raise TypeError(f"`embedder` must be callable with a list, got {type(embedder).__name__}")
        if num_generations < 2:
            raise ValueError(f"`num_generations` must be at least 2 to compare generations, got {num_generations}")
        self.embedder = embedder
        self.num_generations = num_generations
        self.codec = codec

    def embed(self, completions: list, completion_ids: list[list[int]]) -> torch.Tensor:
        """
        Embeddings of this process's completions.

        Args:
            completions (`list`): `b` texts, or conversations whose turns' contents are joined.
            completion_ids (`list[list[int]]`): Their token ids; what the codec decodes.

        Returns:
            `torch.Tensor`: Shape `(b, D)`, float32 at least, on the process's device.

        Raises:
            TypeError: If the embedder returns no numbers.
            ValueError: If the embedder does not return one vector per completion.
        """
        if self.codec is not None:
            inputs: list = self.codec.decode(completion_ids)
        else:
            inputs = [c if isinstance(c, str) else "\n".join(turn["content"] for turn in c) for c in completions]
        return self.embed_decoded(inputs)

    def embed_decoded(self, inputs: list[Any]) -> torch.Tensor:
        """
        Embeddings of texts or sounds.

        Args:
            inputs (`list`): What the embedder reads.

        Returns:
            `torch.Tensor`: Shape `(len(inputs), D)`, float32 at least, on the process's device.

        Raises:
            TypeError: If the embedder returns no numbers.
            ValueError: If the embedder does not return one vector for each.
        """
        output = self.embedder(one_channel(inputs))
        try:
            embeddings = torch.as_tensor(output)
        except (TypeError, ValueError) as error:
            kind = type(output).__name__
            raise TypeError(f"`embedder` must return a tensor of shape ({len(inputs)}, D), got {kind}") from error
        if embeddings.ndim != 2 or embeddings.shape[0] != len(inputs):
            raise ValueError(
                f"`embedder` must return shape ({len(inputs)}, D) for {len(inputs)} completions, got "
                f"{tuple(embeddings.shape)}"
            )
        return embeddings.detach().to(PartialState().device, torch.promote_types(embeddings.dtype, torch.float32))

    def score(
        self, prompts: list, completions: list, completion_ids: list[list[int]], num_generations: int | None = None
    ) -> ScoredRollout:
        """
        Embeddings and rewards of the global batch, from the rows of this process.

        Args:
            prompts (`list`): `b` prompts, for messages.
            completions, completion_ids (`list`): See [`embed`].
            num_generations (`int`, *optional*): Group size `G`; that of the constructor if `None`.

        Returns:
            `ScoredRollout`: Of all processes, in the order of their ranks.

        Raises:
            BadBatchError: In every process, if in any one the embedder raises, or a vector has no direction.
        """
        group = self.num_generations if num_generations is None else num_generations
        report_status("it embeds")
        local, cause = torch.zeros(0, 0), None
        try:
            local = self.embed(completions, completion_ids)
            what = "the embedder's vector has no direction (it is zero, infinite or NaN)"
            problems = row_problems(what, _without_direction(local), prompts)
        except Exception as error:  # the other processes wait for this one's embeddings
            problems, cause = [f"the embedder raised {type(error).__name__}: {error}"], error
        raise_together(problems, cause)
        embeddings = gather(local)
        return ScoredRollout(embeddings, group_diversity(embeddings, group))

    def __call__(
        self, prompts: list, completions: list, completion_ids: list[list[int]], **kwargs: object
    ) -> list[float]:
        """
        Rewards `r_j` of this process's completions; see [`group_diversity`].

        Raises:
            BadBatchError: As [`score`] does.
        """
        rewards = self.score(prompts, completions, completion_ids).rewards
        start = PartialState().process_index * len(completions)
        return rewards[start : start + len(completions)].tolist()
