"""Export and import ratings and items as CSV, for MTurk, Prolific, spreadsheets and other programs."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_drcd.ratings.comparisons import advantage_of, scores_of
from trl_drcd.ratings.store import Answer, Study
from trl_drcd.validation.messages import short_repr

# Column names in results of MTurk, Prolific and survey tools
SLOT = ("slot", "Input.slot")
RATER = ("rater", "pseudonym", "WorkerId", "PROLIFIC_PID", "Participant id", "participant_id")
SCORES = {
    "left": ("left", "score_left", "Answer.left", "Answer.score_left"),
    "right": ("right", "score_right", "Answer.right", "Answer.score_right"),
    "preference": ("preference", "Answer.preference"),
}
STATUS = ("AssignmentStatus", "Status", "status")
REFUSED = {"rejected", "returned", "timed-out", "screened out"}
# First characters that a spreadsheet interprets as a formula, including full-width signs
FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")


def items_csv(study: Study, base_url: str = "") -> str:
    """
    Blind items for raters, one row per slot, as input for a crowd-working site.

    Args:
        study ([`Study`]): The study.
        base_url (`str`, *optional*): URL under which `clips/` is served, such as `https://example.org/study`.

    Returns:
        `str`: CSV with `slot`, `book`, `position`, `question`, `prompt`, and the clips `left0`, `left1`, `right0`,
        `right1` (URLs; for text the texts themselves). Models are not named.
    """
    rows = study.rows("SELECT * FROM slots JOIN items USING (item) ORDER BY book, position")
    table = []
    for row in rows:
        a, b = json.loads(row["clips_a"]), json.loads(row["clips_b"])
        sides = {"left": a if row["a_left"] else b, "right": b if row["a_left"] else a}
        clips = {
            f"{side}{number}": _content(study, clip, base_url)
            for side, names in sides.items()
            for number, clip in enumerate(names)
        }
        table.append(
            {key: row[key] for key in ("slot", "book", "position", "question")}
            | {"prompt": row["prompt_text"]}
            | clips
        )
    columns = ["slot", "book", "position", "question", "prompt", "left0", "left1", "right0", "right1"]
    return to_csv(table, columns, for_spreadsheets=False)  # a site shows these texts as they are


def _content(study: Study, clip: str, base_url: str) -> str:
    if clip.endswith(".txt"):
        return (study.folder / "clips" / clip).read_text(encoding="utf-8")
    return f"{base_url.rstrip('/')}/clips/{clip}" if base_url else f"clips/{clip}"


def ratings_csv(study: Study) -> str:
    """
    All ratings as CSV, one row each, with models, sides, scores of A and B, and the advantage of A.

    The column `simulated` is 1 for simulated raters.
    """
    table = []
    for rating in study.ratings():
        scores = scores_of(rating) or ("", "")
        table.append(
            rating
            | {"rater": rating["pseudonym"], "score_a": scores[0], "score_b": scores[1]}
            | {"advantage_a": advantage_of(rating), "check": rating["check_kind"], "prompt": rating["prompt_text"]}
        )
    columns = ["slot", "item", "question", "prompt", "model_a", "model_b", "check", "a_left", "rater", "simulated",
               "score_left", "score_right", "preference", "score_a", "score_b", "advantage_a", "seconds",
               "at"]  # fmt: skip
    return to_csv(table, columns)


def to_csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], for_spreadsheets: bool = True) -> str:
    """Rows as CSV; text that a spreadsheet would interpret as a formula is prefixed with `'` if it is for one."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        cells = (row.get(column) for column in columns)
        writer.writerow(
            ""
            if c is None
            else f"'{c}"
            if for_spreadsheets and isinstance(c, str) and (c.startswith(FORMULA) or c.strip().startswith(FORMULA))
            else c
            for c in cells
        )
    return file.getvalue()


def import_csv(study: Study, file: str | Path, simulated: bool = False) -> tuple[int, int]:
    """
    Import the results of a crowd-working site.

    Worker ids are not stored: a rater's pseudonym is a hash of the id with the study's own salt. Rejected and returned
    assignments are skipped; importing a file twice adds nothing.

    Args:
        study ([`Study`]): The study whose [`items_csv`] was uploaded.
        file (`str` or `Path`): CSV with one row per rating: `slot`, `rater`, and `left` and `right`, or `preference`.
            MTurk's names (`Input.slot`, `WorkerId`, `Answer.left`, ...) and `PROLIFIC_PID` are accepted too.
        simulated (`bool`, *optional*, defaults to `False`): Whether the raters are simulated.

    Returns:
        `tuple[int, int]`: Number of ratings added, and of ratings skipped as already stored.

    Raises:
        ValueError: If a column is missing, or a row is not a valid rating. Ratings before that row stay stored, and
            the file can be imported again.
    """
    with open(file, newline="", encoding="utf-8-sig") as stream:
        rows = list(csv.DictReader(stream))
    if not rows:
        raise ValueError(f"`file={file}` has no rows; give a CSV file with a header and one row per rating")
    columns = {"slot": _column(rows[0], SLOT, file), "rater": _column(rows[0], RATER, file)}
    added = 0
    kept = [row for row in rows if not any(str(row.get(name)).lower() in REFUSED for name in STATUS)]
    for number, row in enumerate(kept, 1):
        try:
            added += study.import_rating(
                _hashed(study, row[columns["rater"]]), _whole(row[columns["slot"]]), _answer(row), simulated
            )
        except ValueError as error:
            raise ValueError(f"`file={file}`, rating {number}: {error}") from error
    return added, len(kept) - added


def _column(row: Mapping[str, str], names: Sequence[str], file: str | Path) -> str:
    found = next((name for name in names if name in row), None)
    if found is None:
        raise ValueError(f"`file={file}` has none of the columns {list(names)}; it has {list(row)}")
    return found


def _answer(row: Mapping[str, str]) -> Answer:
    values = {}
    for name, columns in SCORES.items():
        text = next((row[column] for column in columns if (row.get(column) or "").strip()), None)
        values[name] = None if text is None else _whole(text)
    return Answer(**values)


def _whole(text: str) -> int:
    try:
        return int(text)
    except (TypeError, ValueError):
        raise ValueError(f"{short_repr(text)} is not an integer") from None


def _hashed(study: Study, worker: str) -> str:
    if not (worker or "").strip():
        raise ValueError("the rater's name is empty")
    return "w" + hashlib.sha256(f"{study.about['salt']}{worker.strip()}".encode()).hexdigest()[:12]
