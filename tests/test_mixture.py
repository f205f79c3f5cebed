"""Several embedders at once: distances, advantages and the log of their mixture."""

import pytest
import torch
from test_trainer import bag_of_words, make_trainer

from trl_drcd.diversity import diversity_advantages, group_diversity, pairwise_cosine_distance
from trl_drcd.mixture import EmbedderMixture, as_embedder, distance_scales


def lengths(texts):
    """Another embedder, of another size and far from unit length."""
    return torch.tensor([[10.0 * len(text), 7.0, float(text.count("a"))] for text in texts], dtype=torch.float64)


TEXTS = ["a slow tune", "harp", "fast drum a", "a a a", "flute", "slow", "a fast", "drum"]


def test_the_mixtures_distance_is_the_weighted_mean_of_distances():
    mixture = EmbedderMixture({"words": bag_of_words, "lengths": lengths}, {"words": 3.0}, {"lengths": 0.5})
    assert mixture.shares == pytest.approx({"words": 3 / 5, "lengths": 2 / 5})
    embeddings = mixture(TEXTS)
    assert embeddings.shape == (8, 11)
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(8), check_dtype=False)
    words, others = bag_of_words(TEXTS), lengths(TEXTS).float()
    for measure in (pairwise_cosine_distance, group_diversity, diversity_advantages):
        expected = 0.6 * measure(words, 4) + 0.4 * measure(others, 4)
        torch.testing.assert_close(measure(embeddings, 4).float(), expected, atol=1e-6, rtol=1e-5)
    expected = {"words": group_diversity(words, 4).mean().item(), "lengths": group_diversity(others, 4).mean().item()}
    assert mixture.diversities(embeddings, 4) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("factor", [1e-30, 1e-22, 1e20])
def test_lengths_of_vectors_do_not_count_however_extreme(factor):
    two = {"words": bag_of_words, "lengths": lengths}
    scaled = EmbedderMixture(two | {"words": lambda texts: bag_of_words(texts) * factor})(TEXTS)
    torch.testing.assert_close(scaled, EmbedderMixture(two)(TEXTS), atol=1e-6, rtol=1e-5)


def test_scales_make_embedders_of_other_spreads_count_alike():
    """One whose distances differ ten times as much gets a tenth of the weight."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(32, 6, generator=generator)

    def near(inputs):
        return 1 + 0.1 * spread[inputs]

    def far(inputs):
        return spread[inputs]

    embedders = {"near": near, "far": far}
    scales = distance_scales(embedders, list(range(32)))
    assert scales["far"] > 10 * scales["near"] > 0
    mixture = EmbedderMixture(embedders, scales=scales)
    parts = mixture(list(range(32))).split(6, dim=1)
    deviations = [(part @ part.T)[torch.triu_indices(32, 32, 1).unbind()].std() for part in parts]
    torch.testing.assert_close(deviations[0], deviations[1], rtol=1e-3, atol=0)


def test_what_cannot_be_right_is_refused_by_name():
    two = {"words": bag_of_words, "lengths": lengths}
    for arguments, message in [
        (({},), "`embedder` is an empty mapping"),
        ((two, {"word": 1.0}), r"`weights` names \['word'\]; the embedders are \['lengths', 'words'\]"),
        ((two, {"words": 0.0}), r"`weights\['words'\]` must be finite and above 0, got 0.0"),
        ((two, None, {"words": float("nan")}), r"`scales\['words'\]` must be finite and above 0, got nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            EmbedderMixture(*arguments)
    with pytest.raises(TypeError, match=r"`embedder\['words'\]` must be callable with a list, got int"):
        as_embedder({"words": 3})
    with pytest.raises(ValueError, match=r"`embedder\['short'\]` must return shape \(8, D\) .* got \(7, 3\)"):
        EmbedderMixture({"short": lambda texts: lengths(texts[1:])})(TEXTS)
    with pytest.raises(ValueError, match="at least 3 completions, got 2"):
        distance_scales(two, TEXTS[:2])
    with pytest.raises(ValueError, match="finds all `inputs` equally far apart"):
        distance_scales({"same": lambda texts: torch.ones(len(texts), 2)}, TEXTS)
    assert as_embedder(lengths) is lengths and as_embedder(None) is None
    assert EmbedderMixture({"zero": lambda texts: torch.zeros(len(texts), 2)})(TEXTS).isnan().all()


@pytest.mark.parametrize("credit", ["sequence", "critic"])
def test_the_trainer_takes_a_mapping_and_logs_each_diversity(tmp_path, tokenizer, credit):
    trainer = make_trainer(
        tmp_path, tokenizer, embedder={"words": bag_of_words, "lengths": lengths}, diversity_coef=1.0,
        diversity_credit=credit, max_steps=1,
    )  # fmt: skip
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "diversity" in entry)
    mean = (logged["diversity/words"] + logged["diversity/lengths"]) / 2
    assert logged["diversity"] == pytest.approx(mean, abs=1e-6)
    assert "eval_diversity/words" not in logged


def test_a_mixture_that_hears_needs_a_codec(tmp_path, tokenizer):
    from trl_drcd.audio import MusicDescriptors

    with pytest.raises(
        ValueError, match="`embedder` is a MusicDescriptors, which needs audio, but there is no `codec`"
    ):
        make_trainer(tmp_path, tokenizer, embedder={"words": bag_of_words, "tune": MusicDescriptors()})
