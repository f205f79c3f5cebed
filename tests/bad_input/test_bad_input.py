"""
Every bad input gives an error of the expected class, which names the argument, its value and the remedy, before
anything is sampled. The rows are in the tables beside this file.
"""

import subprocess
import sys

import pytest
import table_command_line
import table_configuration
import table_data
import table_evaluation
import table_merging
import table_models
import table_sound
import transformers
from bad_world import Bad, World

from trl_drcd import CFGDistillDiversityTrainer, guidance
from trl_drcd.policies import CausalLMPolicy, MusicgenPolicy

TABLES = (
    *(table_configuration, table_data, table_models, table_merging, table_evaluation, table_sound, table_command_line),
)
ROWS: list[Bad] = [row for table in TABLES for row in table.ROWS]


@pytest.fixture(scope="session")
def world(tmp_path_factory, tokenizer) -> World:
    return World(tmp_path_factory.mktemp("bad"), tokenizer)


@pytest.fixture
def nothing_sampled(monkeypatch):
    """Whatever could sample fails the test."""

    def sampled(*args, **kwargs):
        pytest.fail("something was sampled")

    for owner, name in (
        (transformers.GenerationMixin, "generate"),
        (guidance, "generate_guided"),
        (CausalLMPolicy, "rollout"),
        (MusicgenPolicy, "rollout"),
        (CFGDistillDiversityTrainer, "_generate_single_turn"),
    ):
        monkeypatch.setattr(owner, name, sampled)


def test_there_are_enough_rows_and_none_twice():
    assert len(ROWS) >= 60
    assert len({row.name for row in ROWS}) == len(ROWS)


@pytest.mark.slow
def test_the_last_line_of_a_launch_is_the_recipes_own(tmp_path):
    """`accelerate launch` would end with a traceback of its own."""
    words = [sys.executable, "-m", "trl_drcd.cli", "train", "text", "--model_name_or_path", "a/b", "--dataset"]
    run = subprocess.run([*words, str(tmp_path / "none.jsonl")], capture_output=True, text=True)
    assert run.returncode != 0 and "Traceback" not in run.stdout + run.stderr
    assert run.stderr.splitlines()[-1].startswith("trl-drcd train text: error: `dataset=")


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_bad_input(row: Bad, world: World, tmp_path, nothing_sampled, capsys):
    with pytest.raises(row.error) as caught:
        row.act(world, tmp_path)
    assert type(caught.value) is row.error
    message = str(caught.value)
    if row.error is SystemExit:
        if isinstance(caught.value.code, int):  # argparse prints its own
            message = capsys.readouterr().err.splitlines()[-1]
        assert "error: " in message and "Traceback" not in message
    assert "\n" not in message and len(message) < 800
    for part in (row.argument, row.value, row.remedy):
        assert part in message, message
    assert not (tmp_path / "ran").exists()
