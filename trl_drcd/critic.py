"""
Per-step advantages of the diversity reward from a critic of prefixes.

The reward of a completion depends on its embedding only through its cosines to the other completions of its prompt.
A ridge regression predicts these cosines from what the prefix already tells, and the predicted reward is the baseline
of the next token:

    A_j(n) = sum_k gae_lambda^k (V_j(n + k + 1) - V_j(n + k)),    V_j(S_j) = r_j.

`V_j(n)` depends on the tokens of j before step n and on the *other* completions, never on j's later tokens. So at
`gae_lambda = 1`, where `A_j(n) = r_j - V_j(n)`, the gradient is unbiased whatever the weights are; below 1 errors of
the critic become bias, and the noise of later steps is left out.

Letters: `P` prompts, `G` generations per prompt, `B = P * G` completions (groups whole and contiguous), `S` steps, `K`
codebooks, `H` hidden size, `F` features, `D` embedding size. Cosines, values and advantages have no unit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .credit import (
    Reduce,
    generalized_advantages,
    identity,
    minus_others,
    plain_reward,
    predicted_cosines,
    subtract_other_prompts,
)
from .diversity import unit_groups
from .kernels import diversity_shares

# Positions between which the weights are interpolated, at equal distances in the root of the step: what a prefix tells
# changes fast at its beginning
KNOTS = 3
CALIBRATION_KNOTS = 6
# Steps of a completion that the regressions read: neighbours hardly differ
FIT_STEPS = 32
LARGEST_FEATURES = 512
NORM_FEATURES = 64
MEMORY_LIMIT = 48 * 2**20  # bytes of statistics and weights
# The calibration has few numbers to find: it follows faster, and its prior, no prediction, weighs as much as this
CALIBRATION_FORGET = 0.95
CALIBRATION_PRIOR = 64  # sequences


class CriticOutput(NamedTuple):
    """Advantages `(B, S)`, 0 past the end of a completion, and metrics by log key, the same on every process."""

    advantages: torch.Tensor
    metrics: dict[str, float]


def running_mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Mean of the hidden states up to and with each step, `x_n = mean_{m <= n} h_m`; past the end the last one stays.

    Args:
        hidden (`torch.Tensor`): Hidden states that *predict* each step, so that `h_n` has read the tokens before step
            n alone; shape `(B, S, F)`.
        mask (`torch.Tensor`): True where a step counts, a prefix of each row; shape `(B, S)`.

    Returns:
        `torch.Tensor`: Shape `(B, S, F)`, float32 at least.
    """
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    kept = torch.where(mask[..., None], hidden, 0.0)  # not a product: what stands in padding may be NaN
    steps = mask.cumsum(1).clamp(min=1)
    return kept.cumsum(1) / steps[..., None]


def position_hats(steps: int, max_steps: int, knots: int) -> torch.Tensor:
    """
    Weights of interpolation between `knots` positions, which lie at equal distances in the root of the step.

    Returns:
        `torch.Tensor`: Shape `(steps, knots)`, float64; rows add up to 1, and two neighbours at most are not 0.
    """
    position = (torch.arange(steps, dtype=torch.float64) / max(max_steps - 1, 1)).sqrt().clamp(max=1) * (knots - 1)
    return (1 - (position[:, None] - torch.arange(knots)).abs()).clamp(min=0)


def fit_steps(steps: int, max_steps: int) -> torch.Tensor:
    """The steps below `steps` that the regressions read, int64: at equal distances in the root of the step."""
    root = (torch.arange(FIT_STEPS, dtype=torch.float64) + 0.5) / FIT_STEPS
    read = (max_steps * root.square()).long().unique()
    return read[read < steps]


