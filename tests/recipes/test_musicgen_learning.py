"""
Distillation and diversity on a small MusicGen of the tiny music world, trained here in a minute or two.

Its training clips are sampled from the shipped MusicLM, whose codes (2 codebooks of 1,024) the spectral codec plays,
so nothing has to be built or downloaded.
"""

import random
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchaudio")

from datasets import Dataset
from test_trainer import settings
from transformers import AutoModelForCausalLM, AutoTokenizer, EncodecConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "tiny_music" / "build"))

from tokenizer import build_t5_tokenizer
from train_musicgen import build_musicgen, code_loss

from trl_drcd import CFGDistillDiversityTrainer
from trl_drcd.audio import MusicEmbedder
from trl_drcd.audio.codecs import SpectralCodec, delay, undelay
from trl_drcd.evaluation.likelihood import teacher_terms
from trl_drcd.evaluation.sampling import sample_prompts
from trl_drcd.evaluation.variety import diversity_within_prompts
from trl_drcd.guidance import left_pad
from trl_drcd.policies import MusicgenPolicy
from trl_drcd.prompts import distinct, load_prompts

pytestmark = pytest.mark.slow
TINY_MUSIC = Path(__file__).parents[2] / "recipes" / "tiny_music"
WORLD, FRAMES = TINY_MUSIC / "models", 50


class Player:
    """The spectral codec on completions in the delayed layout."""

    def __init__(self, codec: SpectralCodec):
        self.codec = codec

    def decode(self, completions):
        codes = undelay(torch.tensor(completions).unflatten(1, (-1, self.codec.num_codebooks)))
        return [(sound, 16000) for part in codes.split(8) for sound in self.codec.decode_codes(part)]


def prompts_of(split, count):
    file = TINY_MUSIC / "data" / f"{split}_prompts.jsonl"
    return distinct(load_prompts("prompts", str(file), "train")["prompt"], count)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A trained small MusicGen (T5 2 x 128, decoder 4 x 256, 2 codebooks), its tokenizer and its codec."""
    torch.manual_seed(0)
    musiclm, codec = (
        AutoModelForCausalLM.from_pretrained(WORLD / "musiclm"),
        SpectralCodec.from_pretrained(WORLD / "codec"),
    )
    captions = prompts_of("train", 192)
    samples = sample_prompts(
        musiclm, AutoTokenizer.from_pretrained(WORLD / "musiclm"), captions, max_new_tokens=2 * FRAMES
    )
    clips = [(caption, codes) for caption, ids in zip(captions, samples.token_ids, strict=True)
             if len(codes := codec.to_codes(ids)) == FRAMES]  # fmt: skip
    assert len(clips) > 150
    tokenizer = build_t5_tokenizer()
    audio = EncodecConfig(
        num_filters=2, hidden_size=8, num_lstm_layers=1, sampling_rate=16000, target_bandwidths=[1.0]
    )
    model = build_musicgen(tokenizer, audio, num_codebooks=codec.num_codebooks).train()
    policy, rng = MusicgenPolicy(tokenizer, model.config), random.Random(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    for _ in range(120):
        chosen = rng.sample(clips, 32)
        rows = [{"prompt": "", "negative_prompt": None if rng.random() < 0.2 else text} for text, _ in chosen]
        completion = delay(torch.stack([codes for _, codes in chosen]), policy.mask_id).flatten(1)
        batch = *left_pad(policy.negative_prompt_ids(rows, None), 0), completion, torch.ones_like(completion)
        loss = code_loss(policy, model, batch).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    folder = tmp_path_factory.mktemp("musicgen")
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, Player(codec)


def run(world, tmp_path, **changed):
    """A short training run on it: its values on held-out prompts before and after, and its log."""
    folder, player = world
    embedder = MusicEmbedder.from_pretrained(WORLD / "embedder")
    trainer = CFGDistillDiversityTrainer(
        model=str(folder),
        args=settings(
            tmp_path, max_completion_length=FRAMES + 1, per_device_train_batch_size=32, bf16=True,
            lr_scheduler_type="cosine", **changed,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts_of("train", 192)}),
        embedder=embedder if changed.get("diversity_coef") else None,
        codec=player,
    )  # fmt: skip

    def values():
        samples = sample_prompts(
            trainer.model, trainer.processing_class, prompts_of("test", 24), 4, max_new_tokens=FRAMES + 1
        )
        terms = teacher_terms(trainer.model, trainer.teacher.copy, trainer.processing_class, samples)
        return terms.kl.mean().item(), diversity_within_prompts(embedder(player.decode(samples.token_ids)), 4).mean()

    before = values()
    trainer.train()
    return before, values(), trainer.state.log_history


def test_the_kl_to_the_guided_teacher_falls(world, tmp_path):
    (before, _), (after, _), _ = run(world, tmp_path, max_steps=25, learning_rate=1e-3)
    assert after < 0.6 * before


def test_diversity_rises_with_its_reward(world, tmp_path):
    """Without guidance, which pulls the other way; one run gave 0.434 to 0.516 and, held out, 0.519 to 0.568."""
    reward = {"diversity_coef": 200.0, "num_generations": 8, "guidance_scale": 1.0}
    (_, before), (_, after), log = run(world, tmp_path, max_steps=40, learning_rate=5e-4, **reward)
    diversity = [entry["diversity"] for entry in log if "diversity" in entry]
    assert sum(diversity[-13:]) > 1.05 * sum(diversity[:13])
    assert after > before
