"""The critic's advantages against exact enumeration of all groups of a toy autoregressive policy."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from trl_drcd import CFGDistillDiversityConfig
from trl_drcd.audio.codecs import CodebookCodec, delay
from trl_drcd.credit import generalized_advantages, per_code, predicted_cosines, subtract_other_prompts
from trl_drcd.critic import PrefixCritic, critic_advantages, embed_prefixes, hidden_means, prefix_steps
from trl_drcd.diversity import diversity_advantages
from trl_drcd.diversity_term import DiversityTerm

STEPS, SIZE = 3, 4


class ToyPolicy:
    """
    A policy whose logits, and an embedder whose vectors, are tables by prefix.

    Args:
        tokens, eos: Tokens 0 .. `tokens - 1`; with `eos`, token 0 ends a completion.
        codebooks, undrawn: Tokens of each step, each drawn from the steps before; those (step, codebook) are fixed.
    """

    def __init__(self, tokens=2, eos=False, codebooks=1, undrawn=(), steps=STEPS):
        torch.manual_seed(1)
        actions = list(itertools.product(range(tokens), repeat=codebooks))
        self.sequences, self.starts = [], list(range(1, steps))
        for sequence in itertools.product(actions, repeat=steps):
            cut = next((n for n, a in enumerate(sequence) if a[0] == 0), steps - 1) + 1 if eos else steps
            if sequence[:cut] not in self.sequences and not any(sequence[n][k] for n, k in undrawn):
                self.sequences.append(sequence[:cut])
        prefixes = sorted({s[:n] for s in self.sequences for n in range(steps + 1)})
        index = {prefix: i for i, prefix in enumerate(prefixes)}
        self.theta = torch.randn(len(prefixes), codebooks, tokens, dtype=torch.float64, requires_grad=True)
        vectors = torch.randn(len(prefixes), SIZE, dtype=torch.float64) + 1
        count = len(self.sequences)
        self.embeddings = torch.stack([vectors[index[s]] for s in self.sequences])
        self.prefixes = torch.full((count, steps - 1, SIZE), torch.nan, dtype=torch.float64)  # where none is, not read
        states = torch.randn(len(prefixes), 3, dtype=torch.float64)  # of the teacher, after each prefix
        self.means = torch.stack([
            torch.stack([states[index[s[: min(n, len(s))]]] for n in range(1, steps)]) for s in self.sequences
        ])  # fmt: skip
        self.peeking, self.reached = self.prefixes.clone(), torch.zeros(count, steps - 1, dtype=torch.bool)
        self.mask = torch.zeros(count, steps, codebooks, dtype=torch.bool)
        log_probs, rows = self.theta.log_softmax(-1), []
        for row, sequence in enumerate(self.sequences):
            parts = torch.zeros(steps, codebooks, dtype=torch.float64)
            for n, action in enumerate(sequence):
                if n > 0:
                    self.reached[row, n - 1] = True
                    self.prefixes[row, n - 1] = vectors[index[sequence[:n]]]
                    self.peeking[row, n - 1] = vectors[index[sequence[: n + 1]]]
                for k in range(codebooks):
                    if (n, k) not in undrawn:
                        self.mask[row, n, k] = True
                        parts[n, k] = log_probs[index[sequence[:n]], k, action[k]]
            rows.append(parts)
        self.code_log_probs = torch.stack(rows)  # (sequences, S, K)
        self.log_probs = self.code_log_probs.sum((1, 2))

    def exact(self):
        """One half of the gradient of Eq. (3)."""
        unit = torch.nn.functional.normalize(self.embeddings, dim=-1)
        p = self.log_probs.exp()
        return torch.autograd.grad((p[:, None] * p * (1 - unit @ unit.T)).sum() / 2, self.theta, retain_graph=True)[0]

    def expected(self, group, advantages_of, prompts=1):
        """`E[mean_j sum_n sum_k A_jnk grad log p(y_jnk)]` over all batches; `advantages_of(rows) -> (B, S, K)`."""
        batches = torch.cartesian_prod(*[torch.arange(len(self.sequences))] * (group * prompts))
        if prompts == 1:  # many groups in one batch, for what takes nothing from other prompts
            advantages = advantages_of(batches.flatten()).unflatten(0, batches.shape)
        else:
            advantages = torch.stack([advantages_of(batch) for batch in batches])
        weight = self.log_probs[batches].sum(1).exp().detach()
        surrogate = (advantages * self.code_log_probs[batches]).sum((2, 3)).mean(1)
        return torch.autograd.grad((weight * surrogate).sum(), self.theta, retain_graph=True)[0]


def wrong_critic(prefixes):
    """Prefixes of random vectors say nothing of the end; these factors believe them."""
    critic = PrefixCritic(prefixes)
    factors = torch.linspace(0.9, 0.4, prefixes)
    critic.load_state_dict({"sums": torch.stack([factors, torch.ones(prefixes), torch.full((prefixes,), 1e12)])})
    torch.testing.assert_close(critic.factors()[0].float(), factors)
    return critic


def wrong_reader(prefixes):
    """The same for hidden states, from which it has learnt nonsense."""
    critic = PrefixCritic(prefixes, hidden_states=True)
    generator = torch.Generator().manual_seed(3)
    sums = torch.tensor([0.9, 0.8, 1.0, 0.3, 0.3, 1.0, 1e12]).repeat(prefixes, 1).T
    random = [torch.randn(prefixes, size, generator=generator) for size in (3 * 3, 3 * SIZE)]
    gram = random[0].view(-1, 3, 3) @ random[0].view(-1, 3, 3).mT + torch.eye(3)
    rows = torch.full((prefixes,), 1e12)
    critic.load_state_dict({"sums": sums, "gram": gram, "cross": random[1].view(-1, 3, SIZE), "rows": rows})
    assert critic.told(torch.ones(1, prefixes, 3), SIZE).abs().max() > 0.5 and critic.factors().min() > 0.5
    return critic


def advantages_of(policy, group, gae_lambda=1.0, kernel="pairs", prefixes=None, hidden=False, means=None):
    prefixes = policy.prefixes if prefixes is None else prefixes
    critic = (wrong_reader if hidden else wrong_critic)(len(policy.starts))
    means = policy.means if means is None else means

    def make(rows):
        found = prefixes[rows], policy.reached[rows], policy.embeddings[rows]
        read = means[rows] if hidden else None
        output = critic_advantages(critic, *found, group, gae_lambda, kernel, fit=False, means=read)
        return per_code(output.advantages, policy.starts, policy.mask[rows])

    return make


def one_by_one(make, group):
    """As `make`, but each group alone: in a batch of one prompt there are no other prompts."""
    return lambda rows: torch.cat([make(part) for part in rows.split(group)])


# (tokens, eos, G): 8, 27, 4 and 15 completions; up to 50,625 groups
TOYS = [(2, False, 2), (2, False, 3), (2, False, 4), (3, False, 3)]
TOYS += [(2, True, 2), (2, True, 3), (2, True, 4), (3, True, 2), (3, True, 3), (3, True, 4)]


@pytest.mark.parametrize(("tokens", "eos", "group"), TOYS)
@pytest.mark.parametrize("hidden", [False, True])
def test_unbiased_however_wrong(tokens, eos, group, hidden):
    """At `gae_lambda` 1 the expected gradient is one half of the exact one, whatever prefixes and states say."""
    policy = ToyPolicy(tokens, eos)
    make = advantages_of(policy, group, hidden=hidden)
    expected = policy.expected(group, one_by_one(make, group) if group == 2 else make)
    torch.testing.assert_close(expected, policy.exact(), rtol=0, atol=1e-10)


def test_unbiased_with_another_prompt():
    """Two prompts a batch: at G = 2 each takes its level from the other one."""
    policy = ToyPolicy(2, eos=True)
    expected = policy.expected(2, advantages_of(policy, 2), prompts=2)
    torch.testing.assert_close(expected, policy.exact(), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("steps", "undrawn"), [(2, ()), (3, ((0, 1), (2, 0)))], ids=["parallel", "delayed"])
def test_unbiased_with_codebooks(steps, undrawn):
    """Two codes a step; delayed by one step, codebook 1 begins late and codebook 0 ends early."""
    policy = ToyPolicy(codebooks=2, undrawn=undrawn, steps=steps)
    expected = policy.expected(3, advantages_of(policy, 3))
    torch.testing.assert_close(expected, policy.exact(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("group", [2, 3])
def test_a_critic_that_peeks_is_found(group):
    """Prefixes that hold the first token of their own block: the enumeration must not pass."""
    policy = ToyPolicy(eos=True)
    make = advantages_of(policy, group, prefixes=policy.peeking)
    expected = policy.expected(group, one_by_one(make, group) if group == 2 else make)
    assert (expected - policy.exact()).abs().max() > 0.005


@pytest.mark.parametrize("group", [2, 3])
def test_hidden_states_that_know_the_end_are_found(group):
    """Those of the whole completion: the enumeration must not pass."""
    policy = ToyPolicy()
    whole = policy.means[:, -1:].expand_as(policy.means) * 3  # it has read one step more than the first block's
    make = advantages_of(policy, group, hidden=True, means=whole)
    expected = policy.expected(group, one_by_one(make, group) if group == 2 else make)
    assert (expected - policy.exact()).abs().max() > 1e-3


def test_below_one_a_wrong_critic_is_biased():
    policy = ToyPolicy(eos=True)
    expected = policy.expected(3, advantages_of(policy, 3, gae_lambda=0.5))
    assert (expected - policy.exact()).abs().max() > 0.005


def rollout(prompts=4, group=4, blocks=5, seed=0, shortest=2):
    """Completions of unequal length: the embedding of a prefix is the sum of what its blocks say."""
    generator = torch.Generator().manual_seed(seed)
    of_prompt = 2 * torch.randn(prompts, 1, 1, SIZE, generator=generator)
    parts = torch.randn(prompts, group, blocks, SIZE, generator=generator)
    sums = (of_prompt + parts.cumsum(2)).flatten(0, 1)
    last = torch.randint(shortest, blocks, (prompts * group, 1), generator=generator)
    embeddings = sums.take_along_dim(last[..., None], dim=1)[:, 0]
    return sums[:, :-1], torch.arange(blocks - 1) < last, embeddings


@pytest.mark.parametrize(("prompts", "group"), [(1, 2), (3, 2), (1, 3), (3, 3), (2, 8)])
def test_an_empty_critic_is_the_sequence_level(prompts, group):
    prefixes, reached, embeddings = rollout(prompts, group)
    everywhere = torch.ones_like(reached)
    output = critic_advantages(PrefixCritic(4), prefixes, everywhere, embeddings, group)
    expected = diversity_advantages(embeddings, group)[:, None].expand(-1, 5)
    torch.testing.assert_close(output.advantages, expected, atol=1e-6, rtol=1e-5)
    assert output.metrics["critic/squared_advantage"] == pytest.approx(1)
    assert output.metrics["critic/r2_q4"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("group", [2, 4])
def test_learns_and_explains_more_along_the_completion(group):
    critic = PrefixCritic(4)
    for seed in range(20):
        critic_advantages(critic, *rollout(group=group, seed=seed, shortest=4), group)
    factors = critic.factors()[0].tolist()
    assert 1 >= factors[3] > factors[0] > 0.1
    held_out = rollout(64, group, seed=100, shortest=4)
    metrics = critic_advantages(critic, *held_out, group, fit=False).metrics
    r2 = [metrics[f"critic/r2_q{q}"] for q in (1, 2, 3, 4)]
    assert r2 == sorted(r2) and r2[3] > 0.5 and r2[0] > 0
    assert metrics["critic/squared_advantage"] < 0.8
    short = critic_advantages(critic, *held_out, group, gae_lambda=0.0, fit=False)
    assert short.metrics["critic/squared_advantage"] < 0.7 * metrics["critic/squared_advantage"]


def test_blocks_past_the_end_have_no_advantage():
    prefixes, reached, embeddings = rollout()
    advantages = critic_advantages(PrefixCritic(4), prefixes, reached, embeddings, 4, 0.5).advantages
    assert (advantages[:, 1:][~reached] == 0).all() and (advantages[:, 0] != 0).all() and not reached.all()


@pytest.mark.parametrize("hidden", [False, True])
def test_a_rollout_is_never_used_for_its_own_advantages(hidden):
    learning, frozen = (PrefixCritic(4, hidden_states=hidden) for _ in range(2))
    for seed in range(4):
        frozen.load_state_dict(learning.state_dict())
        found = rollout(seed=seed)
        means = states_of(*found, seed) if hidden else None
        before = critic_advantages(frozen, *found, 4, fit=False, means=means).advantages
        after = critic_advantages(learning, *found, 4, means=means).advantages
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        assert not torch.equal(frozen.factors(), learning.factors())


def states_of(prefixes, reached, embeddings, seed, noise=0.3):
    """Hidden states that know of the end what is not audible yet: another basis, with noise."""
    generator = torch.Generator().manual_seed(1000 + seed)
    basis = torch.randn(SIZE, 6, generator=torch.Generator().manual_seed(5))
    known = torch.nn.functional.normalize(embeddings, dim=-1) @ basis
    return (known + noise * torch.randn(known.shape, generator=generator))[:, None].expand(-1, reached.shape[1], -1)


@pytest.mark.parametrize("kernel", ["pairs", "logdet"])
def test_hidden_states_explain_what_prefixes_do_not(kernel):
    blind, reader = PrefixCritic(4), PrefixCritic(4, hidden_states=True)
    for seed in range(40):
        found = rollout(8, seed=seed, shortest=4)
        critic_advantages(blind, *found, 4, kernel=kernel)
        critic_advantages(reader, *found, 4, kernel=kernel, means=states_of(*found, seed))
    held_out = rollout(64, seed=100, shortest=4)
    of_blind = critic_advantages(blind, *held_out, 4, kernel=kernel, fit=False).metrics
    of_reader = critic_advantages(
        reader, *held_out, 4, kernel=kernel, fit=False, means=states_of(*held_out, 9)
    ).metrics
    assert of_reader["critic/r2_q2"] > of_blind["critic/r2_q2"] + 0.15 and of_reader["critic/r2_q1"] > 0
    # Of hidden states that say nothing it learns to believe nothing
    deaf = PrefixCritic(4, hidden_states=True)
    for seed in range(40):
        found = rollout(8, seed=seed, shortest=4)
        critic_advantages(deaf, *found, 4, kernel=kernel, means=states_of(*found, seed, noise=1e3))
    of_deaf = critic_advantages(
        deaf, *held_out, 4, kernel=kernel, fit=False, means=states_of(*held_out, 9, 1e3)
    ).metrics
    assert of_deaf["critic/r2_q2"] > of_blind["critic/r2_q2"] - 0.05


def test_means_of_hidden_states_by_hand():
    """State n has read the tokens before n; a short completion has the mean over all of it; NaN counts as 0."""
    hidden = torch.arange(6.0)[None, :, None] + torch.tensor([0.0, 10.0])  # (1, 6, 2)
    mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    both = hidden.repeat(2, 1, 1)
    both[1, 3:] = torch.nan
    found = hidden_means(both, mask, [2, 4])
    expected = torch.tensor([[[1.0, 11], [2, 12]], [[1, 11], [1, 11]]])
    torch.testing.assert_close(found, expected)
    of_codebooks = torch.stack([both, both + 5, both + 7], 2)  # the later ones may have read codes of their own step
    torch.testing.assert_close(hidden_means(of_codebooks, mask, [2, 4]), expected)
    assert not hidden_means(both[1:], torch.zeros(1, 6, dtype=torch.bool), [2, 4]).any()
    wide = torch.randn(3, 6, 1000)
    small = hidden_means(wide, mask[:1].expand(3, -1), [2, 4], size=400)
    assert small.shape == (3, 2, 400) and torch.equal(small, hidden_means(wide, mask[:1].expand(3, -1), [2, 4], 400))
    whole = hidden_means(wide, mask[:1].expand(3, -1), [2, 4], size=1000)
    inner = [torch.einsum("amf,bmf->abm", x, x) / 1000 for x in (whole, small)]
    assert (inner[0] - inner[1]).abs().max() < 0.05  # random signs keep inner products


def test_generalized_advantages_by_hand():
    values, rewards = torch.tensor([[1.0, 2.0, 4.0], [1.0, 3.0, 9.0]]), torch.tensor([8.0, 5.0])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    # delta: 1, 2, 4 and 2, 2
    expected = {1.0: [[7, 6, 4], [4, 2, 0]], 0.0: [[1, 2, 4], [2, 2, 0]], 0.5: [[3, 4, 4], [3, 2, 0]]}
    for gae_lambda, advantages in expected.items():
        found = generalized_advantages(values, rewards, mask, gae_lambda)
        torch.testing.assert_close(found, torch.tensor(advantages, dtype=torch.float32))


def test_predicted_cosines_against_loops():
    torch.manual_seed(0)
    for group in (2, 3, 5):
        raw, cosines = torch.randn(2, group, 3, group), torch.randn(2, group, group)
        found = predicted_cosines(raw, cosines)
        for p, j, m, i in itertools.product(range(2), range(group), range(3), range(group)):
            if i != j:
                others = [k for k in range(group) if k not in (i, j)] or [i]
                level = sum(cosines[p, k, i] - raw[p, k, m, i] for k in others) / len(others)
                torch.testing.assert_close(found[p, j, m, i], raw[p, j, m, i] + level)


def test_other_prompts_by_hand():
    advantages = torch.tensor([[1.0, 3.0], [2.0, 0.0], [5.0, 7.0], [6.0, 9.0]])
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    # The first prompt's blocks have means 1.5 and 3 (one sample alive), the second's 5.5 and 8
    expected = torch.tensor([[1 - 5.5, 3 - 8.0], [2 - 5.5, 0.0], [5 - 1.5, 7 - 3.0], [6 - 1.5, 9 - 3.0]])
    torch.testing.assert_close(subtract_other_prompts(advantages, mask, 2), expected)
    torch.testing.assert_close(subtract_other_prompts(advantages[:2], mask[:2], 2), advantages[:2])


def test_per_code_by_hand():
    mask = torch.tensor([[[1, 0], [1, 1], [1, 1], [0, 1]], [[1, 0], [1, 1], [0, 1], [0, 0]]]).bool()
    found = per_code(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), [2], mask)
    expected = torch.tensor([[[1, 0], [1, 1], [2, 2], [0, 2]], [[3, 0], [3, 3], [0, 4], [0, 0]]])
    torch.testing.assert_close(found, expected.float())


def test_prefix_steps_are_parts_of_the_longest_completion():
    assert prefix_steps(200, 9) == list(range(20, 200, 20))
    assert prefix_steps(7, 9) == [1, 2, 3, 4, 5, 6]  # rounded together
    assert prefix_steps(40, 9, least=8) == [8, 12, 16, 20, 24, 28, 32, 36]
    for wrong, message in [((1, 3), "at most 1 steps have no prefix"), ((8, 0), "`num_prefixes` must be at least 1")]:
        with pytest.raises(ValueError, match=message):
            prefix_steps(*wrong)


def test_prefixes_are_decoded_for_themselves():
    """Two codes a step; a prefix as long as the completion is none, and an empty call is never made."""
    asked = []

    def embed(ids):
        asked.append(ids)
        return torch.tensor([[float(sum(row)), 1.0] for row in ids])

    completions = [[1, 2, 3, 4, 5, 6], [1, 1, 2, 2], [7, 7]]
    vectors, reached = embed_prefixes(embed, completions, [1, 2, 3], 2, ids_per_step=2)
    assert asked == [[[1, 2], [1, 1]], [[1, 2, 3, 4]]]
    assert reached.tolist() == [[True, True, False], [True, False, False], [False, False, False]]
    torch.testing.assert_close(vectors[..., 0], torch.tensor([[3.0, 10, 0], [2, 0, 0], [0, 0, 0]]))


def test_prefixes_can_be_drafted_at_once():
    """`draft` is called once for all completions and lengths; what is not reached is not embedded."""
    asked = []

    def draft(completions, lengths):
        asked.append((list(completions), lengths))
        return [[f"{ids[0]}{length}" for ids in completions] for length in lengths]

    completions = [[1, 2, 3, 4, 5, 6], [7, 1, 2, 2], [8, 7]]
    vectors, reached = embed_prefixes(
        lambda names: torch.tensor([[float(name), 1.0] for name in names]), completions, [1, 2, 3], 2, 2, draft
    )
    assert asked == [(completions, [2, 4, 6])]
    assert reached.tolist() == [[True, True, False], [True, False, False], [False, False, False]]
    assert vectors[..., 0].tolist() == [[12, 14, 0], [72, 0, 0], [0, 0, 0]]


def test_a_prefix_of_delayed_codebooks_is_its_whole_frames():
    """After n steps the frames before n - K + 1 are whole; the codes of later ones are not read."""
    codes = torch.randint(0, 9, (1, 10, 4), generator=torch.Generator().manual_seed(0))
    ids, codec = delay(codes, mask_id=9).flatten().tolist(), CodebookCodec(None, num_codebooks=4, mask_id=9)
    for step in prefix_steps(13, 5, least=4):
        assert torch.equal(codec.to_codes(ids[: step * 4]), codes[0, : step - 3])


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_shards_give_the_same(shards):
    """Each process embeds its own prefixes; gathered, they are those of one process, a group split or not."""
    completions = [[row + 1] * (row % 5 + 1) for row in range(8)]

    def embed(ids):
        return torch.tensor([[float(sum(row)), len(row), 1.0] for row in ids])

    whole = embed_prefixes(embed, completions, [1, 2, 3], 3)
    size = len(completions) // shards
    parts = [embed_prefixes(embed, completions[i : i + size], [1, 2, 3], 3) for i in range(0, 8, size)]
    gathered = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
    for found, expected in zip(gathered, whole, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("hidden", [False, True])
def test_state_goes_through_a_file(tmp_path, hidden):
    critic, resumed = (PrefixCritic(4, hidden_states=hidden) for _ in range(2))

    def read(seed):
        return states_of(*rollout(seed=seed), seed) if hidden else None

    for seed in range(2):
        critic_advantages(critic, *rollout(seed=seed), 4, means=read(seed))
    save_file(critic.state_dict(), tmp_path / "critic.safetensors")
    resumed.load_state_dict(load_file(tmp_path / "critic.safetensors"))
    for seed in (2, 3):  # bit for bit, in what comes out and in what is learnt
        outputs = [critic_advantages(c, *rollout(seed=seed), 4, 0.9, means=read(seed)) for c in (critic, resumed)]
        assert torch.equal(outputs[0].advantages, outputs[1].advantages) and outputs[0].metrics == outputs[1].metrics
    shape = r"\(7, 4\)" if hidden else r"\(3, 4\)"
    for state, found in [(critic.state_dict(), shape), ({}, "nothing")]:
        with pytest.raises(ValueError, match=rf"sums of shape {found}, this run's needs \(3, 7\)"):
            PrefixCritic(7).load_state_dict(state)
    with pytest.raises(ValueError, match=r"`diversity_hidden_states` that it was trained with"):
        PrefixCritic(4, hidden_states=not hidden).load_state_dict(critic.state_dict())


def test_a_prefix_without_direction_says_nothing_of_itself():
    prefixes, reached, embeddings = rollout()
    reached[:, 0] = True
    prefixes[0, 0], prefixes[1, 0] = 0.0, torch.nan
    output = critic_advantages(wrong_critic(4), prefixes, reached, embeddings, 4, 0.5)
    assert output.advantages.isfinite().all()


def test_what_cannot_be_right_is_refused():
    prefixes, reached, embeddings = rollout()
    with pytest.raises(ValueError, match=r"`gae_lambda` must be in \[0, 1\], got 1.5"):
        critic_advantages(PrefixCritic(4), prefixes, reached, embeddings, 4, gae_lambda=1.5)
    with pytest.raises(ValueError, match=r"the critic's M = 3, got \(16, 4, 4\) and \(16, 4\)"):
        critic_advantages(PrefixCritic(3), prefixes, reached, embeddings, 4)
    reader = PrefixCritic(4, hidden_states=True)
    with pytest.raises(ValueError, match=r"this critic needs `means` \(B, M, F\), of \(16, 4\), got None"):
        critic_advantages(reader, prefixes, reached, embeddings, 4)
    with pytest.raises(ValueError, match=r"this critic needs `means` None, got \(16, 4, 3\)"):
        critic_advantages(PrefixCritic(4), prefixes, reached, embeddings, 4, means=torch.zeros(16, 4, 3))
    critic_advantages(reader, prefixes, reached, embeddings, 4, means=torch.ones(16, 4, 3))
    with pytest.raises(ValueError, match=r"sizes \(3, 4\), these have \(5, 4\)"):
        critic_advantages(reader, prefixes, reached, embeddings, 4, means=torch.ones(16, 4, 5))
    with pytest.raises(ValueError, match="`diversity_kernel` must be one of"):
        critic_advantages(PrefixCritic(4), prefixes, reached, embeddings, 4, kernel="volume")
    for name, value in [("num_prefixes", 0), ("forget", 1.5), ("prior", 0.0)]:
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            PrefixCritic(**({"num_prefixes": 2} | {name: value}))


@pytest.mark.parametrize(("share", "most"), [(0.0, 0.15), (0.25, 0.32), (0.5, 0.48)])
def test_a_completion_of_which_nothing_was_read_teaches_nothing(share, most):
    """
    `mask_truncated_completions` hides whole rows from the teacher, whose states of them are zeros. Of those that were
    read the critic still leaves only a part of the squared advantages.
    """
    torch.manual_seed(0)
    direction, size, steps = torch.randn(6, 16, dtype=torch.float64), 4, 3
    critic, left, plain = PrefixCritic(steps, hidden_states=True), 0.0, 0.0
    for rollout in range(60):
        states = torch.randn(32, 1, 6, dtype=torch.float64)
        embeddings = states[:, 0] @ direction + 0.1 * torch.randn(32, 16, dtype=torch.float64)
        read = torch.rand(32) >= share
        means = (3 + states).expand(-1, steps, -1) * read[:, None, None]
        prefixes, reached = torch.randn(32, steps, 16), torch.ones(32, steps, dtype=torch.bool)
        found = critic_advantages(critic, prefixes, reached, embeddings, size, 1.0, "pairs", True, means)
        if rollout >= 40:
            left += found.advantages[read, 2].square().sum()
            plain += diversity_advantages(embeddings, size)[read].square().sum()
    assert left / plain < most


def test_an_embedder_whose_vectors_change_their_size_is_named():
    with pytest.raises(ValueError, match=r"its vectors have shape \(2, 2\) instead of \(2, 5\)"):
        embed_prefixes(lambda ids: torch.zeros(len(ids), len(ids[0])), [[1] * 5, [2] * 5], [2], 5)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_regression_is_that_of_the_normal_equations(threads):
    """At a hidden size at which MKL's factors with pivots fail on two threads."""
    generator, before, size, prefixes = torch.Generator().manual_seed(0), torch.get_num_threads(), 256, 39
    critic = PrefixCritic(prefixes, hidden_states=True)
    rows = torch.randn(critic.BINS, 640, size, generator=generator, dtype=torch.float64)
    told = torch.randn(critic.BINS, 640, 192, generator=generator, dtype=torch.float64)
    gram, cross = rows.mT @ rows, rows.mT @ told
    counts = torch.full((critic.BINS,), 640.0, dtype=torch.float64)
    critic.load_state_dict({"sums": critic.sums, "gram": gram, "cross": cross, "rows": counts})
    means = torch.randn(4, prefixes, size, generator=generator)
    try:
        torch.set_num_threads(threads)
        found = critic.told(means, 192)
    finally:
        torch.set_num_threads(before)
    for prefix, b in enumerate(critic.bin_of.tolist()):
        prior = critic.PRIOR_RIDGE * (critic.bin_of == b).sum() * gram[b].diagonal() / 640
        weights = np.linalg.solve((gram[b] + torch.diag(prior)).numpy(), cross[b].numpy())
        np.testing.assert_allclose(found[:, prefix].numpy(), means[:, prefix].double().numpy() @ weights, atol=1e-9)


