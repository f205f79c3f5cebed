"""Write a static page of an evaluation: one folder of HTML, audio and pictures, for any web host."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

from trl_drcd.app import pages
from trl_drcd.app.listen import Listen
from trl_drcd.evaluation.metrics import axes
from trl_drcd.evaluation.plots import write_plots
from trl_drcd.evaluation.points import pooled
from trl_drcd.evaluation.report import Item, PromptItems, Sample
from trl_drcd.evaluation.report_tables import points_table
from trl_drcd.evaluation.results import read_results
from trl_drcd.files import write_text


def export_page(evaluation: str, out: str, title: str) -> Path:
    """
    Write `index.html`, `audio/` and `images/`; the page loads no remote resources and needs no server.

    Args:
        evaluation (`str`): `output_dir` of an evaluation.
        out (`str`): Output folder, which must be empty or not exist.
        title (`str`): Heading of the page.

    Returns:
        `Path`: Path of `index.html`.

    Raises:
        FileExistsError: If the folder is not empty.
        FileNotFoundError: If the evaluation has no results or samples.
    """
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"`export={out}` is not empty; give a new folder")
    listen = Listen(evaluation)
    points = pooled(read_results(listen.folder / "results.jsonl"))
    known = set.intersection(*(set(point.values) for point in points))
    figures = write_plots(points, axes(known, "quality"), axes(known, "diversity"), folder / "images")
    names = sorted((folder / "images").glob("*.png"), key=lambda path: path.stat().st_mtime_ns)
    plots = [(plot.heading, f"images/{path.name}") for plot, path in zip(figures, names, strict=True)]
    numbers = {name: number for number, name in enumerate(listen.strategies)}
    prompts = [_copied(prompt, number, numbers, listen.folder, folder) for number, prompt in enumerate(listen.prompts)]
    page = pages.render(
        "static.html.j2", title=title, prompts=prompts, strategies=listen.strategies, plots=plots,
        table=points_table(points), style=pages.asset("app.css") + pages.asset("static.css"),
        script=pages.asset("static.js"),
    )  # fmt: skip
    write_text(folder / "index.html", page)
    return folder / "index.html"


def _copied(prompt: PromptItems, number: int, strategies: dict[str, int], source: Path, folder: Path) -> PromptItems:
    """Copy the samples of a prompt under short names."""
    items = []
    for item in prompt.items:
        samples = []
        for index, sample in enumerate(item.samples):
            name = f"{number:03d}_{strategies[item.name]:02d}_{index}"
            samples.append(_copy(sample, name, source, folder))
        items.append(Item(item.name, samples))
    return PromptItems(prompt.text, items)


def _copy(sample: Sample, name: str, source: Path, folder: Path) -> Sample:
    if sample.text is not None:
        return sample
    addresses = {"sound": f"audio/{name}.wav", "picture": f"images/spectrograms/{name}.png"}
    for kind, address in addresses.items():
        target = folder / address
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / unquote(getattr(sample, kind)), target)
    return replace(sample, **addresses)
