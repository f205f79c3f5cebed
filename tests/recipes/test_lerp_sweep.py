"""The sweep of lambda from made-up measurements: which weights are measured, and what is kept."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model

pytest.importorskip("torchaudio")
pytest.importorskip("soundfile")
pytest.importorskip("matplotlib")

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import lerp_sweep


def test_every_lambda_is_measured_once(tmp_path, tokenizer, monkeypatch):
    ends = {"quality": 0.0, "diversity": 8.0, "world/models/musiclm": -1.0}
    for name, value in ends.items():
        model = make_model(tokenizer)
        torch.nn.init.constant_(model.lm_head.weight, value)
        model.save_pretrained(tmp_path / name)
    seen = []

    def measured_values(model, base, guidance, args, name):
        assert guidance == 1.0 and args.prompts == 2 and base.lm_head.weight.mean() == -1
        seen.append((name, model.lm_head.weight.mean().item()))
        metrics = {"kl": [2.0, 4.0], "adherence": [0.1, 0.2], "diversity": [seen[-1][1]] * 2}
        return SimpleNamespace(tokens_per_second=1.0), [], metrics | {"entropy_per_token": [1.0, 1.0]}

    monkeypatch.setattr(lerp_sweep, "measured_values", measured_values)
    words = [f"--quality={tmp_path / 'quality'}", f"--diversity={tmp_path / 'diversity'}", "--prompts=2"]
    words += [f"--world={tmp_path / 'world'}", f"--output={tmp_path / 'out'}"]
    lerp_sweep.main([*words, "--points=3"])
    assert seen == [("base", -1), ("lambda 0.00", 0), ("lambda 0.50", 4), ("lambda 1.00", 8)]
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["interpolation_weight"] for line in lines] == [None, 0, 0.5, 1]
    assert [line["metrics"]["diversity"]["mean"] for line in lines] == [-1, 0, 4, 8]
    assert [line["model"] for line in lines[:2]] == ["musiclm", "quality + diversity"] and str(
        tmp_path
    ) not in json.dumps(lines)
    assert "| lambda 0.50 | 3.000 [2.000, 4.000] |" in (tmp_path / "out" / "results.md").read_text()
    lerp_sweep.main([*words, "--points=5"])
    assert seen[4:] == [("lambda 0.25", 2), ("lambda 0.75", 6)]
    with pytest.raises(SystemExit):
        lerp_sweep.main([*words, "--points=1"])
