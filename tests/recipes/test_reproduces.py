"""A committed row of results, from its seed once more: `trl-drcd evaluate` on the first prompts of it."""

from pathlib import Path

import pytest

from trl_drcd import cli
from trl_drcd.evaluation.results import read_results
from trl_drcd.evaluation.statistics import bootstrap_interval

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "music" / "results.jsonl"
BATCH = 64  # of recipes/music/evaluate_music.yaml


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", "beta 100"])
def test_a_row_comes_back_within_its_interval(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (committed,) = (line for line in read_results(RESULTS) if line.name == name)
    # Whole batches, so that the draws are the same whatever comes after them
    prompts = BATCH // committed.samples_per_prompt
    words = {
        "num_prompts": prompts, "samples_per_prompt": committed.samples_per_prompt, "seed": committed.seed,
        "output_dir": tmp_path, "batch_size": BATCH, "omega": committed.omega,
    }  # fmt: skip
    flags = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    cli.main(["evaluate", "--config", "recipes/music/evaluate_music.yaml", "--only", name, *flags])
    (line,) = read_results(tmp_path / "results.jsonl")
    for metric, values in committed.per_prompt.items():
        interval = bootstrap_interval(values[:prompts])
        assert interval["low"] <= line.metrics[metric]["mean"] <= interval["high"], metric
