"""The tiny music world: tune families and splits, captions, token streams, what is shipped."""

import json
import random
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parents[2] / "recipes" / "tiny_music"
sys.path.append(str(FOLDER / "build"))

import captions  # noqa: E402
import prompts  # noqa: E402
import render  # noqa: E402
import scores  # noqa: E402
from tokenizer import FIRST_AUDIO_TOKEN, build_tokenizer  # noqa: E402
from train_base import Clips, audio_logits, audio_loss, learning_rate, off_turn_penalty, tokens_in_turn  # noqa: E402


def score(title: str, pitches: list[int], **fields) -> dict:
    notes = [[float(i), 1.0, pitch, 0] for i, pitch in enumerate(pitches)]
    bars = [float(i) for i in range(0, len(pitches), 4)]
    return {"id": title, "title": title, "source": "ryan", "notes": notes, "bars": bars} | fields


def tune(seed: int, length: int = 60) -> list[int]:
    rng = random.Random(seed)
    return [rng.randint(60, 80) for _ in range(length)]


def test_a_family_is_a_title_or_a_melody_in_any_transposition():
    melody = tune(0)
    variant = [p + 5 for p in melody[:40]] + tune(9, 20)  # two thirds of the tune, transposed, under another name
    rows = [
        score("The Humours of Bandon", melody),
        score("Flowers of Cork", variant),
        score("Humours of Bandon -- Jig", tune(1)),
        score("Maid on the Green", tune(2)),
    ]
    families = scores.families(rows)
    assert families[0] == families[1] == families[2] != families[3]


def test_kind_is_read_from_the_field_the_title_or_the_place_in_the_book():
    assert scores._kind(" slipjig", "x", None, "9/8") == "slip jig"
    assert scores._kind("", "Acacia -- Reel", None, "2/4") == "reel"
    assert scores._kind("", "Untitled", 1200, "4/4") == "reel"
    assert scores._kind("", "Untitled", 700, "4/4") is None  # in the section of jigs, and not in 6/8
    assert scores._kind("jig", "x", None, "9/8") == "slip jig"


def test_chunks_start_on_bars_and_do_not_overlap():
    row = score("x", tune(3, 40))
    for seed in range(20):
        first, second = render.chunk_starts(row, 0.25, random.Random(seed))  # 4 s are 16 quarter notes
        assert first in row["bars"] and second in row["bars"] and second >= first + 16 and second + 16 <= 40
    assert render.chunk_starts(score("x", tune(3, 31)), 0.25, random.Random(0)) is None


def test_a_clip_does_not_hear_the_clip_before_it():
    pytest.importorskip("tinysoundfont")
    soundfont = "/usr/share/sounds/sf2/FluidR3_GM.sf2"
    if not Path(soundfont).exists():
        pytest.skip(f"{soundfont} is not installed")
    notes = [(0.0, 1.0, 60, 90), (1.0, 3.0, 64, 90)]
    violin = render.render_notes(notes, 40, soundfont)
    assert violin.shape == (64000,) and violin.std() > 0
    render.render_notes(notes, 19, soundfont)
    assert (render.render_notes(notes, 40, soundfont) == violin).all()


def test_keys_are_transposed():
    assert captions.transpose_key("G", "minor", 2) == "A minor"
    assert captions.transpose_key("C", "major", -1) == "B major"


def test_captions_stay_in_the_vocabulary_and_name_what_they_are_told_to():
    rng, words = random.Random(0), set(captions.vocabulary())
    for _ in range(500):
        row = {
            "instrument": rng.choice(list(captions.INSTRUMENTS)),
            "tempo": rng.choice(list(captions.TEMPI)),
            "kind": rng.choice(list(captions.KINDS)),
            "key": f"{rng.choice(captions.TONICS)} {rng.choice(captions.MODES)}",
        }
        assert set(captions.caption(row, rng).lower().split()) <= words
        assert row["key"] in captions.caption(row, rng, {"key"})
        assert row["key"] not in captions.caption(row, rng, {"instrument", "tempo", "kind"})
    row = {"instrument": "church organ", "tempo": "slow", "kind": "air", "key": "G minor"}
    assert captions.full_caption(row) == "a slow air in G minor for church organ"
    assert captions._join("a", "air") == "an air"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(2, 8)


def test_prompt_layout(tokenizer):
    def tokens(text):
        return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])

    assert tokens("") == ["<s>", "<audio>"]
    assert " ".join(tokens("A slow Bach chorale, in C# minor!")) == "<s> a slow bach chorale in c# minor <audio>"
    assert tokens("slow <a1_7>")[2] == "<a1_7>"
    assert tokenizer.convert_tokens_to_ids("<a1_7>") == FIRST_AUDIO_TOKEN + 8 + 7
    assert (
        tokenizer.padding_side == "left" and tokenizer.unk_token_id not in tokenizer(tokenizer.decode(5))["input_ids"]
    )


