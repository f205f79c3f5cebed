"""Drawing by the inverse of the distribution function, in two levels."""

import pytest
import torch

from trl_drcd.sampling import draw
from trl_drcd.sampling.drawing import BLOCK


def uniforms(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("vocabulary", [2, 13, BLOCK, BLOCK + 1, 5 * BLOCK - 3])
def test_tokens_are_those_of_one_search_in_float64(vocabulary):
    torch.manual_seed(0)
    logits, uniform = 3 * torch.randn(500, vocabulary), uniforms(500)
    p = (logits.double() / 0.9).softmax(-1)
    expected = torch.searchsorted(p.cumsum(-1), uniform[:, None], right=True)[:, 0]
    drawn = draw(logits.clone(), uniform, 0.9)
    assert (drawn.tokens != expected).sum() == 0
    torch.testing.assert_close(drawn.log_probs.double(), p.gather(1, expected[:, None])[:, 0].log(), rtol=0, atol=1e-5)
    assert drawn.finite.all()


def test_a_token_without_probability_is_never_drawn():
    """Not at the ends of the unit interval, nor where rounding meets the end of a block."""
    logits = torch.full((1, 3 * BLOCK), -torch.inf)
    logits[0, [1, BLOCK - 2, BLOCK + 5, 2 * BLOCK + 7]] = torch.tensor([0.3, 0.1, -9.0, 0.7])
    possible = logits.isfinite()[0]
    cumulated = logits.double().softmax(-1).cumsum(-1)[0, possible]
    ends = torch.cat([torch.zeros(1).double(), cumulated[:-1]])
    after, before = (torch.nextafter(ends, torch.full_like(ends, x)) for x in (2.0, -1.0))
    uniform = torch.cat([ends, after, before.clamp(min=0), torch.tensor([1 - 2.0**-53]).double(), uniforms(1000)])
    tokens = draw(logits.repeat(len(uniform), 1), uniform).tokens
    assert possible[tokens].all()
    assert tokens.unique().tolist() == possible.nonzero().flatten().tolist()


def test_rows_that_are_not_finite_are_drawn_uniformly():
    bad = torch.zeros(4, 10)
    bad[0, 3], bad[1, 3] = torch.nan, torch.inf
    bad[2] = -torch.inf
    drawn = draw(bad.repeat(1000, 1), uniforms(4000))
    assert drawn.finite.view(-1, 4).all(0).tolist() == [False, False, False, True]
    assert not drawn.finite.view(-1, 4)[:, :3].any()
    counts = drawn.tokens.view(-1, 4)[:, 0].bincount(minlength=10)
    assert counts.min() > 60 and len(counts) == 10


def test_frequencies_are_probabilities_of_a_large_vocabulary():
    """One token of a half, the rest flat: 2,200 draws."""
    logits = torch.zeros(1, 50_000)
    logits[0, 31_234] = torch.tensor(49_999.0).log()
    tokens = draw(logits.expand(200, -1).clone(), uniforms(200, 1)).tokens
    for seed in range(2, 12):
        tokens = torch.cat([tokens, draw(logits.expand(200, -1).clone(), uniforms(200, seed)).tokens])
    share = (tokens == 31_234).double().mean()
    assert abs(share - 0.5) < 4 * 0.5 / len(tokens) ** 0.5
    below = (tokens[tokens != 31_234] < 25_000).double()
    assert abs(below.mean() - 0.5) < 4 * 0.5 / len(below) ** 0.5
