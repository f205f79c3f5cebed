"""The demo's tables and page from made-up measurements, and how it watches its processes."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("torchaudio")
pytest.importorskip("soundfile")
pytest.importorskip("matplotlib")

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import demo

from trl_drcd._files import wav_bytes, write_bytes, write_text


@pytest.fixture
def args(tmp_path) -> argparse.Namespace:
    return argparse.Namespace(output=tmp_path, world=tmp_path / "world", prompts=2, samples=2, listen=1)


def test_the_report_compares_with_the_base(args):
    values = {"kl": [10.0, 30.0], "adherence": [0.2, 0.4], "diversity": [0.5, 0.5], "entropy_per_token": [1.0, 1.2]}
    for name in demo.MODELS:
        halved = values | {"kl": [5.0, 15.0], "diversity": [0.4, 0.4]} if name == "quality" else values
        measured = {
            "settings": demo.settings_of(args), "shown": ["a <b> (1)"], "tokens_per_second": 123.4, "values": halved,
        }  # fmt: skip
        write_text(args.output / "measured" / name / "measured.json", json.dumps(measured))
        write_bytes(args.output / "measured" / name / "00.wav", wav_bytes(torch.zeros(4000), 16000))
    tables = demo.report(args)
    assert "| base | 20.000 [10.000, 30.000] | 0.300 [0.200, 0.400] | 0.500 [0.500, 0.500] |" in tables
    assert "| quality | 50 [50, 50] | 0.000 [0.000, 0.000] | -0.100 [-0.100, -0.100] |" in tables
    assert (args.output / "index.html").read_text().count("<audio") == 5
    lines = [json.loads(line) for line in (args.output / "results.jsonl").read_text().splitlines()]
    assert [line["strategy"] for line in lines] == ["base", "base with CFG", "quality", "merged", "diversity"]
    assert [line["guidance_scale"] for line in lines] == [1.0, 3.0, 1.0, 1.0, 1.0]
    assert [line.get("interpolation_weight") for line in lines] == [None, None, None, 0.5, None]
    assert lines[2]["metrics"]["kl"] == {"mean": 10.0, "low": 5.0, "high": 15.0}


def test_what_was_measured_with_other_settings_is_measured_anew(args):
    assert not demo.is_measured("base", args)
    measured = {"settings": demo.settings_of(args)}
    write_text(args.output / "measured" / "base" / "measured.json", json.dumps(measured))
    assert demo.is_measured("base", args)
    args.samples = 8
    assert not demo.is_measured("base", args)


def test_a_failed_process_ends_the_others_and_shows_its_last_words(tmp_path):
    processes = {
        "bad": demo.start(["-c", "raise ValueError('no such luck')"], tmp_path / "bad.txt"),
        "good": demo.start(["-c", "import time; time.sleep(60)"], tmp_path / "good.txt"),
    }
    with pytest.raises(SystemExit, match=r"bad failed(.|\n)*no such luck"):
        demo.wait(processes, tmp_path, lambda: None)
    assert processes["good"].wait(timeout=10) != 0
    demo.wait({"fine": demo.start(["-c", "pass"], tmp_path / "fine.txt")}, tmp_path, lambda: None)


def test_the_command_line_is_described(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--help"])
    with pytest.raises(SystemExit):
        demo.parse()
    text = capsys.readouterr().out
    assert "make demo" in text and "--fresh" in text and "--measure" not in text


def test_the_next_measurement_starts_as_soon_as_one_ends(args, monkeypatch):
    """Five models, two at a time; the first takes as long as all others."""
    script = args.output / "fake.py"
    script.write_text(
        "import sys, time, pathlib\n"
        "name = sys.argv[2]\n"
        "log = open(pathlib.Path(__file__).with_suffix('.txt'), 'a')\n"
        "print('start', name, file=log, flush=True)\n"
        "time.sleep(6.0 if name == 'base with CFG' else 0.1)\n"
        "print('end', name, file=log, flush=True)\n"
        "sys.exit(name == 'broken')\n"
    )
    monkeypatch.setattr(demo, "__file__", str(script))
    demo.measure_all(args)
    lines = script.with_suffix(".txt").read_text().splitlines()
    assert lines[-1] == "end base with CFG" and len(lines) == 10  # the others ran beside it
    monkeypatch.setattr(demo, "MODELS", {"broken": (None, 1.0), "base with CFG": (None, 1.0)})
    with pytest.raises(SystemExit, match="measuring 'broken' failed"):
        demo.measure_all(args)


def test_the_merged_model_is_half_way(args):
    for value, name in enumerate(("quality", "diversity")):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        )
        model = LlamaForCausalLM(config)
        torch.nn.init.constant_(model.lm_head.weight, 1.0 + value)
        model.save_pretrained(args.output / name)
    demo.merge(args)
    merged = LlamaForCausalLM.from_pretrained(args.output / "merged")
    assert torch.equal(merged.lm_head.weight, torch.full((8, 8), 1.5))
    demo.merge(args)  # there already
