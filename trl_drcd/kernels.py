"""
Kernels of the diversity reward: mean distance, or the volume that the completions of a prompt span.

Letters: `P` prompts, `G` generations per prompt, `B = P * G`, `D` embedding size.
"""

from __future__ import annotations

import torch

from trl_drcd.diversity import diversity_advantages, unit_groups

KERNELS = ("pairs", "logdet", "vendi")
# Added to the diagonal of the kernel, so that the share of a copy of another completion is not -infinity
LOGDET_EPSILON = 0.1


def _without_own(rows: torch.Tensor) -> torch.Tensor:
    """Cosines `(P, G, S, G)` of sample j at step n to sample i; zero where i is j."""
    itself = torch.eye(rows.shape[1], dtype=torch.bool, device=rows.device)[:, None, :]
    return rows.masked_fill(itself, 0.0)


def _pairs_shares(cosines: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return 1 - rows.sum(-1) / (rows.shape[1] - 1)


def _logdet_shares(cosines: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    group = cosines.shape[-1]
    itself = torch.eye(group, dtype=torch.bool, device=cosines.device)
    cross = (
        itself[:, :, None] ^ itself[:, None, :]
    )  # (G, G, G): of j, what its row and column are but for the diagonal
    kernel = cosines + LOGDET_EPSILON * itself.to(cosines)
    without = kernel[:, None].masked_fill(cross, 0.0)
    explained = torch.einsum("pjni,pjik,pjnk->pjn", rows, torch.linalg.inv(without), rows)
    # Never below epsilon for cosines of vectors; a prediction may be none
    return (1 + LOGDET_EPSILON - explained).clamp(min=LOGDET_EPSILON).log()


def _vendi_score(cosines: torch.Tensor) -> torch.Tensor:
    """`exp(entropy)` of the eigenvalues of `cosines / G`, shape `(...)`."""
    values = torch.linalg.eigvalsh(cosines).clamp(min=0)
    values = values / values.sum(-1, keepdim=True)
    return torch.special.entr(values).sum(-1).exp()


def _vendi_shares(cosines: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    group = cosines.shape[-1]
    shares = []
    for j in range(group):
        kept = [i for i in range(group) if i != j]
        whole = cosines[:, None].repeat(1, rows.shape[2], 1, 1)
        whole[:, :, j, kept] = whole[:, :, kept, j] = rows[:, j, :, kept]
        others = cosines[:, kept][:, :, kept]
        shares.append(_vendi_score(whole) - _vendi_score(others)[:, None])
    return torch.stack(shares, dim=1)


def diversity_shares(cosines: torch.Tensor, rows: torch.Tensor | None = None, kernel: str = "pairs") -> torch.Tensor:
    """
    What each completion adds to the diversity of its group: `f(group) - f(group without j)`.

    Since `f(group without j)` does not depend on `y_j`, the share is a reward with an unbiased baseline, and `mean_j
    share_j * grad log p(y_j)` has the expectation `grad E[f] / G`, with f

    - `"pairs"`: the sum of the distances of all pairs over `G - 1`; the share is `r_j` of
      [`~trl_drcd.diversity.group_diversity`], and the gradient one half of that of Eq. (3). Two tight clusters score
      as well as a spread.
    - `"logdet"`: `log det(C + 0.1 I)` of the cosines C, in nats: the volume that the completions span. A share lies in
      `[log 0.1, log 1.1]`.
    - `"vendi"`: the Vendi score (https://huggingface.co/papers/2210.02410), the exponential of the entropy of the
      eigenvalues of `C / G`: the effective number of different completions, in `[1, G]`.

    Args:
        cosines (`torch.Tensor`): Cosines inside each group, shape `(P, G, G)`.
        rows (`torch.Tensor`, *optional*): Cosines of sample j to each sample i that stand in place of its true ones,
            one case after the other, shape `(P, G, S, G)`; entries with `i = j` are not read.
        kernel (`str`): `"pairs"`, `"logdet"` or `"vendi"`.

    Returns:
        `torch.Tensor`: Shape `(P, G)`, or `(P, G, S)` with `rows`.

    Raises:
        ValueError: If `kernel` is another.
    """
    functions = {"pairs": _pairs_shares, "logdet": _logdet_shares, "vendi": _vendi_shares}
    if kernel not in functions:
        raise ValueError(f"`diversity_kernel` must be one of {list(KERNELS)}, got {kernel!r}")
    if rows is None:
        return functions[kernel](cosines, _without_own(cosines[:, :, None])).squeeze(-1)
    return functions[kernel](cosines, _without_own(rows))


def kernel_advantages(embeddings: torch.Tensor, num_generations: int, kernel: str = "pairs") -> torch.Tensor:
    """
    [`diversity_shares`] minus a baseline that does not depend on `y_j`; for `"pairs"`,
    [`~trl_drcd.diversity.diversity_advantages`].

    The baseline is what the other completions add on average where j is left out of the group, `mean_{k != j} (f(group
    without j) - f(group without j and k))`, and then the mean advantage of the other prompts of the batch, for what
    one completion adds falls with their number. At `G = 2` only the latter is left.

    Args:
        embeddings (`torch.Tensor`): Shape `(B, D)` of the global batch (of all processes), groups contiguous.
        num_generations (`int`): Group size `G`; at least 2, and divides `B`.
        kernel (`str`): `"pairs"`, `"logdet"` or `"vendi"`.

    Returns:
        `torch.Tensor`: Shape `(B,)`, in the unit of the kernel.

    Raises:
        ValueError: If `B` is not a multiple of `num_generations`, an embedding has no length, or `kernel` is another.
    """
    if kernel == "pairs":
        return diversity_advantages(embeddings, num_generations)
    unit = unit_groups(embeddings, num_generations)
    cosines = unit @ unit.mT
    advantages = diversity_shares(cosines, kernel=kernel)
    if num_generations > 2:
        kept = [[i for i in range(num_generations) if i != j] for j in range(num_generations)]
        smaller = torch.stack([cosines[:, k][:, :, k] for k in kept], dim=1).flatten(0, 1)  # (P * G, G - 1, G - 1)
        advantages = advantages - diversity_shares(smaller, kernel=kernel).mean(-1).view_as(advantages)
    if (prompts := len(advantages)) > 1:
        sums = advantages.sum(-1, keepdim=True)
        advantages = advantages - (sums.sum() - sums) / ((prompts - 1) * num_generations)
    return advantages.flatten()