def test_a_hidden_state_that_is_far_larger_than_the_others_does_not_drown_them():
    torch.manual_seed(0)
    direction = torch.randn(6, 16, dtype=torch.float64)

    def r2(scale):
        critic = PrefixCritic(1, hidden_states=True)
        for _ in range(30):
            states = torch.randn(32, 1, 6, dtype=torch.float64)
            embeddings = states[:, 0, 1:] @ direction[1:] + 0.1 * torch.randn(32, 16, dtype=torch.float64)
            states[..., 0] *= scale  # says nothing
            found = critic_advantages(
                critic, torch.randn(32, 1, 16), torch.ones(32, 1, dtype=torch.bool), embeddings, 4, means=states
            )
        return found.metrics["critic/r2_q3"]

    torch.manual_seed(1)
    expected = r2(1.0)
    torch.manual_seed(1)
    assert r2(100.0) == pytest.approx(expected, abs=0.02) and expected > 0.5


@pytest.mark.parametrize(("given", "reads"), [({}, True), ({"diversity_hidden_states": False}, False)])
def test_the_critic_of_a_training_reads_hidden_states_unless_told_not_to(tmp_path, given, reads):
    args = CFGDistillDiversityConfig(
        str(tmp_path), diversity_coef=1.0, max_completion_length=20, use_cpu=True, **given
    )
    policy = SimpleNamespace(first_frame_steps=1)
    assert DiversityTerm(None, None, args, policy, None).critic.hidden_states is reads
