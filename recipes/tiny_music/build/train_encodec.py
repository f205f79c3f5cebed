"""
Train a small EnCodec on the training clips, and write the codes of clips: the audio codec of the tiny MusicGen.

An `EncodecModel` of transformers (so that other tools take the checkpoint), 16 kHz mono, 25 frames a second of 4
codes. Its latents are the log-mel frames of the spectral codec, shifted and scaled; its first codebooks are the
spectral codec's, the others code what these leave. So the codes need no training. The decoder learns to make sound of
the quantised latents: L1 distance of log-mel spectrograms at four resolutions, no discriminator. The encoder learns to
compute the latents, at every fourth step. The schedule follows the clock.

    OMP_NUM_THREADS=1 python recipes/tiny_music/build/train_encodec.py --minutes 15
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from render import OUTPUT
from scores import HERE
from tqdm import tqdm
from train_base import State, learning_rate
from train_codec import perplexity, waveforms
from transformers import EncodecConfig, EncodecModel

from trl_drcd.audio.codecs import SpectralCodec, fit_codebooks, mel_matrix

NUM_CODEBOOKS = 4
RESOLUTIONS = [(2048, 160), (1024, 96), (512, 64), (256, 32)]  # window in samples, mel bands


def spectral_codec(args: argparse.Namespace) -> SpectralCodec:
    """The shipped spectral codec with further codebooks, fitted on what its own leave of training frames; kept."""
    if (args.output / "spectral" / "config.json").exists():
        return SpectralCodec.from_pretrained(args.output / "spectral")
    shipped = SpectralCodec.from_pretrained(args.codec)
    audio = np.load(args.clips / "train" / "audio.npy", mmap_mode="r")
    rows = np.sort(np.random.default_rng(args.seed).choice(len(audio), min(len(audio), 1000), replace=False))
    frames = torch.cat([shipped.log_mel(waveforms(audio, part)) for part in np.array_split(rows, len(rows) // 50 + 1)])
    rest = (frames - shipped.decode_log_mel(shipped.quantise(frames))).flatten(0, 1)
    more = fit_codebooks(rest, NUM_CODEBOOKS - shipped.num_codebooks, shipped.codebook_size, 15, args.seed)
    codec = SpectralCodec(torch.cat([shipped.codebooks, more]))
    codec.save_pretrained(args.output / "spectral")
    return codec


def build_encodec(spectral: SpectralCodec) -> EncodecModel:
    """Random weights, and the spectral codec's codebooks moved to mean 0 and variance 1."""
    config = EncodecConfig(
        sampling_rate=16000, target_bandwidths=[1.0], hidden_size=spectral.num_mels, num_filters=24,
        num_residual_layers=1, upsampling_ratios=[2, 5, 4, 16], codebook_size=spectral.codebook_size,
        num_lstm_layers=1, use_causal_conv=False,
    )  # fmt: skip
    encodec = EncodecModel(config)
    shift, scale = latent_scale(spectral)
    with torch.no_grad():
        for k, layer in enumerate(encodec.quantizer.layers):
            layer.codebook.embed.copy_((spectral.codebooks[k] - (shift if k == 0 else 0)) / scale)
        # Biases as large as the signal, and sound out of proportion, are a bad start
        for name, parameter in encodec.named_parameters():
            if name.endswith("conv.bias"):
                parameter.zero_()
    return encodec


