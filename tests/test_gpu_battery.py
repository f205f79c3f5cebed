"""benchmarks/gpu/run.py: a part is done, failed or out of time; what is done is not run again."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "gpu" / "run.py"


@pytest.fixture
def battery(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_battery", FILE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_battery", module)
    spec.loader.exec_module(module)
    return module


def script(folder, name, text):
    file = folder / f"{name}.py"
    file.write_text(text)
    return str(file)


def test_parts_end_each_for_itself_and_what_is_done_is_not_run_again(battery, tmp_path, monkeypatch):
    good = script(tmp_path, "good", "import sys, pathlib\npathlib.Path(sys.argv[1]).write_text('{\"seconds\": 1}')")
    bad = script(tmp_path, "bad", "raise SystemExit(3)")
    slow = script(tmp_path, "slow", "import time\ntime.sleep(60)")
    parts = (
        battery.Part("first", 1, (f"{good} {{out}}/result.json",), ()),
        battery.Part("second", 1, (bad, good), ()),
        battery.Part("third", 1, (), (slow,)),
        battery.Part("last", 1, (f"{good} {{out}}/result.json",), ()),
    )
    monkeypatch.setattr(battery, "PARTS", parts)
    assert battery.main(["--small", "--minutes", "0.2", "--output", str(tmp_path / "out")]) == 2
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["parts"]
    assert {name: part["state"] for name, part in found.items()} == {
        "first": "done",
        "second": "failed (3)",
        "third": "out of time",
        "last": "done",
    }
    assert found["first"]["result"] == {"seconds": 1}
    assert "| third | out of time |" in (tmp_path / "out" / "summary.md").read_text()
    log = tmp_path / "out" / "first" / "log.txt"
    before = log.read_text()
    assert battery.main(["--small", "--minutes", "0.2", "--output", str(tmp_path / "out")]) == 2
    assert log.read_text() == before
    assert (tmp_path / "out" / "second" / "log.txt").read_text().count("$ python") == 2


def test_without_a_gpu_only_small_sizes_run(battery, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(battery.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        battery.main(["--output", str(tmp_path)])
    assert "there is no GPU here; `--small` runs the parts at sizes for a CPU" in capsys.readouterr().err


def test_every_script_of_the_parts_is_there(battery):
    words = [word for part in battery.PARTS for command in (*part.commands, *part.small) for word in command.split()]
    files = [word for word in words if word.endswith((".py", ".yaml"))]
    assert len(files) > 10
    assert [file for file in files if not (battery.ROOT / file).is_file()] == []
