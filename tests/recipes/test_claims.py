"""The script of the claims, on results that are there, against numbers worked out here from the raw lines."""

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

from recipes import claims

RESULTS = Path(__file__).parents[2] / "results"


def means_of_points(folder, metric):
    """Mean of each point over prompts and training seeds."""
    values = defaultdict(list)
    for text in (RESULTS / folder / "results.jsonl").read_text().splitlines():
        line = json.loads(text)
        values[line["point"]].append(line["per_prompt"][metric])
    return {point: fmean(map(fmean, rows)) for point, rows in values.items()}


def guidance_changes(folder, metric):
    """CFG minus base on the same prompts: mean, and half the 95 % t-interval of the mean over 64 prompts."""
    lines = [json.loads(text) for text in (RESULTS / folder / "results.jsonl").read_text().splitlines()]
    (base,) = (line["per_prompt"][metric] for line in lines if line["name"] == "base")
    (cfg,) = (
        line["per_prompt"][metric]
        for line in lines
        if not line["weights"] and (line["guidance_scale"], line["temperature"]) == (3, 0.99)
    )
    changes = [b - a for a, b in zip(base, cfg, strict=True)]
    assert len(changes) == 64
    return fmean(changes), 1.9983 * stdev(changes) / math.sqrt(64)  # Student's t of 63 degrees of freedom


def check_cost_of_guidance(text, folder, metrics):
    """Each table of the text has the verdict, the difference and an interval near that of the raw lines."""
    rows = re.findall(r"\| CFG costs diversity \| (\w+) \| CFG - base (\S+) \[(\S+), (\S+)\]", text)
    assert len(rows) == len(metrics)
    for (verdict, *numbers), metric in zip(rows, metrics, strict=True):
        mean, half = guidance_changes(folder, metric)
        found, low, high = map(float, numbers)
        assert abs(found - mean) < 6e-4  # three digits are printed
        assert abs((high - low) / 2 / half - 1) < 0.15  # a bootstrap over 64 prompts
        assert mean + half < 0 and verdict == "holds"


def test_every_pair_of_metrics_gets_a_table(tmp_path, capsys):
    words = ["--omega", "equal", "--diversity", "diversity", "no_such", "--output", str(tmp_path / "claims.md")]
    claims.main([str(RESULTS / "music" / "results.jsonl"), *words])
    printed = capsys.readouterr().out
    assert "not measured for all rows: no_such" in printed
    text = (tmp_path / "claims.md").read_text()
    assert text.count("## ") == 2
    preference, adherence = (means_of_points("music", metric).values() for metric in ("preference", "adherence"))
    omega = (max(preference) - min(preference)) / (max(adherence) - min(adherence))
    assert text.startswith(f"quality = {omega:.4g} * adherence + preference")
    check_cost_of_guidance(text, "music", ["diversity"] * 2)
    # Three training seeds, 64 prompts; by hand: variances 0.001190 and 0.000285 with 2 and 63 degrees of freedom are
    # 0.001476 with 3.07, so 0.1255 -+ 3.144 * 0.03841; a bootstrap over three seeds says [0.065, 0.196]
    assert "coefficient 300 - base 0.125 [0.005, 0.246]" in text


def test_of_texts_quality_is_the_adherence(capsys):
    claims.main([str(RESULTS / "text" / "results.jsonl")])
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("## ")] == [
        "## The paper's claims in quality and diversity",
        "## The paper's claims in quality and diversity, second embedding",
        "## Claims of the paper that these strategies do not answer",
    ]
    check_cost_of_guidance(printed, "text", ["diversity", "diversity_second"])
    assert "preference" not in printed


def test_a_report_of_rows_with_further_samples_is_written(tmp_path, capsys):
    files = [str(RESULTS / "text/study" / name / "results.jsonl") for name in (".", "seed1")]
    claims.main([*files, "--report", str(tmp_path)])
    table = (tmp_path / "report.md").read_text()
    assert "192 held-out prompts x 8 to 16 samples" in table
    assert "CFG buys quality | holds" in capsys.readouterr().out and "0.738 [0.726, 0.750]" in table
