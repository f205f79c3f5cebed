"""The diversity estimator against exact enumeration, and the reward callable."""

import itertools

import pytest
import torch

from trl_drcd.diversity import DiversityReward, diversity_advantages, group_diversity, pairwise_cosine_distance


def test_distances_rewards_by_hand():
    embeddings = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])  # right angle, opposite, right angle
    expected = torch.tensor([[[0.0, 1.0, 2.0], [1.0, 0.0, 1.0], [2.0, 1.0, 0.0]]])
    torch.testing.assert_close(pairwise_cosine_distance(embeddings, 3), expected)
    torch.testing.assert_close(group_diversity(embeddings, 3), torch.tensor([1.5, 1.0, 1.5]))
    # A_j = r_j - the distance of the one pair without j
    torch.testing.assert_close(diversity_advantages(embeddings, 3), torch.tensor([1.5 - 1, 1.0 - 2, 1.5 - 1]))


def test_identical_completions_have_no_diversity_and_no_advantage():
    embeddings = torch.ones(4, 3)
    assert group_diversity(embeddings, 4).abs().max() < 1e-6
    assert diversity_advantages(embeddings, 4).abs().max() < 1e-6


OUTCOMES = 3


def toy(prompts: int):
    """Categorical policies over three outcomes, one per prompt, and an embedding of each outcome."""
    torch.manual_seed(1)
    theta = torch.randn(prompts, OUTCOMES, dtype=torch.float64, requires_grad=True)
    vectors = torch.randn(OUTCOMES, 4, dtype=torch.float64)
    unit = vectors / vectors.norm(dim=-1, keepdim=True)
    return theta, vectors, 1 - unit @ unit.T


def exact_gradient(theta, distance):
    """Gradient of the mean over prompts of Eq. (3): sum over pairs of p(a) p(b) d(a, b)."""
    p = theta.softmax(-1)
    diversity = torch.einsum("pa,pb,ab->p", p, p, distance * ~torch.eye(OUTCOMES, dtype=torch.bool)).mean()
    return torch.autograd.grad(diversity, theta)[0]


def expected_gradient(theta, vectors, group, advantages_of):
    """Expectation over all batches of `mean_j A_j grad log p(y_j)`, by enumeration of every batch."""
    prompts = theta.shape[0]
    log_p = theta.log_softmax(-1)
    expectation = torch.zeros_like(theta)
    for batch in itertools.product(range(OUTCOMES), repeat=prompts * group):
        y = torch.tensor(batch)
        prompt = torch.arange(prompts).repeat_interleave(group)
        log_probs = log_p[prompt, y]
        surrogate = (advantages_of(vectors[y]) * log_probs).mean()
        weight = log_probs.sum().exp().detach()
        expectation += weight * torch.autograd.grad(surrogate, theta, retain_graph=True)[0]
    return expectation


@pytest.mark.parametrize(("group", "prompts"), [(2, 2), (2, 3), (3, 1), (3, 2), (4, 1)])
def test_estimator_is_unbiased(group, prompts):
    """Its expectation is one half of the exact gradient at every G, as Eq. (4) is at two samples."""
    theta, vectors, distance = toy(prompts)
    expected = expected_gradient(theta, vectors, group, lambda e: diversity_advantages(e, group))
    torch.testing.assert_close(expected, exact_gradient(theta, distance) / 2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("group", [2, 3, 4])
def test_leave_one_out_mean_of_the_rewards_is_biased(group):
    """What RLOO subtracts still holds `d_ij`: its gradient is (G - 2) / (G - 1) of the right one."""

    def leave_one_out(embeddings):
        rewards = group_diversity(embeddings, group).view(-1, group)
        return (rewards - (rewards.sum(-1, keepdim=True) - rewards) / (group - 1)).flatten()

    theta, vectors, distance = toy(1)
    expected = expected_gradient(theta, vectors, group, leave_one_out)
    share = (group - 2) / (group - 1)
    torch.testing.assert_close(expected, share * exact_gradient(theta, distance) / 2, rtol=1e-9, atol=1e-12)
    if group > 2:
        embeddings = torch.randn(3 * group, 5, dtype=torch.float64)
        torch.testing.assert_close(leave_one_out(embeddings), share * diversity_advantages(embeddings, group))


def test_baseline_lowers_the_variance_where_most_completions_differ():
    """Two hundred outcomes at distances near 1: without a baseline the gradient is mostly noise."""
    torch.manual_seed(0)
    outcomes, groups, size = 200, 2000, 4
    log_p = torch.randn(outcomes).log_softmax(-1)
    vectors = torch.randn(outcomes, 32)
    draws = torch.multinomial(log_p.exp(), groups * size, replacement=True)
    scores = torch.nn.functional.one_hot(draws, outcomes) - log_p.exp()  # grad log p of a categorical policy

    def variance(weights):
        return (weights[:, None] * scores).view(groups, size, outcomes).mean(1).var(0).sum()

    embeddings = vectors[draws]
    assert variance(diversity_advantages(embeddings, size)) < variance(group_diversity(embeddings, size)) / 2


@pytest.mark.parametrize("function", [pairwise_cosine_distance, group_diversity, diversity_advantages])
def test_bad_embeddings_are_named(function):
    with pytest.raises(ValueError, match=r"at least 2 .* got 1"):
        function(torch.ones(4, 2), 1)
    with pytest.raises(ValueError, match=r"multiple of `num_generations` \(3\), got \(4, 2\)"):
        function(torch.ones(4, 2), 3)
    for bad in (0.0, torch.nan, torch.inf):
        embeddings = torch.ones(4, 2)
        embeddings[2] = bad
        with pytest.raises(ValueError, match=r"rows \[2\] have no direction"):
            function(embeddings, 2)


def test_reward_callable_on_texts_conversations_and_audio():
    table = {"x": [1.0, 0.0], "y": [0.0, 1.0]}
    reward = DiversityReward(lambda texts: torch.tensor([table[t] for t in texts]), num_generations=2)
    ids = [[1], [2], [1], [1]]
    assert reward(prompts=["p"] * 4, completions=["x", "y", "x", "x"], completion_ids=ids) == [1, 1, 0, 0]
    turns = [[{"role": "assistant", "content": c}] for c in "xyxx"]
    assert reward(prompts=["p"] * 4, completions=turns, completion_ids=ids, trainer_state=None) == [1, 1, 0, 0]

    class Codec:
        def decode(self, token_ids):
            return [(torch.full((4,), float(t[0])), 16000) for t in token_ids]

    def listen(audio):
        assert all(rate == 16000 for _, rate in audio)
        return torch.stack([torch.tensor([wave.mean().item(), 1.0]) for wave, _ in audio])

    heard = DiversityReward(listen, num_generations=2, codec=Codec())(["p"] * 4, [""] * 4, ids)
    assert heard[0] == heard[1] > 0.01 and heard[2:] == pytest.approx([0, 0], abs=1e-6)


def test_reward_callable_refuses_what_cannot_work():
    with pytest.raises(TypeError, match="`embedder` must be callable"):
        DiversityReward("a name")
    with pytest.raises(ValueError, match="at least 2"):
        DiversityReward(len, num_generations=1)
    with pytest.raises(ValueError, match=r"must return shape \(2, D\)"):
        DiversityReward(lambda texts: torch.ones(1, 3), 2)(["p"] * 2, ["x", "y"], [[1], [2]])
