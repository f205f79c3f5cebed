"""
What embeddings hear: held-out recordings told apart, and how far a single change moves a recording.

Every test recording is rendered anew with one thing changed (instrument, tempo, key, tune), and the mean cosine
distance between the two is taken, for E, the descriptors and the judge's audio tower. Needs the sound font.

    python recipes/tiny_music/build/measure_embedder.py        # writes results/music/embedders.{json,md}
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captions import INSTRUMENTS, TEMPI
from listening import CODEC, Clips, as_audio
from render import chunk_starts, onset_rate, render_recording
from scores import HERE, read_scores
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from trl_drcd.files import write_text
from trl_drcd.evaluation.tables import markdown_table
from trl_drcd.audio.codecs import SpectralCodec
from trl_drcd.audio import MusicDescriptors, MusicEmbedder
from trl_drcd.audio import TextAudioJudge
from trl_drcd.evaluation.statistics import bootstrap_interval
from trl_drcd.evaluation.tables import formatted

Embed = Callable[[list], torch.Tensor]


def auc(cosines: np.ndarray, others: np.ndarray) -> float:
    """
    Area under the ROC curve of the cosine telling chunks of one recording from chunks of two.

    Args:
        cosines (`np.ndarray`): First chunk by second chunk of each recording, shape `(R, R)`.
        others (`np.ndarray`): Which pairs are compared as negatives, shape `(R, R)`, bool, diagonal false.
    """
    scores = np.concatenate([cosines.diagonal(), cosines[others]])
    return float(roc_auc_score(np.arange(len(scores)) < len(cosines), scores))


def resampled_auc(cosines: np.ndarray, others: np.ndarray, resamples: int = 200) -> dict[str, float]:
    """[`auc`] with its 95 % bootstrap interval over recordings; a recording drawn twice is no negative of itself."""
    draws = np.random.default_rng(0).integers(0, len(cosines), (resamples, len(cosines)))
    values = [auc(cosines[np.ix_(d, d)], others[np.ix_(d, d)]) for d in draws]
    low, high = np.quantile(values, [0.025, 0.975])
    return {"mean": auc(cosines, others), "low": float(low), "high": float(high)}


def retrieval(cosines: np.ndarray, ranks: tuple[int, ...] = (1, 5, 10)) -> dict[str, dict[str, float]]:
    """How often a recording's second chunk is among the nearest to its first, of all second chunks."""
    rank = (cosines > cosines.diagonal()[:, None]).sum(1)
    return {f"retrieval_at_{k}": bootstrap_interval(rank < k) for k in ranks}


def telling_apart(embed: Embed, codec: SpectralCodec, split: str = "test") -> dict[str, Any]:
    """
    Held-out recordings told apart; `hard` compares recordings of one instrument and tempo only.

    Args:
        embed (`Callable`): Audio to `(N, D)` of length 1.
        codec ([`SpectralCodec`]): For the clips as a policy would make them.
        split (`str`, *optional*, defaults to `"test"`): Of the tunes.

    Returns:
        `dict`: Metrics, each with `mean`, `low`, `high`, for `originals`, `round_trips` and an original against a
        round trip (`mixed`).
    """
    clips = Clips(split)
    original, coded = (
        torch.cat([embed(as_audio(batch)) for batch in clips.waveforms(c)]).numpy() for c in (None, codec)
    )
    rows = clips.rows[::2]
    names = np.array([row["recording"] for row in rows])
    alike = np.array([[a["instrument"] == b["instrument"] and a["tempo"] == b["tempo"] for b in rows] for a in rows])
    other = names[:, None] != names
    result = {}
    for name, (a, b) in {
        "originals": (original, original), "round_trips": (coded, coded), "mixed": (original, coded)
    }.items():  # fmt: skip
        cosines = a[::2] @ b[1::2].T
        result[name] = {"auc": resampled_auc(cosines, other), "hard_auc": resampled_auc(cosines, other & alike)}
        result[name] |= retrieval(cosines)
    return result


# ---------------------------------------------------------------- one thing changed