def latent_scale(spectral: SpectralCodec) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of each band, and one standard deviation, over the entries of the first codebook."""
    first = spectral.codebooks[0]
    return first.mean(0), (first - first.mean(0)).std()


class MelLoss(torch.nn.Module):
    """Mean over resolutions of the mean absolute distance of log-mel spectrograms, in nats."""

    def __init__(self):
        super().__init__()
        for window, bands in RESOLUTIONS:
            self.register_buffer(f"mel_{window}", mel_matrix(window, bands, 16000))
            self.register_buffer(f"window_{window}", torch.hann_window(window))

    def log_mel(self, audio: torch.Tensor, window: int) -> torch.Tensor:
        shape = getattr(self, f"window_{window}")
        spectrum = torch.stft(audio, window, window // 4, window=shape, return_complex=True)
        # The root of a squared magnitude has no slope at silence: keep off zero
        magnitude = (torch.view_as_real(spectrum).square().sum(-1) + 1e-8).sqrt()
        return (magnitude.transpose(1, 2) @ getattr(self, f"mel_{window}") + 0.05 * window / 2048).log()

    def forward(self, decoded: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
        losses = [(self.log_mel(decoded, w) - self.log_mel(original, w)).abs().mean() for w, _ in RESOLUTIONS]
        return torch.stack(losses).mean()


def crops(audio: np.ndarray, codes: np.ndarray, rng: np.random.Generator, count: int, frames: int) -> tuple:
    """Random crops of random clips: audio `(count, frames * 640)` and their codes `(count, frames, K)`."""
    rows, starts = rng.integers(len(codes), size=count), rng.integers(codes.shape[1] - frames, size=count)
    pairs = list(zip(rows, starts, strict=True))
    sound = waveforms(np.stack([audio[r, s * 640 : (s + frames) * 640] for r, s in pairs]), slice(None))
    return sound, torch.from_numpy(np.stack([codes[r, s : s + frames] for r, s in pairs]).astype(np.int64))


def train(encodec: EncodecModel, args: argparse.Namespace) -> None:
    """Train until the clock says so, going on from `last/` where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encodec, mel_loss = encodec.to(device).train(), MelLoss().to(device)
    optimiser = torch.optim.AdamW(encodec.parameters(), lr=args.learning_rate, betas=(0.8, 0.99), weight_decay=0.0)
    state = State(args.output / "last")
    state.load(encodec, optimiser)
    audio = np.load(args.clips / "train" / "audio.npy", mmap_mode="r")
    codes = np.load(args.output / "train" / "codes.npy")
    print(f"{encodec.num_parameters() / 1e6:.2f} M parameters, {len(codes)} clips, {device}", flush=True)

    limit, losses = args.minutes * 60, {"mel": [], "latents": []}
    began, saved = time.time() - state.seconds, state.seconds
    bar = tqdm(total=int(limit), initial=int(state.seconds), unit="s", desc="training")
    while state.seconds < limit:
        rng = np.random.default_rng([args.seed, state.step])
        sound, chosen = (part.to(device) for part in crops(audio, codes, rng, args.batch, args.frames))
        latents = encodec.quantizer.decode(chosen.permute(2, 0, 1))
        with torch.autocast(device, torch.bfloat16):
            decoded = encodec.decoder(latents)[:, 0].float()
            encoded = encodec.encoder(sound[:, None]).float() if state.step % 4 == 0 else None
        loss = distance = mel_loss(decoded, sound)
        losses["mel"].append(distance.item())
        if encoded is not None:
            loss = distance + (error := F.mse_loss(encoded, latents))
            losses["latents"].append(error.item())
        optimiser.zero_grad()
        loss.backward()
        for part in (encodec.encoder, encodec.decoder):
            torch.nn.utils.clip_grad_norm_(part.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(state.seconds / limit, args.learning_rate)
        optimiser.step()
        state.step, state.seconds = state.step + 1, time.time() - began
        bar.set_postfix(step=state.step, mel=f"{np.mean(losses['mel'][-50:]):.3f}", refresh=False)
        bar.update(int(state.seconds) - bar.n)
        if state.seconds - saved > 120 or state.seconds >= limit:
            saved = state.seconds
            means = {name: round(float(np.mean(values)), 4) for name, values in losses.items()}
            losses = {name: [] for name in losses}
            with open(args.output / "log.jsonl", "a") as log:
                log.write(json.dumps({"step": state.step, "seconds": round(state.seconds)} | means) + "\n")
            state.save(encodec, optimiser)


@torch.no_grad()
def report(encodec: EncodecModel, spectral: SpectralCodec, audio: torch.Tensor) -> dict:
    """
    Mean absolute log-mel distances to the original, in nats, as in the spectral codec's report; silence is the
    yardstick. Of the codes made by the spectral codec, and of those made by the encoder.
    """
    original, silence = spectral.log_mel(audio), torch.zeros_like(audio)
    codes = {
        "decoded": spectral.quantise(original).transpose(1, 2),
        "encoded_decoded": torch.cat([encodec.encode(part[:, None]).audio_codes[0] for part in audio.split(50)]),
    }
    measured: dict = {"codebook_size": spectral.codebook_size}
    measured["quantised_nats"] = float((spectral.decode_log_mel(codes["decoded"].mT) - original).abs().mean())
    for name, values in codes.items():
        sound = torch.cat([encodec.decode(part[None], [None]).audio_values[:, 0] for part in values.split(50)])
        measured[f"{name}_nats"] = float((spectral.log_mel(sound) - original).abs().mean())
        measured[f"{name}_multi_resolution_nats"] = float(MelLoss()(sound, audio))
    sound = torch.cat([spectral.decode_codes(part.mT) for part in codes["decoded"].split(50)])
    measured["griffin_lim_nats"] = float((spectral.log_mel(sound) - original).abs().mean())
    measured["griffin_lim_multi_resolution_nats"] = float(MelLoss()(sound, audio))
    measured["silence_nats"] = float((original - np.log(spectral.floor)).abs().mean())
    measured["silence_multi_resolution_nats"] = float(MelLoss()(silence, audio))
    measured["perplexity"] = perplexity(codes["decoded"].mT, spectral.codebook_size)
    return measured


@torch.no_grad()
def write_codes(spectral: SpectralCodec, source: Path, target: Path, count: int | None) -> None:
    """Codes `(N, S, K)`, uint16, of the first `count` clips of a split."""
    if target.exists():
        print(f"{target} exists: skipped")
        return
    audio = np.load(source, mmap_mode="r")[:count]
    starts = tqdm(range(0, len(audio), 100), desc=f"codes of {target.parent.name}")
    parts = [spectral.encode(waveforms(audio, slice(start, start + 100))) for start in starts]
    target.parent.mkdir(parents=True, exist_ok=True)
    np.save(target.with_suffix(".tmp.npy"), torch.cat(parts).numpy().astype(np.uint16))
    os.replace(target.with_suffix(".tmp.npy"), target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, default=OUTPUT)
    parser.add_argument("--codec", type=Path, default=HERE / "models" / "codec", help="the spectral codec")
    parser.add_argument("--output", type=Path, default=OUTPUT.parent / "encodec")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--frames", type=int, default=20, help="length of a crop")
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--count", type=int, default=20000, help="training clips to use")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    spectral = spectral_codec(args)
    for split in ("validation", "test", "train"):
        count = args.count if split == "train" else None
        write_codes(spectral, args.clips / split / "audio.npy", args.output / split / "codes.npy", count)
    model = args.output / "model"
    if (model / "report.json").exists():
        print(f"{model} is trained: skipped")
        return
    torch.manual_seed(args.seed)
    encodec = build_encodec(spectral)
    train(encodec, args)
    validation = np.load(args.clips / "validation" / "audio.npy", mmap_mode="r")
    measured = report(encodec.eval().cpu(), spectral, waveforms(validation, slice(0, 200)))
    print(json.dumps(measured))
    shutil.rmtree(model, ignore_errors=True)
    encodec.save_pretrained(model)
    (model / "report.json").write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
