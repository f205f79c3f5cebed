"""The critic's advantages against exact enumeration of all groups of a toy autoregressive policy."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from safetensors.torch import load_file, save_file

from trl_drcd.credit import (
    generalized_advantages,
    minus_others,
    per_codebook,
    predicted_cosines,
    subtract_other_prompts,
)
from trl_drcd.critic import (
    CALIBRATION_KNOTS,
    KNOTS,
    PrefixCritic,
    critic_advantages,
    feature_size,
    orthogonal_projection,
    running_mean,
)
from trl_drcd.diversity import diversity_advantages

STEPS, HIDDEN, SIZE = 3, 5, 4


class ToyPolicy:
    """
    Tokens 0 .. `tokens - 1`; with `eos`, token 0 ends a completion. Logits, hidden states and embeddings are tables.

    Args:
        tokens, eos: The vocabulary.
        codebooks: Tokens drawn at each step, each from the steps before; those in `undrawn` (step, codebook) are
        fixed.
    """

    def __init__(self, tokens=2, eos=False, codebooks=1, undrawn=(), steps=STEPS):
        torch.manual_seed(1)
        self.eos = eos
        action = list(itertools.product(range(tokens), repeat=codebooks))
        self.sequences = []
        for sequence in itertools.product(action, repeat=steps):
            cut = next((n for n, a in enumerate(sequence) if a[0] == 0), steps - 1) + 1 if eos else steps
            if any(sequence[n][k] for n, k in undrawn):
                continue
            if sequence[:cut] not in self.sequences:
                self.sequences.append(sequence[:cut])
        prefixes = sorted({s[:n] for s in self.sequences for n in range(steps + 1)})
        self.index = {prefix: i for i, prefix in enumerate(prefixes)}
        self.theta = torch.randn(len(prefixes), codebooks, tokens, dtype=torch.float64, requires_grad=True)
        hidden = torch.randn(len(prefixes), HIDDEN, dtype=torch.float64)
        count = len(self.sequences)
        self.embeddings = torch.randn(count, SIZE, dtype=torch.float64) + 1
        self.mask = torch.zeros(count, steps, dtype=torch.bool)
        self.code_mask = torch.zeros(count, steps, codebooks, dtype=torch.bool)
        self.hidden = torch.full((count, steps, HIDDEN), torch.nan, dtype=torch.float64)  # padding is never read
        self.peeking = self.hidden.clone()
        log_probs, code = self.theta.log_softmax(-1), []
        for row, sequence in enumerate(self.sequences):
            self.mask[row, : len(sequence)] = True
            parts = torch.zeros(steps, codebooks, dtype=torch.float64)
            for n in range(len(sequence)):
                here = self.index[sequence[:n]]
                self.hidden[row, n] = hidden[here]
                self.peeking[row, n] = hidden[self.index[sequence[: n + 1]]]
                for k in range(codebooks):
                    if (n, k) not in undrawn:
                        self.code_mask[row, n, k] = True
                        parts[n, k] = log_probs[here, k, sequence[n][k]]
            code.append(parts)
        self.code_log_probs = torch.stack(code)  # (sequences, S, K)
        self.log_probs = self.code_log_probs.sum((1, 2))

    def exact(self):
        """One half of the gradient of Eq. (3)."""
        unit = torch.nn.functional.normalize(self.embeddings, dim=-1)
        p = self.log_probs.exp()
        return torch.autograd.grad((p[:, None] * p * (1 - unit @ unit.T)).sum() / 2, self.theta, retain_graph=True)[0]

    def expected(self, group, advantages_of, prompts=1):
        """`E[mean_j sum_n sum_k A_jnk grad log p(y_jnk)]` over all batches; `advantages_of(rows) -> (B, S, K)`."""
        count = len(self.sequences)
        batches = torch.cartesian_prod(*[torch.arange(count)] * (group * prompts))
        if prompts == 1:  # each group is a batch of its own: no term of another prompt
            advantages = advantages_of(batches.flatten()).unflatten(0, batches.shape)
        else:
            advantages = torch.stack([advantages_of(batch) for batch in batches])
        weight = self.log_probs[batches].sum(1).exp().detach()
        surrogate = (advantages * self.code_log_probs[batches]).sum((2, 3)).mean(1)
        return torch.autograd.grad((weight * surrogate).sum(), self.theta, retain_graph=True)[0]


def wrong_critic(seed=0):
    """Weights that have nothing to do with the policy."""
    critic, generator = PrefixCritic(HIDDEN, SIZE, STEPS), torch.Generator().manual_seed(seed)
    state = {n: torch.randn(t.shape, generator=generator).double() for n, t in critic.state_dict().items()}
    state["second_moments"] = torch.eye(HIDDEN).expand(KNOTS, -1, -1) / 5
    state["calibration_moments"][:, :-1] = torch.eye(2 * CALIBRATION_KNOTS)
    state["sequences"] = state["calibration_sequences"] = torch.tensor([1e6])
    critic.load_state_dict(state)
    assert critic.weights().abs().mean() > 1 and critic.calibration().abs().mean() > 0.3
    return critic


def advantages_of(policy, group, critic, gae_lambda=1.0, kernel="pairs", hidden=None):
    hidden = policy.hidden if hidden is None else hidden

    def make(rows):
        output = critic_advantages(
            critic, hidden[rows], policy.mask[rows], policy.embeddings[rows], group, gae_lambda, kernel, fit=False
        )
        return per_codebook(output.advantages, policy.code_mask[rows])

    return make


def one_by_one(make, group):
    """As `make`, but each group alone: at G = 2 a batch of one prompt has no other prompts."""
    return lambda rows: torch.cat([make(part) for part in rows.split(group)])


# (tokens, eos, G): 8, 27, 4 and 15 completions; up to 50,625 groups
TOYS = [(2, False, 2), (2, False, 3), (2, False, 4), (3, False, 3)]
TOYS += [(2, True, 2), (2, True, 3), (2, True, 4), (3, True, 2), (3, True, 3), (3, True, 4)]


@pytest.mark.parametrize(("tokens", "eos", "group"), TOYS)
def test_unbiased_for_any_weights(tokens, eos, group):
    """At `gae_lambda` 1 the expected gradient is one half of the exact one, however wrong the critic is."""
    policy = ToyPolicy(tokens, eos)
    make = advantages_of(policy, group, wrong_critic())
    expected = policy.expected(group, one_by_one(make, group) if group == 2 else make)
    torch.testing.assert_close(expected, policy.exact(), rtol=0, atol=1e-10)


def test_unbiased_with_another_prompt():
    """Two prompts a batch: at G = 2 each takes its level from the other one."""
    policy = ToyPolicy(2, eos=True)
    make = advantages_of(policy, 2, wrong_critic())
    torch.testing.assert_close(policy.expected(2, make, prompts=2), policy.exact(), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("steps", "undrawn"), [(2, ()), (3, ((0, 1), (2, 0)))], ids=["parallel", "delayed"])
def test_unbiased_with_codebooks(steps, undrawn):
    """Two codes a step; delayed by one step, codebook 1 begins late and codebook 0 ends early."""
    policy = ToyPolicy(codebooks=2, undrawn=undrawn, steps=steps)
    make = advantages_of(policy, 3, wrong_critic())
    torch.testing.assert_close(policy.expected(3, make), policy.exact(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("group", [2, 3])
def test_a_critic_that_peeks_is_found(group):
    """Hidden states that have read the very token of the step: the enumeration must not pass."""
    policy = ToyPolicy(eos=True)
    make = advantages_of(policy, group, wrong_critic(), hidden=policy.peeking)
    expected = policy.expected(group, one_by_one(make, group) if group == 2 else make)
    assert (expected - policy.exact()).abs().max() > 0.01


def test_below_one_a_wrong_critic_is_biased():
    policy = ToyPolicy(eos=True)
    expected = policy.expected(3, advantages_of(policy, 3, wrong_critic(), gae_lambda=0.5))
    assert (expected - policy.exact()).abs().max() > 0.01


def rollout(prompts=4, group=4, steps=12, seed=0):
    """Completions of unequal length, whose embeddings are what the mean of their hidden states says, plus noise."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    count = prompts * group
    hidden = draw(prompts, 1, 1, HIDDEN).expand(prompts, group, steps, HIDDEN).flatten(0, 1) + draw(
        count, steps, HIDDEN
    )
    lengths = torch.randint(steps // 2, steps + 1, (count, 1), generator=generator)
    mask = torch.arange(steps) < lengths
    reads = torch.randn(HIDDEN, SIZE, generator=torch.Generator().manual_seed(99))
    embeddings = running_mean(hidden, mask)[:, -1] @ reads + 0.05 * draw(count, SIZE) + 1
    return hidden.masked_fill(~mask[..., None], torch.nan), mask, embeddings


@pytest.mark.parametrize(("prompts", "group"), [(1, 2), (3, 2), (1, 3), (3, 3), (2, 8)])
def test_an_empty_critic_is_the_sequence_level(prompts, group):
    hidden, mask, embeddings = rollout(prompts, group)
    lengths = torch.full_like(mask, True)
    hidden = hidden.nan_to_num()
    output = critic_advantages(PrefixCritic(HIDDEN, SIZE, 12), hidden, lengths, embeddings, group)
    expected = diversity_advantages(embeddings, group)[:, None].expand(-1, 12)
    torch.testing.assert_close(output.advantages, expected, atol=1e-6, rtol=1e-5)
    assert output.metrics["critic/squared_advantage"] == pytest.approx(1)
    assert output.metrics["critic/r2_q4"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("group", "least"), [(2, 0.1), (4, 0.3)])
def test_learns_and_explains_more_along_the_completion(group, least):
    """On held-out prompts; at G = 2 the one other sample has to give the level, which is noise."""
    critic = PrefixCritic(HIDDEN, SIZE, 12)
    for seed in range(60):
        critic_advantages(critic, *rollout(group=group, seed=seed), group)
    held_out = rollout(64, group, seed=100)
    metrics = critic_advantages(critic, *held_out, group, fit=False).metrics
    r2 = [metrics[f"critic/r2_q{q}"] for q in (1, 2, 3, 4)]
    assert r2[3] == max(r2) > least and r2[0] > 0, r2
    assert metrics["critic/squared_advantage"] < 0.95
    short = critic_advantages(critic, *held_out, group, gae_lambda=0.0, fit=False)
    assert short.metrics["critic/squared_advantage"] < metrics["critic/squared_advantage"] / 2
    assert (short.advantages[~held_out[1]] == 0).all()


def test_a_rollout_is_never_used_for_its_own_advantages():
    rollouts = [rollout(seed=seed) for seed in range(3)]
    learning, frozen = PrefixCritic(HIDDEN, SIZE, 12), PrefixCritic(HIDDEN, SIZE, 12)
    for one in rollouts:
        frozen.load_state_dict(learning.state_dict())
        before = critic_advantages(frozen, *one, 4, fit=False).advantages
        torch.testing.assert_close(critic_advantages(learning, *one, 4).advantages, before, rtol=0, atol=0)
    assert not torch.equal(frozen.weights(), learning.weights())


def test_generalized_advantages_by_hand():
    values, rewards = torch.tensor([[1.0, 2.0, 4.0], [1.0, 3.0, 9.0]]), torch.tensor([8.0, 5.0])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    # delta: 1, 2, 4 and 2, 2
    expected = {1.0: [[7, 6, 4], [4, 2, 0]], 0.0: [[1, 2, 4], [2, 2, 0]], 0.5: [[3, 4, 4], [3, 2, 0]]}
    for gae_lambda, advantages in expected.items():
        found = generalized_advantages(values, rewards, mask, gae_lambda)
        torch.testing.assert_close(found, torch.tensor(advantages, dtype=torch.float32))


def test_running_mean_and_leave_one_out_by_hand():
    hidden = torch.tensor([[[2.0], [4.0], [torch.nan]], [[1.0], [3.0], [5.0]]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    means = running_mean(hidden, mask)
    torch.testing.assert_close(means[..., 0], torch.tensor([[2.0, 3.0, 3.0], [1.0, 2.0, 3.0]]))
    torch.testing.assert_close(minus_others(means, 0)[..., 0], torch.tensor([[1.0, 1.0, 0.0], [-1.0, -1.0, 0.0]]))


def test_predicted_cosines_against_loops():
    torch.manual_seed(0)
    for group in (2, 3, 5):
        raw, cosines = torch.randn(2, group, 3, group), torch.randn(2, group, group)
        found = predicted_cosines(raw, cosines)
        for p, j, n, i in itertools.product(range(2), range(group), range(3), range(group)):
            if i != j:
                others = [k for k in range(group) if k not in (i, j)] or [i]
                level = sum(cosines[p, k, i] - raw[p, k, n, i] for k in others) / len(others)
                torch.testing.assert_close(found[p, j, n, i], raw[p, j, n, i] + level)


def test_other_prompts_by_hand():
    advantages = torch.tensor([[1.0, 3.0], [2.0, 0.0], [5.0, 7.0], [6.0, 9.0]])
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    # The first prompt's steps have means 1.5 and 3 (one sample alive), the second's 5.5 and 8
    expected = torch.tensor([[1 - 5.5, 3 - 8.0], [2 - 5.5, 0.0], [5 - 1.5, 7 - 3.0], [6 - 1.5, 9 - 3.0]])
    torch.testing.assert_close(subtract_other_prompts(advantages, mask, 2), expected)
    torch.testing.assert_close(subtract_other_prompts(advantages[:2], mask[:2], 2), advantages[:2])


@pytest.mark.parametrize("shards", [2, 4])
@pytest.mark.parametrize(("group", "kernel"), [(2, "pairs"), (4, "pairs"), (4, "logdet")])
def test_shards_give_the_same(shards, group, kernel):
    """Threads stand for processes: each has groups of its own, and sums meet in `reduce`."""
    one = PrefixCritic(HIDDEN, SIZE, 12)
    many = [PrefixCritic(HIDDEN, SIZE, 12) for _ in range(shards)]
    barrier, box = Barrier(shards), [None] * shards

    def run(rank, part):
        def reduce(tensor):
            box[rank] = tensor
            barrier.wait()
            total = sum(box)
            barrier.wait()
            return total

        return critic_advantages(many[rank], *part, group, 0.9, kernel, reduce)

    for seed in range(3):
        whole = rollout(8, group, seed=seed)
        expected = critic_advantages(one, *whole, group, 0.9, kernel)
        parts = list(zip(*(tensor.chunk(shards) for tensor in whole), strict=True))
        with ThreadPoolExecutor(shards) as pool:
            outputs = list(pool.map(run, range(shards), parts))
        torch.testing.assert_close(torch.cat([o.advantages for o in outputs]), expected.advantages, atol=1e-6, rtol=0)
        assert all(o.metrics == pytest.approx(expected.metrics, abs=1e-6) for o in outputs)
    for critic in many:
        for name, tensor in critic.state_dict().items():
            torch.testing.assert_close(tensor, one.state_dict()[name], rtol=1e-6, atol=1e-6)


def test_state_goes_through_a_file(tmp_path):
    critic, resumed = PrefixCritic(HIDDEN, SIZE, 12), PrefixCritic(HIDDEN, SIZE, 12)
    for seed in range(2):
        critic_advantages(critic, *rollout(seed=seed), 4)
    save_file(critic.state_dict(), tmp_path / "critic.safetensors")
    resumed.load_state_dict(load_file(tmp_path / "critic.safetensors"))
    for seed in (2, 3):  # bit for bit, in what comes out and in what is learnt
        outputs = [critic_advantages(c, *rollout(seed=seed), 4, 0.9) for c in (critic, resumed)]
        assert torch.equal(outputs[0].advantages, outputs[1].advantages) and outputs[0].metrics == outputs[1].metrics
    with pytest.raises(ValueError, match=r"`second_moments` of shape \(3, 5, 5\), this run's needs \(3, 7, 7\)"):
        PrefixCritic(7, SIZE, 12).load_state_dict(critic.state_dict())
    with pytest.raises(ValueError, match="`cross_moments` of shape nothing"):
        critic.load_state_dict({"second_moments": critic.state_dict()["second_moments"]})


def test_features_that_are_not_finite_are_not_learnt():
    critic = PrefixCritic(HIDDEN, SIZE, 12)
    hidden, mask, embeddings = rollout()
    hidden[0, 0, 0] = torch.inf
    critic_advantages(critic, hidden, mask, embeddings, 4)
    assert not any(tensor.any() for tensor in critic.state_dict().values())


def test_projection_is_orthogonal_and_the_same_everywhere():
    for width, size in [(64, 16), (70, 16), (16, 16)]:
        rows = orthogonal_projection(torch.eye(width), size).T  # (size, width)
        gram = rows @ rows.T
        assert gram.shape == (size, size)
        torch.testing.assert_close(gram, torch.diag(gram.diagonal()))
        assert torch.equal(rows.T, orthogonal_projection(torch.eye(width), size))
        assert ((rows != 0).sum(0) == 1).all()


@pytest.mark.parametrize(("hidden", "embedding"), [(4096, 384), (4096, 1024), (8192, 4096), (576, 384), (256, 192)])
def test_memory_stays_below_64_mib(hidden, embedding):
    critic = PrefixCritic(hidden, embedding, 256)
    tensors = [*critic.state_dict().values(), critic.weights()]
    assert sum(t.numel() * t.element_size() for t in tensors) < 64 * 2**20
    assert critic.size == feature_size(hidden, embedding) >= 64
    assert critic.size == hidden or hidden > 256


def test_what_cannot_be_right_is_refused():
    hidden, mask, embeddings = rollout()
    critic = PrefixCritic(HIDDEN, SIZE, 12)
    with pytest.raises(ValueError, match=r"`gae_lambda` must be in \[0, 1\], got 1.5"):
        critic_advantages(critic, hidden, mask, embeddings, 4, gae_lambda=1.5)
    with pytest.raises(ValueError, match=r"must agree, got \(16, 12, 5\), \(16, 11\)"):
        critic_advantages(critic, hidden, mask[:, 1:], embeddings, 4)
    with pytest.raises(ValueError, match="`diversity_kernel` must be one of"):
        critic_advantages(critic, hidden, mask, embeddings, 4, kernel="volume")
    for name, value in [("hidden_size", 0), ("ridge", 0.0), ("forget", 1.5)]:
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            PrefixCritic(**({"hidden_size": 2, "embedding_size": 2, "max_steps": 2} | {name: value}))
