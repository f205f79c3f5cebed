"""
Does guidance do to the tiny MusicLM what the paper says it does? Measured on prompts of held-out tunes.

Samples each prompt several times at each guidance scale, from the same seeds, and reports: how often the judge hears
the instrument and the tempo that the prompt names, the adherence to the prompt, the diversity within a prompt by the
embedding model E, and how often the strongest partial holds its pitch from one frame to the next, each with a 95 %
bootstrap interval over prompts. Writes `gate.json`, `gate.md` and `gate.png` (spectrograms beside the originals').

    OMP_NUM_THREADS=1 python recipes/tiny_music/build/gate.py

It passes if, at guidance 1, both labels are heard clearly more often than by chance, and if adherence is higher and
diversity lower at the largest guidance than at the smallest, with intervals apart.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import textwrap
from pathlib import Path

import numpy as np
import torch
from captions import INSTRUMENTS, KINDS, SYNONYMS, TEMPI, caption
from listening import Clips, as_audio
from scores import HERE
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trl_drcd.audio.codecs import SpectralCodec
from trl_drcd.diversity import group_diversity
from trl_drcd.audio import MusicEmbedder
from trl_drcd.audio import TextAudioJudge
from trl_drcd.guidance import generate_guided

VALUES = {"instrument": list(INSTRUMENTS), "tempo": list(TEMPI), "kind": sorted(KINDS, key=len, reverse=True)}
METRICS = ("instrument", "tempo", "adherence", "diversity", "pitch_hold")
ABOVE_CHANCE = 0.1  # the low end of an accuracy's interval must lie this much above chance


def named(prompt: str, attribute: str) -> str | None:
    """The value of `attribute` ("instrument", "tempo" or "kind") that a prompt names, in any of its synonyms."""
    for value in VALUES[attribute]:
        for word in {value, *SYNONYMS.get(value, [])}:
            if re.search(rf"\b{re.escape(word.lower())}\b", prompt.lower()):
                return value
    return None


def pitch_hold(waveform: torch.Tensor, n_fft: int = 2048, hop_length: int = 640) -> float:
    """
    Share of successive frames whose strongest partial stays in its bin or a neighbour's (7.8 Hz wide at 16 kHz).

    Frames more than 40 dB below the loudest do not count; NaN if none is left.
    """
    window = torch.hann_window(n_fft)
    # Zeros beyond the edges: a reflection needs more samples than a short clip has.
    spectrum = torch.stft(waveform, n_fft, hop_length, window=window, pad_mode="constant", return_complex=True)
    power = spectrum.abs().square()
    level, strongest = power.sum(0), power.argmax(0)
    loud = (level > 1e-4 * level.max()) & (level > 0)
    both = loud[1:] & loud[:-1]
    steady = (strongest[1:] - strongest[:-1]).abs() <= 1
    return float(steady[both].float().mean()) if both.any() else float("nan")


def accuracy(wanted: list[str | None], heard: list[str]) -> np.ndarray:
    """1 where a label was heard, 0 where not, NaN where none was wanted."""
    return np.array([np.nan if w is None else float(w == h) for w, h in zip(wanted, heard, strict=True)])


def chance(wanted: list[str | None], heard: list[str]) -> float:
    """The accuracy to expect if the prompts were dealt to the clips at random."""
    pairs = [(w, h) for w, h in zip(wanted, heard, strict=True) if w is not None]
    shares = {v: (np.mean([w == v for w, _ in pairs]), np.mean([h == v for _, h in pairs])) for v, _ in pairs}
    return float(sum(asked * given for asked, given in shares.values()))


def measure(prompts: list[str], audio: list, judge: TextAudioJudge, embedder: MusicEmbedder) -> tuple[dict, dict]:
    """
    Metrics of clips, those of a prompt contiguous.

    Returns:
        `tuple`: metric to a value per prompt, shape `(P,)`, NaN where a prompt does not name the attribute; attribute
        to chance level.
    """
    samples = len(audio) // len(prompts)
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    heard = judge.classify(audio)
    wanted = {name: [named(prompt, name) for prompt in repeated] for name in ("instrument", "tempo")}
    values = {name: accuracy(wanted[name], heard[name]) for name in wanted}
    values["adherence"] = judge.adherence(repeated, audio).numpy()
    if samples > 1:
        values["diversity"] = group_diversity(embedder(audio), samples).numpy()
    values["pitch_hold"] = np.array([pitch_hold(waveform) for waveform, _ in audio])
    means = {name: value.reshape(len(prompts), samples).mean(1) for name, value in values.items()}
    return means, {name: chance(wanted[name], heard[name]) for name in wanted}


def bootstrap(values: np.ndarray, resamples: np.ndarray) -> dict:
    """Mean over prompts and its 95 % interval; `resamples (R, P)` are indices of prompts, the same for all values."""
    means = np.nanmean(values[resamples], axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(np.nanmean(values)), "low": float(low), "high": float(high)}


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    codec: SpectralCodec,
    prompts: list[str],
    guidance: float,
    args: argparse.Namespace,
) -> list[tuple[torch.Tensor, int]]:
    """`args.samples` clips of each prompt, contiguous; the same seed at every guidance."""
    torch.manual_seed(args.seed)
    ids = [row for row in tokenizer(prompts)["input_ids"] for _ in range(args.samples)]
    null, audio = tokenizer("")["input_ids"], []
    for start in tqdm(range(0, len(ids), args.batch_size), desc=f"guidance {guidance:g}", unit="batch"):
        batch = ids[start : start + args.batch_size]
        tokens = generate_guided(model, batch, [null] * len(batch), guidance, args.temperature, args.max_new_tokens)
        audio += codec.decode(tokens.tolist())
    return audio


def verdict(results: dict, difference: dict, chances: dict, low: str, high: str) -> dict[str, bool]:
    """What must hold, and whether it does."""
    one, three = results[low], results[high]
    return {
        "instrument_above_chance": one["instrument"]["low"] > chances["instrument"] + ABOVE_CHANCE,
        "tempo_above_chance": one["tempo"]["low"] > chances["tempo"] + ABOVE_CHANCE,
        "adherence_rises": difference["adherence"]["low"] > 0,
        "diversity_falls": difference["diversity"]["high"] < 0,
        "adherence_intervals_apart": three["adherence"]["low"] > one["adherence"]["high"],
        "diversity_intervals_apart": three["diversity"]["high"] < one["diversity"]["low"],
    }


def table(report: dict) -> str:
    """The report as Markdown."""
    cell = "{mean:.3f} [{low:.3f}, {high:.3f}]".format_map
    lines = [
        f"{report['prompts']} prompts of held-out tunes x {report['samples_per_prompt']} samples, temperature "
        f"{report['temperature']}, seed {report['seed']}; mean and 95 % bootstrap interval over prompts. "
        "By `recipes/tiny_music/build/gate.py`.",
        "",
        "| guidance | " + " | ".join(METRICS) + " |",
        "|---" * (len(METRICS) + 1) + "|",
    ]
    for name, metrics in [*report["guidance"].items(), (report["compared"], report["difference"])]:
        lines.append(f"| {name} | " + " | ".join(cell(metrics[m]) for m in METRICS) + " |")
    for name in ("chance", "originals", "round_trips"):
        values = [report[name].get(m) for m in METRICS]
        lines.append(f"| {name} | " + " | ".join("" if v is None else f"{v:.3f}" for v in values) + " |")
    lines += [
        "",
        "`originals` and `round_trips`: test recordings with captions of their own, as they are and through the",
    ]
    lines += [
        "codec; their diversity is that between different recordings, not within a prompt. `pitch_hold`: share of"
    ]
    lines += ["frames (25 a second) whose strongest partial is that of the frame before."]
    lines += ["", *(f"- {'holds' if holds else 'DOES NOT HOLD'}: {name}" for name, holds in report["verdict"].items())]
    return "\n".join([*lines, "", f"Gate: {'passed' if report['passed'] else 'NOT passed'}."]) + "\n"


def spectrograms(
    path: Path, prompts: list[str], samples: dict[str, list], codec: SpectralCodec, rows: int = 5
) -> None:
    """Per prompt: an original of the test split that it describes, its round trip, and a sample per guidance."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    clips = Clips("test")
    figure, axes = plt.subplots(rows, 2 + len(samples), figsize=(4 * (2 + len(samples)), 2.4 * rows), squeeze=False)
    for line, index in zip(axes, np.linspace(0, len(prompts) - 1, rows).astype(int), strict=True):
        wanted = {name: value for name in VALUES if (value := named(prompts[index], name))}
        fitting = [i for i, row in enumerate(clips.rows) if all(row[name] == wanted[name] for name in wanted)] or [0]
        original = torch.from_numpy(clips.audio[clips.index[fitting[0]]].astype(np.float32) / 32768)
        panels = {"original": original, "round trip": codec.decode_codes(codec.encode(original))[0]}
        first = index * (len(samples[next(iter(samples))]) // len(prompts))
        panels |= {f"guidance {name}": audio[first][0] for name, audio in samples.items()}
        for axis, (name, waveform) in zip(line, panels.items(), strict=True):
            padded = torch.nn.functional.pad(waveform, (0, max(0, codec.n_fft - len(waveform))))
            axis.imshow(codec.log_mel(padded)[0].T, origin="lower", aspect="auto", vmin=-3, vmax=3)
            axis.set_title(name, fontsize=8)
            axis.set_xticks([]), axis.set_yticks([])
        line[0].set_ylabel(textwrap.fill(prompts[index], 26), fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    Image.open(path).quantize(64).save(path, optimize=True)  # a third of the size


def reference(judge: TextAudioJudge, embedder: MusicEmbedder, codec: SpectralCodec | None) -> dict[str, float]:
    """The metrics of one chunk of each test recording with a caption of its own; diversity between recordings."""
    clips, rng = Clips("test", chunks=1), random.Random(0)
    audio = [pair for batch in clips.waveforms(codec) for pair in as_audio(batch)]
    values, _ = measure([caption(row, rng) for row in clips.rows], audio, judge, embedder)
    between = group_diversity(embedder(audio), len(audio))
    return {name: float(np.nanmean(value)) for name, value in values.items()} | {"diversity": float(between.mean())}


def write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("codec", "embedder", "judge"):
        parser.add_argument(f"--{name}", type=Path, default=HERE / "models" / name)
    parser.add_argument("--model", type=Path, default=HERE / "models" / "musiclm")
    parser.add_argument("--prompts", type=Path, default=HERE / "data" / "test_prompts.jsonl")
    parser.add_argument("--output", type=Path, default=HERE.parents[1] / "results" / "music")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 3.0])
    parser.add_argument("--temperature", type=float, default=0.99)
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_grad_enabled(False)

    with open(args.prompts) as file:
        available = list(dict.fromkeys(json.loads(line)["prompt"] for line in file))
    prompts = random.Random(args.seed).sample(available, min(args.num_prompts, len(available)))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    codec = SpectralCodec.from_pretrained(args.codec)
    embedder, judge = MusicEmbedder.from_pretrained(args.embedder), TextAudioJudge.from_pretrained(args.judge)

    samples, values, chances = {}, {}, {}
    for guidance in args.guidance:
        name = f"{guidance:g}"
        samples[name] = sample(model, tokenizer, codec, prompts, guidance, args)
        values[name], chances[name] = measure(prompts, samples[name], judge, embedder)
    draws = np.random.default_rng(args.seed).integers(0, len(prompts), (args.resamples, len(prompts)))
    low, high = f"{min(args.guidance):g}", f"{max(args.guidance):g}"
    results = {name: {m: bootstrap(v[m], draws) for m in METRICS} for name, v in values.items()}
    difference = {m: bootstrap(values[high][m] - values[low][m], draws) for m in METRICS}
    checks = verdict(results, difference, chances[low], low, high)
    report = {
        "prompts": len(prompts), "samples_per_prompt": args.samples, "temperature": args.temperature,
        "seed": args.seed, "resamples": args.resamples, "guidance": results, "compared": f"{high} - {low}",
        "difference": difference, "chance": chances[low], "originals": reference(judge, embedder, None),
        "round_trips": reference(judge, embedder, codec), "verdict": checks, "passed": all(checks.values()),
    }  # fmt: skip
    args.output.mkdir(parents=True, exist_ok=True)
    write(args.output / "gate.json", json.dumps(report, indent=2) + "\n")
    write(args.output / "gate.md", table(report))
    spectrograms(args.output / "gate.png", prompts, samples, codec)
    print(table(report))


if __name__ == "__main__":
    main()
