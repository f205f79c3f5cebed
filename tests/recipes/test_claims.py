"""The script of the claims, on results that are there."""

from pathlib import Path

from recipes import claims

RESULTS = Path(__file__).parents[2] / "results" / "music" / "results.jsonl"


def test_every_pair_of_metrics_gets_a_table(tmp_path, capsys):
    words = ["--omega", "equal", "--diversity", "diversity", "no_such", "--output", str(tmp_path / "claims.md")]
    claims.main([str(RESULTS), *words])
    printed = capsys.readouterr().out
    assert "not measured of all rows: no_such" in printed
    text = (tmp_path / "claims.md").read_text()
    assert text.count("## ") == 2 and text.count("| CFG costs diversity | holds |") == 2
    assert text.startswith("quality = 34.84 * adherence + preference")
