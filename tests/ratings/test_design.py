"""Who rates what, when and on which side."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest

from trl_drcd.ratings.design import DesignArguments, check_design, make_design, study_size
from trl_drcd.ratings.samples import read_evaluation

MODELS = ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("models", "prompts", "raters", "per_item"), [(5, 20, 15, 3), (3, 7, 4, 2), (2, 5, 1, 1)])
def test_a_design_is_balanced(models, prompts, raters, per_item, seed):
    asked = {"quality": prompts, "diversity": prompts // 2}
    design = make_design(MODELS[:models], prompts, 4, asked, raters, per_item, checks=2, seed=seed)
    table = check_design(design)
    pairs = models * (models - 1) // 2
    assert len(table) == 2 * pairs
    assert {(question, slots) for question, _, slots, _, _ in table} == {
        ("quality", prompts * per_item), ("diversity", prompts // 2 * per_item)
    }  # fmt: skip
    rated = {item.number: item for item in design.items if item.check is None}
    by_book = Counter((slot.book, slot.item) for slot in design.slots if slot.item in rated)
    assert set(by_book.values()) == {1}
    for question in asked:  # books are alike in length
        sizes = Counter(
            slot.book for slot in design.slots if rated.get(slot.item) and rated[slot.item].question == question
        )
        assert len(sizes) == raters and max(sizes.values()) - min(sizes.values()) <= 1


def test_pairs_come_early_and_late_alike():
    design = make_design(MODELS, 100, 4, {"quality": 100, "diversity": 50}, 15, 3, seed=1)
    places = [place for question, *_, place in check_design(design) if question == "quality"]
    assert max(places) - min(places) < 0.1  # 300 places of each pair, in books of 100


def test_sides_do_not_alternate():
    design = make_design(["a", "b"], 40, 1, {"quality": 40}, 1, 1, checks=0)
    sides = [slot.a_left for slot in design.slots]
    assert sum(sides) == 20
    assert sides not in ([True, False] * 20, [False, True] * 20)


def test_clips_are_of_the_right_model_and_prompt():
    design = make_design(MODELS, 6, 4, {"quality": 6, "diversity": 6}, 3, 3)
    for item in design.items:
        for model, clips in zip(item.models, item.clips, strict=True):
            assert [clip[:2] for clip in clips] == [(model, item.prompt)] * (2 if item.question == "diversity" else 1)
            if item.check is None:
                assert len(set(clips)) == len(clips) and not any(clip[3] for clip in clips)


def test_attention_checks():
    design = make_design(MODELS, 6, 4, {"quality": 6, "diversity": 6}, 6, 3, checks=2)
    checks = {item.number: item for item in design.items if item.check}
    assert Counter(item.check for item in checks.values()) == {"same": 4, "worse": 4}
    for item in checks.values():
        one, other = item.clips
        if item.check == "same":
            assert one == other
        elif item.question == "quality":
            assert other[0][3] and not one[0][3]
        else:
            assert other[0] == other[1] and one[0] != one[1]
    per_book = Counter(slot.book for slot in design.slots if slot.item in checks)
    assert per_book == dict.fromkeys(range(6), 4)  # 2 of each question
    assert not any(slot.item in checks for slot in design.slots if slot.position == 0)


def test_the_same_seed_gives_the_same_design():
    one, same, other = (make_design(MODELS, 6, 2, {"quality": 6}, 3, 3, seed=seed) for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s[1:], "is in 2 books"),
        (lambda s: [replace(x, a_left=True) for x in s], "is on the left of"),
        (lambda s: [replace(x, book=0) for x in s], "twice"),
        (lambda s: [replace(x, book=0) if x.item == 0 and x.book == 1 else x for x in s], None),
    ],
)
def test_the_check_finds(spoil, message):
    design = make_design(["a", "b", "c"], 8, 1, {"quality": 8}, 6, 3, checks=0)
    spoilt = replace(design, slots=spoil(design.slots))
    if message is None:
        check_design(design)
        return
    with pytest.raises(ValueError, match=message):
        check_design(spoilt)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"raters": 4}, "multiple of `raters_per_item=3`"),
        ({"raters_per_item": 0}, "`raters_per_item` must be at least 1, got 0"),
        ({"checks": -1}, "`checks` must be at least 0"),
    ],
)
def test_bad_arguments(changed, message):
    with pytest.raises(ValueError, match=message):
        DesignArguments("evaluation", "out", **changed)


@pytest.mark.parametrize(
    ("models", "samples", "asked", "raters", "message"),
    [
        (["a"], 2, {"quality": 2}, 3, "at least 2 different names"),
        (["a", "a"], 2, {"quality": 2}, 3, "at least 2 different names"),
        (["a", "b"], 1, {"diversity": 2}, 3, "only 1 was kept"),
        (["a", "b"], 2, {"quality": 9}, 3, "samples of 2 prompts were kept"),
        (["a", "b"], 2, {"quality": 0}, 3, "at least one must be above 0"),
        (["a", "b"], 2, {"quality": 2}, 9, "too many for 2 items"),
    ],
)
def test_what_cannot_be_designed(models, samples, asked, raters, message):
    with pytest.raises(ValueError, match=message):
        make_design(models, 2, samples, asked, raters, 3)


def test_an_evaluation_is_read(evaluation):
    read = read_evaluation(evaluation)
    assert list(read.files) == ["base", "CFG", "beta 0", "beta 15", "LERP"]
    assert (len(read.prompts), read.samples, read.kind) == (6, 3, "music")
    assert read.files["CFG"][2][1].name == "02_1.wav"


def test_evaluations_that_do_not_fit(evaluation, tmp_path):
    copy = shutil.copytree(evaluation, tmp_path / "copy")
    (copy / "samples" / "m1" / "03_1.wav").unlink()
    with pytest.raises(FileNotFoundError, match="lacks"):
        read_evaluation(copy)
    index = copy / "samples" / "m1" / "samples.jsonl"
    index.write_text("".join(line for line in index.read_text().splitlines(True) if '"a reel"' not in line))
    with pytest.raises(ValueError, match="samples of 'CFG' for other prompts"):
        read_evaluation(copy)
    shutil.rmtree(copy / "samples" / "m2")
    with pytest.raises(FileNotFoundError, match=r"has no samples of \['beta 0'\]"):
        read_evaluation(copy)
    with pytest.raises(FileNotFoundError, match=r"has no results\.jsonl"):
        read_evaluation(tmp_path / "nothing")


def test_one_of_those_that_share_their_samples(tmp_path):
    """A model and the interpolation with all its weight on it have the same samples: a tie, whoever listens."""
    from tests.ratings.conftest import make_evaluation
    from trl_drcd.ratings.study import create_study

    folder = make_evaluation(tmp_path / "evaluation", "text", models=["base", "quality", "LERP (lambda 0)"])
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    lines[2]["samples"] = lines[1]["samples"]
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = DesignArguments(str(folder), str(tmp_path / "study"), raters=3)
    study, design = create_study(arguments)
    assert study.about["models"] == design.models == ["base", "quality"]
    assert study.about["left_out"] == ["LERP (lambda 0)"]
    assert "about " in study_size(design) and study_size(design).endswith("minutes")
    arguments = replace(arguments, out=str(tmp_path / "other"), models=["LERP (lambda 0)", "quality"])
    with pytest.raises(ValueError, match=r"'LERP \(lambda 0\)' and 'quality', whose samples are the same"):
        create_study(arguments)


def test_many_pairs_are_told_in_one_line_each_question():
    from trl_drcd.ratings.commands import _balance

    few, many = (
        make_design([f"m{i}" for i in range(count)], 4, 2, {"quality": 4, "diversity": 4}, 6, 3) for count in (4, 9)
    )
    assert len(_balance(few).rows) == 12
    assert [row[:3] for row in _balance(many).rows] == [
        ["quality: each of 36", "12", "6"], ["diversity: each of 36", "12", "6"]
    ]  # fmt: skip
