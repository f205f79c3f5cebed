"""Guided sampling beside transformers' own, step by step: batches of unequal prompts, left padding, caches."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessor,
    LogitsProcessorList,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from trl_drcd.guidance import EarlySteps, TeacherCFGLogitsProcessor, guide_logits, left_pad

SCALE, TEMPERATURE = 3.0, 0.9
PROMPTS = [[1, 5, 6, 4], [1, 8, 9, 10, 11, 12, 7, 4], [1, 4]]
NEGATIVES = [[1, 4], [1, 11, 5, 4], [1, 4, 7, 6, 9, 4]]
SCRIPT = torch.tensor([[6, 7, 8, 9, 10], [12, 5, 5, 6, 11], [7, 9, 12, 8, 5]])  # the tokens that each row "samples"


class Recorder(LogitsProcessor):
    """Keeps the log-probabilities that a step samples from, and lets only the script's token pass."""

    def __init__(self, log_probs_of):
        self.log_probs_of, self.steps = log_probs_of, []

    def __call__(self, input_ids, scores):
        self.steps.append(self.log_probs_of(scores))
        token = SCRIPT[:, [len(self.steps) - 1]].repeat(scores.shape[0] // len(SCRIPT), 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def recorded(model, rows, recorder, *before) -> torch.Tensor:
    """Log-probabilities of every step of `generate`, `(steps, B, V)`."""
    ids, mask = left_pad(rows, 0)
    processors = LogitsProcessorList([*before, recorder])
    output = model.generate(
        ids, attention_mask=mask, logits_processor=processors, max_new_tokens=SCRIPT.shape[1], do_sample=False
    )
    assert torch.equal(output[: len(SCRIPT), ids.shape[1] :], SCRIPT)
    return torch.stack(recorder.steps)


def ours(model) -> torch.Tensor:
    return recorded(
        model, PROMPTS + NEGATIVES, Recorder(TeacherCFGLogitsProcessor(SCALE, TEMPERATURE).guided_log_probs)
    )


def theirs(model) -> torch.Tensor:
    ids, mask = left_pad(NEGATIVES, 0)
    processor = UnbatchedClassifierFreeGuidanceLogitsProcessor(SCALE, model, ids, mask)
    return recorded(model, PROMPTS, Recorder(lambda scores: (scores / TEMPERATURE).log_softmax(-1)), processor)


@torch.no_grad()
def definition(model) -> torch.Tensor:
    """Eq. (1) from one forward per row, step and stream: no padding, no cache."""
    rows = []
    for prompt, negative, script in zip(PROMPTS, NEGATIVES, SCRIPT.tolist(), strict=True):
        streams = [
            torch.stack([model(torch.tensor([start + script[:step]])).logits[0, -1] for step in range(len(script))])
            for start in (prompt, negative)
        ]
        rows.append((guide_logits(*streams, SCALE) / TEMPERATURE).log_softmax(-1))
    return torch.stack(rows, 1)


def test_both_sample_from_the_same_distributions_at_every_step(model):
    torch.testing.assert_close(ours(model), definition(model), rtol=0, atol=1e-4)
    torch.testing.assert_close(ours(model), theirs(model), rtol=0, atol=1e-4)


def test_guidance_can_start_late(model):
    """Before its start the steps are those of the conditional stream alone, exactly; then they are guided."""
    start, processor = 2, TeacherCFGLogitsProcessor(SCALE, TEMPERATURE, early=EarlySteps(2))

    def log_probs(scores):
        found = processor.guided_log_probs(scores)
        processor(None, scores)  # draws, and counts the step
        return found

    found = recorded(model, PROMPTS + NEGATIVES, Recorder(log_probs))
    unguided = Recorder(lambda scores: (scores.chunk(2)[0] / TEMPERATURE).log_softmax(-1))
    plain = recorded(model, PROMPTS + NEGATIVES, unguided)
    assert torch.equal(found[:start], plain[:start])
    torch.testing.assert_close(found[start:], definition(model)[start:], rtol=0, atol=1e-4)


def test_with_learned_positions_ours_is_right_and_theirs_is_off_where_the_negative_prompt_is_padded(tokenizer):
    """
    Theirs gives the unconditional stream no `position_ids`: padding on its left shifts learned positions.

    Should this fail since theirs has become right, drop the second half.
    """
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.4,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    expected, padded = definition(model), [len(negative) < max(map(len, NEGATIVES)) for negative in NEGATIVES]
    torch.testing.assert_close(ours(model), expected, rtol=0, atol=1e-4)
    errors = (theirs(model) - expected).abs().amax(dim=(0, 2))
    assert padded == [True, True, False]
    assert errors[2] < 1e-4 and errors[:2].min() > 0.1


@pytest.mark.parametrize("name", ["temperature", "guidance_scale"])
def test_the_comparison_would_notice(model, monkeypatch, name):
    expected = theirs(model)
    monkeypatch.setitem(globals(), {"temperature": "TEMPERATURE", "guidance_scale": "SCALE"}[name], 1.5)
    assert (ours(model) - expected).abs().max() > 0.1
