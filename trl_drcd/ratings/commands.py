"""`trl-drcd ratings design | simulate | report | export | import | release | power`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_drcd.files import write_text
from trl_drcd.validation.command_line import parse_command_line
from trl_drcd.validation.field_types import check_types


@dataclass
class ExportArguments:
    """What `trl-drcd ratings export` takes."""

    study: str = field(metadata={"help": "Folder of the study."})
    out: str = field(metadata={"help": "CSV file to write."})
    what: str = field(default="ratings", metadata={"help": "ratings; or items, blind, for a crowd-working site."})
    base_url: str = field(default="", metadata={"help": "Items: where the study's clips/ can be reached."})

    def __post_init__(self) -> None:
        check_types(self)
        if self.what not in ("ratings", "items"):
            raise ValueError(f"`what` must be ratings or items, got {self.what!r}")


@dataclass
class ImportArguments:
    """What `trl-drcd ratings import` takes."""

    study: str = field(metadata={"help": "Folder of the study."})
    file: str = field(metadata={"help": "CSV with a row for each rating: slot, rater, left and right, or preference."})
    simulated: bool = field(default=False, metadata={"help": "The raters were no people."})

    def __post_init__(self) -> None:
        check_types(self)


@dataclass
class ReleaseArguments:
    """What `trl-drcd ratings release` takes."""

    study: str = field(metadata={"help": "Folder of the study."})
    pseudonym: str = field(metadata={"help": "A rater who will not go on."})


def design(arguments: Any) -> None:
    """Make a study of an evaluation's samples: a balanced, checked design, the clips, the database."""
    from trl_drcd.evaluation.tables import Table, markdown
    from trl_drcd.ratings.design import check_design, study_size
    from trl_drcd.ratings.study import create_study

    study, made = create_study(arguments)
    rows = [[f"{q}: {pair}", str(n), f"{left}", f"{place:.2f}"] for q, pair, n, left, place in check_design(made)]
    print(markdown(Table("", ["pair", "ratings", "first on the left", "mean place (0 to 1)"], rows)))
    if arguments.diversity_prompts is None and not any(item.question == "diversity" for item in made.items):
        print(
            "\nDiversity is left out: one sample of each is kept. For it, evaluate with `listen_samples: 2` or more."
        )
    print(f"\n{study_size(made)}\nStudy: {study.folder}   (rate: trl-drcd app --tabs rate --study {study.folder})")


def simulate(arguments: Any) -> None:
    """Let simulated raters rate a study, to try it; everything is labelled as simulated."""
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
    print(f"{len(text.splitlines()) - 1} rows or more: {arguments.out}")


def import_ratings(arguments: Any) -> None:
    """Take in ratings that were made on a crowd-working site."""
    from trl_drcd.ratings.store import Study
    from trl_drcd.ratings.tabular import import_csv

    if not Path(arguments.file).is_file():
        raise FileNotFoundError(f"`file={arguments.file}` is no file; give the CSV that the site returned")
    added, known = import_csv(Study(arguments.study), arguments.file, arguments.simulated)
    print(f"{added} ratings added, {known} were there already or are a second rating of an item by the same rater")


def release(arguments: Any) -> None:
    """Give what a rater has not rated to the next who joins."""
    from trl_drcd.ratings.store import Study

    print(f"{Study(arguments.study).release(arguments.pseudonym)} items are free for another rater")


def power(arguments: Any) -> None:
    """How many ratings decide a win rate."""
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
    """`trl-drcd ratings COMMAND ...`; a YAML file in place of `--config FILE.yaml` is taken for it."""
    from trl import TrlParser

    commands, words = _commands(), list(argv)
    if words and words[0].endswith((".yaml", ".yml")):
        words = ["design", *words]
    if not words or words[0] not in commands:
        listed = "\n".join(f"  trl-drcd ratings {name:9s} {run.__doc__}" for name, (run, _) in commands.items())
        print(f"usage:\n{listed}\n\n`trl-drcd ratings COMMAND --help` says more")
        raise SystemExit(0 if words and words[0] in ("-h", "--help") else 2)
    run, kind = commands[words[0]]
    rest = words[1:]
    if rest and rest[0].endswith((".yaml", ".yml")):
        rest = ["--config", *rest]
    (arguments,) = parse_command_line(
        TrlParser(kind, prog=f"trl-drcd ratings {words[0]}", description=run.__doc__), rest
    )
    run(arguments)