def test_training_loss_is_that_of_each_stream_alone(tokenizer):
    """Right padding and a batch of unequal prompts change nothing; only audio tokens and the end count."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    clips = Clips.__new__(Clips)
    clips.audio = torch.randint(FIRST_AUDIO_TOKEN, FIRST_AUDIO_TOKEN + 8, (3, 6))
    clips.rows = [{"instrument": "piano", "tempo": "fast", "kind": "jig", "key": "C major"}] * 3
    clips.tokenizer = tokenizer
    ids, lengths = clips.batch([0, 1, 2], random.Random(1), 0.5)
    assert len(set(lengths.tolist())) > 1 and ids.shape[1] == lengths.max() + 7
    single = []
    for row, length in zip(ids, lengths.tolist(), strict=True):
        labels = row[: length + 7].clone()
        labels[:length] = -100
        assert labels[-1] == tokenizer.eos_token_id
        single.append(model(row[None, : length + 7], labels=labels[None]).loss)
    loss = audio_loss(*audio_logits(model, ids, lengths, 7))
    torch.testing.assert_close(loss, torch.stack(single).mean(), atol=0.02, rtol=0)


def test_learning_rate_warms_up_and_falls():
    rates = [learning_rate(share / 100, 1.0) for share in range(101)]
    assert rates[0] == 0 and max(rates) == rates[2] == 1 and abs(rates[-1] - 0.02) < 1e-9
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_no_tune_family_of_the_shipped_scores_is_in_two_splits():
    rows = scores.read_scores()
    splits = defaultdict(set)
    for row in rows:
        splits[row["family"]].add(row["split"])
    assert len(rows) > 3000 and all(len(found) == 1 for found in splits.values())
    assert {row["kind"] for row in rows} <= set(captions.KINDS)


def test_shipped_test_prompts_are_held_out():
    shipped = {
        split: [json.loads(line) for line in (FOLDER / "data" / f"{split}_prompts.jsonl").read_text().splitlines()]
        for split in ("train", "test", "fresh")
    }
    assert [len(split) for split in shipped.values()] == [2000, 400, 208]
    assert len({p["prompt"].lower() for split in shipped.values() for p in split}) == 2608
    for split, expected in (("train", False), ("test", True), ("fresh", True)):
        full = [p for p in shipped[split] if p["instrument"] and p["tempo"] and p["kind"]]
        assert full and all(prompts.held_out(p) is expected for p in full)


def test_the_shipped_prompts_are_made_again_by_their_script(tmp_path):
    """From the list of scores alone: no clip is rendered."""
    subprocess.run([sys.executable, str(FOLDER / "build" / "prompts.py"), "--output", str(tmp_path)], check=True)
    for path in sorted((FOLDER / "data").glob("*_prompts.jsonl")):
        assert (tmp_path / path.name).read_text() == path.read_text()

    # What is there is kept, and has no text of it drawn again
    taken = (tmp_path / "fresh_prompts.jsonl").read_text()
    (tmp_path / "test_prompts.jsonl").write_text(taken)
    (tmp_path / "fresh_prompts.jsonl").unlink()
    subprocess.run([sys.executable, str(FOLDER / "build" / "prompts.py"), "--output", str(tmp_path)], check=True)
    assert (tmp_path / "test_prompts.jsonl").read_text() == taken
    assert not set(taken.splitlines()) & set((tmp_path / "fresh_prompts.jsonl").read_text().splitlines())


def test_off_turn_penalty_knows_whose_turn_it_is():
    """Codebooks of four entries, two frames and the end: silent where only allowed tokens have weight."""

    class Codec:
        num_codebooks, codebook_size, first_token_id = 2, 4, 5

    allowed = tokens_in_turn(Codec, end=2, vocabulary=15, audio_length=5)
    assert [row.nonzero().flatten().tolist() for row in allowed] == [[5, 6, 7, 8], [9, 10, 11, 12]] * 2 + [[2]]
    assert off_turn_penalty(torch.where(allowed, 30.0, 0.0)[None], allowed) < 1e-3
    wrong = torch.zeros(1, 5, 15)
    # log of forbidden over allowed mass, above the margin: (11 to 4 four times, 14 to 1 once)
    expected = (4 * np.log(11 / 4) + np.log(14)) / 5 + 12
    assert abs(off_turn_penalty(wrong, allowed).item() - expected) < 1e-3


def test_shipped_models_are_safe_small_and_load():
    from trl_drcd.audio import MusicDescriptors, MusicEmbedder, PreferenceModel, TextAudioJudge

    models = FOLDER / "models"
    weights = [file for file in models.rglob("*") if file.suffix in {".safetensors", ".bin", ".pt", ".pkl", ".npy"}]
    assert {file.suffix for file in weights} == {".safetensors"}
    assert sum(file.stat().st_size for file in models.rglob("*") if file.is_file()) < 40e6
    assert all((file.parent / "README.md").is_file() for file in weights)
    audio = [(0.1 * torch.randn(64000, generator=torch.Generator().manual_seed(0)), 16000)]
    for kind, name in ((MusicEmbedder, "embedder"), (MusicDescriptors, "descriptors")):
        assert torch.isfinite(kind.from_pretrained(models / name)(audio)).all()
    assert PreferenceModel.from_pretrained(models / "preference").preference(audio).shape == (1,)
    assert TextAudioJudge.from_pretrained(models / "judge").adherence(["a slow air"], audio).shape == (1,)
