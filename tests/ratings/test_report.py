"""A study from end to end by its commands, and CSV in and out."""

import csv
import io
import json
import shutil

import numpy as np
import pytest
import soundfile
import torch

from ratings.conftest import MODELS, PROMPTS, make_evaluation
from trl_drcd.cli import main
from trl_drcd.files import wav_bytes
from trl_drcd.ratings.design import DesignArguments
from trl_drcd.ratings.report import ReportArguments, write_report
from trl_drcd.ratings.simulated import SimulateArguments, simulate
from trl_drcd.ratings.store import Answer, Study
from trl_drcd.ratings.study import create_study, degraded_audio, degraded_text
from trl_drcd.ratings.tabular import import_csv, items_csv, ratings_csv, to_csv


def test_the_commands(evaluation, tmp_path, capsys):
    config = tmp_path / "design.yaml"
    config.write_text(f"evaluation: {evaluation}\nout: {tmp_path / 'study'}\nraters: 6\ndiversity_prompts: 4\n")
    main(["ratings", str(config)])
    assert "60 of quality, 40 of diversity" in capsys.readouterr().out
    main(["ratings", "simulate", "--study", str(tmp_path / "study"), "--abilities", "0", "1", "1", ".5", "1.5"])
    assert "SIMULATED" in capsys.readouterr().out
    main(["ratings", "report", "--study", str(tmp_path / "study"), "--draws", "100"])
    assert "SIMULATED" in capsys.readouterr().out
    main(["ratings", "export", "--study", str(tmp_path / "study"), "--out", str(tmp_path / "ratings.csv")])
    rows = list(csv.DictReader((tmp_path / "ratings.csv").open()))
    assert {row["simulated"] for row in rows} == {"1"}
    main(["ratings", "power", "--win_rate", "0.57", "--ties", "0"])
    assert "| 0.57 | 399 |" in capsys.readouterr().out
    report = tmp_path / "study" / "report"
    text = (report / "report.md").read_text()
    assert "SIMULATED RATERS. No person has rated anything here" in text
    assert "## Quality" in text and "## Diversity" in text and "| entropy_per_token |" in text
    for name in ("win_rates", "scores", "diversity"):
        assert (report / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert "SIMULATED" in (report / f"{name}.svg").read_text() or (report / f"{name}.svg").stat().st_size > 5000
    with pytest.raises(SystemExit, match="has no ratings yet"):
        create_study(DesignArguments(str(evaluation), str(tmp_path / "empty"), raters=6))
        main(["ratings", "report", "--study", str(tmp_path / "empty")])
    with pytest.raises(SystemExit) as stop:
        main(["ratings"])
    assert stop.value.code == 2


def test_the_report_finds_the_truth(evaluation, tmp_path):
    """Abilities that differ by much, no noise of prompts: the true scores are in their intervals."""
    study, _ = create_study(DesignArguments(str(evaluation), str(tmp_path / "study"), raters=15, raters_per_item=15))
    abilities = [0.0, 1.0, 0.5, 0.2, 1.2]
    simulate(study, SimulateArguments(str(study.folder), abilities, prompt_noise=0.0, inattention=0.0))
    result = write_report(ReportArguments(str(study.folder), draws=200))
    truth = 1000 + 400 / np.log(10) * (np.array(abilities) - np.mean(abilities))
    for question in ("quality", "diversity"):
        found = result["questions"][question]
        inside = [
            found["scores"][m]["low"] <= value <= found["scores"][m]["high"]
            for m, value in zip(MODELS, truth, strict=True)
        ]
        assert sum(inside) >= 4
        assert found["win_rates"][0][4]["high"] < 0.5 < found["win_rates"][4][0]["low"]
        assert found["comparisons"] == 900 and found["per_pair"] == 90
    assert result["simulated"] and result["checks_failed"][0] == 0
    stored = json.loads((study.folder / "report" / "report.json").read_text())
    assert stored["questions"]["quality"]["wins"] == result["questions"]["quality"]["wins"]


def test_judges_as_simulated_raters(evaluation, tmp_path):
    """The judge's own metric must then agree with the ratings."""
    study, _ = create_study(DesignArguments(str(evaluation), str(tmp_path / "study"), raters=6))
    simulate(study, SimulateArguments(str(study.folder), judges=["quality", "diversity"], steepness=4.0))
    found = write_report(ReportArguments(str(study.folder), draws=100))["questions"]
    assert found["quality"]["metrics"]["quality"]["over_models"]["mean"] > 0.9
    assert found["quality"]["metrics"]["quality"]["over_comparisons"]["low"] > 0.2


def test_inattentive_raters_are_left_out(study):
    """One rater answers 3 and 3 always, which fails the checks of degraded clips but not those of equal ones."""
    link = study.join("asleep")
    while task := study.next_task(link):
        for place in task.places:
            study.mark_played(link, task.slot, place)
        study.rate(link, task.slot, Answer(3, 3) if task.question == "quality" else Answer(preference=3))
    other = study.join("ann")
    items = {row["slot"]: row for row in study.rows("SELECT * FROM slots JOIN items USING (item)")}
    while task := study.next_task(other):
        for place in task.places:
            study.mark_played(other, task.slot, place)
        good = 0 if items[task.slot]["check_kind"] == "same" else (1 if items[task.slot]["a_left"] else -1)
        answer = Answer(3 + good, 3 - good) if task.question == "quality" else Answer(preference=3 - good)
        study.rate(other, task.slot, answer)
    result = write_report(ReportArguments(str(study.folder), draws=100, most_failed=0.4))
    assert (result["raters"], result["left_out"]) == (2, 1)
    assert not result["simulated"] and "SIMULATED" not in (study.folder / "report" / "report.md").read_text()
    assert result["questions"]["quality"]["wins"][0][1] > 0 and result["questions"]["quality"]["wins"][1][0] == 0


def test_mturk_and_back(study, tmp_path):
    items = list(csv.DictReader(io.StringIO(items_csv(study, "https://example.org/s/"))))
    assert items[0]["left0"].startswith("https://example.org/s/clips/")
    assert not any(model in items_csv(study) for model in MODELS)
    first, second = items[0], next(row for row in items if row["question"] == "diversity")
    file = tmp_path / "Batch.csv"
    with file.open("w", newline="") as stream:
        names = [
            "HITId",
            "WorkerId",
            "AssignmentStatus",
            "Input.slot",
            "Answer.left",
            "Answer.right",
            "Answer.preference",
        ]
        writer = csv.writer(stream)
        writer.writerow(names)
        writer.writerow(["h", "A1SECRET", "Approved", first["slot"], 4, 2, ""])
        writer.writerow(["h", "A1SECRET", "Approved", second["slot"], "", "", 5])
        writer.writerow(["h", "B2SECRET", "Rejected", items[1]["slot"], 1, 1, ""])
    assert import_csv(study, file) == (2, 0)
    assert import_csv(study, file) == (0, 2)
    text = ratings_csv(study)
    assert "SECRET" not in text and len(text.splitlines()) == 3
    names = {rating["pseudonym"] for rating in study.ratings()}
    assert len(names) == 1 and names.pop().startswith("w")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ("rater,left,right\nann,1,2\n", "none of the columns"),
        ("slot,rater,left,right\nx,ann,1,2\n", "rating 1: 'x' is not an integer"),
        ("slot,rater,left,right\n1,ann,1,9\n", "rating 1: `right` must be an integer from 1 to 5"),
        ("slot,rater,left,right\n99999,ann,1,2\n", "is not a slot of this study"),
        ("slot,rater,left,right\n1,,1,2\n", "the rater's name is empty"),
    ],
)
def test_bad_files(study, tmp_path, text, message):
    file = tmp_path / "file.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        import_csv(study, file)


