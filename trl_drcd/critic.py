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
        least (`int`, *optional*, defaults to 1): Steps that the shortest prefix must have: those of the first whole
            frame, with delayed codebooks.

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

    Raises:
        ValueError: If `embed` gives vectors of another shape.
    """
    lengths = [step * ids_per_step for step in steps]
    reached = torch.tensor([[len(ids) > length for length in lengths] for ids in completion_ids])
    vectors = torch.zeros(*reached.shape, size)
    drafts = draft(completion_ids, lengths) if draft is not None else None
    for m, length in enumerate(lengths):
        rows = reached[:, m].nonzero().flatten().tolist()
        if rows:
            found = [completion_ids[row][:length] if drafts is None else drafts[m][row] for row in rows]
            embedded = embed(found)
            if tuple(embedded.shape) != (len(rows), size):
                raise ValueError(f"its vectors have shape {tuple(embedded.shape)} instead of {(len(rows), size)}")
            vectors[rows, m] = embedded.to(vectors)
    return vectors, reached


def hidden_means(hidden: torch.Tensor, mask: torch.Tensor, steps: Sequence[int], size: int = 256) -> torch.Tensor:
    """
    Mean hidden state over each prefix of completions, at most `size` numbers of it.

    Args:
        hidden (`torch.Tensor`): Of the teacher, which at each step has read the steps before; shape `(b, S, H)`, or
            `(b, S, K, H)` for codebooks with states of their own, of which the first is taken: the others may have
            read codes of their own step.
        mask (`torch.Tensor`): True for the steps of a completion, bool `(b, S)`.
        steps (`Sequence[int]`): The `M` lengths of [`prefix_steps`].
        size (`int`, *optional*, defaults to 256): Larger states are projected to this size by fixed random signs.

    Returns:
        `torch.Tensor`: Float32 `(b, M, min(H, size))`. Of a completion that is shorter than a prefix, the mean over
        all of it, and zeros where it has no step; values that are not finite count as 0.
    """
    hidden, count = (hidden[:, :, 0] if hidden.ndim == 4 else hidden), mask.long().cumsum(1)
    total, means, start = hidden.new_zeros(len(hidden), hidden.shape[-1], dtype=torch.float32), [], 0
    for step in steps:
        end = min(step, hidden.shape[1] - 1) + 1  # the state before the first step of the next block
        part = torch.nan_to_num(hidden[:, start:end].float(), posinf=0.0, neginf=0.0)
        total = total + (part * mask[:, start:end, None]).sum(1)
        means.append(total / count[:, end - 1, None].clamp(min=1))
        start = end
    found = torch.stack(means, 1)
    if found.shape[-1] <= size:
        return found
    signs = torch.randint(0, 2, (found.shape[-1], size), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return found @ (signs.to(found) / size**0.5)


class PrefixCritic:
    """
    What a prefix tells of its completion, learnt from earlier rollouts.

    Each prefix predicts the cosines of its completion to the others of its prompt, and with them the reward less that
    expected without any prediction ([`~trl_drcd.credit.predicted_cosines`]), in one or two ways: as if it were all of
    the completion; and, with `hidden_states`, by ridge regression of the completion's unit embedding on the mean
    hidden states of the prefix, both less those of the group's others. A factor for each way and length, by least
    squares, says how much of it comes true: early prefixes say little of the end.

    Args:
        num_prefixes (`int`): `M`.
        forget (`float`, *optional*, defaults to 0.95): Factor on the factors' sums of earlier rollouts at each new
            one, in (0, 1].
        prior (`float`, *optional*, defaults to 64): Weight of the factors' prior, no prediction, in completions.
        hidden_states (`bool`, *optional*, defaults to `False`): Whether it reads [`hidden_means`] too.

    Raises:
        ValueError: If an argument is out of its range.
    """

    FORGET_RIDGE, PRIOR_RIDGE, BINS = 0.99, 256.0, 8  # a regression has more to learn than a factor

    def __init__(self, num_prefixes: int, forget: float = 0.95, prior: float = 64.0, hidden_states: bool = False):
        if num_prefixes < 1:
            raise ValueError(f"`num_prefixes` must be at least 1, got {num_prefixes}")
        if not 0 < forget <= 1:
            raise ValueError(f"`forget` must be above 0 and at most 1, got {forget}")
        if not prior > 0:
            raise ValueError(f"`prior` must be above 0, got {prior}")
        self.forget, self.prior, self.hidden_states = forget, prior, hidden_states
        self.ways = 2 if hidden_states else 1
        # Of each prefix: sums of predictions times outcome, of products of predictions, of completions
        self.sums = torch.zeros(self.ways + self.ways**2 + 1, num_prefixes, dtype=torch.float64)
        # Prefixes of about one length share a regression: the bin of each, and of each bin the sums of products of
        # features, of features with changes of the embedding, of rows; the first rollout tells the sizes
        bins = min(num_prefixes, self.BINS)
        self.bin_of = torch.arange(num_prefixes) * bins // num_prefixes
        self.gram, self.cross = torch.zeros(2, bins, 0, 0, dtype=torch.float64)
        self.rows = torch.zeros(bins, dtype=torch.float64)

    def factors(self) -> torch.Tensor:
        """The factor of each way and prefix, shape `(ways, M)`, float64, in [0, 1]; 0 before the first rollout."""
        products, squares, counts = self.sums.split([self.ways, self.ways**2, 1])
        squares = squares.T.unflatten(1, (self.ways, self.ways))
        diagonal = squares.diagonal(dim1=1, dim2=2)
        shrunk = squares + torch.diag_embed(diagonal * self.prior / counts.T.clamp(min=1) + 1e-30)
        return torch.linalg.solve(shrunk, products.T).clamp(0, 1).T

    def told(self, means: torch.Tensor, size: int) -> torch.Tensor:
        """
        What hidden states say of the embedding: `(..., M, F)` to `(..., M, size)`, float64; 0 at the first rollout.

        Raises:
            ValueError: If it has learnt from hidden states or embeddings of another size.
        """
        if not self.cross.numel():
            return means.new_zeros(*means.shape[:-1], size, dtype=torch.float64)
        if self.cross.shape[1:] != (means.shape[-1], size):
            raise ValueError(
                f"the critic has learnt from hidden states and embeddings of sizes {tuple(self.cross.shape[1:])}, "
                f"these have {(means.shape[-1], size)}"
            )
        # The prior in units of each feature: a few of a language model's hidden states are far larger than the others
        scale = self.gram.diagonal(dim1=1, dim2=2) / self.rows.clamp(min=1)[:, None]
        prior = self.PRIOR_RIDGE * self.bin_of.bincount()[:, None] * scale + 1e-30
        ridge = self.gram + torch.diag_embed(prior)
        # Positive definite. `solve`, which factors with pivots, fails in MKL for several matrices on several threads
        weights = torch.cholesky_solve(self.cross, torch.linalg.cholesky(ridge))[self.bin_of]
        return torch.einsum("...mf,mfd->...md", means.double(), weights.to(means.device))

    def fit(
        self,
        predictions: torch.Tensor,
        outcomes: torch.Tensor,
        reached: torch.Tensor,
        means: torch.Tensor | None = None,
        changes: torch.Tensor | None = None,
    ) -> None:
        """
        Adds a rollout to the sums. Call it after the rollout's advantages are made, so that they never see themselves.

        Args:
            predictions (`torch.Tensor`): What each prefix said of the reward, by way, less the reward without
                prediction; shape `(B, M, ways)`.
            outcomes (`torch.Tensor`): What the reward was, less the same; shape `(B, M)`.
            reached (`torch.Tensor`): True where there is such a prefix, shape `(B, M)`.
            means (`torch.Tensor`, *optional*): Of [`hidden_means`], less those of the group's others, `(B, M, F)`.
            changes (`torch.Tensor`, *optional*): Unit embeddings, less the mean of the group's others, `(B, D)`.
        """
        x = predictions.double().masked_fill(~reached[..., None], 0.0)
        y = outcomes.double().masked_fill(~reached, 0.0)
        squares = torch.einsum("bmk,bml->klm", x, x).flatten(0, 1)
        new = torch.cat([torch.einsum("bmk,bm->km", x, y), squares, reached.double().sum(0)[None]])
        self.sums = self.forget * self.sums + new.cpu()
        if means is None or changes is None:
            return
        z, bins = means.double().masked_fill(~reached[..., None], 0.0), self.bin_of.to(means.device)
        parts = [z[:, bins == number] for number in range(len(self.rows))]
        gram = torch.stack([torch.einsum("bmf,bmg->fg", part, part) for part in parts])
        cross = torch.stack([part.sum(1).T @ changes.double() for part in parts])
        rows = torch.stack([reached[:, bins == number].double().sum() for number in range(len(self.rows))])
        before = (self.gram, self.cross) if self.cross.numel() else (0.0, 0.0)
        self.gram = self.FORGET_RIDGE * before[0] + gram.cpu()
        self.cross = self.FORGET_RIDGE * before[1] + cross.cpu()
        self.rows = self.FORGET_RIDGE * self.rows + rows.cpu()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All that a checkpoint has to hold."""
        if not self.hidden_states:
            return {"sums": self.sums}
        return {"sums": self.sums, "gram": self.gram, "cross": self.cross, "rows": self.rows}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """
        Takes the sums of a checkpoint.

        Raises:
            ValueError: If they are of another number of prefixes, or of other hidden states.
        """
        for name, own in self.state_dict().items():
            size = own.shape[: 1 if name in ("gram", "cross") else None]  # of which the first rollout tells the rest
            if name not in state or state[name].shape[: len(size)] != size:
                found = tuple(state[name].shape) if name in state else "nothing"
                raise ValueError(
                    f"the checkpoint's critic has {name} of shape {found}, this run's needs {tuple(size)}: resume "
                    "with the number of prefixes, the completion length and the `diversity_hidden_states` that it was "
                    "trained with"
                )
        for name in self.state_dict():
            setattr(self, name, state[name].to(torch.float64))


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
    means: torch.Tensor | None = None,
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
        means (`torch.Tensor`, *optional*): Of [`hidden_means`], `(B, M, F)`; for a critic that reads hidden states. A
            completion of which nothing was read, all zeros, takes the mean of its group, and the critic does not
            learn from it.

    Returns:
        `CriticOutput`: Advantages `(B, M + 1)`, and metrics: `critic/r2_q1` to `_q4`, the part of the rewards'
        variance about the sequence's baseline that the value explains in each quarter of the longest completion,
        before the fit; `critic/squared_advantage`, the mean square of the advantages over that of the sequence's.

    Raises:
        ValueError: If a shape does not fit, `gae_lambda` is not in [0, 1], or an embedding has no direction.
    """
    _check_inputs(critic, prefixes, reached, embeddings, gae_lambda, means)
    unit = unit_groups(embeddings, num_generations)
    dtype, unit = unit.dtype, unit.double()  # all of it is small
    learns = reached
    if means is not None:
        means, read = _filled(means, num_generations)
        learns = reached & read[:, None]
    cosines = unit @ unit.mT
    expected = plain_reward(cosines, kernel)  # (P, G, 1)
    vectors = [_unit_prefixes(prefixes, reached, unit)]
    if means is not None:
        vectors.append(critic.told(means.unflatten(0, unit.shape[:2]), unit.shape[2]))

    def predicted(vectors: torch.Tensor) -> torch.Tensor:
        """The reward that prefixes with these embeddings `(P, G, M, D)` foretell, less `expected`, `(B, M)`."""
        raw = torch.einsum("pjmd,pid->pjmi", vectors, unit)
        return (diversity_shares(cosines, predicted_cosines(raw, cosines), kernel) - expected).flatten(0, 1)

    predictions = torch.stack([predicted(each) for each in vectors], -1)  # (B, M, ways)
    rewards, plain = diversity_shares(cosines, kernel=kernel).flatten(), expected.flatten(0, 1)
    values = torch.cat([plain, plain + (predictions * critic.factors().T.to(plain)).sum(-1)], dim=1)
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
        ways = [torch.cat([start, each], dim=1).masked_fill(~mask, 0.0) for each in predictions.unbind(-1)]
        of_prefix = torch.stack([levelled(each)[:, 1:] for each in ways], -1)
        learnt = (
            [None, None] if means is None else [_less_others(x, num_generations) for x in (means, unit.flatten(0, 1))]
        )
        critic.fit(of_prefix, outcomes[:, 1:], learns, *learnt)
    return CriticOutput(advantages.to(dtype), metrics)


def _check_inputs(
    critic: PrefixCritic,
    prefixes: torch.Tensor,
    reached: torch.Tensor,
    embeddings: torch.Tensor,
    gae_lambda: float,
    means: torch.Tensor | None,
) -> None:
    """Refuse arguments of [`critic_advantages`] that do not fit each other or the critic."""
    if not 0 <= gae_lambda <= 1:
        raise ValueError(f"`gae_lambda` must be in [0, 1], got {gae_lambda}")
    shape = (len(embeddings), critic.sums.shape[1])
    if tuple(prefixes.shape) != (*shape, embeddings.shape[1]) or tuple(reached.shape) != shape:
        raise ValueError(
            f"`prefixes` (B, M, D) and `reached` (B, M) must agree with `embeddings` (B, D) {tuple(embeddings.shape)} "
            f"and the critic's M = {shape[1]}, got {tuple(prefixes.shape)} and {tuple(reached.shape)}"
        )
    if critic.hidden_states is (means is None) or (means is not None and tuple(means.shape[:2]) != shape):
        wanted = f"(B, M, F), of {shape}" if critic.hidden_states else "None"
        raise ValueError(f"this critic needs `means` {wanted}, got {None if means is None else tuple(means.shape)}")


def _filled(means: torch.Tensor, num_generations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Means `(B, M, F)` with the mean of the group's others in place of all zeros, and which are their own, `(B,)`."""
    read = means.flatten(1).any(1)
    groups, weight = means.unflatten(0, (-1, num_generations)), read.view(-1, num_generations, 1, 1).to(means)
    level = (groups * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
    return torch.where(weight > 0, groups, level).flatten(0, 1), read


def _less_others(values: torch.Tensor, num_generations: int) -> torch.Tensor:
    """Values `(B, ...)` less their mean over the others of the group."""
    groups = values.double().unflatten(0, (-1, num_generations))
    return (groups - (groups.sum(1, keepdim=True) - groups) / (num_generations - 1)).flatten(0, 1)


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
