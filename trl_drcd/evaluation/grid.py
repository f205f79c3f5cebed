"""
An evaluation as a whole: every strategy sampled on the same prompts with the same seed, judged, and written down.

Results go to `results.jsonl`, one line for each row as it is done, which a second call does not do again; then to
`summary.csv`, plots and `report.html`.
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
    Sample and judge every row that is not in `results.jsonl` yet, then write summary, plots and report.

    Args:
        args ([`EvaluateArguments`]): Everything.
        extra_metrics (`dict`, *optional*): Name to a callable with TRL's reward signature, `(prompts, completions,
            **kwargs) -> list[float]`; for audio, `completions` are `(waveform, sampling_rate)` pairs.

    Returns:
        `list[Result]`: The lines of `results.jsonl`, in the order of the strategies; what an earlier call has left
        there and is not of this one is in `other_results.jsonl`.

    Raises:
        FileNotFoundError: If a folder or file is not there; before any sampling.
        OSError: If there is no room for the results.
        ValueError: If a strategy is not well-formed, or there are fewer prompts than asked for; before any sampling.
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
    """A line that may have been measured under another name, with what this call says of it."""
    same = {name: getattr(result, name) for name in ("kind", "metrics", "per_prompt", "samples", "more")}
    return replace(about, **same)
