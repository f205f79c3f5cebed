"""The script of the claims, on results that are there."""

from pathlib import Path

from recipes import claims

RESULTS = Path(__file__).parents[2] / "results"


def test_every_pair_of_metrics_gets_a_table(tmp_path, capsys):
    words = ["--omega", "equal", "--diversity", "diversity", "no_such", "--output", str(tmp_path / "claims.md")]
    claims.main([str(RESULTS / "music" / "results.jsonl"), *words])
    printed = capsys.readouterr().out
    assert "not measured of all rows: no_such" in printed
    text = (tmp_path / "claims.md").read_text()
    assert text.count("## ") == 2 and text.count("| CFG costs diversity | holds |") == 2
    assert text.startswith("quality = 34.84 * adherence + preference")


def test_of_texts_quality_is_the_adherence(capsys):
    claims.main([str(RESULTS / "text" / "results.jsonl")])
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("## ")] == [
        "## quality and diversity",
        "## quality and diversity_second",
    ]
    assert printed.count("| CFG costs diversity | holds |") == 2 and "preference" not in printed
