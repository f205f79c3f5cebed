"""`trl-drcd ratings design | simulate | report | export | import | release | power`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_drcd.files import write_text
from trl_drcd.validation.command_line import parse_command_line
from trl_drcd.validation.field_types import check_types

MOST_PAIRS = 24  # that are listed one by one


@dataclass
class ExportArguments:
    """Arguments of `trl-drcd ratings export`."""

    study: str = field(metadata={"help": "Folder of the study."})
    out: str = field(metadata={"help": "CSV file to write."})
    what: str = field(default="ratings", metadata={"help": "ratings; or items, blind, for a crowd-working site."})
    base_url: str = field(default="", metadata={"help": "For items: URL under which the study's clips/ is served."})

    def __post_init__(self) -> None:
        check_types(self)
        if self.what not in ("ratings", "items"):
            raise ValueError(f"`what` must be ratings or items, got {self.what!r}")


@dataclass
class ImportArguments:
    """Arguments of `trl-drcd ratings import`."""

    study: str = field(metadata={"help": "Folder of the study."})
    file: str = field(metadata={"help": "CSV with one row per rating: slot, rater, left and right, or preference."})
    simulated: bool = field(default=False, metadata={"help": "The raters are simulated, not people."})

    def __post_init__(self) -> None:
        check_types(self)


@dataclass
class ReleaseArguments:
    """Arguments of `trl-drcd ratings release`."""

    study: str = field(metadata={"help": "Folder of the study."})
    pseudonym: str = field(metadata={"help": "A rater who will not continue."})


def design(arguments: Any) -> None:
    """Create a study from an evaluation's samples: a balanced, checked design, the clips, the database."""
    from trl_drcd.evaluation.tables import markdown
    from trl_drcd.ratings.design import study_size
    from trl_drcd.ratings.study import create_study

    study, made = create_study(arguments)
    print(markdown(_balance(made)))
    if left_out := study.about["left_out"]:
        print(f"\nLeft out, since their samples are those of another: {', '.join(left_out)}")
    if arguments.diversity_prompts is None and not any(item.question == "diversity" for item in made.items):
        print("\nNo diversity items: only one sample per prompt was kept. Evaluate with `listen_samples: 2` or more.")
    print(f"\n{study_size(made)}\nStudy: {study.folder}   (rate: trl-drcd app --tabs rate --study {study.folder})")


def _balance(made: Any) -> Any:
    """How often and where each pair of models is compared; of many pairs, the range over those of a question."""
    from trl_drcd.evaluation.tables import Table
    from trl_drcd.ratings.design import QUESTIONS, check_design

    pairs = check_design(made)
    header = ["pair", "ratings", "first on the left", "mean place (0 to 1)"]
    if len(pairs) <= MOST_PAIRS:
        return Table("", header, [[f"{q}: {pair}", str(n), str(left), f"{at:.2f}"] for q, pair, n, left, at in pairs])
    rows = []
    for question in QUESTIONS:
        if of_it := [row for row in pairs if row[0] == question]:
            ends = [(min(column), max(column)) for column in list(zip(*of_it, strict=True))[2:]]
            cells = [f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}" for low, high in ends]
            rows.append([f"{question}: each of {len(of_it)}", *cells])
    return Table("", header, rows)


def simulate(arguments: Any) -> None:
    """Let simulated raters rate a study, to test it; everything is labelled as simulated."""
    from trl_drcd.ratings.simulated import simulate as run
    from trl_drcd.ratings.store import Study

    print(f"{run(Study(arguments.study), arguments)} ratings by SIMULATED raters: {arguments.study}")


def report(arguments: Any) -> None:
    """Win rates, Bradley-Terry scores, agreement, figures, correlations with metrics, power."""
    from trl_drcd.ratings.report import write_report

    result = write_report(arguments)
    out = arguments.out or f"{arguments.study}/report"
    raters = "SIMULATED raters" if result["simulated"] else "raters"
    print(f"{result['ratings']} ratings by {result['raters']} {raters}: {out}/report.md (figures and CSV beside it)")


def export(arguments: Any) -> None:
    """Write ratings, or the items for a crowd-working site, as CSV."""
    from trl_drcd.ratings.store import Study
    from trl_drcd.ratings.tabular import items_csv, ratings_csv

    study = Study(arguments.study)
    text = items_csv(study, arguments.base_url) if arguments.what == "items" else ratings_csv(study)
    write_text(arguments.out, text)
    print(f"at most {len(text.splitlines()) - 1} rows: {arguments.out}")


def import_ratings(arguments: Any) -> None:
    """Import ratings made on a crowd-working site."""
    from trl_drcd.ratings.store import Study
    from trl_drcd.ratings.tabular import import_csv

    if not Path(arguments.file).is_file():
        raise FileNotFoundError(f"`file={arguments.file}` is not a file; give the CSV that the site returned")
    added, known = import_csv(Study(arguments.study), arguments.file, arguments.simulated)
    print(f"{added} ratings added; {known} skipped, already stored or a second rating of an item by the same rater")


def release(arguments: Any) -> None:
    """Release a rater's unrated items to the next rater who joins."""
    from trl_drcd.ratings.store import Study

    print(f"{Study(arguments.study).release(arguments.pseudonym)} items released for another rater")


def power(arguments: Any) -> None:
    """Number of ratings needed to detect a win rate."""
    from trl_drcd.evaluation.tables import markdown
    from trl_drcd.ratings.power import power_table

    print(markdown(power_table(arguments)))


def _commands() -> dict[str, tuple[Callable[[Any], None], Any]]:
    from trl_drcd.ratings.design import DesignArguments
    from trl_drcd.ratings.power import PowerArguments
    from trl_drcd.ratings.report import ReportArguments
    from trl_drcd.ratings.simulated import SimulateArguments

    return {
        "design": (design, DesignArguments),
        "simulate": (simulate, SimulateArguments),
        "report": (report, ReportArguments),
        "export": (export, ExportArguments),
        "import": (import_ratings, ImportArguments),
        "release": (release, ReleaseArguments),
        "power": (power, PowerArguments),
    }


def main(argv: Sequence[str]) -> None:
    """Run `trl-drcd ratings COMMAND ...`; `FILE.yaml` is short for `--config FILE.yaml`."""
    from trl import TrlParser

    commands, words = _commands(), list(argv)
    if words and words[0].endswith((".yaml", ".yml")):
        words = ["design", *words]
    if not words or words[0] not in commands:
        listed = "\n".join(f"  trl-drcd ratings {name:9s} {run.__doc__}" for name, (run, _) in commands.items())
        print(f"usage:\n{listed}\n\n`trl-drcd ratings COMMAND --help` lists the arguments")
        raise SystemExit(0 if words and words[0] in ("-h", "--help") else 2)
    run, kind = commands[words[0]]
    rest = words[1:]
    if rest and rest[0].endswith((".yaml", ".yml")):
        rest = ["--config", *rest]
    (arguments,) = parse_command_line(
        TrlParser(kind, prog=f"trl-drcd ratings {words[0]}", description=run.__doc__), rest
    )
    run(arguments)
