"""
What a tiny MusicGen and its distilled models do on held-out prompts, and what embedder and judge hear of its codec.

Its codes are those of the spectral codec, so Griffin-Lim plays them too: both are listened to.

Results go to `results.jsonl` and `results.md`, the codec's to `round_trips.json`. What is measured already is kept.

    python recipes/tiny_music/build/measure_musicgen.py --round-trips
    python recipes/tiny_music/build/measure_musicgen.py --models outputs/musicgen_quality outputs/musicgen_diversity
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from captions import full_caption
from gate import measure as heard
from render import OUTPUT, read_metadata
from scores import HERE
from tqdm import tqdm
from train_codec import waveforms
from transformers import AutoTokenizer, EncodecModel, MusicgenForConditionalGeneration

from trl_drcd.files import write_text
from trl_drcd.prompts import distinct, load_prompts
from trl_drcd.evaluation.tables import markdown_table
from trl_drcd.audio.codecs import CodebookCodec, SpectralCodec, delay
from trl_drcd.audio import MusicEmbedder
from trl_drcd.audio import TextAudioJudge
from trl_drcd.evaluation.likelihood import teacher_terms
from trl_drcd.evaluation.sampling import sample_prompts
from trl_drcd.evaluation.statistics import bootstrap_interval
from trl_drcd.evaluation.variety import per_prompt
from trl_drcd.policies import policy_for

COLUMNS = {
    "kl": "KL to guided teacher (nats)",
    "entropy_per_token": "entropy (nats/token)",
    "adherence": "adherence, EnCodec",
    "diversity": "diversity, EnCodec",
    "adherence_gl": "adherence, Griffin-Lim",
    "diversity_gl": "diversity, Griffin-Lim",
    "instrument_gl": "instrument, Griffin-Lim",
    "tempo_gl": "tempo, Griffin-Lim",
}
TEMPERATURE, TEACHER_GUIDANCE, STEPS, SEED = 0.99, 3.0, 103, 0


def judges() -> tuple[TextAudioJudge, MusicEmbedder]:
    """The shipped judge and embedder."""
    models = HERE / "models"
    return TextAudioJudge.from_pretrained(models / "judge"), MusicEmbedder.from_pretrained(models / "embedder")


def round_trips(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """
    Test recordings, and their codes decoded by Griffin-Lim (with all codebooks) and by the EnCodec.

    `retrieved` is the share of decoded clips whose nearest original, under the embedder, is their own.
    """
    encodec = EncodecModel.from_pretrained(args.codes / "model")
    spectral = SpectralCodec.from_pretrained(args.codes / "spectral")
    audio, rows = np.load(args.clips / "test" / "audio.npy", mmap_mode="r"), read_metadata(args.clips / "test")
    index = np.arange(0, len(rows), len(rows) // args.clips_count)[: args.clips_count]
    codes = torch.from_numpy(np.load(args.codes / "test" / "codes.npy")[index].astype(np.int64))
    codec = CodebookCodec(encodec, codes.shape[-1], encodec.config.codebook_size)
    sounds = {
        "original": [(w, 16000) for w in waveforms(audio, index)],
        "Griffin-Lim": [(w, 16000) for part in codes.split(8) for w in spectral.decode_codes(part)],
        "EnCodec": codec.decode(delay(codes, codec.mask_id).flatten(1).tolist()),
    }
    captions, (judge, embedder) = [full_caption(rows[i]) for i in index], judges()
    originals, results = None, {}
    for name, sound in tqdm(sounds.items(), desc="round trips"):
        values, _ = heard(captions, sound, judge, embedder)
        embeddings = torch.nn.functional.normalize(embedder(sound), dim=-1)
        originals = embeddings if originals is None else originals
        nearest = (embeddings @ originals.T).argmax(1)
        results[name] = {key: float(np.nanmean(values[key])) for key in ("adherence", "instrument", "tempo")} | {
            "distance to original": float((1 - (embeddings * originals).sum(1)).mean()),
            "distance to others": float((1 - embeddings @ originals.T)[~torch.eye(len(index), dtype=bool)].mean()),
            "retrieved": float((nearest == torch.arange(len(index))).float().mean()),
        }
    return results


def measure(name: str, folder: Path, guidance: float, args: argparse.Namespace) -> dict:
    """Values per prompt of one model."""
    base = MusicgenForConditionalGeneration.from_pretrained(args.base)
    model, tokenizer = (kind.from_pretrained(folder) for kind in (MusicgenForConditionalGeneration, AutoTokenizer))
    dataset = load_prompts("prompts", str(HERE / "data" / "test_prompts.jsonl"), "train")
    samples = sample_prompts(
        model, tokenizer, distinct(dataset["prompt"], args.prompts), args.samples, guidance,
        temperature=TEMPERATURE, max_new_tokens=STEPS, seed=SEED, description=f"sample {name}",
    )  # fmt: skip
    terms = teacher_terms(
        model, base, tokenizer, samples, TEACHER_GUIDANCE, temperature=TEMPERATURE, model_guidance_scale=guidance,
        description=f"KL {name}",
    )  # fmt: skip
    codec, spectral = policy_for(model, tokenizer).codec(model), SpectralCodec.from_pretrained(args.codes / "spectral")
    values, chance = heard(samples.prompts, codec.decode(samples.token_ids), *judges())
    codes = torch.stack([codec.to_codes(ids) for ids in samples.token_ids])
    played = [(waveform, 16000) for part in codes.split(8) for waveform in spectral.decode_codes(part)]
    values |= {f"{key}_gl": value for key, value in heard(samples.prompts, played, *judges())[0].items()}
    values |= {
        "kl": per_prompt(terms.kl, args.samples),
        "entropy_per_token": per_prompt(terms.entropy / terms.tokens, args.samples),
    }
    return {
        "values": {key: [float(v) for v in values[key]] for key in COLUMNS}, "chance": chance,
        "tokens_per_second": samples.tokens_per_second,
    }  # fmt: skip


def report(measured: dict[str, dict], guidance: dict[str, float], args: argparse.Namespace) -> None:
    """Intervals over prompts, also of the differences from the base."""
    rows, differences, lines = {}, {}, []
    base = {key: np.array(values) for key, values in measured["base"]["values"].items()}
    for name, result in measured.items():
        values = {key: np.array(result["values"][key]) for key in COLUMNS}
        metrics = {key: bootstrap_interval(value) for key, value in values.items()}
        speed = result["tokens_per_second"]
        line = {
            "strategy": name, "model": name, "guidance_scale": guidance[name], "temperature": TEMPERATURE,
            "seed": SEED, "prompts": args.prompts, "samples_per_prompt": args.samples, "chance": result["chance"],
            "metrics": metrics | {"tokens_per_second": {"mean": speed, "low": speed, "high": speed}},
        }  # fmt: skip
        lines.append(json.dumps(line) + "\n")
        cell = "{mean:.3f} [{low:.3f}, {high:.3f}]".format_map
        rows[name] = {COLUMNS[key]: cell(value) for key, value in metrics.items()} | {"tokens/s": f"{speed:.0f}"}
        if name != "base":
            differences[name] = {COLUMNS[key]: cell(bootstrap_interval(values[key] - base[key])) for key in COLUMNS}
    about = (
        f"{args.prompts} held-out prompts x {args.samples} samples, temperature {TEMPERATURE}, seed {SEED}; mean and "
    )
    about += "95 % bootstrap interval over prompts. By `recipes/tiny_music/build/measure_musicgen.py`."
    paired = f"Against the base, prompt by prompt:\n\n{markdown_table(differences)}\n" if differences else ""
    write_text(args.output / "results.jsonl", "".join(lines))
    write_text(args.output / "results.md", f"{about}\n\n{markdown_table(rows)}\n\n{paired}")
    print((args.output / "results.md").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=OUTPUT.parent / "musicgen" / "model")
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="folders of distilled models")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("results/musicgen"))
    parser.add_argument("--kept", type=Path, default=OUTPUT.parent / "musicgen" / "measured", help="values per prompt")
    parser.add_argument("--round-trips", action="store_true", help="measure the codec instead")
    parser.add_argument("--clips", type=Path, default=OUTPUT)
    parser.add_argument("--codes", type=Path, default=OUTPUT.parent / "encodec")
    parser.add_argument("--clips-count", type=int, default=200, help="test recordings for --round-trips")
    args = parser.parse_args()
    if args.round_trips:
        results = round_trips(args)
        write_text(args.output / "round_trips.json", json.dumps(results, indent=2) + "\n")
        print(markdown_table(results))
        return
    models = {"base": (args.base, 1.0), "base with CFG": (args.base, TEACHER_GUIDANCE)}
    models |= {folder.name: (folder, 1.0) for folder in args.models}
    measured = {}
    for name, (folder, guidance) in models.items():
        kept = args.kept / f"{name}-{args.prompts}x{args.samples}.json"
        if not kept.exists():
            write_text(kept, json.dumps(measure(name, folder, guidance, args)))
        measured[name] = json.loads(kept.read_text())
    report(measured, {name: guidance for name, (_, guidance) in models.items()}, args)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
