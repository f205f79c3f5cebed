"""
Note lists of public-domain tunes, extracted from the scores that the package `music21` ships.

Three sources: Bach's four-part chorales, Ryan's Mammoth Collection (1883) and O'Neill's Music of Ireland (1903). Each
score becomes one JSON line: `id, title, source, kind, metre, key, mode, bars, notes, family, split`. Times are in
quarter notes: `bars` holds onsets, `notes` lists of (onset, duration, MIDI pitch, part). A family holds all editions
of a tune; no family is divided over two splits.

    python recipes/tiny_music/build/scores.py
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
from itertools import pairwise
from multiprocessing import Pool
from pathlib import Path
from typing import Any

from tqdm import tqdm

HERE = Path(__file__).resolve().parents[1]  # models/ and data/
TONICS = ["C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B"]
RHYTHMS = ["slip jig", "jig", "reel", "hornpipe", "strathspey", "air", "waltz", "march", "clog"]
# O'Neill's book is ordered by kind; used where a transcription carries no `R:` field.
ONEILL_SECTIONS = [(625, "air"), (1115, "jig"), (1175, "slip jig"), (1555, "reel"), (1780, "hornpipe")]
MIN_NOTES = 40
NGRAM, OVERLAP, COMMON = 8, 0.15, 12


def _kind(rhythm: str, title: str, number: int | None, metre: str) -> str | None:
    """The kind of a tune from its `R:` field, its title or its place in the book; `None` if it cannot be told."""
    for text in (rhythm, title):
        text = text.lower().replace("slipjig", "slip jig")
        for kind in RHYTHMS:
            if re.search(rf"\b{kind}\b", text):
                return "slip jig" if kind == "jig" and metre == "9/8" else "hornpipe" if kind == "clog" else kind
    section = next((kind for last, kind in ONEILL_SECTIONS if number is not None and number <= last), None)
    expected = {"jig": "6/8", "slip jig": "9/8"}.get(section or "")
    return None if expected and metre != expected else section


def _headers(text: str) -> dict[int, dict[str, str]]:
    """The `T:` and `R:` fields of every tune of an ABC file, by its `X:` number."""
    found: dict[int, dict[str, str]] = {}
    for block in re.split(r"(?m)^(?=X:)", text):
        number = re.match(r"X:\s*(\d+)", block)
        if number:
            fields = {f: m.group(1).strip() for f in "TR" if (m := re.search(rf"(?m)^{f}:(.*)$", block))}
            found[int(number.group(1))] = fields
    return found


def _extract(score: Any, source: str, name: str, rhythm: str = "", number: int | None = None) -> dict | None:
    """One score as a dictionary, or `None` where it cannot serve (too short, no metre, unknown kind)."""
    from music21 import key as m21key

    flats = [part.stripTies().flatten() for part in score.parts]
    metres = flats[0].getElementsByClass("TimeSignature") if flats else []
    if not metres or (source == "bach" and len(flats) != 4):
        return None
    metre = metres[0].ratioString
    title = (score.metadata.title if score.metadata else None) or name
    kind = "chorale" if source == "bach" else _kind(rhythm, title, number, metre)
    notes = []
    for part, flat in enumerate(flats):
        for n in flat.notes:
            if not n.duration.isGrace and n.quarterLength > 0:
                notes += [
                    [round(float(n.offset), 4), round(float(n.quarterLength), 4), p.midi, part] for p in n.pitches
                ]
    if kind in (None, "waltz", "march") or len(notes) < MIN_NOTES:
        return None
    stated = next(iter(flats[0].getElementsByClass(m21key.Key)), None)
    k = stated if stated is not None and source != "bach" else score.analyze("key")
    mode = k.mode if k.mode in ("major", "minor", "dorian", "mixolydian") else "minor"
    bars = sorted({round(float(m.offset), 4) for m in score.parts[0].getElementsByClass("Measure")})
    return {
        "id": name, "title": title, "source": source, "kind": kind, "metre": metre, "key": TONICS[k.tonic.pitchClass],
        "mode": mode, "bars": bars, "notes": sorted(notes),
    }  # fmt: skip


def read_file(task: tuple[str, str]) -> list[dict]:
    """All usable scores of one corpus file, `task` being (source, path)."""
    from music21 import converter

    source, path = task
    stem = Path(path).stem
    try:
        parsed = converter.parse(path)
    except Exception as error:
        tqdm.write(f"skipped {stem}: {error}")
        return []
    headers = {} if source == "bach" else _headers(Path(path).read_text(errors="replace"))
    rows = []
    for score in getattr(parsed, "scores", None) or [parsed]:
        number = score.metadata.number if score.metadata else None
        number = int(number) if number and str(number).isdigit() else next(iter(headers), None)
        name = {"bach": stem, "ryan": f"ryan-{stem}"}.get(source, f"oneill-{stem}-{number}")
        try:
            rhythm = headers.get(number, {}).get("R", "") if number is not None else ""
            row = _extract(score, source, name, rhythm, number if source == "oneill" else None)
        except Exception as error:
            tqdm.write(f"skipped {name}: {error}")
            continue
        if row:
            rows.append(row)
    return rows


def normalise_title(title: str) -> str:
    """A title without accents, articles, brackets, variant numbers and the kind of the tune."""
    text = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode().lower().replace("'", "")
    text = re.sub(r"\(.*?\)|--.*$|\b(no|version|variation|setting)\b.*$", " ", text)
    text = re.sub(r"\b(the|a|an|" + "|".join(RHYTHMS) + r")\b", " ", re.sub(r"[^a-z ]", " ", text))
    return " ".join(sorted(text.split()))


def melody_ngrams(row: dict) -> set[tuple[int, ...]]:
    """Interval n-grams of the top part, repeated notes dropped: the same for every transposition and note length."""
    pitches = [n[2] for n in row["notes"] if n[3] == 0]
    pitches = [p for p, before in zip(pitches, [None, *pitches], strict=False) if p != before]
    steps = [b - a for a, b in pairwise(pitches)]
    return {tuple(steps[i : i + NGRAM]) for i in range(len(steps) - NGRAM + 1)}


def families(rows: list[dict]) -> list[int]:
    """
    Tune-family index of every score: the connected components of "same normalised title, or at least `OVERLAP` of the
    shorter melody's interval n-grams in common". N-grams of more than `COMMON` scores are stock phrases, and ignored.
    """
    parent = list(range(len(rows)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    by_title: dict[str, int] = {}
    grams = [melody_ngrams(row) for row in rows]
    holders: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        title = normalise_title(row["title"])
        if title and row["source"] != "bach":
            parent[find(i)] = find(by_title.setdefault(title, i))
        for gram in grams[i]:
            holders[gram].append(i)
    shared: Counter[tuple[int, int]] = Counter()
    for scores in holders.values():
        if len(scores) <= COMMON:
            shared.update((a, b) for x, a in enumerate(scores) for b in scores[x + 1 :])
    for (a, b), count in shared.items():
        if count >= OVERLAP * max(1, min(len(grams[a]), len(grams[b]))):
            parent[find(a)] = find(b)
    return [find(i) for i in range(len(rows))]


def split_of(family: str) -> str:
    """The split of a family, from a hash of its name alone: 85 % train, 5 % validation, 10 % test."""
    share = int(hashlib.sha256(family.encode()).hexdigest()[:8], 16) / 2**32
    return "train" if share < 0.85 else "validation" if share < 0.90 else "test"


def read_scores(path: Path = HERE / "data" / "scores.jsonl.gz") -> list[dict]:
    """The score list that `main` wrote."""
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "data" / "scores.jsonl.gz")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    if args.output.exists():
        print(f"{args.output} exists: skipped")
        return
    from music21 import corpus

    composers = [("bach", "bach"), ("ryan", "ryansMammoth"), ("oneill", "oneills1850")]
    tasks = [(s, str(p)) for s, c in composers for p in sorted(corpus.getComposer(c)) if p.suffix in (".mxl", ".abc")]
    # The largest files first, so that no process is left alone with one at the end.
    tasks.sort(key=lambda task: (task[0] != "oneill", task[1]))
    with Pool(args.processes) as pool:
        found = list(tqdm(pool.imap_unordered(read_file, tasks), total=len(tasks), desc="reading scores", unit="file"))
    unique = {row["id"]: row for rows in found for row in rows}
    rows = [unique[name] for name in sorted(unique)]
    # A family is named after its first member, so that the split does not hang on the order of the unions.
    first: dict[int, str] = {}
    for row, root in zip(rows, families(rows), strict=True):
        row["family"] = first.setdefault(root, row["id"])
        row["split"] = split_of(row["family"])
    temporary = args.output.with_suffix(".tmp")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="") as file:
        file.writelines((json.dumps(row, separators=(",", ":")) + "\n").encode() for row in rows)
    os.replace(temporary, args.output)
    for column in ("source", "kind", "mode", "split"):
        print(column, dict(Counter(row[column] for row in rows)))
    sizes = Counter(row["family"] for row in rows)
    print(f"{len(rows)} scores in {len(sizes)} families, the largest of {max(sizes.values())}")


if __name__ == "__main__":
    main()
