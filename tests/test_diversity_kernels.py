"""Volume kernels of the diversity reward: shares and their advantages against exact enumeration."""

import math

import pytest
import torch
from test_critic import ToyPolicy, advantages_of, one_by_one

from trl_drcd.diversity import diversity_advantages, group_diversity, unit_groups
from trl_drcd.kernels import KERNELS, LOGDET_EPSILON, diversity_shares, kernel_advantages


def total(unit, kernel):
    """f of whole groups, from its definition; unit `(..., G, D)`, G from 1."""
    cosines = unit @ unit.mT
    group = cosines.shape[-1]
    if kernel == "logdet":
        return torch.logdet(cosines + LOGDET_EPSILON * torch.eye(group, dtype=cosines.dtype))
    values = torch.linalg.eigvalsh(cosines / group).clamp(min=1e-300)
    return torch.exp(-(values * values.log()).sum(-1))


def random_groups(prompts=3, group=4, size=6):
    torch.manual_seed(0)
    return torch.randn(prompts * group, size, dtype=torch.float64)


@pytest.mark.parametrize("group", [2, 3, 5])
def test_shares_from_the_definition(group):
    embeddings = random_groups(group=group)
    unit = unit_groups(embeddings, group)
    cosines = unit @ unit.mT
    torch.testing.assert_close(diversity_shares(cosines).flatten(), group_diversity(embeddings, group))
    for kernel in ("logdet", "vendi"):
        shares = diversity_shares(cosines, kernel=kernel)
        for j in range(group):
            without = unit[:, [i for i in range(group) if i != j]]
            torch.testing.assert_close(shares[:, j], total(unit, kernel) - total(without, kernel))


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_stand_in_place_of_the_true_cosines(kernel):
    """The row of another vector gives the share of a group in which that vector stands in place of j's."""
    unit = unit_groups(random_groups(), 4)
    other = unit_groups(random_groups(size=6).flip(0), 4)
    rows = torch.einsum("pjd,pid->pji", other, unit)
    both = torch.stack([unit @ unit.mT, rows], dim=2)  # (P, G, 2, G)
    shares = diversity_shares(unit @ unit.mT, both, kernel)
    torch.testing.assert_close(shares[:, :, 0], diversity_shares(unit @ unit.mT, kernel=kernel))
    for j in range(4):
        swapped = unit.clone()
        swapped[:, j] = other[:, j]
        torch.testing.assert_close(shares[:, j, 1], diversity_shares(swapped @ swapped.mT, kernel=kernel)[:, j])


def expected_of(policy, kernel, group):
    """Gradient of `E[f] / G` by enumeration of the groups, from the definition of f."""
    unit = torch.nn.functional.normalize(policy.embeddings, dim=-1)
    groups = torch.cartesian_prod(*[torch.arange(len(unit))] * group)
    weight = policy.log_probs[groups].sum(1).exp()
    return torch.autograd.grad((weight * total(unit[groups], kernel)).sum() / group, policy.theta, retain_graph=True)[
        0
    ]


@pytest.mark.parametrize("kernel", ["logdet", "vendi"])
@pytest.mark.parametrize("group", [2, 3, 4])
def test_sequence_level_is_unbiased(kernel, group):
    policy = ToyPolicy(2, eos=True)

    def make(rows):
        advantages = torch.cat([kernel_advantages(policy.embeddings[r], group, kernel) for r in rows.split(group)])
        return advantages[:, None, None].expand(-1, *policy.mask.shape[1:])

    torch.testing.assert_close(policy.expected(group, make), expected_of(policy, kernel, group), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kernel", ["logdet", "vendi"])
def test_sequence_level_is_unbiased_with_other_prompts(kernel):
    policy = ToyPolicy(2, eos=True)

    def make(rows):
        advantages = kernel_advantages(policy.embeddings[rows], 2, kernel)
        return advantages[:, None, None].expand(-1, *policy.mask.shape[1:])

    torch.testing.assert_close(policy.expected(2, make, 2), expected_of(policy, kernel, 2), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kernel", ["logdet", "vendi"])
@pytest.mark.parametrize(("group", "prompts"), [(2, 1), (3, 1), (4, 1), (2, 2)])
def test_a_wrong_critic_leaves_them_unbiased(kernel, group, prompts):
    policy = ToyPolicy(2, eos=True)
    make = advantages_of(policy, group, kernel=kernel)
    expected = policy.expected(group, make if prompts > 1 else one_by_one(make, group), prompts)
    torch.testing.assert_close(expected, expected_of(policy, kernel, group), rtol=0, atol=1e-10)


def test_two_tight_clusters_are_not_a_spread():
    """Eight vectors in two opposite clusters have more distance than eight right angles, and less volume."""
    generator = torch.Generator().manual_seed(0)
    side = torch.tensor([1.0, -1.0]).repeat(4)[:, None]
    clusters = side * torch.eye(8)[0] + 0.01 * torch.randn(8, 8, generator=generator)
    embeddings = torch.cat([clusters, torch.eye(8)])
    assert group_diversity(embeddings, 8)[:8].mean() > group_diversity(embeddings, 8)[8:].mean()
    unit = unit_groups(embeddings, 8)
    for kernel in ("logdet", "vendi"):
        shares = diversity_shares(unit @ unit.mT, kernel=kernel)
        assert shares[0].mean() < shares[1].mean()
    torch.testing.assert_close(diversity_shares(unit @ unit.mT, kernel="vendi")[1], torch.ones(8))
    torch.testing.assert_close(
        diversity_shares(unit @ unit.mT, kernel="logdet")[1], torch.full((8,), math.log(1 + LOGDET_EPSILON))
    )


def test_pairs_are_what_they_were_and_others_are_refused():
    embeddings = random_groups()
    assert torch.equal(kernel_advantages(embeddings, 4), diversity_advantages(embeddings, 4))
    with pytest.raises(ValueError, match=r"`diversity_kernel` must be one of \['pairs', 'logdet', 'vendi'\]"):
        diversity_shares(torch.eye(2)[None], kernel="volume")


@pytest.mark.parametrize("kernel", ["logdet", "vendi"])
def test_the_baseline_lowers_the_variance(kernel):
    embeddings = random_groups(prompts=200)
    unit = unit_groups(embeddings, 4)
    shares = diversity_shares(unit @ unit.mT, kernel=kernel)
    assert kernel_advantages(embeddings, 4, kernel).square().mean() < 0.7 * shares.square().mean()
