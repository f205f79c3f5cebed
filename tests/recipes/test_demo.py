"""What the demo asks to be measured, its table, and how it watches its processes."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl import TrlParser

pytest.importorskip("torchaudio")
pytest.importorskip("soundfile")
pytest.importorskip("matplotlib")

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import demo

from trl_drcd.evaluation.grid import EvaluateArguments
from trl_drcd.evaluation.points import pooled
from trl_drcd.evaluation.results import read_results

RESULTS = Path(__file__).parents[2] / "results" / "music" / "results.jsonl"


@pytest.fixture
def args(tmp_path) -> argparse.Namespace:
    world = Path(demo.__file__).parent / "tiny_music"
    return argparse.Namespace(output=tmp_path, world=world, prompts=3, samples=2, listen=1, full=False, seed=1)


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
    assert asked.strategies[4]["diversity_coef"] == 300  # of musiclm_diversity.yaml
    before = demo.evaluation(args, running=["diversity"])  # a part of it, measured beside a training
    assert before.strategies == asked.strategies[:4] + asked.strategies[6:] and before.num_processes == 1
    other = demo.evaluation(args, running=["quality"])
    assert other.strategies == [*asked.strategies[:3], asked.strategies[4], asked.strategies[6]]
    args.world = Path(os.path.relpath(args.world))
    assert [strategy["name"] for strategy in demo.evaluation(args).strategies] == names
    args.world = args.output  # the shipped means are models of the shipped world
    assert [strategy["name"] for strategy in demo.evaluation(args).strategies] == names[:-1]


def test_the_table_is_printed_and_written(args, monkeypatch, capsys):
    results, asked = read_results(RESULTS), []
    monkeypatch.setattr(demo, "train", lambda args: None)
    monkeypatch.setattr(demo, "merge", lambda args: None)
    monkeypatch.setattr(demo, "parse", lambda: argparse.Namespace(**vars(args), fresh=False))
    monkeypatch.setattr(demo, "evaluate", lambda arguments: asked.append(arguments) or results)
    demo.main()
    assert [arguments.num_processes for arguments in asked] == [2]
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


def test_an_error_of_looking_ends_the_processes(tmp_path):
    processes = {"run": demo.start(["-c", "import time; time.sleep(60)"], tmp_path / "run.txt")}

    def look() -> None:
        raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"):
        demo.wait(processes, tmp_path, look)
    assert processes["run"].wait(timeout=10) != 0


def test_what_needs_no_training_is_measured_beside_the_longer_run(args, monkeypatch):
    class Run:
        """A process that has ended, or not."""

        def __init__(self, code: int | None) -> None:
            self.code = code

        def poll(self) -> int | None:
            return self.code

    commands, looked = {}, []
    monkeypatch.setattr(demo, "start", lambda command, log: commands.setdefault(log.stem, command) and Run(None))

    def wait(processes: dict[str, Run], logs: Path, look: Callable[[], None]) -> None:
        look()
        assert set(processes) == {"quality", "diversity"}  # both are at work
        processes["quality"].code = 1
        look()
        assert len(processes) == 2
        tiny(1.0).save_pretrained(args.output / "quality")
        processes["quality"].code = 0
        look()
        look()
        looked.append(list(processes))
        processes["diversity"].code = 0
        look()

    monkeypatch.setattr(demo, "wait", wait)
    args.steps, args.minutes = None, 5.0
    demo.train(args)
    assert looked == [["quality", "diversity", "measure"]]
    assert commands["measure"][:4] == ["-m", "trl_drcd.cli", "evaluate", "--config"]
    (parsed,) = TrlParser(EvaluateArguments).parse_args_and_config(commands["measure"][3:])
    assert parsed == demo.evaluation(args, running=["diversity"])


def test_with_one_run_left_over_all_is_measured_after_it(args, monkeypatch):
    commands, run = {}, SimpleNamespace(poll=lambda: None)
    monkeypatch.setattr(demo, "start", lambda command, log: commands.setdefault(log.stem, command) and run)
    monkeypatch.setattr(demo, "wait", lambda processes, logs, look: look())
    args.steps, args.minutes = None, 5.0
    (args.output / "quality").mkdir()
    for file in ("README.md", "model.safetensors"):
        (args.output / "quality" / file).touch()
    demo.train(args)
    assert list(commands) == ["diversity"]


def test_the_command_line_is_described(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--help"])
    with pytest.raises(SystemExit):
        demo.parse()
    text = capsys.readouterr().out
    assert "make demo" in text and "--fresh" in text


@pytest.mark.parametrize("steps", [None, 3])
@pytest.mark.parametrize("full", [False, True])
def test_a_short_run_has_few_steps_and_a_full_one_those_of_its_recipe(args, monkeypatch, full, steps):
    commands = {}
    monkeypatch.setattr(demo, "start", lambda command, log: commands.setdefault(log.stem, " ".join(command)))
    monkeypatch.setattr(demo, "wait", lambda processes, logs, look: None)
    args.full, args.steps, args.minutes = full, steps, 5.0
    kept = args.output / "diversity" / "checkpoint-20"
    kept.mkdir(parents=True)
    (args.output / "diversity" / "README.md").touch()  # a run that was interrupted has its card already
    demo.train(args)
    for name, usual in (("quality", 20), ("diversity", 64)):
        assert (
            f"--max_minutes 5.0 --save_strategy no --seed=1 --max_steps={steps or usual}" in commands[name]
        ) is not full
    assert len(commands) == 2
    assert all("--seed=1" in command for command in commands.values())
    assert all(("--resume_from_checkpoint auto" in command) is full for command in commands.values())
    assert ("--max_completion_length=100" in commands["diversity"]) is not full
    assert "--max_completion_length" not in commands["quality"] and kept.exists() is full


def test_models_of_other_settings_are_not_taken_for_these(args, monkeypatch):
    monkeypatch.setattr(demo, "start", lambda command, log: None)
    monkeypatch.setattr(demo, "wait", lambda processes, logs, look: None)
    args.steps, args.minutes = 20, 5.0
    demo.train(args)
    for name in demo.RUNS:
        (args.output / name).mkdir()
        for file in ("README.md", "model.safetensors"):
            (args.output / name / file).touch()
    demo.train(args)  # there already
    args.full = True
    with pytest.raises(SystemExit, match=r"has models of \{'quality': \{'seed': 1, 'max_steps': 20\}.*give --fresh"):
        demo.train(args)


def test_the_merged_model_is_between_the_two(args):
    for value, name in enumerate(("quality", "diversity")):
        tiny(1.0 + value).save_pretrained(args.output / name)
    demo.merge(args)
    merged = LlamaForCausalLM.from_pretrained(args.output / "merged")
    assert torch.allclose(merged.lm_head.weight, torch.full((8, 8), 1.6))
    demo.merge(args)  # there already