def orthogonal_projection(hidden: torch.Tensor, size: int, seed: int = 0) -> torch.Tensor:
    """
    A seeded random projection to `size` features with orthogonal rows, without a matrix.

    Coordinates are permuted, their signs drawn, and as many as fit added up for each feature: `H` additions per step.

    Args:
        hidden (`torch.Tensor`): Shape `(..., H)`.
        size (`int`): `F`; where `H` is not larger, `hidden` comes back as it is.
        seed (`int`): Of the permutation and the signs, the same on every process and device.

    Returns:
        `torch.Tensor`: Shape `(..., F)`.
    """
    width = hidden.shape[-1]
    if width <= size:
        return hidden
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(width, generator=generator).to(hidden.device)
    signs = (2.0 * torch.randint(0, 2, (width,), generator=generator) - 1).to(hidden)
    per_feature = -(-width // size)
    mixed = torch.nn.functional.pad((hidden * signs)[..., order], (0, per_feature * size - width))
    return mixed.unflatten(-1, (size, per_feature)).sum(-1) / per_feature**0.5


def feature_size(hidden_size: int, embedding_size: int) -> int:
    """The most features, `hidden_size` or a power of two below it, whose sums and weights fit into memory."""

    def memory(size: int) -> int:  # bytes of float64: second moments, cross moments, weights
        return 8 * KNOTS * size * (size + 2 * embedding_size)

    if hidden_size <= LARGEST_FEATURES and memory(hidden_size) <= MEMORY_LIMIT:
        return hidden_size
    size = LARGEST_FEATURES
    while size > 1 and (size > hidden_size or memory(size) > MEMORY_LIMIT):
        size //= 2
    return size


class PrefixCritic:
    """
    Ridge regressions, in closed form from sums over the rollouts so far, that predict a reward from a prefix.

    The first one predicts the embedding: of `u_j`, less the mean of the others of its group, on the running mean of
    hidden states before step n ([`running_mean`]), less the same mean of the others. The second one makes a reward of
    it: the reward of [`predicted_cosines`], and the squared length of the predicted difference (in a tight group a
    completion is far from the others if it is far from their middle, in whatever direction), are scaled so that they
    fit best what the rewards of rollouts turned out to be that the first one had not seen yet. So a bad prediction
    counts little. Both have weights that are interpolated between a few positions, and forget earlier rollouts slowly,
    because student and hidden states change.

    Args:
        hidden_size (`int`): `H`; above a limit, which keeps the memory below 48 MiB, hidden states are projected at
            random.
        embedding_size (`int`): `D`.
        max_steps (`int`): Longest completion in steps; positions are relative to it, not to a completion's own length,
            which its prefix does not know.
        ridge (`float`): Weight of the prior of the first regression, zero, in sequences.
        forget (`float`): Factor on the sums of earlier rollouts at each new one, in (0, 1]; of the first regression.
        seed (`int`): Of the random projection.

    Raises:
        ValueError: If a size or setting is out of its range.
    """

    def __init__(
        self,
        hidden_size: int,
        embedding_size: int,
        max_steps: int,
        ridge: float = 256.0,
        forget: float = 0.99,
        seed: int = 0,
    ):
        for name, value in [
            ("hidden_size", hidden_size),
            ("embedding_size", embedding_size),
            ("max_steps", max_steps),
        ]:
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        if not ridge > 0:
            raise ValueError(f"`ridge` must be above 0, got {ridge}")
        if not 0 < forget <= 1:
            raise ValueError(f"`forget` must be above 0 and at most 1, got {forget}")
        self.ridge, self.forget, self.seed = ridge, forget, seed
        self.max_steps = max_steps
        self.size = feature_size(hidden_size, embedding_size)
        shapes = {
            "second_moments": (KNOTS, self.size, self.size),
            "cross_moments": (KNOTS, self.size, embedding_size),
            "sequences": (1,),
            "calibration_moments": (2 * CALIBRATION_KNOTS, 2 * CALIBRATION_KNOTS + 1),
            "calibration_sequences": (1,),
        }
        self._sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
        self._weights: torch.Tensor | None = None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The sums, by name, float64; all that a checkpoint has to hold."""
        return dict(self._sums)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """
        Takes the sums of a checkpoint.

        Raises:
            ValueError: If names or shapes are not this critic's.
        """
        for name, own in self._sums.items():
            found = tuple(state[name].shape) if name in state else "nothing"
            if found != tuple(own.shape):
                raise ValueError(
                    f"the checkpoint's critic has `{name}` of shape {found}, this run's needs {tuple(own.shape)}: "
                    "resume with the model and the embedder that it was trained with, or start anew"
                )
        self._sums = {name: state[name].to(own) for name, own in self._sums.items()}
        self._weights = None

    # ---------------------------------------------------------------- predicting

    def features(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """What is read of the prefix before each step, shape `(B, S, F)`, float32 at least."""
        return running_mean(orthogonal_projection(hidden, self.size, self.seed), mask)

    def weights(self) -> torch.Tensor:
        """Of the first regression, at each knot, shape `(KNOTS, F, D)`, float64; zeros before the first rollout."""
        if self._weights is None:
            moments, sequences = self._sums["second_moments"], self._sums["sequences"].clamp(min=1)
            level = moments.diagonal(dim1=1, dim2=2).mean(-1)
            strength = torch.where(level > 0, self.ridge * level / sequences, 1.0)  # without data any will do
            system = moments + strength[:, None, None] * torch.eye(self.size, dtype=torch.float64)
            self._weights = torch.cholesky_solve(self._sums["cross_moments"], torch.linalg.cholesky(system))
        return self._weights

    def calibration(self) -> torch.Tensor:
        """Of the second regression: factors of reward and squared length at each knot, shape `(2, knots)`, float64."""
        moments, cross = self._sums["calibration_moments"].split([2 * CALIBRATION_KNOTS, 1], dim=1)
        prior = 1e-6 + CALIBRATION_PRIOR / self._sums["calibration_sequences"].clamp(min=1)
        diagonal = moments.diagonal()
        diagonal = torch.where(diagonal > 0, prior * diagonal, 1.0)
        return torch.linalg.solve(moments + torch.diag(diagonal), cross).view(2, CALIBRATION_KNOTS)

    def _along(self, features: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Features `(P, G, S, F)` times a table `(KNOTS, 1 or P, F, C)` interpolated at each step; `(P, G, S, C)`."""
        hats = position_hats(features.shape[2], self.max_steps, KNOTS)
        left = (hats @ torch.arange(KNOTS, dtype=hats.dtype)).floor().clamp(max=KNOTS - 2)
        parts = []
        for knot in range(KNOTS - 1):
            here = (left == knot).nonzero().flatten().to(features.device)
            rows, near = features[:, :, here].to(table), hats.to(table)[here, :, None]
            parts.append(
                rows @ table[knot][:, None] * near[:, knot] + rows @ table[knot + 1][:, None] * near[:, knot + 1]
            )
        return torch.cat(parts, dim=2)

    def predictors(
        self, features: torch.Tensor, cosines: torch.Tensor, unit: torch.Tensor, kernel: str
    ) -> torch.Tensor:
        """
        What the second regression scales, each 0 where the first one knows nothing.

        Args:
            features (`torch.Tensor`): Shape `(B, S, F)`.
            cosines (`torch.Tensor`): True ones inside each group, shape `(P, G, G)`.
            unit (`torch.Tensor`): Unit embeddings, shape `(P, G, D)`.
            kernel (`str`): As in [`~trl_drcd.kernels.diversity_shares`].

        Returns:
            `torch.Tensor`: Reward of the predicted cosines less that of no prediction, and squared length of the
            predicted difference less the mean of the others'; shape `(2, P, G, S)`.
        """
        grouped, weights = features.unflatten(0, unit.shape[:2]), self.weights().to(features.device)
        # First the few directions, then the many steps: no `(B, S, D)` exists
        raw = self._along(grouped, weights[:, None] @ unit.to(weights).mT)
        reward = diversity_shares(cosines, predicted_cosines(raw, cosines), kernel)
        short = orthogonal_projection(weights, NORM_FEATURES, self.seed)[:, None].to(features)
        length = self._along(minus_others(grouped, dim=1), short).square().sum(-1)
        return torch.stack([reward - plain_reward(cosines, kernel), minus_others(length, dim=1).to(reward)])

    def values(self, predictors: torch.Tensor, cosines: torch.Tensor, kernel: str) -> torch.Tensor:
        """Predicted reward before each step, shape `(P, G, S)`, from [`PrefixCritic.predictors`]."""
        hats = position_hats(predictors.shape[-1], self.max_steps, CALIBRATION_KNOTS).to(predictors)
        factors = self.calibration().to(predictors) @ hats.T  # (2, S)
        return plain_reward(cosines, kernel) + (predictors * factors[:, None, None]).sum(0)

    # ---------------------------------------------------------------- learning

    def fit(
        self,
        features: torch.Tensor,
        mask: torch.Tensor,
        unit: torch.Tensor,
        predictors: torch.Tensor,
        targets: torch.Tensor,
        reduce: Reduce = identity,
    ) -> None:
        """
        Adds a rollout to the sums. Call it after the rollout's advantages are made, so that they never see themselves.

        A rollout with features that are not finite is left out, on all processes alike.

        Args:
            features (`torch.Tensor`): Shape `(B, S, F)`.
            mask (`torch.Tensor`): True where a step counts, shape `(B, S)`.
            unit (`torch.Tensor`): Unit embeddings, shape `(P, G, D)`.
            predictors (`torch.Tensor`): Those that this critic made of the rollout, shape `(2, B, S)`.
            targets (`torch.Tensor`): What the values should have added to the plain reward, shape `(B, S)`.
            reduce (`Callable`): Sums a tensor over the processes.
        """
        read = fit_steps(features.shape[1], self.max_steps).to(features.device)
        valid = mask[:, read, None].double()
        x = minus_others(features[:, read].unflatten(0, unit.shape[:2]), dim=1).flatten(0, 1).double() * valid
        y = minus_others(unit, dim=1).flatten(0, 1).double()
        z = torch.cat([predictors, targets[None]])[:, :, read].double() * valid[None, ..., 0]
        local, scaled = position_hats(features.shape[1], self.max_steps, KNOTS).to(x)[read], []
        for hats in local.T:
            weighted = x * hats[:, None]
            scaled.append(torch.cat([torch.einsum("bnf,bng->fg", weighted, x), weighted.sum(1).mT @ y], dim=1))
        hats = position_hats(features.shape[1], self.max_steps, CALIBRATION_KNOTS).to(x)[read]
        phi = torch.einsum("kbn,nq->bnkq", z[:2], hats).flatten(2)
        products = torch.einsum("bnk,bnl->kl", phi, torch.cat([phi, z[2, ..., None]], dim=-1))
        moments, products = reduce(torch.stack(scaled)).cpu(), reduce(products).cpu()
        rows = reduce(valid.new_tensor([float(len(mask))])).cpu()
        if not (moments.isfinite().all() and products.isfinite().all()):
            return
        second, cross = moments.split([self.size, y.shape[1]], dim=2)
        new = {"second_moments": second, "cross_moments": cross, "sequences": rows}
        for name, value in new.items():
            self._sums[name] = self.forget * self._sums[name] + value
        for name, value in {"calibration_moments": products, "calibration_sequences": rows}.items():
            self._sums[name] = CALIBRATION_FORGET * self._sums[name] + value
        self._weights = None


def critic_advantages(
    critic: PrefixCritic,
    hidden: torch.Tensor,
    mask: torch.Tensor,
    embeddings: torch.Tensor,
    num_generations: int,
    gae_lambda: float = 1.0,
    kernel: str = "pairs",
    reduce: Reduce = identity,
    fit: bool = True,
) -> CriticOutput:
    """
    Advantages of each step of a rollout; afterwards the critic learns from it.

    With a critic that has seen nothing, `gae_lambda = 1` and `kernel = "pairs"` every step of a completion has the
    advantage of [`~trl_drcd.diversity.diversity_advantages`]; at any critic, the expected gradient of `mean_j sum_n
    A_j(n) log p(step n)` is then the same.

    Args:
        critic ([`PrefixCritic`]): Changed by the call where `fit`.
        hidden (`torch.Tensor`): Hidden states that predict each step, shape `(B, S, H)`; of student or teacher.
        mask (`torch.Tensor`): True where a step counts, a prefix of each row; shape `(B, S)`.
        embeddings (`torch.Tensor`): Of the completions, shape `(B, D)`; need not be normalised.
        num_generations (`int`): Group size `G`; the groups are whole and contiguous.
        gae_lambda (`float`): In [0, 1].
        kernel (`str`): As in [`~trl_drcd.kernels.diversity_shares`].
        reduce (`Callable`): Sums a tensor over the processes, each of which has groups of its own.
        fit (`bool`): False in evaluation.

    Returns:
        `CriticOutput`: Advantages `(B, S)`, and metrics: `critic/r2_q1` to `_q4`, the part of the rewards' variance
        about the sequence's baseline that the value explains in each quarter of the completions, before the fit;
        `critic/squared_advantage`, the mean square of the advantages over that of the sequence's.

    Raises:
        ValueError: If a shape does not fit, `gae_lambda` is not in [0, 1], or an embedding has no direction.
    """
    if not 0 <= gae_lambda <= 1:
        raise ValueError(f"`gae_lambda` must be in [0, 1], got {gae_lambda}")
    unit = unit_groups(embeddings, num_generations)
    dtype, unit = unit.dtype, unit.double()  # what follows is small, but for the features
    if mask.shape != hidden.shape[:2] or len(mask) != len(embeddings):
        raise ValueError(
            f"`hidden` (B, S, H), `mask` (B, S) and `embeddings` (B, D) must agree, got {tuple(hidden.shape)}, "
            f"{tuple(mask.shape)} and {tuple(embeddings.shape)}"
        )
    features = critic.features(hidden, mask)
    cosines = unit @ unit.mT
    rewards = diversity_shares(cosines, kernel=kernel).flatten()
    predictors = critic.predictors(features, cosines, unit, kernel)
    values = critic.values(predictors, cosines, kernel).flatten(0, 1)
    plain = plain_reward(cosines, kernel).expand_as(predictors[0]).flatten(0, 1)

    def levelled(advantages: torch.Tensor) -> torch.Tensor:
        if num_generations == 2 or kernel != "pairs":
            return subtract_other_prompts(advantages, mask, num_generations, reduce)
        return advantages

    advantages = levelled(generalized_advantages(values, rewards, mask, gae_lambda))
    errors, targets = (levelled(generalized_advantages(v, rewards, mask, 1.0)) for v in (values, plain))
    metrics = _metrics(advantages, errors, targets, mask, reduce)
    if fit:
        flat = predictors.flatten(1, 2).masked_fill(~mask, 0.0)
        critic.fit(features, mask, unit, torch.stack([levelled(p) for p in flat]), targets, reduce)
    return CriticOutput(advantages.to(dtype), metrics)


def _metrics(
    advantages: torch.Tensor, errors: torch.Tensor, plain: torch.Tensor, mask: torch.Tensor, reduce: Reduce
) -> dict[str, float]:
    """R2 of the value by quarter of each completion's own length, and the size of the advantages."""
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    quarter = (4 * (mask.cumsum(1) - 1).clamp(min=0) // lengths).clamp(max=3)
    member = torch.nn.functional.one_hot(quarter, 4) * mask[..., None]
    squares = torch.stack([advantages, errors, plain]).square()
    of_advantages, of_errors, of_plain = reduce(
        torch.einsum("tbn,bnq->tq", squares.double(), member.double())
    ).tolist()
    r2 = {f"critic/r2_q{q + 1}": 1 - of_errors[q] / of_plain[q] for q in range(4) if of_plain[q] > 0}
    return r2 | {"critic/squared_advantage": sum(of_advantages) / max(sum(of_plain), 1e-30)}
