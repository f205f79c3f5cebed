"""
Test the paper's claims on a `results.jsonl` of `trl-drcd evaluate`, for music or text, with paired 95 % intervals over
prompts (and training seeds).

    python recipes/claims.py results/music/results.jsonl
    python recipes/claims.py results/music/results.jsonl --omega equal --output results/music/claims.md
    python recipes/claims.py results/music/results.jsonl --report outputs/report      # also tables and plots
"""

from __future__ import annotations

import argparse
from pathlib import Path

from trl_drcd.evaluation.claims import claims_tables
from trl_drcd.evaluation.joining import FURTHER_PROMPTS_HELP, RESULTS_HELP, read_joined
from trl_drcd.evaluation.points import pooled, with_quality
from trl_drcd.evaluation.report import write_report
from trl_drcd.evaluation.tables import markdown
from trl_drcd.files import write_text
from trl_drcd.validation.messages import one_line_errors


def main(argv: list[str] | None = None) -> None:
    """Print a table for each measured pair of a quality and a diversity metric."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help=RESULTS_HELP)
    parser.add_argument("--further_prompts", type=Path, nargs="+", default=[], help=FURTHER_PROMPTS_HELP)
    parser.add_argument(
        "--omega", help="quality = omega * adherence + preference: a number or `equal`; by default as stored"
    )
    parser.add_argument("--quality", nargs="+", default=["quality", "adherence"], help="quality metrics")
    parser.add_argument("--diversity", nargs="+", default=["diversity", "diversity_second"], help="diversity metrics")
    parser.add_argument("--output", type=Path, help="a Markdown file for the tables")
    parser.add_argument("--report", type=Path, help="a folder for all tables and plots of the evaluation")
    args = parser.parse_args(argv)
    with one_line_errors("claims.py"):
        results = read_joined(*args.results, further_prompts=args.further_prompts)
    results = with_quality(results, args.omega) if args.omega else results
    points = pooled(results)
    known = set.intersection(*(set(point.values) for point in points))
    if "preference" not in known:
        known -= {"adherence"}  # equal to quality without a preference
        args.quality = [metric for metric in args.quality if metric != "adherence"]
    if missing := sorted({*args.quality, *args.diversity} - known):
        print(f"not measured for all rows: {', '.join(missing)}")
    omega = points[0].omega
    parts = [] if omega is None else [f"quality = {omega:.4g} * adherence + preference"]
    metrics = ([metric for metric in asked if metric in known] for asked in (args.quality, args.diversity))
    parts += [f"## {table.heading}\n\n{markdown(table)}" for table in claims_tables(points, *metrics)]
    text = "\n\n".join(parts) + "\n"
    print(text)
    if args.output:
        write_text(args.output, text)
    if args.report:
        write_report(results, args.report)


if __name__ == "__main__":
    main()