def changes_of(row: dict, scores: list[dict], rng: random.Random) -> dict[str, dict]:
    """
    Recordings that differ from a metadata row in one thing each, as rows for [`render_recording`].

    Args:
        row (`dict`): Of a test recording, with `starts`.
        scores (`list[dict]`): The scores of its split.
        rng (`random.Random`): Of the choices.
    """
    by_id = {score["id"]: score for score in scores}
    instrument = rng.choice([name for name in INSTRUMENTS if name != row["instrument"]])
    tempo = rng.choice([name for name in TEMPI if name != row["tempo"]])
    factor = TEMPI[row["tempo"]] / TEMPI[tempo]
    changed = {
        "nothing": row,
        "instrument": row | {"instrument": instrument},
        "tempo": row | {"tempo": tempo, "seconds_per_quarter": row["seconds_per_quarter"] * factor},
        "key (3 semitones)": row | {"transpose": row["transpose"] + (3 if row["transpose"] < 0 else -3)},
        "key (1 semitone)": row | {"transpose": row["transpose"] + (1 if row["transpose"] < 0 else -1)},
    }
    rate = onset_rate(by_id[row["score"]]) / row["seconds_per_quarter"]
    for other in rng.sample(scores, len(scores)):
        spq = onset_rate(other) / rate
        alike = other["kind"] == row["kind"] and other["family"] != row["family"]
        starts = chunk_starts(other, spq, rng) if alike else None
        if starts is not None:
            changed["tune"] = row | {"score": other["id"], "seconds_per_quarter": spq, "starts": starts}
            break
    return changed


def sensitivity(
    embedders: dict[str, Embed], codec: SpectralCodec, recordings: int, soundfont: str, seed: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Mean cosine distance between a test clip and the same with one thing changed, for each embedder."""
    scores = [score for score in read_scores(HERE / "data" / "scores.jsonl.gz") if score["split"] == "test"]
    by_id, rng, clips = {score["id"]: score for score in scores}, random.Random(seed), Clips("test")
    pairs = list(zip(clips.rows[::2], clips.rows[1::2], strict=True))
    distances: dict[str, dict[str, list[float]]] = {name: {} for name in embedders}
    for first, second in tqdm(rng.sample(pairs, recordings), desc="one thing changed", unit="recording"):
        row = first | {"starts": [first["start"], second["start"]]}
        changed = changes_of(row, scores, rng)
        audio = {
            name: torch.from_numpy(render_recording((one, by_id[one["score"]], soundfont)) / np.float32(32768))
            for name, one in changed.items()
        }
        waves = {name: chunks[0] for name, chunks in audio.items()}
        waves |= {"chunk of the recording": audio["nothing"][1], "level (-12 dB)": 0.25 * waves["nothing"]}
        waves["codec round trip"] = codec.decode_codes(codec.encode(waves["nothing"][None]))[0]
        names = [name for name in waves if name != "nothing"]
        for embedder, embed in embedders.items():
            embeddings = torch.nn.functional.normalize(
                embed(as_audio([waves["nothing"], *map(waves.get, names)])), dim=-1
            )
            for name, distance in zip(names, (1 - embeddings[1:] @ embeddings[0]).tolist(), strict=True):
                distances[embedder].setdefault(name, []).append(distance)
    return {e: {name: bootstrap_interval(v) for name, v in rows.items()} for e, rows in distances.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE.parents[1] / "results" / "music")
    parser.add_argument("--soundfont", default="/usr/share/sounds/sf2/FluidR3_GM.sf2")
    parser.add_argument("--recordings", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    models, codec = HERE / "models", SpectralCodec.from_pretrained(CODEC)
    judge = TextAudioJudge.from_pretrained(models / "judge")
    embedders: dict[str, Embed] = {
        "E": MusicEmbedder.from_pretrained(models / "embedder"),
        "descriptors": MusicDescriptors.from_pretrained(models / "descriptors"),
        "judge's audio tower": judge.embed_audio,
    }
    apart = {name: telling_apart(embed, codec) for name, embed in embedders.items()}
    moved = sensitivity(embedders, codec, args.recordings, args.soundfont, args.seed)
    write_text(
        args.output / "embedders.json", json.dumps({"telling_apart": apart, "one_change": moved}, indent=1) + "\n"
    )
    parts = []
    for which in ("originals", "round_trips", "mixed"):
        table = {name: {k: formatted(v) for k, v in one[which].items()} for name, one in apart.items()}
        parts.append(f"{which.replace('_', ' ')}\n\n{markdown_table(table)}")
    changed = {name: {e: formatted(moved[e][name]) for e in embedders} for name in moved["E"]}
    parts.append(f"Mean cosine distance after one change\n\n{markdown_table(changed)}")
    text = "\n\n".join(parts) + "\n"
    write_text(args.output / "embedders.md", text)
    print(text)


if __name__ == "__main__":
    main()
