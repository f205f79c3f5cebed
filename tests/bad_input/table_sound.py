"""Bad sound, embedders and codecs, and audio files to train an embedder on."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from bad_world import Bad

from trl_drcd.audio import MusicEmbedder
from trl_drcd.audio.codecs import SpectralCodec
from trl_drcd.diversity import DiversityReward, group_diversity
from trl_drcd.text import SentenceEmbedder


def codec(name: str, change: Any, value: str, remedy: str, error: type[BaseException] = ValueError) -> Bad:
    """A codec's folder, changed."""
    return Bad(name, lambda w, tmp: SpectralCodec.from_pretrained(change(w, tmp)), error, "codec", value, remedy)


def embedder(name: str, change: Any, value: str, remedy: str, error: type[BaseException] = ValueError) -> Bad:
    """A music embedder's folder, changed."""
    return Bad(name, lambda w, tmp: MusicEmbedder.from_pretrained(change(w, tmp)), error, "embedder", value, remedy)


def hears(name: str, waveform: Any, rate: Any, error: type[BaseException], value: str, remedy: str) -> Bad:
    """A clip, given to a music embedder."""
    return Bad(
        name,
        lambda w, tmp: MusicEmbedder.from_pretrained(w / "embedder")([(waveform, rate)]),
        error,
        "audio[0]",
        value,
        remedy,
    )


def returns(name: str, output: Any, value: str, remedy: str, error: type[BaseException] = ValueError) -> Bad:
    """An embedder that returns this for four completions."""

    def act(world: Any, tmp: Path) -> None:
        DiversityReward(lambda texts: output, 2).embed(list("abcd"), [[1]] * 4)

    return Bad(name, act, error, "embed", value, remedy)


def recordings(name: str, make: Any, error: type[BaseException], value: str, remedy: str) -> Bad:
    """What recipes/music/train_embedder.py is to train on."""

    def act(world: Any, tmp: Path) -> None:
        import train_embedder

        AcceleratorState._reset_state(reset_partial_state=True)  # the rows before have started another one
        words = ["--dataset", str(make(world, tmp)), "--output_dir", str(tmp / "out"), "--steps", "1"]
        train_embedder.main([*words, "--recordings_per_batch", "2", "--versions", "1"])

    return Bad(name, act, error, "`dataset", value, remedy)


def two_files(content: bytes) -> Any:
    def make(world: Any, tmp: Path) -> Path:
        world.wav(tmp / "music" / "a.wav"), world.wav(tmp / "music" / "b.wav")
        (tmp / "music" / "c\u0301 \u266b.wav").write_bytes(content)
        return tmp / "music"

    return make


def array(content: Any, **more: Any) -> Any:
    def make(world: Any, tmp: Path) -> Path:
        np.save(tmp / "a.npy", content, **more)
        return tmp / "a.npy"

    return make


def torn_array(world: Any, tmp: Path) -> Path:
    file = array(np.zeros((3, 100), np.float32))(world, tmp)
    file.write_bytes(file.read_bytes()[:200])
    return file


