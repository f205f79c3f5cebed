"""`push_to_hub=True` in training: the finished model goes to the Hub, by the rules of `trl-drcd push`."""

import pytest

from tests.hub.server import TOKEN
from tests.test_trainer import make_trainer
from trl_drcd.hub import push_to_hub


def test_the_finished_model_is_pushed_and_no_checkpoint(hub, tmp_path, tokenizer):
    trainer = make_trainer(
        tmp_path / "out", tokenizer, max_steps=2, save_strategy="steps", save_steps=1, push_to_hub=True,
        hub_model_id="mine", hub_strategy="all_checkpoints",
    )  # fmt: skip
    assert trainer.hub_model_id == "user/mine"
    trainer.train()
    trainer.save_model()
    assert hub.repos == {}
    address = trainer.push_to_hub()
    assert address == f"{hub.url}/user/mine"
    repo = hub.repos["user/mine"]
    assert repo.private
    assert repo.files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert not [name for name in repo.files if "checkpoint" in name or name.endswith((".bin", ".pt", ".pth"))]
    assert b"diversity-rewarded CFG distillation" in repo.files["README.md"]
    assert TOKEN not in repr(repo.files)


def test_a_name_that_is_taken_is_found_before_training(hub, folder, tmp_path, tokenizer):
    push_to_hub(folder, "user/mine")
    with pytest.raises(FileExistsError, match="user/mine is already on the Hub"):
        make_trainer(tmp_path / "out", tokenizer, push_to_hub=True, hub_model_id="user/mine")
