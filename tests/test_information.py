"""What a text tells about its prompt, on a random model."""

import pytest
import torch

from trl_drcd.evaluation.arguments import EvaluateArguments
from trl_drcd.evaluation.information import FRAME, prompt_information
from trl_drcd.evaluation.measuring import Worker
from trl_drcd.evaluation.plan import plan


@pytest.fixture
def frame(monkeypatch, tokenizer):
    """A frame of words that the tokenizer knows."""
    monkeypatch.setattr("trl_drcd.evaluation.information.FRAME", "a {completion} for")
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
    with pytest.raises(ValueError, match="must have the same length, got 1 and 2"):
        prompt_information(model, tokenizer, ["a"], ["b", "c"])


def test_the_frame_reads_on_into_the_request():
    assert FRAME.format(completion="x").endswith(" for the request: ")


def test_the_grid_asks_for_information_on_texts(tmp_path, model, frame):
    model.save_pretrained(tmp_path / "m")
    frame.save_pretrained(tmp_path / "m")
    (tmp_path / "p.jsonl").write_text('{"prompt": "slow tune"}\n{"prompt": "fast harp"}\n')
    args = EvaluateArguments(
        str(tmp_path / "m"), str(tmp_path / "p.jsonl"), num_prompts=2, samples_per_prompt=2, max_new_tokens=4,
        output_dir=str(tmp_path / "out"), prompt_information=True,
    )  # fmt: skip
    held_out, (task,) = plan(args, {})
    worker = Worker(args, held_out, [task.row], quiet=True)
    found = worker(task).per_prompt["prompt_information"]
    samples = worker.samples(task, model)
    texts = frame.batch_decode(samples.token_ids, skip_special_tokens=True)
    expected = prompt_information(model, frame, samples.repeated_prompts, texts).view(2, 2).mean(1)
    assert found == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)
