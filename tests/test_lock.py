"""requirements.lock has what constraints.txt pins, each with hashes."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def pins(text: str) -> dict[str, str]:
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", text, re.M)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def test_the_lock_file_has_the_pins_with_hashes():
    lock = (ROOT / "requirements.lock").read_text()
    assert pins(lock) == pins((ROOT / "constraints.txt").read_text())
    for entry in re.split(r"^(?=[A-Za-z0-9])", lock, flags=re.M)[1:]:
        assert "--hash=sha256:" in entry, entry.split()[0]
    assert "://" not in lock
