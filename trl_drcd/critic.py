"""
The critic: what the beginning of a completion already tells about its diversity reward.

The reward of a completion depends on its embedding only through its cosines to the other completions of its prompt.
The embeddings of its prefixes, at a few fixed steps, predict these cosines, and the predicted reward is the baseline
of the tokens from there to the next prefix, a block:

    A_j(m) = sum_k gae_lambda^k (V_j(m + k + 1) - V_j(m + k)),    V_j = r_j at the end.

`V_j(m)` depends on the tokens of j before block m and on the *other* completions, never on j's later tokens. So at
`gae_lambda = 1`, where `A_j(m) = r_j - V_j(m)`, the gradient is unbiased however bad the prediction is; below 1 errors
of the prediction become bias, and the noise of later blocks is left out.

Letters: `P` prompts, `G` generations per prompt, `B = P * G` completions (groups whole and contiguous), `M` prefixes
of a completion, which part it into `M + 1` blocks, `S` steps, `D` embedding size. Rewards, values and advantages have
the unit of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from trl_drcd.credit import generalized_advantages, plain_reward, predicted_cosines, subtract_other_prompts
from trl_drcd.diversity import unit_groups
from trl_drcd.kernels import diversity_shares


class CriticOutput(NamedTuple):
    """Advantages of blocks `(B, M + 1)`, 0 for blocks that a completion has not, and metrics by log key."""

    advantages: torch.Tensor
    metrics: dict[str, float]


def prefix_steps(max_steps: int, num_prefixes: int, least: int = 1) -> list[int]:
    """
    Lengths of the prefixes in steps: equal parts of the longest completion.

    They do not depend on a completion's own length, which its prefix does not know.

    Args:
        max_steps (`int`): Longest completion.
        num_prefixes (`int`): `M`, at least 1.
        least (`int`, *optional*, defaults to 1): Steps that the shortest prefix must have; with `K` delayed codebooks
            `K`, for fewer steps hold no whole frame.

    Returns:
        `list[int]`: At most `num_prefixes` different lengths from `least` to `max_steps - 1`, rising.

    Raises:
        ValueError: If no prefix fits.
    """
    if num_prefixes < 1:
        raise ValueError(f"`num_prefixes` must be at least 1, got {num_prefixes}")
    steps = sorted({round(max_steps * m / (num_prefixes + 1)) for m in range(1, num_prefixes + 1)})
    steps = [step for step in steps if least <= step < max_steps]
    if not steps:
        raise ValueError(
            f"completions of at most {max_steps} steps have no prefix of {least} steps or more among "
            f"{num_prefixes}; give longer completions, or credit whole sequences"
        )
    return steps


def embed_prefixes(
    embed: Callable[[list[Any]], torch.Tensor],
    completion_ids: Sequence[list[int]],
    steps: Sequence[int],
    size: int,
    ids_per_step: int = 1,
    draft: Callable[[Sequence[list[int]], list[int]], list[list[Any]]] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Embeddings of the prefixes of completions, each prefix decoded so that nothing of what follows is in it.

    Args:
        embed (`Callable`): Embeddings `(len, D)` of a non-empty list of token ids, or of what `draft` makes of them.
        completion_ids (`Sequence[list[int]]`): `b` completions, without padding.
        steps (`Sequence[int]`): The `M` lengths of [`prefix_steps`].
        size (`int`): `D`.
        ids_per_step (`int`, *optional*, defaults to 1): `K` for codebooks.
        draft (`Callable`, *optional*): Decodes all prefixes at once: called with the completions and the lengths of
            prefixes in ids; returns, for each length, an item for each completion.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Embeddings `(b, M, D)`, and where there are some, bool `(b, M)`: only of
        prefixes that are shorter than the completion.
    """
    lengths = [step * ids_per_step for step in steps]
    reached = torch.tensor([[len(ids) > length for length in lengths] for ids in completion_ids])
    vectors = torch.zeros(*reached.shape, size)
    drafts = draft(completion_ids, lengths) if draft is not None else None
    for m, length in enumerate(lengths):
        rows = reached[:, m].nonzero().flatten().tolist()
        if rows:
            found = [completion_ids[row][:length] if drafts is None else drafts[m][row] for row in rows]
            vectors[rows, m] = embed(found).to(vectors)
    return vectors, reached


