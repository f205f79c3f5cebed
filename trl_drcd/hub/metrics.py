"""Metrics of an evaluation for a model card: `model-index`, and a table with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult

from trl_drcd.evaluation.digests import weights_digest
from trl_drcd.evaluation.results import Result, read_results
from trl_drcd.files import own_file
from trl_drcd.markdown import markdown_table, markdown_text

TASKS = {"text": ("text-generation", "Text generation"), "music": ("text-to-audio", "Text to audio")}


def result_of(file: Path, folder: Path, strategy: str | None = None) -> Result:
    """
    The row of a `results.jsonl` for a model.

    Args:
        file (`Path`): `results.jsonl`, or the folder of an evaluation.
        folder (`Path`): The model's folder.
        strategy (`str`, *optional*): Name of the row; by default the row of the model alone, without guidance.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If no row, or more than one, matches, or the folder's weights are not those that were measured.
    """
    file = file / "results.jsonl" if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"`results={file}` does not exist; give the folder or results.jsonl of an evaluation")
    rows, model = read_results(file), folder.resolve().name
    if strategy is not None:
        found = [row for row in rows if strategy in (row.name, row.point)]
    else:
        alone = [row for row in rows if row.is_trained() or row.is_base()]
        found = [row for row in alone if model in (row.name, row.point, Path(row.model).name)]
    if len(found) != 1:
        raise ValueError(
            f"`results={file}` has {len(found)} rows for {strategy or model}, expected 1; set `strategy` to one of: "
            f"{', '.join(row.name for row in rows)}"
        )
    if found[0].model_digest not in (None, weights_digest(folder)):
        raise ValueError(
            f"`results={file}`: {found[0].name} was measured on other weights than `folder={folder}` has now; run the "
            "evaluation again, or give the folder that was measured"
        )
    return found[0]


def eval_results(result: Result) -> list[EvalResult]:
    """Metrics of a row for `model-index`; intervals are in `args`, since the format has no field for them."""
    task, task_name = TASKS[result.kind]
    return [
        EvalResult(
            task_type=task,
            task_name=task_name,
            dataset_type="held-out-prompts",
            dataset_name=f"{result.prompts} held-out prompts, {result.samples_per_prompt} samples each",
            metric_type=name,
            metric_name=f"{name} (95 % interval {value['low']:.4g} to {value['high']:.4g})",
            metric_value=value["mean"],
            metric_args={"low": value["low"], "high": value["high"], "interval": 0.95},
            verified=False,
        )
        for name, value in result.metrics.items()
    ]


def metrics_section(result: Result) -> str:
    """The card's section of metrics, with a table."""
    about = (
        f"{result.prompts} held-out prompts, {result.samples_per_prompt} samples each, temperature "
        f"{result.temperature:g}, guidance {result.guidance_scale:g}, seed {result.seed}; 95 % intervals."
    )
    if result.checkpoint is not None:
        about += f" Weights of training step {result.checkpoint}."
    if result.negative_prompt is not None:
        about += f" Negative prompt: {markdown_text(result.negative_prompt)}"
    rows = {
        name: {"mean": value["mean"], "low": value["low"], "high": value["high"]}
        for name, value in result.metrics.items()
    }
    return f"## Evaluation\n\n{about}\n\n{markdown_table(rows)}"


def plot_of(results: Path | None, names: Sequence[str]) -> dict[str, Path]:
    """`front.png` of an evaluation, unless the model's folder has its own."""
    if results is None or "front.png" in names:
        return {}
    plot = own_file(results if results.is_dir() else results.parent, "front.png")
    return {} if plot is None else {"front.png": plot}
