"""An adapter on another base than the one it was trained on is told, wherever the user names the base."""

import json
import warnings

import pytest
from conftest import make_model
from merge_worlds import random_adapter

from trl_drcd.evaluation.checks import check_ends
from trl_drcd.evaluation.strategies import expand
from trl_drcd.merging import interpolate_adapters, load_adapter_model
from trl_drcd.merging.folders import warn_of_other_base

WAYS = {
    "load": lambda adapter, base, out: load_adapter_model(adapter, base_model=base),
    "merge": lambda adapter, base, out: interpolate_adapters([adapter], [1.0], out, base_model=base),
    "evaluate": lambda adapter, base, out: check_ends(
        load_adapter_model(adapter).get_base_model(), expand([{"name": "x", "model": str(adapter)}]), str(base)
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_another_base_is_told_and_the_right_one_is_not(tmp_path, tokenizer, way):
    for seed, name in enumerate(("base", "other")):
        make_model(tokenizer, seed).save_pretrained(tmp_path / name)
    adapter = random_adapter(tmp_path / "adapter", tmp_path / "base", seed=0)
    with pytest.warns(UserWarning, match=r"adapter was trained on .*base, and is used on .*other"):
        WAYS[way](adapter, tmp_path / "other", tmp_path / "out")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        WAYS[way](adapter, tmp_path / "base", tmp_path / "right")
    assert not [one for one in told if "was trained on" in str(one.message)]


@pytest.mark.parametrize(
    ("recorded", "given", "told"),
    [
        ("org/base", "org/base", False), ("/gone/base", "here/base", False), ("base", "other", True),
        ("/cache/models--org--base/snapshots/0a1b", "org/base", False), ("org/base", "link", False),
        ("link", "link", False),
        ("/cache/models--org--base/snapshots/0a1b", "org/other", True), ("target", "link", False),
    ],
)  # fmt: skip
def test_names_that_may_be_of_one_model(tmp_path, monkeypatch, recorded, given, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "target" / "base").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "target" / ("base" if recorded == "org/base" else ""))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": recorded}))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_of_other_base(tmp_path, given)
    assert bool(found) == told
