"""
Run an evaluation: sample every strategy on the same prompts with the same seed, measure, and write the report.

Each finished row is appended to `results.jsonl`; a second call reuses it. At the end come `summary.csv`, plots and
`report.html`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from trl_drcd.evaluation.arguments import EvaluateArguments
from trl_drcd.evaluation.judging import RewardFunction
from trl_drcd.evaluation.measuring import measure_tasks
from trl_drcd.evaluation.plan import plan, unmeasured
from trl_drcd.evaluation.points import with_quality
from trl_drcd.evaluation.report import write_report
from trl_drcd.evaluation.results import Result, ResultsFolder

__all__ = ["EvaluateArguments", "evaluate"]


def evaluate(args: EvaluateArguments, extra_metrics: Mapping[str, RewardFunction] | None = None) -> list[Result]:
    """
    Sample and measure every row that is not in `results.jsonl` yet, then write summary, plots and report.

    Args:
        args ([`EvaluateArguments`]): Settings of the evaluation.
        extra_metrics (`dict`, *optional*): Name to a callable with TRL's reward signature, `(prompts, completions,
            **kwargs) -> list[float]`; for audio, `completions` are `(waveform, sampling_rate)` pairs.

    Returns:
        `list[Result]`: The lines of `results.jsonl`, in the order of the strategies. Lines of earlier calls that are
        not part of this one move to `other_results.jsonl`.

    Raises:
        FileNotFoundError: If a folder or file does not exist; before any sampling.
        OSError: If the results cannot be written or the disk is too full.
        ValueError: If a strategy is invalid, or there are fewer prompts than `num_prompts`; before any sampling.
    """
    given = extra_metrics or {}
    held_out, tasks = plan(args, given)
    folder = ResultsFolder(args.output_dir)
    with folder.explaining():
        done = folder.read()
        waiting = unmeasured(tasks, done)
        folder.check_room(len(waiting))
        for result in measure_tasks(waiting, held_out, args, given):
            done[result.settings] = result
            folder.append(result)
        measured = [_as_asked(done[task.settings], task.about(args)) for task in tasks]
        results = with_quality(measured, args.omega)
        folder.arrange(results)
        write_report(results, folder.folder)
    return results


def _as_asked(result: Result, about: Result) -> Result:
    """A result that may have been measured under another name, with the name and settings of this call."""
    same = {name: getattr(result, name) for name in ("kind", "metrics", "per_prompt", "samples", "more")}
    return replace(about, **same)
