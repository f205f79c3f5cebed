"""The README's Python example runs as it stands, but for its length."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_python_example_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    shorter = code.replace(
        "max_completion_length=200",
        "max_completion_length=4, max_steps=1, per_device_train_batch_size=8, gradient_accumulation_steps=1, "
        "report_to='none', save_strategy='no'",
    ).replace("outputs/mine", str(tmp_path))
    assert shorter.count("max_steps=1") == 1 and str(tmp_path) in shorter
    monkeypatch.chdir(ROOT)
    names: dict = {}
    exec(shorter, names)
    assert names["trainer"].state.global_step == 1
