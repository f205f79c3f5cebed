"""What the demo asks to be measured, its table, and how it watches its processes."""

import argparse
import os
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

from trl_drcd.evaluation.points import pooled
from trl_drcd.evaluation.results import read_results

RESULTS = Path(__file__).parents[2] / "results" / "music" / "results.jsonl"


@pytest.fixture
def args(tmp_path) -> argparse.Namespace:
    world = Path(demo.__file__).parent / "tiny_music"
    return argparse.Namespace(output=tmp_path, world=world, prompts=3, samples=2, listen=1)


def tiny(value: float) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    torch.nn.init.constant_(model.lm_head.weight, value)
    return model


def test_it_asks_for_a_front_in_two_processes(args):
    asked = demo.evaluation(args)
    names = [strategy["name"] for strategy in asked.strategies]
    assert names == ["base", "CFG", "temperature", "quality", "diversity", "LERP", "LERP of means"]
    assert all(Path(model).is_dir() for model in asked.strategies[6]["models"])
    assert asked.num_processes == 2 and asked.batch_size == 6
    assert asked.strategies[4]["diversity_coef"] == 100  # of musiclm_diversity.yaml
    args.world = Path(os.path.relpath(args.world))
    assert [strategy["name"] for strategy in demo.evaluation(args).strategies] == names
    args.world = args.output  # the shipped means are models of the shipped world
    assert [strategy["name"] for strategy in demo.evaluation(args).strategies] == names[:-1]


def test_the_table_is_printed_and_written(args, monkeypatch, capsys):
    results = read_results(RESULTS)
    for step in ("train", "merge"):
        monkeypatch.setattr(demo, step, lambda args: None)
    monkeypatch.setattr(demo, "parse", lambda: argparse.Namespace(**vars(args), fresh=False))
    monkeypatch.setattr(demo, "evaluate", lambda asked: results)
    demo.main()
    printed = capsys.readouterr().out
    assert "report.html" in printed and " minutes" in printed
    table = (args.output / "results.md").read_text()
    assert table.strip() in printed and table.count("\n") == 2 + len(pooled(results))
    assert "| LERP of 0 and 100 (lambda 0.5) | " in table and "| passes per token |" in table


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
    assert "make demo" in text and "--fresh" in text


def test_the_merged_model_is_half_way(args):
    for value, name in enumerate(("quality", "diversity")):
        tiny(1.0 + value).save_pretrained(args.output / name)
    demo.merge(args)
    merged = LlamaForCausalLM.from_pretrained(args.output / "merged")
    assert torch.equal(merged.lm_head.weight, torch.full((8, 8), 1.5))
    demo.merge(args)  # there already
