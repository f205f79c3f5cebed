"""One HTML page to listen to (or read) several models' completions of the same prompts side by side."""

from __future__ import annotations

import base64
import html
import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trl_drcd.compat.extras import require
from trl_drcd.files import wav_bytes

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1500px; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .35rem .7rem; text-align: left }
tr { border-bottom: 1px solid #ddd } td { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.grid { display: grid; gap: .4rem 1rem; margin: 1.5rem 0 } .grid > h3 { grid-column: 1 / -1; margin: .8rem 0 0 }
figure { margin: 0 } figcaption { font-size: 13px; color: #555 } audio { width: 100%; height: 2.2rem }
img { width: 100%; height: 150px; image-rendering: auto; display: block } .text { white-space: pre-wrap }
.long { text-align: left; white-space: normal } .wide { overflow-x: auto }
.plot { width: auto; height: auto; max-width: 100% }
"""


def spectrogram_png(waveform: torch.Tensor, sampling_rate: int, max_hertz: float = 4000.0) -> bytes:
    """
    A PNG image of a spectrogram: time from left to right, frequency from bottom to top, 60 dB from dark to bright.

    Args:
        waveform (`torch.Tensor`): Shape `(T,)`, float samples.
        sampling_rate (`int`): In Hz.
        max_hertz (`float`, *optional*, defaults to 4000.0): Frequency of the upper edge.

    Returns:
        `bytes`: The file.

    Raises:
        ImportError: If matplotlib is missing; it comes with the extra `plot`.
    """
    n_fft = 2048
    window = torch.hann_window(n_fft)
    spectrum = torch.stft(waveform, n_fft, n_fft // 4, window=window, pad_mode="constant", return_complex=True)
    bins = max(1, min(n_fft // 2, round(max_hertz * n_fft / sampling_rate)))
    decibels = 20 * spectrum[:bins].abs().clamp(min=1e-5).log10()
    file = io.BytesIO()
    require("matplotlib.image", "plot").imsave(
        file, decibels.numpy(), cmap="magma", origin="lower", vmin=decibels.max() - 60, vmax=decibels.max()
    )
    return file.getvalue()


def _completion(item: Any) -> str:
    """Player and spectrogram of a `(waveform, sampling_rate)` pair; a text as it is."""
    if isinstance(item, str):
        return f'<div class="text">{html.escape(item)}</div>'
    sound = base64.b64encode(wav_bytes(*item)).decode()
    image = base64.b64encode(spectrogram_png(*item)).decode()
    return (
        f'<img src="data:image/png;base64,{image}" alt="spectrogram">'
        f'<audio controls preload="none" src="data:audio/wav;base64,{sound}"></audio>'
    )


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts, escaped; the first column names the row."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)

    def filled(cell: str) -> str:
        return f"<td{' class=long' if len(cell) > 40 else ''}>{html.escape(cell)}</td>"

    body = "".join(f"<tr><th>{html.escape(row[0])}</th>{''.join(map(filled, row[1:]))}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def comparison_markdown(prompts: Sequence[str], completions: Mapping[str, Sequence[str]]) -> str:
    """
    Each prompt with every model's completion, in Markdown; texts are one paragraph each, and shown as they are.

    Args:
        prompts (`list[str]`): The `n` prompts.
        completions (`dict`): Name of each model to its `n` texts.

    Returns:
        `str`: A section for each prompt.
    """
    parts = []
    for index, prompt in enumerate(prompts):
        texts = [f"{name}: {' '.join(items[index].split())}" for name, items in completions.items()]
        lines = "\n".join(textwrap.fill(text, 110, subsequent_indent="    ") for text in texts)
        fence = "~" * (3 + max(map(len, re.findall("~+", lines)), default=0))
        parts.append(f"### {html.escape(' '.join(prompt.split()))}\n\n{fence}text\n{lines}\n{fence}")
    return "\n\n".join(parts)


def comparison_page(
    title: str,
    introduction: str,
    tables: dict[str, tuple[Sequence[str], Sequence[Sequence[str]]]],
    prompts: Sequence[str],
    completions: Mapping[str, Sequence[Any]],
    figures: Sequence[bytes] = (),
) -> str:
    """
    A self-contained page: an introduction, tables of results, and for each prompt every model's completion.

    Args:
        title (`str`): Heading.
        introduction (`str`): Text below it.
        tables (`dict`): Heading to header, and rows of texts; the first above the completions, the others below.
        prompts (`list[str]`): The `n` prompts.
        completions (`dict`): Name of each model to its `n` completions: texts, or `(waveform, sampling_rate)` pairs,
            which get a player and a spectrogram.
        figures (`Sequence[bytes]`, *optional*): PNG images above the tables.

    Returns:
        `str`: HTML; every text in it is escaped, sound and images are inside.

    Raises:
        ValueError: If a model has not as many completions as there are prompts.
    """
    for name, items in completions.items():
        if len(items) != len(prompts):
            raise ValueError(
                f"`completions` has {len(items)} of {name!r}; expected one for each of {len(prompts)} prompts"
            )
    cells = []
    for index, prompt in enumerate(prompts):
        players = (
            f"<figure><figcaption>{html.escape(name)}</figcaption>{_completion(items[index])}</figure>"
            for name, items in completions.items()
        )
        cells.append(f"<h3>{html.escape(prompt)}</h3>{''.join(players)}")
    images = (base64.b64encode(figure).decode() for figure in figures)
    plots = "".join(f'<img class="plot" src="data:image/png;base64,{image}" alt="plot">' for image in images)
    columns = f"grid-template-columns: repeat({len(completions)}, minmax(11rem, 1fr))"
    first, *others = (
        (f"<h2>{html.escape(head)}</h2>" if head else "") + html_table(*table) for head, table in tables.items()
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1><p>{html.escape(introduction)}</p>"
        f'{plots}<div class="wide">{first}</div>'
        f'<div class="wide"><div class="grid" style="{columns}">{"".join(cells)}</div></div>'
        f'<div class="wide">{"".join(others)}</div></body></html>\n'
    )
