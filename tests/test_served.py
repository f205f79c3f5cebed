"""benchmarks/served.py: ratios of rounds, and what it refuses."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def served(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location("served", BENCHMARKS / "served.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "served", module)
    spec.loader.exec_module(module)
    return module


def test_ratios_are_of_the_same_round(served):
    found = {"CFG": [(2.0, 1.0, 100), (4.0, 2.0, 100)], "base": [(1.0, 0.5, 100), (1.0, 2.0, 200)]}
    cells = served.table(found, "CFG")
    assert cells["base"] == {
        "tokens/s": "133", "tokens per processor second": "133", "tokens/s / guided": "5.00",
        "per processor second / guided": "2.00",
    }  # fmt: skip
    assert cells["CFG"]["tokens/s / guided"] == "1.00"


@pytest.mark.slow
def test_it_samples_the_shipped_rows(served, tmp_path, capsys):
    output = tmp_path / "served.json"
    served.main(["--prompts", "2", "--samples", "2", "--tokens", "4", "--rounds", "1", "--output", str(output)])
    assert "| LERP (lambda 0.5) |" in capsys.readouterr().out
    rounds = json.loads(output.read_text())["rounds"]
    assert {name: [one[2] for one in row] for name, row in rounds.items()} == {name: [16] for name in rounds}


def test_what_cannot_be_compared_is_refused(served, capsys):
    with pytest.raises(SystemExit):
        served.main(["--rounds", "0"])
    assert "--rounds must be at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"'nothing'.*are not in the shipped rows"):
        served.main(["--rows", "base", "nothing"])
    with pytest.raises(SystemExit, match=r"needs a row with guidance"):
        served.main(["--rows", "base"])
