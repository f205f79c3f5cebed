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
    assert printed.count("| CFG costs diversity | holds |") == 2 and "preference" not in printed