class PrefixCritic:
    """
    How much of what a prefix predicts comes true: one factor per prefix length, by least squares over earlier
    rollouts.

    The prediction is the reward that j would have if its prefix were all of it
    ([`~trl_drcd.credit.predicted_cosines`]), less the reward that is expected without any prediction. Early prefixes
    say little of the end; their factor is small.

    Args:
        num_prefixes (`int`): `M`.
        forget (`float`, *optional*, defaults to 0.95): Factor on the sums of earlier rollouts at each new one, in (0,
            1].
        prior (`float`, *optional*, defaults to 64): Weight of the prior, no prediction, in completions.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(self, num_prefixes: int, forget: float = 0.95, prior: float = 64.0):
        if num_prefixes < 1:
            raise ValueError(f"`num_prefixes` must be at least 1, got {num_prefixes}")
        if not 0 < forget <= 1:
            raise ValueError(f"`forget` must be above 0 and at most 1, got {forget}")
        if not prior > 0:
            raise ValueError(f"`prior` must be above 0, got {prior}")
        self.forget, self.prior = forget, prior
        # Of each prefix: sums of prediction times outcome, of squared predictions, of completions
        self.sums = torch.zeros(3, num_prefixes, dtype=torch.float64)

    def factors(self) -> torch.Tensor:
        """The factor of each prefix, shape `(M,)`, float64, in [0, 1]; 0 before the first rollout."""
        products, squares, counts = self.sums
        shrunk = squares * (1 + self.prior / counts.clamp(min=1))
        return (products / shrunk.clamp(min=1e-30)).clamp(0, 1)

    def fit(self, predictions: torch.Tensor, outcomes: torch.Tensor, reached: torch.Tensor) -> None:
        """
        Adds a rollout to the sums. Call it after the rollout's advantages are made, so that they never see themselves.

        Args:
            predictions, outcomes (`torch.Tensor`): What each prefix said of the reward, and what the reward was, both
                less the reward without prediction; shape `(B, M)`.
            reached (`torch.Tensor`): True where there is such a prefix, shape `(B, M)`.
        """
        x, y = (values.double().masked_fill(~reached, 0.0) for values in (predictions, outcomes))
        new = torch.stack([(x * y).sum(0), x.square().sum(0), reached.double().sum(0)])
        self.sums = self.forget * self.sums + new.cpu()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All that a checkpoint has to hold."""
        return {"sums": self.sums}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """
        Takes the sums of a checkpoint.

        Raises:
            ValueError: If they are of another number of prefixes.
        """
        if "sums" not in state or state["sums"].shape != self.sums.shape:
            found = tuple(state["sums"].shape) if "sums" in state else "nothing"
            raise ValueError(
                f"the checkpoint's critic has sums of shape {found}, this run's needs {tuple(self.sums.shape)}: "
                "resume with the number of prefixes and the completion length that it was trained with"
            )
        self.sums = state["sums"].to(self.sums)


