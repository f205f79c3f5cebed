"""The text comparison and its judge on a random model and made-up encoders."""

import json

import pytest
import torch

from recipes import compare_text
from trl_drcd.evaluation.text import FRAME, prompt_information

pytest.importorskip("sentence_transformers")


@pytest.fixture
def frame(monkeypatch, tokenizer):
    """A frame of words that the tokenizer knows."""
    monkeypatch.setattr("trl_drcd.evaluation.text.FRAME", "a {completion} for")
    return tokenizer


def test_prompt_information_is_the_difference_of_two_log_likelihoods(frame, model):
    prompts, completions = ["slow tune", "drum", "slow tune"], ["harp", "flute a fast harp", ""]
    found = prompt_information(model, frame, prompts, completions, batch_size=2)

    def log_likelihood(text, target):
        ids = torch.tensor([[1, *frame(text, add_special_tokens=False).input_ids]])
        target = frame(target, add_special_tokens=False).input_ids
        total = 0.0
        for token in target:  # one forward per token, no padding
            total += model(ids).logits[0, -1].log_softmax(-1)[token].item()
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
        return total

    pairs = zip(prompts, completions, strict=True)
    expected = [log_likelihood(f"a {c} for", p) - log_likelihood("a  for", p) for p, c in pairs]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
    assert expected[2] == 0.0 and abs(expected[0]) > 0.01


def test_prompts_and_completions_must_be_pairs(tokenizer, model):
    with pytest.raises(ValueError, match="got 1 `prompts` for 2 `completions`"):
        prompt_information(model, tokenizer, ["a"], ["b", "c"])


def test_the_frame_reads_on_into_the_request():
    assert FRAME.format(completion="x").endswith(" for the request: ")


def test_what_is_measured_is_kept_and_shown(tmp_path, monkeypatch, capsys, tokenizer, model):
    calls = []

    def encoder(folder):
        calls.append(folder)
        return lambda texts: torch.tensor([[1.0 + len(text), text.count("a"), 1.0] for text in texts])

    monkeypatch.setattr(compare_text, "SentenceEmbedder", encoder)
    for folder in ("base", "trained"):
        model.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    (tmp_path / "test.jsonl").write_text('{"prompt": "slow tune"}\n{"prompt": "fast harp"}\n')
    words = ["--base", tmp_path / "base", "--dataset", tmp_path / "test.jsonl", "--output", tmp_path / "out"]
    words += ["--prompts", 2, "--samples", 2, "--max_new_tokens", 5, "--models", f"mine={tmp_path / 'trained'}"]
    compare_text.main([str(word) for word in words])
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["strategy"] for line in lines] == ["base", "base with CFG", "mine"]
    assert [line["guidance_scale"] for line in lines] == [1.0, 3.0, 1.0]
    names = {"quality", "adherence", "diversity", "diversity_second", "entropy_per_token", "tokens_per_second"}
    assert names < set(lines[0]["metrics"])
    assert lines[1]["metrics"]["kl"]["mean"] == pytest.approx(0, abs=1e-4)
    assert lines[0]["metrics"]["kl"]["mean"] > 0.01
    assert lines[0]["metrics"]["kl"] == lines[2]["metrics"]["kl"]  # the same weights, the same seed
    assert (tmp_path / "out" / "samples.md").read_text().count("## ") == 2
    count = len(calls)
    compare_text.main([str(word) for word in words])
    assert len(calls) == count == 6
    compare_text.main([*map(str, words), "--samples", "3"])
    assert len(calls) == 2 * count
