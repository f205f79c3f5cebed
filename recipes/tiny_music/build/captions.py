"""
The words of the tiny music world: its instruments, tempi and kinds of tune, and the captions made of them.

A metadata row has `instrument`, `tempo`, `kind` and `key` ("G minor"). A caption names some of them, in one of several
wordings; all words are known beforehand (`vocabulary`), so a word-level tokenizer covers every caption.
"""

from __future__ import annotations

import random
import re

# Name -> General MIDI program, counted from 0.
INSTRUMENTS = {
    "church organ": 19, "piano": 0, "violin": 40, "flute": 73, "trumpet": 56,
    "accordion": 21, "acoustic guitar": 24, "harpsichord": 6, "marimba": 12, "clarinet": 71,
}  # fmt: skip
# Name -> note onsets per second; far enough apart to be told from each other whatever the tune.
TEMPI = {"slow": 1.75, "medium": 3.3, "fast": 6.2}
# Kind -> factor on the onset rate: a fast chorale is slower than a fast reel.
KINDS = {
    "chorale": 0.75, "air": 0.85, "reel": 1.0, "jig": 1.0, "hornpipe": 1.0, "slip jig": 1.0, "strathspey": 1.0,
}  # fmt: skip
TONICS = ["C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B"]
MODES = ["major", "minor", "dorian", "mixolydian"]

SYNONYMS = {
    "church organ": ["church organ", "church organ", "pipe organ"],
    "violin": ["violin", "violin", "fiddle"],
    "acoustic guitar": ["acoustic guitar", "acoustic guitar", "guitar"],
    "slow": ["slow", "slow", "calm"],
    "medium": ["medium", "moderate", "steady"],
    "fast": ["fast", "fast", "quick"],
    "chorale": ["chorale", "Bach chorale", "Bach chorale"],
    "reel": ["reel", "reel", "Irish reel"],
    "jig": ["jig", "jig", "Irish jig"],
    "hornpipe": ["hornpipe", "hornpipe", "Irish hornpipe"],
    "air": ["air", "air", "Irish air"],
}
# How often a caption names an attribute.
NAMED = {"instrument": 0.9, "tempo": 0.8, "kind": 0.8, "key": 0.5}


def _join(*words: str) -> str:
    text = " ".join(word for word in words if word)
    return re.sub(r"\ba (?=[aeiouI])", "an ", text)


def _wordings(tempo: str, kind: str, key: str, instrument: str) -> list[str]:
    """All wordings for the given words; an empty string is an attribute that is not named."""
    in_key = f"in {key}" if key else ""
    forms = [
        _join("a", tempo, kind or "tune", in_key, f"for {instrument}" if instrument else ""),
        _join("a", tempo, kind or "piece", in_key, f"played on the {instrument}" if instrument else ""),
        _join(tempo, kind or "music", in_key, f"on {instrument}" if instrument else ""),
    ]
    if instrument:
        forms += [
            _join(instrument, "playing a", tempo, kind or "tune", in_key),
            _join("a", instrument, "plays a", tempo, kind or "piece", in_key),
            _join("solo", instrument, tempo, kind, in_key),
        ]
    if tempo:
        forms.append(
            _join("a", kind or "tune", "at a", tempo, "tempo", in_key, f"for {instrument}" if instrument else "")
        )
    return forms


def full_caption(row: dict) -> str:
    """The plain caption that names every attribute: "a slow chorale in G minor for church organ"."""
    return _wordings(row["tempo"], row["kind"], row["key"], row["instrument"])[0]


def caption(row: dict, rng: random.Random, named: set[str] | None = None) -> str:
    """
    A random caption of a clip.

    Args:
        row (`dict`): Has `instrument`, `tempo`, `kind` and `key`.
        rng (`random.Random`): Source of all choices; the same state gives the same caption.
        named (`set[str]`, *optional*): The attributes to name; drawn with the shares of `NAMED` if not given.

    Returns:
        `str`: The caption; never empty.
    """
    if named is None:
        named = {a for a, share in NAMED.items() if rng.random() < share} or {"instrument"}
    words = {a: rng.choice(SYNONYMS.get(row[a], [row[a]])) if a in named else "" for a in NAMED}
    return rng.choice(_wordings(words["tempo"], words["kind"], words["key"], words["instrument"]))


def vocabulary() -> list[str]:
    """Every word that a caption can hold, in lower case and sorted."""
    words = set(TONICS) | set(MODES)
    for name in [*INSTRUMENTS, *TEMPI, *KINDS]:
        for synonym in [name, *SYNONYMS.get(name, [])]:
            words |= set(synonym.split())
            for form in _wordings(synonym, synonym, "", synonym) + _wordings("", "", "C major", synonym):
                words |= set(form.split())
    return sorted({word.lower() for word in words | {"an"}})


def transpose_key(tonic: str, mode: str, semitones: int) -> str:
    """The name of a key after transposition: `("G", "minor", 2)` gives "A minor"."""
    return f"{TONICS[(TONICS.index(tonic) + semitones) % 12]} {mode}"