def _unit_prefixes(prefixes: torch.Tensor, reached: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Unit embeddings `(P, G, M, D)`; the completion's own past its end, zero where a prefix has no direction."""
    lengths = prefixes.double().norm(dim=-1, keepdim=True)
    usable = lengths.isfinite() & (lengths > 0)
    known = torch.where(usable, prefixes.double(), 0.0) / torch.where(usable, lengths, 1.0)
    return torch.where(reached[..., None], known, unit.flatten(0, 1)[:, None]).unflatten(0, unit.shape[:2])


def critic_advantages(
    critic: PrefixCritic,
    prefixes: torch.Tensor,
    reached: torch.Tensor,
    embeddings: torch.Tensor,
    num_generations: int,
    gae_lambda: float = 1.0,
    kernel: str = "pairs",
    fit: bool = True,
) -> CriticOutput:
    """
    Advantages of the blocks of a rollout; afterwards the critic learns from it.

    With a critic that has seen nothing, `gae_lambda = 1` and `kernel = "pairs"` every block has the advantage of
    [`~trl_drcd.diversity.diversity_advantages`]; with any critic the expected gradient of `mean_j sum_n A_j(n) log
    p(step n)` is then the same. All arguments are those of the global batch, so that every process gets the same.

    Args:
        critic ([`PrefixCritic`]): Changed by the call where `fit`.
        prefixes (`torch.Tensor`): Embeddings of prefixes, shape `(B, M, D)`; need not be normalised.
        reached (`torch.Tensor`): True where the prefix is shorter than the completion, bool `(B, M)`.
        embeddings (`torch.Tensor`): Of the completions, shape `(B, D)`; need not be normalised.
        num_generations (`int`): Group size `G`; the groups are contiguous.
        gae_lambda (`float`): In [0, 1], per block.
        kernel (`str`): As in [`~trl_drcd.kernels.diversity_shares`].
        fit (`bool`): False in evaluation.

    Returns:
        `CriticOutput`: Advantages `(B, M + 1)`, and metrics: `critic/r2_q1` to `_q4`, the part of the rewards'
        variance about the sequence's baseline that the value explains in each quarter of the longest completion,
        before the fit; `critic/squared_advantage`, the mean square of the advantages over that of the sequence's.

    Raises:
        ValueError: If a shape does not fit, `gae_lambda` is not in [0, 1], or an embedding has no direction.
    """
    if not 0 <= gae_lambda <= 1:
        raise ValueError(f"`gae_lambda` must be in [0, 1], got {gae_lambda}")
    unit = unit_groups(embeddings, num_generations)
    dtype, unit = unit.dtype, unit.double()  # all of it is small
    shape = (len(embeddings), critic.sums.shape[1])
    if tuple(prefixes.shape) != (*shape, embeddings.shape[1]) or tuple(reached.shape) != shape:
        raise ValueError(
            f"`prefixes` (B, M, D) and `reached` (B, M) must agree with `embeddings` (B, D) {tuple(embeddings.shape)} "
            f"and the critic's M = {shape[1]}, got {tuple(prefixes.shape)} and {tuple(reached.shape)}"
        )
    cosines = unit @ unit.mT
    raw = torch.einsum("pjmd,pid->pjmi", _unit_prefixes(prefixes, reached, unit), unit)
    plain = plain_reward(cosines, kernel)  # (P, G, 1)
    predictions = (diversity_shares(cosines, predicted_cosines(raw, cosines), kernel) - plain).flatten(0, 1)
    rewards, plain = diversity_shares(cosines, kernel=kernel).flatten(), plain.flatten(0, 1)
    values = torch.cat([plain, plain + critic.factors().to(plain) * predictions], dim=1)
    mask = torch.cat([torch.ones_like(reached[:, :1]), reached], dim=1)

    def levelled(advantages: torch.Tensor) -> torch.Tensor:
        """Without what a value misses alike in all groups, where the rest of the group cannot tell its level."""
        if num_generations > 2 and kernel == "pairs":
            return advantages
        return subtract_other_prompts(advantages, mask, num_generations)

    advantages = levelled(generalized_advantages(values, rewards, mask, gae_lambda))
    errors = levelled(generalized_advantages(values, rewards, mask, 1.0))
    outcomes = levelled(generalized_advantages(plain.expand_as(values), rewards, mask, 1.0))
    metrics = _metrics(advantages, errors, outcomes)
    if fit:
        start = torch.zeros_like(plain)
        of_prefix = levelled(torch.cat([start, predictions], dim=1).masked_fill(~mask, 0.0))[:, 1:]
        critic.fit(of_prefix, outcomes[:, 1:], reached)
    return CriticOutput(advantages.to(dtype), metrics)


def _metrics(advantages: torch.Tensor, errors: torch.Tensor, outcomes: torch.Tensor) -> dict[str, float]:
    """R2 of the value by quarter of the blocks, and the size of the advantages; all of shape `(B, M + 1)`."""
    squares = torch.stack([advantages, errors, outcomes]).square().sum(1)  # (3, M + 1)
    blocks = squares.shape[1]
    metrics = {}
    for quarter in range(4):
        inside = [m for m in range(blocks) if 4 * m // blocks == quarter]
        if (total := float(squares[2, inside].sum())) > 0:
            metrics[f"critic/r2_q{quarter + 1}"] = 1 - float(squares[1, inside].sum()) / total
    total = float(squares[2].sum())
    return metrics | {"critic/squared_advantage": float(squares[0].sum()) / total if total > 0 else 0.0}
