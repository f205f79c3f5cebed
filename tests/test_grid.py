"""Strategies, judging and the files of an evaluation, on a tiny model."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import make_model

from trl_drcd.evaluation import grid
from trl_drcd.evaluation.grid import EvaluateArguments, evaluate
from trl_drcd.evaluation.judging import Judges, between_prompts, distinct_n, frechet_distance, judge_samples
from trl_drcd.evaluation.metrics import diversity_between_prompts
from trl_drcd.evaluation.plots import front_plot, lambda_plot
from trl_drcd.evaluation.sampling import Samples
from trl_drcd.evaluation.strategies import Models, Row, expand

# ---------------------------------------------------------------- strategies


def test_a_list_is_a_sweep():
    rows = expand([
        {"name": "base"},
        {"name": "CFG", "guidance_scale": [2, 3]},
        {"name": "LERP", "models": ["a", "b"], "interpolation_weight": [0, 0.25], "temperature": 0.9},
        {"name": "uniform", "models": ["a", "b", "c", "d"]},
    ])  # fmt: skip
    assert [row.name for row in rows] == [
        "base", "CFG (gamma 2)", "CFG (gamma 3)", "LERP (T 0.9, lambda 0)", "LERP (T 0.9, lambda 0.25)", "uniform"
    ]  # fmt: skip
    assert rows[4].weights == (0.75, 0.25) and rows[5].weights == (0.25,) * 4
    assert len({row.slug for row in rows}) == 6 and all(re.fullmatch(r"[\w.]+", row.slug) for row in rows)


@pytest.mark.parametrize(
    ("strategies", "message"),
    [
        ([], "`strategies` is empty"),
        ([{"guidance_scale": 3}], r"`strategies\[0\]` must be a mapping with a `name`"),
        ([{"name": "a", "gamma": 3}], r"has \['gamma'\]; known are"),
        ([{"name": "a"}, {"name": "a"}], "the name of an earlier one"),
        ([{"name": "a", "guidance_scale": [1], "temperature": [1]}], "one list at most"),
        ([{"name": "a", "model": "x", "models": ["y"]}], "give one of them"),
        ([{"name": "a", "models": ["x"], "interpolation_weight": 0.5}], "is for two `models`"),
        ([{"name": "a", "models": ["x", "y"], "interpolation_weight": 1.5}], r"must be in \[0, 1\], got 1.5"),
        ([{"name": "a", "models": ["x", "y"], "weights": [0.5, 0.6]}], "`weights` must be finite and sum to 1"),
        ([{"name": "a", "temperature": 0}], "`temperature` must be finite and above 0, got 0"),
        ([{"name": "a", "guidance_scale": -1}], "`guidance_scale` must be finite and at least 0, got -1"),
    ],
)
def test_bad_strategies_are_refused(strategies, message):
    with pytest.raises(ValueError, match=message):
        expand(strategies)


def test_models_are_mixed_in_memory(tokenizer, tmp_path):
    ends = []
    for seed in (0, 1, 2):
        model = make_model(tokenizer, seed)
        model.save_pretrained(tmp_path / str(seed))
        ends.append(model.state_dict())
    models = Models(str(tmp_path / "0"))
    (a, b, c) = (str(tmp_path / str(seed)) for seed in (0, 1, 2))
    for weight in (0.25, 1.0, 0.0):
        mixed = models(Row("x", (b, c), (1 - weight, weight))).state_dict()
        for name, tensor in mixed.items():
            torch.testing.assert_close(tensor, (1 - weight) * ends[1][name] + weight * ends[2][name])
    assert models(Row("base")) is models.base
    single = models(Row("one", (c,), (1.0,))).state_dict()
    assert all(torch.equal(single[name], ends[2][name]) for name in single)
    assert all(torch.equal(tensor, ends[0][name]) for name, tensor in models.base.state_dict().items()), a


# ---------------------------------------------------------------- judging


def test_judged_by_hand():
    samples = Samples(["p", "q"], [[1], [2], [3], [4]], 2, seconds=1.0)
    vectors = {"a b": [1.0, 0.0], "a c": [0.0, 1.0], "b": [1.0, 1.0], "b b": [2.0, 2.0]}
    judges = Judges(
        embedder=lambda items: torch.tensor([vectors[item] for item in items]),
        adherence={"adherence": lambda prompts, items: torch.tensor([1.0, 2.0, 3.0, 5.0])},
        preference=lambda items: torch.tensor([0.0, 1.0, 2.0, 4.0]),
        rewards={"length": lambda prompts, completions, **kwargs: [float(len(c)) for c in completions]},
    )
    values, overall = judge_samples(samples, list(vectors), judges, omega=5.0)
    np.testing.assert_allclose(values["diversity"], [1.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(values["quality"], [5 * 1.5 + 0.5, 5 * 4 + 3])
    np.testing.assert_allclose(values["length"], [3, 2])
    assert overall["diversity_between_prompts"]["mean"] == pytest.approx(1 - 0.5**0.5)
    without = judge_samples(samples, list(vectors), Judges(adherence=judges.adherence), omega=5.0)[0]
    np.testing.assert_allclose(without["quality"], without["adherence"])


def test_distance_between_prompts_is_the_mean_over_pairs():
    embeddings = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    interval = between_prompts(embeddings, 3)
    assert interval["mean"] == pytest.approx(diversity_between_prompts(embeddings, 3))
    assert interval["low"] < interval["mean"] < interval["high"]


def test_distinct_n():
    assert distinct_n(["a b a b", "a b"], 2) == pytest.approx(2 / 4)  # ab, ba, ab; ab
    assert distinct_n(["a", ""], 2) == 0.0


def test_self_bleu_of_equal_and_of_different_texts():
    pytest.importorskip("sacrebleu")
    samples = Samples(["p", "q"], [[1]] * 4, 2, seconds=1.0)
    texts = ["the slow old harp played a tune"] * 2 + ["one two three four five", "six seven eight nine ten"]
    values, _ = judge_samples(samples, texts, Judges(), omega=5.0)
    assert values["self_bleu"][0] == pytest.approx(100) and values["self_bleu"][1] < 5


def test_frechet_distance_of_known_normals():
    eye = np.eye(3)
    assert frechet_distance(np.zeros(3), eye, np.zeros(3), eye) == pytest.approx(0)
    assert frechet_distance(np.zeros(3), eye, np.array([1.0, 2.0, 2.0]), eye) == pytest.approx(9)
    # Diagonal covariances: sum of (sigma_1 - sigma_2)^2
    assert frechet_distance(np.zeros(3), 4 * eye, np.zeros(3), 9 * eye) == pytest.approx(3)


# ---------------------------------------------------------------- the whole


@pytest.fixture
def args(tokenizer, tmp_path):
    for seed in (0, 1):
        make_model(tokenizer, seed).save_pretrained(tmp_path / str(seed))
    tokenizer.save_pretrained(tmp_path / "0")
    prompts = ["a slow tune", "fast <drum> & flute", "harp"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    ends = [str(tmp_path / "0"), str(tmp_path / "1")]
    strategies = [
        {"name": "base"},
        {"name": "CFG", "guidance_scale": [2.0, 3.0]},
        {"name": "LERP", "models": ends, "interpolation_weight": [0, 0.5, 1]},
    ]
    return EvaluateArguments(
        str(tmp_path / "0"), str(tmp_path / "p.jsonl"), strategies, output_dir=str(tmp_path / "out"), num_prompts=3,
        samples_per_prompt=4, max_new_tokens=5, listen=2,
    )  # fmt: skip


@pytest.fixture
def judged(monkeypatch):
    """Judges that look at the texts, without loading any model."""

    def embed(texts):
        words = ["slow", "fast", "harp", "drum", "flute", "tune"]
        return torch.tensor([[1.0] + [float(text.split().count(word)) for word in words] for text in texts])

    judges = Judges(embed, embed, {"adherence": lambda p, c: torch.tensor([float(len(text)) for text in c])})
    monkeypatch.setattr(Judges, "load", classmethod(lambda cls, args, rewards: judges))


def test_evaluation_writes_everything_and_does_nothing_twice(args, judged, tmp_path, monkeypatch):
    results = evaluate(args)
    output = tmp_path / "out"
    assert [row["name"] for row in results][-1] == "LERP (lambda 1)"
    lines = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert lines == results
    needed = {"quality", "adherence", "diversity", "diversity_second", "entropy_per_token", "tokens_per_second", "kl"}
    assert needed <= set(results[0]["metrics"])
    by_name = {row["name"]: row for row in results}
    assert by_name["CFG (gamma 3)"]["metrics"]["kl"]["mean"] == pytest.approx(0, abs=1e-5)
    # lambda 0 is the base: the same draws, the same samples
    assert by_name["LERP (lambda 0)"]["per_prompt"] == by_name["base"]["per_prompt"]
    for name in ("front.png", "front.svg", "lambda.png", "lambda.svg", "summary.csv", "report.html"):
        assert (output / name).stat().st_size > 0
    page = (output / "report.html").read_text()
    assert "fast &lt;drum&gt; &amp; flute" in page and "<drum>" not in page
    assert len((output / "summary.csv").read_text().splitlines()) == 1 + len(results)

    with open(output / "results.jsonl", "a") as file:
        file.write('{"torn')  # as after a crash
    monkeypatch.setattr(grid, "measure", lambda *a: pytest.fail("measured twice"))
    assert evaluate(args) == results
    assert (output / "results.jsonl").read_text().count("\n") == len(results)


def test_other_settings_are_measured_anew(args, judged):
    first = evaluate(args)
    args.seed = 1
    again = evaluate(args)
    assert len(again) == len(first) and again[0]["per_prompt"] != first[0]["per_prompt"]


def test_too_few_prompts(args):
    args.num_prompts = 4
    with pytest.raises(ValueError, match="has 3 different prompts, `num_prompts` is 4"):
        evaluate(args)


def test_plots_join_sweeps(args, judged):
    results = evaluate(args)
    (axes,) = front_plot(results).axes
    assert {"base", "CFG", "LERP"} <= {text.get_text() for text in axes.get_legend().get_texts()}
    panels = lambda_plot(results).axes
    assert len(panels) == 2
    np.testing.assert_allclose(panels[0].lines[0].get_xdata(), [0, 0.5, 1])
    assert lambda_plot(results[:1]) is None
