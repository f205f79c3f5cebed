"""
Kernels of the diversity reward: mean distance, or the volume that the completions of a prompt span.

Letters: `P` prompts, `G` generations per prompt, `B = P * G`, `D` embedding size.
"""

from __future__ import annotations

import torch

from trl_drcd.diversity import diversity_advantages, unit_groups

KERNELS = ("pairs", "logdet", "vendi")
# Added to the diagonal of the kernel, so that the share of a duplicate completion is not -infinity
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
    )  # (G, G, G): for each j, the off-diagonal entries of its row and column
    kernel = cosines + LOGDET_EPSILON * itself.to(cosines)
    without = kernel[:, None].masked_fill(cross, 0.0)
    explained = torch.einsum("pjni,pjik,pjnk->pjn", rows, torch.linalg.inv(without), rows)
    # At least epsilon for true cosines; predicted cosines may not belong to any set of vectors
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
    The contribution of each completion to the diversity of its group: `f(group) - f(group without j)`.

    Since `f(group without j)` does not depend on `y_j`, it is an unbiased baseline, and `mean_j share_j * grad log
    p(y_j)` has the expectation `grad E[f] / G`. The function f is

    - `"pairs"`: the sum of the distances of all pairs, divided by `G - 1`. The share is `r_j` of
      [`~trl_drcd.diversity.group_diversity`], and the gradient is half of that of Eq. (3). Two tight clusters can
      score as high as evenly spread completions.
    - `"logdet"`: `log det(C + 0.1 I)` of the cosines C, in nats: the volume spanned by the completions. A share lies
      in `[log 0.1, log 1.1]`.
    - `"vendi"`: the Vendi score (https://huggingface.co/papers/2210.02410), the exponential of the entropy of the
      eigenvalues of `C / G`: the effective number of distinct completions, in `[1, G]`.

    Args:
        cosines (`torch.Tensor`): Cosines inside each group, shape `(P, G, G)`.
        rows (`torch.Tensor`, *optional*): `S` alternative (e.g. predicted) rows of cosines of sample j to each sample
            i, used in place of the true ones, shape `(P, G, S, G)`; entries with `i = j` are ignored.
        kernel (`str`): `"pairs"`, `"logdet"` or `"vendi"`.

    Returns:
        `torch.Tensor`: Shape `(P, G)`, or `(P, G, S)` with `rows`; in the unit of f.

    Raises:
        ValueError: If `kernel` is unknown.
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

    The baseline has two parts. The first is the mean share of the other completions in the group without j, `mean_{k
    != j} (f(group without j) - f(group without j and k))`; at `G = 2` it is left out. The second is the mean advantage
    of the other prompts of the batch: it corrects for the smaller group of the first part, where shares are larger.

    Args:
        embeddings (`torch.Tensor`): Embeddings of the global batch (all processes), shape `(B, D)`, groups contiguous.
        num_generations (`int`): Group size `G`; at least 2, and divides `B`.
        kernel (`str`): `"pairs"`, `"logdet"` or `"vendi"`.

    Returns:
        `torch.Tensor`: Shape `(B,)`, in the unit of the kernel.

    Raises:
        ValueError: If `B` is not a multiple of `num_generations`, an embedding is zero, or `kernel` is unknown.
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
