"""Write the samples of a training run."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from trl_drcd.diversity import AudioDecoder
from trl_drcd.evaluation.sampling import Samples
from trl_drcd.files import wav_bytes, write_bytes, write_text


def write_samples(
    samples: Samples, folder: Path, tokenizer: PreTrainedTokenizerBase, codec: AudioDecoder | None = None
) -> None:
    """
    Write completions and their prompts to `samples.jsonl`; audio also to WAV files.

    Args:
        samples ([`~trl_drcd.evaluation.sampling.Samples`]): The samples.
        folder (`Path`): Output folder, created if it does not exist.
        tokenizer (`PreTrainedTokenizerBase`): Decodes completions to text.
        codec (`AudioDecoder`, *optional*): Decodes completions to audio instead.
    """
    rows = [{"prompt": prompt} for prompt in samples.repeated_prompts]
    if codec is None:
        texts = tokenizer.batch_decode(samples.token_ids, skip_special_tokens=True)
        rows = [row | {"completion": text} for row, text in zip(rows, texts, strict=True)]
    else:
        for number, (waveform, rate) in enumerate(codec.decode(samples.token_ids)):
            rows[number]["file"] = f"{number:02d}.wav"
            write_bytes(folder / f"{number:02d}.wav", wav_bytes(waveform, rate))
    write_text(folder / "samples.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