def test_a_spreadsheet_runs_no_formula():
    assert to_csv([{"a": "=1+1", "b": -1, "c": None}], "abc") == "a,b,c\n'=1+1,-1,\n"
    for text in ("+1", "-1", "@x", " =1", "＝1"):
        assert to_csv([{"a": text}], "a") == f"a\n'{text}\n"
    assert to_csv([{"a": "a - b"}], "a") == "a\na - b\n"


def test_texts(tmp_path):
    folder = make_evaluation(tmp_path / "evaluation", "text", samples=2)
    study, _ = create_study(DesignArguments(str(folder), str(tmp_path / "study"), raters=6, diversity_prompts=2))
    link = study.join("ann")
    assert study.rate(link, study.next_task(link).slot, Answer(1, 2))  # nothing to play
    assert "several words" in items_csv(study)


@pytest.mark.parametrize("text", ["- a list", "=1", "+ 2", "@home"])
def test_a_site_shows_texts_as_they_are(tmp_path, text):
    folder = make_evaluation(tmp_path / "evaluation", "text", prompts=[text, *PROMPTS[1:]])
    for file in (folder / "samples").glob("*/*.txt"):
        file.write_text(text)
    study, _ = create_study(DesignArguments(str(folder), str(tmp_path / "study"), raters=6, checks=0))
    rows = list(csv.DictReader(io.StringIO(items_csv(study))))
    assert {row["left0"] for row in rows} == {text} and text in {row["prompt"] for row in rows}


def test_clips_of_two_channels(tmp_path):
    folder = make_evaluation(tmp_path / "evaluation")
    for number, file in enumerate(sorted((folder / "samples").glob("*/*.wav"))):
        tones = 0.1 * torch.sin(torch.arange(2 * 800.0).view(2, 800) * (0.1 + 0.01 * number))
        file.write_bytes(wav_bytes(tones, 8000))
    study, design = create_study(DesignArguments(str(folder), str(tmp_path / "study"), raters=6, diversity_prompts=3))
    assert any(item.check == "worse" for item in design.items)
    clips = [soundfile.read(file)[0] for file in (study.folder / "clips").iterdir()]
    assert {clip.shape for clip in clips} == {(800, 2)}
    noisy = degraded_audio(torch.zeros(2, 800))
    assert noisy.shape == (2, 800) and not torch.equal(noisy[0], noisy[1])


