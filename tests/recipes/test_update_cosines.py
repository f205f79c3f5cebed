"""Cosines of updates, against the dense products."""

import pytest
import torch
from conftest import make_model
from peft import LoraConfig, get_peft_model

from recipes import update_cosines


def adapter(tokenizer, folder, seed, **settings):
    """A random adapter; returns its update of all weights, flattened."""
    torch.manual_seed(seed)
    base = make_model(tokenizer)
    before = {name: p.detach().double() for name, p in base.named_parameters()}
    model = get_peft_model(make_model(tokenizer), LoraConfig(**{"r": 2, "lora_alpha": 6} | settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.save_pretrained(folder)
    merged = dict(model.merge_and_unload().named_parameters())
    return torch.cat([(merged[name].detach().double() - before[name]).flatten() for name in before])


def test_they_equal_those_of_the_merged_weights(tokenizer, tmp_path):
    """Ranks, scales and adapted modules differ."""
    settings = [{}, {"r": 3, "lora_alpha": 1}, {"target_modules": ["q_proj", "k_proj", "v_proj"]}]
    deltas = torch.stack([adapter(tokenizer, tmp_path / str(n), n, **given) for n, given in enumerate(settings)])
    cosines, norms = update_cosines.update_cosines([tmp_path / str(n) for n in range(3)])
    unit = deltas / deltas.norm(dim=1, keepdim=True)
    torch.testing.assert_close(cosines, unit @ unit.T, rtol=0, atol=1e-5)
    torch.testing.assert_close(norms, deltas.norm(dim=1), rtol=1e-5, atol=0)


def test_one_adapter_is_not_enough_and_the_table_has_all(tokenizer, tmp_path, capsys):
    adapter(tokenizer, tmp_path / "a", 0)
    adapter(tokenizer, tmp_path / "b", 1)
    with pytest.raises(SystemExit, match="at least two adapters"):
        update_cosines.main([str(tmp_path / "a")])
    update_cosines.main([str(tmp_path / "a"), str(tmp_path / "b")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| | a | b | norm |" and lines[2].startswith("| a | 1.00 |")


def test_whole_models_differ_from_their_base(tokenizer, tmp_path):
    """As LoRA's, written into the base: the same cosines and norms."""
    base = make_model(tokenizer)
    base.save_pretrained(tmp_path / "base")
    before, deltas = {name: p.detach().double() for name, p in base.named_parameters()}, []
    for seed in range(3):
        torch.manual_seed(seed)
        model = make_model(tokenizer)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(before[name] + 0.01 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / str(seed))
        deltas.append(torch.cat([(p.detach().double() - before[n]).flatten() for n, p in model.named_parameters()]))
    cosines, norms = update_cosines.model_update_cosines([tmp_path / str(n) for n in range(3)], tmp_path / "base")
    unit = torch.stack(deltas) / torch.stack(deltas).norm(dim=1, keepdim=True)
    torch.testing.assert_close(cosines, unit @ unit.T, rtol=0, atol=1e-5)
    torch.testing.assert_close(norms, torch.stack(deltas).norm(dim=1), rtol=1e-5, atol=0)
    with pytest.raises(SystemExit, match=r"different (tensors|shapes)"):
        other = make_model(tokenizer, num_hidden_layers=1)
        other.save_pretrained(tmp_path / "other")
        update_cosines.main([str(tmp_path / "0"), str(tmp_path / "other"), "--base", str(tmp_path / "base")])
