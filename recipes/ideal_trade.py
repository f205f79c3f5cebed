"""
Can a judge of adherence and an embedder show that a policy is better than guidance? The gate of an evaluation.

With guidance, `y` is a completion, `a(y)` its adherence, and `r(y)` the expected distance to another completion of the
prompt. A policy that is tilted towards diversity, to first order `p(y) (1 + c r(y))`, has the trade

    adherence per diversity = cov(a, r) / (2 var(r))

which is the best that a reward for diversity alone can reach. Weaker guidance, the rival, pays the difference of the
base and the guided rows. Where the ideal trade is not clearly above guidance's (nearer to 0), the two metrics measure
nearly the same, and no policy can win: use another judge.

    python recipes/ideal_trade.py recipes/text/gate.yaml        # samples base and guidance, unless they are there

Intervals (95 %) are percentile bootstraps over prompts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from trl_drcd.diversity import pairwise_cosine_distance
from trl_drcd.evaluation.arguments import EvaluateArguments
from trl_drcd.evaluation.judging import embed_all
from trl_drcd.evaluation.measuring import Worker
from trl_drcd.evaluation.plan import Task, plan
from trl_drcd.evaluation.statistics import Interval, bootstrap_interval
from trl_drcd.evaluation.tables import formatted, markdown_table
from trl_drcd.validation.messages import one_line_errors
from trl_drcd.validation.yaml_files import read_yaml


def trade_moments(distances: np.ndarray, adherence: np.ndarray) -> np.ndarray:
    """
    Unbiased estimates of `D`, `E a`, `var(r)` and `cov(a, r)` from the samples of one prompt.

    They are U-statistics, means over all choices of different samples: `r` is known only from the other samples, and
    the variance of its estimate is not part of `var(r)`.

    Args:
        distances (`np.ndarray`): Shape `(G, G)`, symmetric, the diagonal 0; at least four samples.
        adherence (`np.ndarray`): Shape `(G,)`.

    Returns:
        `np.ndarray`: Shape `(4,)`.
    """
    count = len(adherence)
    of_sample, squares, total = distances.sum(1), (distances**2).sum(), distances.sum()
    pairs, triples = count * (count - 1), count * (count - 1) * (count - 2)
    joined = (of_sample @ of_sample - squares) / triples  # E d(1, 2) d(1, 3)
    apart = (total**2 - 4 * of_sample @ of_sample + 2 * squares) / (triples * (count - 3))  # E d(1, 2) d(3, 4)
    of_one = adherence @ of_sample / pairs  # E a(1) d(1, 2)
    of_other = (adherence.sum() * total - 2 * adherence @ of_sample) / triples  # E a(1) d(2, 3)
    return np.array([total / pairs, adherence.mean(), joined - apart, of_one - of_other])


def trades(guided: np.ndarray, base: np.ndarray) -> dict[str, Interval]:
    """
    Adherence per diversity of guidance and of the ideal policy, and their difference.

    Args:
        guided (`np.ndarray`): Moments of the guided samples, `(P, 4)`, see [`trade_moments`].
        base (`np.ndarray`): The same of the base, on the same prompts.
    """

    def guidance(means: np.ndarray) -> float:
        return (means[1] - means[5]) / (means[0] - means[4])

    def ideal(means: np.ndarray) -> float:
        return means[3] / (2 * means[2])

    columns = np.concatenate([guided, base], 1)
    return {
        "guidance": bootstrap_interval(columns, lambda rows: guidance(rows.mean(0))),
        "ideal": bootstrap_interval(columns, lambda rows: ideal(rows.mean(0))),
        "ideal - guidance": bootstrap_interval(columns, lambda rows: ideal(rows.mean(0)) - guidance(rows.mean(0))),
    }


def scored(worker: Worker, task: Task, per_prompt: int) -> Iterator[tuple[str, str, np.ndarray]]:
    """Moments of a row, `(P, 4)`, for each pair of a judge of adherence and an embedder."""
    samples = worker.samples(task, worker.models(task.row))
    completions = worker.decode(samples)
    adherence = {name: judge(samples.repeated_prompts, completions) for name, judge in worker.judges.adherence.items()}
    if worker.args.prompt_information:
        adherence["prompt_information"] = worker.inform(samples, completions)
    for diversity, embed in worker.judges.embedders.items():
        distances = pairwise_cosine_distance(embed_all(diversity, embed, completions).double(), per_prompt).numpy()
        for name, values in adherence.items():
            by_prompt = torch.as_tensor(values).double().view(-1, per_prompt).numpy()
            yield name, diversity, np.stack([trade_moments(d, a) for d, a in zip(distances, by_prompt, strict=True)])


def main(argv: list[str] | None = None) -> None:
    """Print a table with a row per pair of metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML file of trl-drcd evaluate, with the base and one guided row")
    with one_line_errors("ideal_trade.py"):
        args = EvaluateArguments(**read_yaml(parser.parse_args(argv).config))
        held_out, tasks = plan(args, {})
        if [task.row.guidance_scale == 1 for task in tasks] not in ([True, False], [False, True]):
            raise ValueError(f"`strategies` must be the base and one guidance scale, got {len(tasks)} rows")
        if args.samples_per_prompt < 4:
            raise ValueError(f"`samples_per_prompt` must be at least 4, got {args.samples_per_prompt}")
        worker = Worker(args, held_out, [task.row for task in tasks])
        if not worker.judges.embedders or not (worker.judges.adherence or args.prompt_information):
            raise ValueError("the evaluation needs an `embedder` and a `judge`")
    tasks.sort(key=lambda task: task.row.guidance_scale)
    base, guided = (
        {
            f"{name} / {diversity}": moments
            for name, diversity, moments in scored(worker, task, args.samples_per_prompt)
        }
        for task in tasks
    )
    table = {
        pair: {key: formatted(value) for key, value in trades(guided[pair], base[pair]).items()} for pair in guided
    }
    print(markdown_table(table))


if __name__ == "__main__":
    main()