ONES, ZEROS = torch.ones(4, 3), torch.zeros(4, 3)
ROWS = [
    hears("whole numbers for sound", torch.ones(9, dtype=torch.int16), 16000, TypeError, "int16", "floats in [-1, 1]"),
    hears("stereo", torch.zeros(2, 9), 16000, ValueError, "(2, 9)", "average the channels"),
    hears("NaN in sound", torch.tensor([0.0, float("nan")]), 16000, ValueError, "NaN", "finite samples"),
    hears("no sampling rate", torch.zeros(9), 0, ValueError, "0", "a positive integer in Hz"),
    hears("sampling rate in words", torch.zeros(9), "CD", TypeError, "'CD'", "a positive integer in Hz"),
    hears("sampling rate NaN", torch.zeros(9), float("nan"), ValueError, "nan", "a positive integer in Hz"),
    hears("words for sound", "la la la", 16000, TypeError, "str", "floats in [-1, 1]"),
    returns("embeddings that are too few", ONES[:3], "(3, 3)", "must return shape (4, D)"),
    Bad("embeddings without a direction", lambda w, tmp: group_diversity(ZEROS, 2), ValueError, "`embeddings`",
        "rows [0, 1, 2, 3]", "non-zero length"),
    Bad("embeddings NaN", lambda w, tmp: group_diversity(ONES * float("nan"), 2), ValueError, "`embeddings`", "NaN",
        "a finite vector"),
    Bad("parts of groups", lambda w, tmp: group_diversity(ONES, 3), ValueError, "`embeddings`", "(4, 3)",
        "a multiple of `num_generations` (3)"),
    returns("embeddings in words", list("abcd"), "list", "must return", TypeError),
    Bad("an embedder that is none", lambda w, tmp: w.trainer(tmp, embedder="minilm", diversity_coef=1.0), TypeError,
        "`embedder`", "str", "callable"),
    Bad("a reward without its embedder", lambda w, tmp: w.trainer(tmp, diversity_coef=1.0), ValueError,
        "`diversity_coef=1.0`", "None", "needs `embedder`"),
    Bad("a codec that decodes nothing", lambda w, tmp: w.trainer(tmp, codec={}), TypeError, "`codec`", "dict",
        "`decode(token_ids)`"),
    Bad("a codec beyond the vocabulary",
        lambda w, tmp: w.trainer(tmp, codec=SpectralCodec(torch.zeros(2, 50, 96), first_token_id=5)), ValueError,
        "`codec`", "104", "vocabulary of 13"),
    Bad("numbers for texts", lambda w, tmp: SentenceEmbedder(SimpleNamespace(eval=lambda: None))([1]), TypeError,
        "`texts`", "int", "strings"),
    Bad("a sentence encoder that is not there", lambda w, tmp: SentenceEmbedder(str(tmp / "none")), FileNotFoundError,
        "`model=", "none", "sentence encoder"),
    Bad("a sentence encoder pickled", lambda w, tmp: SentenceEmbedder(str(w.pickled("model", tmp))), FileNotFoundError,
        "`model", "pytorch_model.bin", "as safetensors"),
    codec("codec not there", lambda w, tmp: tmp / "codec", "config.json", "give the folder of a codec",
          FileNotFoundError),
    codec("codec's configuration torn", lambda w, tmp: w.with_file("codec", tmp, "config.json", "{"), "config.json",
          "copy or save it again"),
    codec("codec of another kind", lambda w, tmp: w.edited("codec", tmp, codec_type="other"), "not hold a spectral",
          "`codec_type: spectral`"),
    codec("codec with unknown entries", lambda w, tmp: w.edited("codec", tmp, colour=3), "['colour']", "known are"),
    codec("codec with a rate in words", lambda w, tmp: w.edited("codec", tmp, sampling_rate="CD"), "'CD'",
          "must be a number"),
    codec("codec with a hop of 0", lambda w, tmp: w.edited("codec", tmp, hop_length=0), "0", "a positive integer"),
    codec("codec torn", lambda w, tmp: w.torn("codec", tmp, "codec.safetensors"), "codec.safetensors",
          "copy or save it again"),
    codec("codec pickled", lambda w, tmp: w.pickled("codec", tmp, "codec.safetensors", "codec.pt"), "codec.pt",
          "as safetensors", FileNotFoundError),
    embedder("embedder not there", lambda w, tmp: tmp / "embedder", "config.json", "save_pretrained",
             FileNotFoundError),
    embedder("embedder's configuration torn", lambda w, tmp: w.with_file("embedder", tmp, "config.json", "{"),
             "config.json", "copy or save it again"),
    embedder("embedder of another class", lambda w, tmp: w.edited("embedder", tmp, model_class="Other"), "Other",
             "expected a MusicEmbedder"),
    embedder("embedder with unknown entries", lambda w, tmp: w.edited("embedder", tmp, colour=3), "['colour']",
             "known are"),
    embedder("embedder of another size", lambda w, tmp: w.edited("embedder", tmp, hidden_size=16), "size mismatch",
             "does not fit its config.json"),
    embedder("embedder torn", lambda w, tmp: w.torn("embedder", tmp), "model.safetensors", "copy or save it again"),
    embedder("embedder pickled", lambda w, tmp: w.pickled("embedder", tmp), "pytorch_model.bin", "as safetensors",
             FileNotFoundError),
    recordings("recordings not there", lambda w, tmp: tmp / "none", SystemExit, "none", "give a folder"),
    recordings("a sound file that is none", two_files(b"not a sound"), SystemExit, ".wav", "remove or convert it"),
    recordings("a sound file torn", two_files(b"RIFF\x24\x00\x00\x00WAVEfmt "), SystemExit, ".wav",
               "remove or convert it"),
    recordings("an empty sound file", two_files(b""), SystemExit, ".wav", "remove or convert it"),
    recordings("recordings pickled", array(np.array([{}, {}]), allow_pickle=True), SystemExit, "a.npy", "pickle"),
    recordings("recordings torn", torn_array, SystemExit, "a.npy", "copy or save it again"),
    recordings("one recording for all", array(np.zeros(99, np.float32)), SystemExit, "(99,)", "(N, samples)"),
    recordings("too few recordings", array(np.zeros((1, 99), np.float32)), SystemExit, "1 recordings", "give more"),
]  # fmt: skip
