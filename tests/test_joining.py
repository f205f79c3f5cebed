"""Rows of several `results.jsonl` as one evaluation."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trl_drcd.evaluation.joining import joined, on_both, read_joined
from trl_drcd.evaluation.points import Comparison, pooled
from trl_drcd.evaluation.report_tables import points_table
from trl_drcd.evaluation.results import Result


def drawn(name: str, seed: int, kl: list[float], point: str | None = None, **settings) -> Result:
    metrics = {key: {"mean": 9.0, "low": 9.0, "high": 9.0} for key in ("kl", "frechet")}
    if "omega" in settings:
        metrics["quality"] = metrics["kl"]
    return Result(
        strategy=name, point=point or name, name=name, seed=seed, prompts=len(kl), samples_per_prompt=8,
        metrics=metrics,
        per_prompt={"kl": kl, "quality": kl}, **settings,
    )  # fmt: skip


def written(file: Path, *rows: Result) -> Path:
    file.write_text("".join(json.dumps(one.to_json()) + "\n" for one in rows))
    return file


def test_further_samples_are_joined_prompt_by_prompt(tmp_path):
    first = written(tmp_path / "0", drawn("base", 0, [1.0, 2.0, 6.0]), drawn("CFG", 0, [5.0, 5.0, 5.0]))
    second = written(tmp_path / "1", drawn("base", 1, [2.0, 4.0, float("nan")]))
    third = written(tmp_path / "2", drawn("base", 2, [3.0, 9.0, 8.0]))
    base, guided = read_joined(first, second, third)
    assert base.per_prompt == {"kl": [2.0, 5.0, 7.0], "quality": [2.0, 5.0, 7.0]}  # without the one that is missing
    assert base.samples_per_prompt == 24 and guided == drawn("CFG", 0, [5.0, 5.0, 5.0])
    assert base.metrics["frechet"]["mean"] == 9.0  # it has no values per prompt, and is that of the first
    assert base.metrics["kl"]["mean"] == pytest.approx(14 / 3) and base.metrics["kl"]["low"] < 14 / 3


def test_further_trainings_are_rows_of_the_same_point(tmp_path):
    trainings = [
        drawn(f"mine #{n}", 0, [float(n), 2.0], "mine", training_seed=n, model=f"outputs/{n}") for n in range(4)
    ]
    first = written(tmp_path / "0", trainings[0], trainings[1], drawn("base", 0, [1.0, 1.0]))
    later = written(tmp_path / "1", trainings[2], trainings[3])
    rows = read_joined(first, later)
    assert [row.name for row in rows] == ["mine #0", "mine #1", "base", "mine #2", "mine #3"]
    mine, base = pooled(rows)
    assert (mine.runs, base.runs) == (4, 1) and mine.values["kl"].tolist() == [[n, 2.0] for n in range(4)]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"temperature": 0.5}, "further trainings must have the same `temperature`, got 0.99 and 0.5"),
        ({"diversity_coef": 100.0}, "further trainings must have the same `diversity_coef`, got 200.0 and 100.0"),
        (
            {"but_model": "of others"},
            "mine #2 in .* must have .*of mine #0, .*`but_model` .*these, of others",
        ),
        ({"model_digest": "a"}, "mine #2 is the model of mine #0 once more"),
        ({"model_digest": None, "model": "outputs/0"}, "mine #2 is the model of mine #0 once more"),
        ({"training_seed": None}, "mine #2 is of the point of mine #0, but one of them has no number"),
    ],
)
def test_what_is_no_further_training_of_a_point(tmp_path, other, message):
    same = {"diversity_coef": 200.0, "but_model": "these", "point": "mine"}
    one = drawn("mine #0", 0, [1.0, 2.0], **same, training_seed=0, model="outputs/0", model_digest="a")
    two = {"training_seed": 2, "model": "outputs/2", "model_digest": "b"}
    first = written(tmp_path / "0", one, drawn("base", 0, [1.0, 1.0]))
    second = written(tmp_path / "1", drawn("mine #2", 0, [1.0, 2.0], **(same | two | other)))
    with pytest.raises(ValueError, match=message):
        read_joined(first, second)


def test_further_trainings_of_an_earlier_version_or_another_omega(tmp_path, caplog):
    same = {"point": "mine", "but_model": "these"}
    first = written(tmp_path / "0", drawn("mine #0", 0, [1.0, 2.0], **same, training_seed=0, model="0", omega=5.0))
    second = written(tmp_path / "1", drawn("mine #1", 0, [3.0, 4.0], **same, training_seed=1, model="1", omega=9.0))
    (mine,) = pooled(read_joined(first, second))
    assert mine.values.keys() == {"kl"} and "quality" not in mine.metrics and not caplog.text
    written(second, drawn("mine #1", 0, [3.0, 4.0], "mine", training_seed=1, model="1", omega=5.0))
    (mine,) = pooled(read_joined(first, second))
    assert mine.values.keys() == {"kl", "quality"} and "do not tell whether their prompts" in caplog.text


def test_joined_rows_have_the_values_of_all_their_samples_together():
    """For means over samples; the noise of two independent halves is smaller by the root of two."""
    values = np.random.default_rng(0).normal(size=(16, 400))
    halves = [drawn("base", seed, list(half.mean(0))) for seed, half in enumerate(values.reshape(2, 8, 400))]
    together = joined(halves)
    assert together.per_prompt["kl"] == pytest.approx(values.mean(0), rel=1e-4, abs=1e-5)
    widths = [np.std(one.per_prompt["kl"]) for one in (together, halves[0])]
    assert widths[0] / widths[1] == pytest.approx(2**-0.5, rel=0.1)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 0}, r"another `seed`, got \[0, 0\]"),
        ({"temperature": 0.5}, r"base: .* the same `temperature`, got 0.99 and 0.5"),
        ({"kl": [1.0, 2.0]}, "the same `prompts`, got 3 and 2"),
        ({"teacher_guidance_scale": 5.0}, "the same `teacher_guidance_scale`"),
        ({"name": "base #1", "point": "base", "training_seed": 1}, "base #1 is of the point of base, but one"),
        ({"but_seed": "of other prompts"}, r"the same prompts, model, judges and lengths, .*'these', 'of other"),
    ],
)
def test_what_is_no_further_sample_of_a_row(tmp_path, other, message):
    same = {"kl": [1.0, 2.0, 3.0], "but_seed": "these"}
    first = written(tmp_path / "0", drawn("base", 0, **same))
    second = written(tmp_path / "1", drawn(**({"name": "base", "seed": 1} | same | other)))
    with pytest.raises(ValueError, match=message):
        read_joined(first, second)


def test_rows_of_another_evaluation_stand_beside_the_first(tmp_path, caplog):
    first = written(tmp_path / "0", drawn("base", 0, [1.0, 2.0], but_row="these", omega=5.0))
    rows = [
        drawn("CFG", 0, [0.0, 1.0], but_row="these", omega=5.0),
        drawn("hot", 0, [3.0, 1.0], but_row="these", omega=9.0),
    ]
    base, cfg, hot = read_joined(first, written(tmp_path / "1", rows[0]), written(tmp_path / "2", rows[1]))
    assert [one.name for one in (base, cfg, hot)] == ["base", "CFG", "hot"] and not caplog.text
    assert "quality" in cfg.per_prompt and "quality" not in hot.per_prompt  # of other weights
    written(tmp_path / "2", drawn("hot", 0, [3.0, 1.0]))
    assert len(read_joined(first, tmp_path / "2")) == 2 and "do not tell whether their prompts" in caplog.text


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"but_row": "of others"}, "CFG in .*1 must have .* of base, .* digests `but_row` differ: these, of others"),
        ({"kl": [1.0]}, "base: CFG in .*1 must have the same `prompts`, got 2 and 1"),
        ({"teacher_guidance_scale": 5.0}, "the same `teacher_guidance_scale`, got 3.0 and 5.0"),
        ({"kind": "music"}, "the same `kind`"),
    ],
)
def test_rows_that_cannot_be_compared_with_the_first(tmp_path, other, message):
    first = written(tmp_path / "0", drawn("base", 0, [1.0, 2.0], but_row="these"))
    second = written(
        tmp_path / "1", drawn(**({"name": "CFG", "seed": 0, "kl": [1.0, 2.0], "but_row": "these"} | other))
    )
    with pytest.raises(ValueError, match=message):
        read_joined(first, second)


def test_another_omega_is_another_quality():
    rows = [drawn("base", seed, [1.0, 2.0], omega=float(seed)) for seed in range(2)]
    assert joined(rows).per_prompt.keys() == {"kl"}


def test_of_rows_that_do_not_say_what_they_are_samples_of_a_warning_tells(tmp_path, caplog):
    rows = [drawn("base", seed, [1.0, 2.0], but_seed="these" if seed else None) for seed in range(2)]
    assert joined(rows).per_prompt["kl"] == [1.0, 2.0] and "do not tell whether their prompts" in caplog.text


def test_two_rows_of_one_name_have_no_further_samples(tmp_path):
    first = written(tmp_path / "0", drawn("base", 0, [1.0]), drawn("base", 0, [2.0], temperature=0.5))
    second = written(tmp_path / "1", drawn("CFG", 1, [1.0]))
    assert len(read_joined(first)) == 2
    with pytest.raises(ValueError, match="has two rows base"):
        read_joined(first, second)


def test_rows_on_further_prompts_are_those_of_one_evaluation_on_all(tmp_path, caplog):
    rng, per_prompt = np.random.default_rng(0), {}
    names = ["base", "mine #0", "mine #1"]
    for name in names:
        per_prompt[name] = [float(f"{value:.6g}") for value in rng.normal(size=9)]

    def rows(prompts: slice, names: list[str], **digests) -> list[Result]:
        seeds = [int(name[-1]) if "#" in name else None for name in names]
        return [
            drawn(name, 0, per_prompt[name][prompts], name[:4], training_seed=seed, model=name, **digests)
            for name, seed in zip(names, seeds, strict=True)
        ]

    first = written(tmp_path / "0", *rows(slice(5), names[:2], but_row="some", but_model="some", but_prompts="both"))
    more = written(tmp_path / "1", *rows(slice(5), names[2:], but_row="some", but_model="some", but_prompts="both"))
    alone = drawn("CFG", 0, [1.0, 2.0, 3.0, 4.0], but_row="other", but_prompts="both")
    further = written(tmp_path / "2", *rows(slice(5, 9), names[::-1], but_row="other", but_prompts="both"), alone)
    both = read_joined(first, more, further_prompts=[further])
    assert [(row.name, row.prompts, row.per_prompt["kl"]) for row in both] == [
        (name, 9, per_prompt[name]) for name in names
    ]
    assert (
        "left out" in caplog.text and caplog.text.rstrip().endswith("only: CFG") and "frechet" not in both[0].metrics
    )
    intervals = []
    for points in (pooled(both), pooled(rows(slice(9), names))):
        compared = Comparison(points)
        intervals.append(compared.interval(compared.difference(points[1], points[0], "kl")))
    assert intervals[0] == intervals[1]


def test_rows_of_an_earlier_version_on_further_prompts(caplog):
    (row,) = on_both([drawn("base", 0, [1.0], omega=5.0)], [drawn("base", 0, [2.0, 3.0], omega=9.0)])
    assert row.per_prompt == {"kl": [1.0, 2.0, 3.0]} and row.metrics["kl"]["mean"] == 2.0 and row.prompts == 3
    assert caplog.messages == ["rows of an earlier version do not tell whether judges, lengths and dtype are the same"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"temperature": 0.5}, "base: further prompts must have the same `temperature`, got 0.99 and 0.5"),
        ({"samples_per_prompt": 16}, "the same `samples_per_prompt`, got 8 and 16"),
        ({"but_prompts": "by others"}, "the same model, base, judges, .* `but_prompts` differ: these, by others"),
        ({"model_digest": "b"}, "the digests `model_digest` differ: a, b"),
        ({"but_row": "first"}, "base: further prompts must be others, but these are the same"),
        ({"settings": "whole"}, "base: further prompts must be others, but these are the same"),
        ({"name": "CFG"}, r"no row has further prompts: \['base'\] and \['CFG'\]"),
    ],
)
def test_what_is_not_on_further_prompts(other, message):
    same = {"but_prompts": "these", "model_digest": "a"}
    first = drawn("base", 0, [1.0, 2.0], but_row="first", settings="whole", **same)
    second = replace(drawn("base", 0, [3.0], but_row="second", settings="rest", **same), **other)
    with pytest.raises(ValueError, match=message):
        on_both([first], [second])


def test_the_table_of_rows_on_further_prompts_has_no_speed():
    """That of one of them would not be that of both."""
    interval = {"mean": 2.0, "low": 1.0, "high": 3.0}
    row = replace(drawn("base", 0, [1.0]), metrics={"kl": interval, "tokens_per_second": interval})
    assert "tokens/s" in points_table(pooled([row])).header
    header = points_table(pooled(on_both([row], [replace(row, seed=1)]))).header
    assert header == ["", "KL to the guided teacher (nats)", "passes per token"]


def test_two_rows_of_one_name_have_no_further_prompts():
    with pytest.raises(ValueError, match="the other set of prompts has two rows base"):
        on_both([drawn("base", 0, [1.0])], [drawn("base", 0, [1.0]), drawn("base", 1, [2.0])])
