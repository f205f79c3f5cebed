"""
Render the score list to 4-second clips at 16 kHz, with captions' metadata.

A recording is a score with an instrument, a tempo and a transposition, all drawn at random; two non-overlapping chunks
of it become clips. Each clip starts at a bar, on a note. Writes `audio.npy` (N, 64000) int16 and `metadata.jsonl` per
split.

    python recipes/tiny_music/build/render.py --soundfont /usr/share/sounds/sf2/FluidR3_GM.sf2
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
from bisect import bisect_left
from collections import Counter
from functools import cache
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
from captions import INSTRUMENTS, KINDS, TEMPI, transpose_key
from scores import HERE, read_scores
from tqdm import tqdm

SAMPLING_RATE, SECONDS = 16000, 4.0
SAMPLES = int(SAMPLING_RATE * SECONDS)
CHUNKS = 2
OUTPUT = HERE.parents[1] / "outputs" / "tiny_music" / "clips"
LOUDNESS, PEAK = 0.1, 0.95  # root mean square and largest absolute value after normalisation
LONGEST_GAP = 1.6  # seconds without a new note within a clip
RECORDINGS = {"train": 20000, "validation": 500, "test": 750}


def onset_rate(score: dict) -> float:
    """Distinct note onsets per quarter note."""
    onsets = {n[0] for n in score["notes"]}
    return len(onsets) / (max(n[0] + n[1] for n in score["notes"]) - min(onsets))


def chunk_starts(score: dict, seconds_per_quarter: float, rng: random.Random) -> list[float] | None:
    """Bar onsets, in quarter notes, of `CHUNKS` random non-overlapping chunks, or `None` if the score is too short."""
    length = SECONDS / seconds_per_quarter
    onsets = sorted({n[0] for n in score["notes"]})
    end = max(n[0] + n[1] for n in score["notes"])

    def usable(bar: float) -> bool:
        first = bisect_left(onsets, bar - 1e-3)
        inside = [*onsets[first : bisect_left(onsets, bar + length)], bar + length]
        gaps = [b - a for a, b in zip([bar, *inside], inside, strict=False)]
        starts_with_note = first < len(onsets) and abs(onsets[first] - bar) < 1e-2
        return starts_with_note and bar + length <= end + 1e-6 and max(gaps) * seconds_per_quarter < LONGEST_GAP

    bars = [bar for bar in score["bars"] if usable(bar)]
    first = [bar for bar in bars if any(other >= bar + length for other in bars)]
    if not first:
        return None
    start = rng.choice(first)
    return [start, rng.choice([bar for bar in bars if bar >= start + length])]


def plan(scores: list[dict], recordings: int, seed: int) -> list[dict]:
    """The random recordings: one metadata row each, with `starts` and `seconds_per_quarter`."""
    rng = random.Random(seed)
    by_kind = {kind: [s for s in scores if s["kind"] == kind] for kind in KINDS}
    queues: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    rows: list[dict] = []
    while len(rows) < recordings:
        # Rare kinds more often than their share, frequent ones less; within a kind each score once before any twice.
        kind = rng.choices(list(KINDS), [math.sqrt(len(by_kind[k])) for k in KINDS])[0]
        if not queues[kind]:
            queues[kind] = rng.sample(by_kind[kind], len(by_kind[kind]))
        score = queues[kind].pop()
        instrument, tempo = rng.choice(list(INSTRUMENTS)), rng.choice(list(TEMPI))
        rate = TEMPI[tempo] * KINDS[kind] * rng.uniform(0.92, 1.08)
        seconds_per_quarter = onset_rate(score) / rate
        starts = chunk_starts(score, seconds_per_quarter, rng)
        if starts is None:
            continue
        transpose = rng.randint(-5, 6)
        rows.append({
            "score": score["id"], "family": score["family"], "recording": len(rows), "instrument": instrument,
            "tempo": tempo, "kind": kind, "key": transpose_key(score["key"], score["mode"], transpose),
            "metre": score["metre"], "transpose": transpose, "starts": starts,
            "seconds_per_quarter": seconds_per_quarter,
        })  # fmt: skip
    return rows


def plan_split(split: str, scores: list[dict], recordings: int, seed: int) -> list[dict]:
    """The recordings of a split, of its own scores and with its own seed."""
    return plan([s for s in scores if s["split"] == split], recordings, seed + list(RECORDINGS).index(split))


@cache
def _synthesiser(soundfont: str) -> tuple[Any, int]:
    import tinysoundfont

    synth = tinysoundfont.Synth(samplerate=SAMPLING_RATE)
    return synth, synth.sfload(soundfont, gain=-6.0)


def render_notes(notes: list[tuple[float, float, int, int]], program: int, soundfont: str) -> np.ndarray:
    """
    Synthesise notes to `(SAMPLES,)` float32, mono.

    Args:
        notes: `(onset, duration, MIDI pitch, velocity)`, times in seconds.
        program: General MIDI program, counted from 0.
        soundfont: Path of an SF2 file.
    """
    synth, font = _synthesiser(soundfont)
    # Voices take some milliseconds to stop: rendered and dropped, or the last clip is heard at the start of this one.
    synth.sounds_off()
    synth.generate(SAMPLING_RATE // 20)
    synth.program_select(0, font, 0, program)
    events = [(int(o * SAMPLING_RATE), 1, p, v) for o, _, p, v in notes]
    events += [(int((o + d) * SAMPLING_RATE) - 1, 0, p, 0) for o, d, p, _ in notes]
    pieces, now = [], 0
    for time, on, pitch, velocity in [*sorted(events), (SAMPLES, 0, 0, 0)]:
        time = min(time, SAMPLES)
        if time > now:
            pieces.append(np.frombuffer(bytes(synth.generate(time - now)), dtype=np.float32))
            now = time
        if now >= SAMPLES:
            break
        synth.noteon(0, pitch, velocity) if on else synth.noteoff(0, pitch)
    return np.concatenate(pieces)[: 2 * SAMPLES].reshape(-1, 2).mean(1)


def render_recording(task: tuple[dict, dict, str]) -> np.ndarray:
    """The chunks of one recording, `(CHUNKS, SAMPLES)` int16, with one gain for all."""
    row, score, soundfont = task
    spq, length = row["seconds_per_quarter"], SECONDS / row["seconds_per_quarter"]
    chunks = []
    for start in row["starts"]:
        notes = []
        for onset, duration, pitch, _ in score["notes"]:
            if start - 1e-3 <= onset < start + length:
                velocity = 105 if any(abs(onset - bar) < 1e-3 for bar in score["bars"]) else 92
                notes.append(
                    (
                        max(0.0, onset - start) * spq,
                        max(0.06, 0.93 * duration * spq),
                        pitch + row["transpose"],
                        velocity,
                    )
                )
        chunks.append(render_notes(notes, INSTRUMENTS[row["instrument"]], soundfont))
    audio = np.stack(chunks)
    gain = min(LOUDNESS / max(1e-6, float(np.sqrt((audio**2).mean()))), PEAK / max(1e-6, float(np.abs(audio).max())))
    return np.round(audio * gain * 32767).astype(np.int16)


def read_metadata(folder: Path) -> list[dict]:
    """The rows of a split, one per clip."""
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def render_split(split: str, scores: list[dict], recordings: int, args: argparse.Namespace) -> None:
    folder = args.output / split
    if (folder / "metadata.jsonl").exists():
        print(f"{folder} exists: skipped")
        return
    folder.mkdir(parents=True, exist_ok=True)
    rows = plan_split(split, scores, recordings, args.seed)
    by_id = {s["id"]: s for s in scores}
    audio = np.lib.format.open_memmap(
        folder / "audio.tmp.npy", mode="w+", dtype=np.int16, shape=(CHUNKS * recordings, SAMPLES)
    )
    with Pool(args.processes) as pool:
        tasks = ((row, by_id[row["score"]], args.soundfont) for row in rows)
        rendered = pool.imap(render_recording, tasks, chunksize=16)
        for i, chunks in enumerate(tqdm(rendered, total=recordings, desc=f"rendering {split}", unit="recording")):
            audio[CHUNKS * i : CHUNKS * (i + 1)] = chunks
    audio.flush()
    os.replace(folder / "audio.tmp.npy", folder / "audio.npy")
    with open(folder / "metadata.tmp", "w") as file:
        for row in rows:
            for chunk, start in enumerate(row["starts"]):
                clip = {k: v for k, v in row.items() if k != "starts"} | {"chunk": chunk, "start": start}
                file.write(json.dumps(clip) + "\n")
    os.replace(folder / "metadata.tmp", folder / "metadata.jsonl")
    print(split, dict(Counter(row["kind"] for row in rows)), len({row["score"] for row in rows}), "scores")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", type=Path, default=HERE / "data" / "scores.jsonl.gz")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--soundfont", default="/usr/share/sounds/sf2/FluidR3_GM.sf2")
    parser.add_argument("--recordings", type=int, nargs=3, default=[*RECORDINGS.values()], help=", ".join(RECORDINGS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not Path(args.soundfont).exists():
        raise FileNotFoundError(
            f"--soundfont {args.soundfont} does not exist: `apt-get install fluid-soundfont-gm`, or name another"
        )
    scores = read_scores(args.scores)
    for split, recordings in reversed(list(zip(RECORDINGS, args.recordings, strict=True))):  # short ones first
        render_split(split, scores, recordings, args)


if __name__ == "__main__":
    main()
