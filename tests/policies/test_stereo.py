"""Stereo MusicGen: codebooks of left and right alternate, in pairs of one delay; against transformers' `generate`."""

from unittest import mock

import pytest
import soundfile
import torch
from test_musicgen import (
    BOOKS,
    PROMPTS,
    SIZE,
    STEPS,
    drawn_as_ours,
    make_musicgen,
    make_t5_tokenizer,
    make_trainer,
    recorded_codes,
)
from transformers import AutoProcessor, MusicgenForConditionalGeneration, pipeline

from trl_drcd.audio.codecs import delay, delays_of, is_coded, undelay
from trl_drcd.diversity import one_channel
from trl_drcd.evaluation.listening import keep_completions, read_clips
from trl_drcd.evaluation.sampling import Samples
from trl_drcd.policies import policy_for


@pytest.fixture
def tokenizer():
    return make_t5_tokenizer()


@pytest.fixture
def stereo():
    return make_musicgen(channels=2)


def both(codes):
    """The codes `(B, T, 2 * BOOKS)` of what the codec was given, left and right."""
    left, right = (side[0].transpose(1, 2) for side in codes)
    return torch.stack([left, right], dim=-1).flatten(2)


def test_delayed_layout_is_that_of_generate(stereo):
    assert delays_of(8, 2) == [0, 0, 1, 1, 2, 2, 3, 3]  # of the published models
    codes = torch.randint(SIZE, (2, STEPS - BOOKS + 1, 2 * BOOKS))
    delayed = delay(codes, SIZE, 2)
    assert delayed.shape == (2, STEPS, 2 * BOOKS) and torch.equal(undelay(delayed, 2), codes)
    assert torch.equal(delayed != SIZE, is_coded(STEPS, 2 * BOOKS, 2).expand(2, -1, -1))
    begin = torch.full((2 * 2 * BOOKS, 1), SIZE)
    _, pattern = stereo.decoder.build_delay_pattern_mask(begin, SIZE, max_length=STEPS + 1)
    theirs = pattern.view(2, 2 * BOOKS, -1)[..., 1:].transpose(1, 2)
    assert torch.equal(theirs == -1, delayed != SIZE)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_samples_and_sounds_equal_those_of_generate(tokenizer, stereo, guidance_scale):
    policy = policy_for(stereo, tokenizer)
    with recorded_codes(stereo) as codes, mock.patch("torch.multinomial", drawn_as_ours):
        inputs = tokenizer(PROMPTS, padding=True, return_tensors="pt")
        torch.manual_seed(5)
        audio = stereo.generate(
            **inputs, guidance_scale=guidance_scale, temperature=0.9, top_k=0, max_new_tokens=STEPS
        )  # fmt: skip
    torch.manual_seed(5)
    ids = [tokenizer(p)["input_ids"] for p in PROMPTS]
    null = policy.negative_prompt_ids([{"prompt": p} for p in PROMPTS], None)
    mine = policy.rollout(stereo, ids, null, guidance_scale, 0.9, STEPS).completions()
    assert torch.equal(torch.tensor(mine), delay(both(codes), SIZE, 2).flatten(1))
    for (waveform, rate), theirs in zip(policy.codec(stereo).decode(mine), audio, strict=True):
        assert rate == 80 and waveform.shape == (2, 8 * (STEPS - BOOKS + 1))
        torch.testing.assert_close(waveform, theirs)
        assert not torch.allclose(waveform[0], waveform[1])


def test_too_few_steps_are_refused(tokenizer, stereo):
    with pytest.raises(ValueError, match="delays of 6 codebooks; give at least 4 \\(2 more than frames\\)"):
        policy_for(stereo, tokenizer).rollout(stereo, [[1]], max_new_tokens=3)
    with pytest.raises(ValueError, match="with S at least 3"):
        policy_for(stereo, tokenizer).codec(stereo).to_codes([0] * 12)


def test_a_trained_folder_plays_both_channels(tokenizer, stereo, tmp_path):
    """The embedder hears their mean; the pipeline plays two channels without guidance."""
    heard = []

    def embed(sounds):
        heard.extend(waveform.shape for waveform, _ in sounds)
        return torch.stack([torch.cat([w[:8], torch.ones(1)]) for w, _ in sounds])

    trainer = make_trainer(
        tmp_path, tokenizer, stereo, max_steps=1, diversity_coef=5.0, diversity_credit="critic", embedder=embed,
        max_completion_length=STEPS, diversity_prefixes=2,
    )  # fmt: skip
    trainer.train()
    assert heard and {len(shape) for shape in heard} == {1}
    trainer.save_model(str(tmp_path / "saved"))
    reloaded = MusicgenForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert AutoProcessor.from_pretrained(tmp_path / "saved").feature_extractor.feature_size == 2
    player = pipeline("text-to-audio", model=str(tmp_path / "saved"))
    with recorded_codes(player.model) as codes, mock.patch("torch.multinomial", drawn_as_ours):
        torch.manual_seed(0)
        sound = player("fast drum", generate_kwargs={"max_new_tokens": STEPS})
    assert sound["audio"].squeeze().shape == (2, 8 * (STEPS - BOOKS + 1))
    torch.manual_seed(0)
    policy = policy_for(reloaded, tokenizer)
    prompt = [tokenizer("fast drum")["input_ids"]]
    mine = policy.rollout(reloaded, prompt, temperature=0.99, max_new_tokens=STEPS).completions()
    assert torch.equal(torch.tensor(mine), delay(both(codes), SIZE, 2).flatten(1))


def test_kept_sounds_have_two_channels(tmp_path):
    sounds = [(torch.stack([torch.linspace(-1, 1, 4000), torch.zeros(4000)]), 8000)] * 2
    keep_completions(tmp_path, Samples(["a", "b"], [[0], [0]], 1, 1.0), sounds, 1, 1)
    (clip,) = read_clips(tmp_path)
    waveform, rate = soundfile.read(clip.file)
    assert waveform.shape == (4000, 2) and rate == 8000 and abs(waveform[0, 0] + 1) < 1e-3
    assert clip.spectrogram().read_bytes().startswith(b"\x89PNG")
    ((mean, _), text) = one_channel([sounds[0], "a text"])
    torch.testing.assert_close(mean, sounds[0][0].mean(0))
    assert text == "a text"
