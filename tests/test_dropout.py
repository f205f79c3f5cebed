"""What is random in training mode is turned off, so that the loss scores the distribution that was sampled from."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model
from peft import BOFTConfig, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model

from trl_drcd.compat.dropout import turn_off_dropout

sys.path.insert(0, str(Path(__file__).parent / "families"))

from tiny import make

TARGETS = ["q_proj", "v_proj", "down_proj"]
ADAPTERS = [
    LoHaConfig(r=2, target_modules=TARGETS, module_dropout=0.5),
    LoHaConfig(r=2, target_modules=TARGETS, rank_dropout=0.5),
    LoKrConfig(r=2, target_modules=TARGETS, module_dropout=0.5),
    LoraConfig(r=2, target_modules=TARGETS, lora_dropout=0.5),
    LoraConfig(r=2, target_modules=TARGETS, lora_dropout=0.5, use_dora=True),
    BOFTConfig(boft_block_size=4, target_modules=TARGETS, boft_dropout=0.9),
]


def logits(model, ids, training: bool):
    model.train(training)
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


@pytest.mark.parametrize("config", ADAPTERS, ids=lambda one: f"{type(one).__name__}-{one.peft_type.value}")
def test_adapters_compute_in_training_as_in_evaluation(tokenizer, config):
    model = get_peft_model(make_model(tokenizer), copy.deepcopy(config))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    ids = torch.randint(5, len(tokenizer), (8, 12), generator=torch.Generator().manual_seed(0))
    assert any(not torch.equal(logits(model, ids, True), logits(model, ids, False)) for _ in range(5))
    turn_off_dropout(model)
    for _ in range(5):
        assert torch.equal(logits(model, ids, True), logits(model, ids, False))


@pytest.mark.parametrize("name", ["mixtral", "phimoe"])
def test_routers_compute_in_training_as_in_evaluation(name):
    """PhiMoE's jitter is also a threshold in evaluation, which stays as it is."""
    model = make(name)
    for module in model.modules():
        for key in [key for key in vars(module) if "jitter" in key]:
            setattr(module, key, 0.1)
    ids = torch.randint(3, 12, (16, 20), generator=torch.Generator().manual_seed(0))
    before = logits(model, ids, False)
    dropout_alone = copy.deepcopy(model)
    for module in dropout_alone.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert not torch.equal(logits(dropout_alone, ids, True), before)
    turn_off_dropout(model)
    assert torch.equal(logits(model, ids, False), before)
    for trained in (model, copy.deepcopy(model)):
        for _ in range(3):
            assert torch.equal(logits(trained, ids, True), before)


def test_a_dropout_of_another_name_is_turned_off():
    class Drop(torch.nn.Dropout):
        """Of one's own."""

    model = torch.nn.Sequential(Drop(0.5))
    turn_off_dropout(model)
    assert model[0].p == 0.0