def test_a_report_before_all_models_are_rated(study):
    link = study.join("ann")
    while task := study.next_task(link):
        answer = Answer(2, 4) if task.question == "quality" else Answer(preference=4)
        study.rate(link, task.slot, answer, must_play=False)
        rated = {rating[side] for rating in study.ratings() for side in ("model_a", "model_b")}
        if not set(MODELS) <= rated and any(each["check_kind"] is None for each in study.ratings()):
            write_report(ReportArguments(str(study.folder), draws=100))
            assert "better" not in (study.folder / "report" / "report.md").read_text()


def test_metrics_of_other_samples_are_not_compared_with_ratings(tmp_path):
    folder = make_evaluation(tmp_path / "evaluation")

    def digests(value):
        lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
        text = "".join(json.dumps(line | {"but_judges": value}) + "\n" for line in lines)
        (folder / "results.jsonl").write_text(text)

    digests("seed 0")
    study = create_study(DesignArguments(str(folder), str(tmp_path / "study"), raters=6, diversity_prompts=3))[0]
    simulate(study, SimulateArguments(str(study.folder), judges=["quality", "diversity"]))
    assert write_report(ReportArguments(str(study.folder), draws=100))["note"] == ""
    digests("seed 1")
    report = write_report(ReportArguments(str(study.folder), draws=100))
    assert "other samples of 'base' than those that were rated" in report["note"]
    assert not report["questions"]["quality"]["metrics"]
    digests(None)  # an earlier version's
    assert write_report(ReportArguments(str(study.folder), draws=100))["note"] == ""


def test_what_is_degraded():
    tone = 0.3 * torch.sin(torch.arange(8000) * 0.3)
    noisy = degraded_audio(tone)
    noise = noisy - tone
    assert 10 * float((tone.square().mean() / noise.square().mean()).log10()) == pytest.approx(0, abs=0.3)  # dB
    assert sorted(degraded_text("one two three four five").split()) == sorted(["one", "two", "three", "four", "five"])
    assert degraded_text("one two three four five") != "one two three four five"
    for short in ("", "a", "aa", "a a", "word", "two words", "one two", "x y"):
        assert degraded_text(short).split() != short.split() and degraded_text(short).strip()


def test_an_evaluation_that_was_made_anew_on_other_prompts(tmp_path):
    folder = make_evaluation(tmp_path / "evaluation")
    study = create_study(DesignArguments(str(folder), str(tmp_path / "study"), raters=6, diversity_prompts=3))[0]
    simulate(study, SimulateArguments(str(study.folder), judges=["quality", "diversity"]))
    assert write_report(ReportArguments(str(study.folder), draws=100))["note"] == ""
    shutil.rmtree(folder)
    make_evaluation(folder, prompts=["other", *PROMPTS[1:]])
    report = write_report(ReportArguments(str(study.folder), draws=100))
    assert "number 0 is 'other' there and 'slow waltz' here" in report["note"]
    assert not report["questions"]["quality"]["metrics"]
    with pytest.raises(ValueError, match="other prompts than the study was designed on"):
        write_report(ReportArguments(str(study.folder), draws=100, evaluation=str(folder)))


def test_a_prompt_without_a_judgement_is_left_out_of_a_metric(tmp_path):
    folder = make_evaluation(tmp_path / "evaluation")
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    lines[0]["per_prompt"]["quality"][0] = float("nan")
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    study = create_study(DesignArguments(str(folder), str(tmp_path / "study"), raters=6, diversity_prompts=3))[0]
    simulate(study, SimulateArguments(str(study.folder), abilities=[0.0, 1.0, 2.0, 3.0, 4.0]))
    found = write_report(ReportArguments(str(study.folder), draws=100))["questions"]["quality"]
    mean = found["means"]["quality"]["base"]
    assert mean["mean"] == pytest.approx(np.mean(lines[0]["per_prompt"]["quality"][1:]))
    assert mean["low"] <= mean["mean"] <= mean["high"]
    for agreement in found["metrics"]["quality"].values():
        assert 0 < agreement["mean"] <= 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "give either `abilities`"),
        ({"abilities": [1.0], "judges": ["a", "b"]}, "give either `abilities`"),
        ({"judges": ["a"]}, "two `judges`"),
        ({"abilities": [1.0], "ties": 2.0}, "`ties` must be between 0 and 1"),
    ],
)
def test_bad_simulations(wrong, message):
    with pytest.raises(ValueError, match=message):
        SimulateArguments("study", **wrong)


def test_simulations_that_do_not_fit(study):
    with pytest.raises(ValueError, match="`abilities` must have one value for each of"):
        simulate(study, SimulateArguments(str(study.folder), [1.0]))
    with pytest.raises(ValueError, match="was not measured"):
        simulate(study, SimulateArguments(str(study.folder), judges=["quality", "taste"]))
    with pytest.raises(ValueError, match="must be between 1 and the number of free places, 6"):
        simulate(study, SimulateArguments(str(study.folder), [0, 0, 0, 0, 0.0], raters=7))
    assert Study(study.folder).ratings() == []
