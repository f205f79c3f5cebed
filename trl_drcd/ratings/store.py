"""
A study in an SQLite database: items, books, raters and ratings.

The database is in WAL mode, and every rating is one transaction, on disk before the rater sees the next item. Unique
keys ensure that no rater rates an item twice and no slot is rated twice; sending a rating again changes nothing.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_drcd.ratings.design import Item, Slot
from trl_drcd.validation.messages import short_repr

FILE, CLIPS_FOLDER = "study.sqlite", "clips"
SCHEMA = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE items (
    item INTEGER PRIMARY KEY,
    question TEXT NOT NULL CHECK (question IN ('quality', 'diversity')),
    prompt INTEGER NOT NULL, prompt_text TEXT NOT NULL,
    model_a TEXT NOT NULL, model_b TEXT NOT NULL,
    clips_a TEXT NOT NULL, clips_b TEXT NOT NULL,
    check_kind TEXT CHECK (check_kind IN ('same', 'worse'))
);
CREATE TABLE slots (
    slot INTEGER PRIMARY KEY,
    book INTEGER NOT NULL, position INTEGER NOT NULL,
    item INTEGER NOT NULL REFERENCES items, a_left INTEGER NOT NULL CHECK (a_left IN (0, 1)),
    UNIQUE (book, position), UNIQUE (book, item)
);
CREATE TABLE raters (
    rater INTEGER PRIMARY KEY, link TEXT NOT NULL UNIQUE, pseudonym TEXT NOT NULL UNIQUE,
    book INTEGER UNIQUE, simulated INTEGER NOT NULL CHECK (simulated IN (0, 1)), joined REAL NOT NULL
);
CREATE TABLE shown (
    rater INTEGER NOT NULL REFERENCES raters, slot INTEGER NOT NULL REFERENCES slots, at REAL NOT NULL,
    PRIMARY KEY (rater, slot)
);
CREATE TABLE played (
    rater INTEGER NOT NULL REFERENCES raters, slot INTEGER NOT NULL REFERENCES slots, clip TEXT NOT NULL,
    PRIMARY KEY (rater, slot, clip)
);
CREATE TABLE ratings (
    slot INTEGER PRIMARY KEY REFERENCES slots,
    rater INTEGER NOT NULL REFERENCES raters, item INTEGER NOT NULL REFERENCES items,
    score_left INTEGER CHECK (score_left BETWEEN 1 AND 5),
    score_right INTEGER CHECK (score_right BETWEEN 1 AND 5),
    preference INTEGER CHECK (preference BETWEEN 1 AND 5),
    seconds REAL, at REAL NOT NULL,
    UNIQUE (rater, item),
    CHECK ((preference IS NULL) = (score_left IS NOT NULL) AND (preference IS NULL) = (score_right IS NOT NULL))
);
"""
FREE_BOOKS = (
    "SELECT DISTINCT book FROM slots WHERE slot NOT IN (SELECT slot FROM ratings) "
    "AND book NOT IN (SELECT book FROM raters WHERE book IS NOT NULL)"
)
MAX_PSEUDONYM = 40
ABANDONED = 600.0  # seconds after which a pseudonym without ratings can be taken up by anyone


@dataclass(frozen=True)
class Answer:
    """
    A rater's answer, for the two sides as shown.

    Args:
        left, right (`int`, *optional*): Quality: score of each side from 1 (bad) to 5 (excellent).
        preference (`int`, *optional*): Diversity: from 1 (the left pair is much more diverse) through 3 (equal) to 5
            (the right pair is much more diverse).
    """

    left: int | None = None
    right: int | None = None
    preference: int | None = None

    def check(self, question: str) -> None:
        """
        Check that the answer has exactly the fields of the question, each an integer from 1 to 5.

        Raises:
            ValueError: If it does not.
        """
        needed = ("left", "right") if question == "quality" else ("preference",)
        for name in ("left", "right", "preference"):
            value = getattr(self, name)
            good = type(value) is int and 1 <= value <= 5 if name in needed else value is None
            if not good:
                wanted = "an integer from 1 to 5" if name in needed else "omitted"
                raise ValueError(f"`{name}` must be {wanted} for {question}, got {short_repr(value)}")


@dataclass(frozen=True)
class Task:
    """
    An item as shown to a rater, without the names of the models.

    Args:
        slot (`int`): Number of the slot, for [`Study.rate`].
        question (`str`): `"quality"` or `"diversity"`.
        prompt (`str`): The prompt's text.
        left, right (`list[str]`): Random file names of clips in the study's folder `clips/`.
        played (`set[str]`): Places of the clips (`"left0"`, `"right1"`) that this rater has played.
    """

    slot: int
    question: str
    prompt: str
    left: list[str]
    right: list[str]
    played: frozenset[str]

    @property
    def places(self) -> list[str]:
        """The places of all clips: `"left0"`, ..., `"right0"`, ..."""
        sides = {"left": self.left, "right": self.right}
        return [f"{side}{number}" for side, clips in sides.items() for number in range(len(clips))]

    def clip(self, place: str) -> str | None:
        """File name of the clip at a place; `None` if there is no such place."""
        return dict(zip(self.places, [*self.left, *self.right], strict=True)).get(place)


class Study:
    """
    An existing study; safe to use from several threads and processes concurrently.

    Args:
        folder (`str` or `Path`): Folder created by `trl-drcd ratings design`.
        power_safe (`bool`, *optional*, defaults to `True`): Whether ratings survive a power failure. If `False` they
            survive only the death of the process, which is enough for simulated raters and many times faster.

    Raises:
        FileNotFoundError: If the folder has no study.
    """

    def __init__(self, folder: str | Path, power_safe: bool = True) -> None:
        self.folder = Path(folder)
        self.power_safe = power_safe
        if not (self.folder / FILE).is_file():
            raise FileNotFoundError(f"`study={folder}` has no {FILE}; make a study with `trl-drcd ratings design`")
        # Kept open but unused: otherwise each call, closing the last connection, would checkpoint the WAL
        self._open = sqlite3.connect(self.folder / FILE, timeout=30, check_same_thread=False)
        self._open.execute("SELECT count(*) FROM about").fetchone()
        self._pages: dict[str, str] = {}  # link to the page that joined by it
        with self._connection() as database:
            self.about = {name: json.loads(value) for name, value in database.execute("SELECT name, value FROM about")}

    @classmethod
    def create(
        cls,
        folder: str | Path,
        items: Sequence[Item],
        slots: Sequence[Slot],
        prompts: Sequence[str],
        names: dict[Any, str],
        about: dict[str, Any],
    ) -> Study:
        """
        Create a study.

        Args:
            folder (`str` or `Path`): Its folder.
            items, slots: See [`~trl_drcd.ratings.design.Design`].
            prompts (`Sequence[str]`): Text of each prompt.
            names (`dict`): Clip to the name of its file.
            about (`dict`): Metadata: models, kind, settings.

        Raises:
            FileExistsError: If the folder already has a study.
        """
        path = Path(folder) / FILE
        if path.exists():
            raise FileExistsError(
                f"`out={folder}` already has a study, which may contain ratings; give another folder"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{FILE}.{secrets.token_hex(4)}.tmp")
        database = sqlite3.connect(unfinished, isolation_level=None)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.executescript(f"BEGIN; {SCHEMA}")
            database.executemany("INSERT INTO about VALUES (?, ?)", [(k, json.dumps(v)) for k, v in about.items()])
            database.executemany(
                "INSERT INTO items VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        item.number,
                        item.question,
                        item.prompt,
                        prompts[item.prompt],
                        *item.models,
                        *(json.dumps([names[clip] for clip in clips]) for clips in item.clips),
                        item.check,
                    )
                    for item in items
                ],
            )
            database.executemany(
                "INSERT INTO slots (book, position, item, a_left) VALUES (?, ?, ?, ?)",
                [(slot.book, slot.position, slot.item, slot.a_left) for slot in slots],
            )
            database.execute("COMMIT")
            database.close()
            _rename_new(unfinished, path)
        finally:
            database.close()
            unfinished.unlink(missing_ok=True)
        return cls(folder)

    @contextmanager
    def _connection(self, sync: bool = False) -> Iterator[sqlite3.Connection]:
        """A new connection for each call: none is shared between threads or left in use when a process dies."""
        database = sqlite3.connect(self.folder / FILE, timeout=30, isolation_level=None)
        try:
            database.execute("PRAGMA foreign_keys = ON")
            database.execute(f"PRAGMA synchronous = {'FULL' if sync and self.power_safe else 'NORMAL'}")
            yield database
        finally:
            database.close()

    @contextmanager
    def _transaction(self, sync: bool = True) -> Iterator[sqlite3.Connection]:
        """An exclusive write transaction, rolled back on errors; with `sync`, on disk before this returns."""
        with self._connection(sync) as database:
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
            except BaseException:
                database.execute("ROLLBACK")
                raise
            database.execute("COMMIT")

    # ---------------------------------------------------------------- raters

    def join(self, pseudonym: str, simulated: bool = False, page: str = "") -> str:
        """
        Assign the next free book to a new rater.

        A pseudonym without ratings gets its existing link again on the page that has chosen it, so that a double
        click or a lost response does not take a second book, while this process runs; otherwise after ten minutes.

        Args:
            pseudonym (`str`): Pseudonym of 1 to 40 printable characters; not a real name.
            simulated (`bool`, *optional*, defaults to `False`): Whether the rater is simulated. A study has either
                human or simulated raters.
            page (`str`, *optional*): What tells open pages apart, such as Gradio's `session_hash`.

        Returns:
            `str`: The rater's secret personal link.

        Raises:
            ValueError: If the pseudonym is invalid or taken, no book is free, or the study has raters of the other
                kind.
        """
        name = pseudonym.strip() if isinstance(pseudonym, str) else ""
        if not 0 < len(name) <= MAX_PSEUDONYM or not name.isprintable():
            raise ValueError(
                f"a pseudonym must have 1 to {MAX_PSEUDONYM} printable characters, got {short_repr(pseudonym)}"
            )
        with self._transaction() as database:
            self._check_kind(database, simulated)
            known = database.execute(
                "SELECT link, (SELECT count(*) FROM ratings WHERE ratings.rater = raters.rater), joined FROM raters "
                "WHERE pseudonym = ?", (name,)
            ).fetchone()  # fmt: skip
            if known and known[1] == 0 and (self._pages.get(known[0]) == page or time.time() - known[2] > ABANDONED):
                self._pages[known[0]] = page
                return str(known[0])
            if known:
                raise ValueError(
                    f"the pseudonym {short_repr(name)} is taken; continue with your personal link, or choose another"
                )
            (book,) = database.execute(f"SELECT min(book) FROM ({FREE_BOOKS})").fetchone()
            if book is None:
                raise ValueError("all places of this study are taken; thank you")
            link = self._add_rater(database, name, book, simulated)
            self._pages[link] = page
            return link

    def _check_kind(self, database: sqlite3.Connection, simulated: bool) -> None:
        other = database.execute("SELECT 1 FROM raters WHERE simulated != ?", (simulated,)).fetchone()
        if other:
            has, wanted = ("human raters", "simulated raters") if simulated else ("simulated raters", "human raters")
            raise ValueError(f"this study has {has}; create another one for {wanted}")

    def _add_rater(self, database: sqlite3.Connection, name: str, book: int | None, simulated: bool) -> str:
        link = secrets.token_urlsafe(16)
        database.execute(
            "INSERT INTO raters (link, pseudonym, book, simulated, joined) VALUES (?, ?, ?, ?, ?)",
            (link, name, book, simulated, time.time()),
        )
        return link

    def _rater(self, database: sqlite3.Connection, link: str) -> tuple[int, int | None]:
        row = database.execute("SELECT rater, book FROM raters WHERE link = ?", (str(link),)).fetchone()
        if row is None:
            raise ValueError("this personal link is unknown; ask the person who gave it to you, or start again")
        return row[0], row[1]

    def pseudonym(self, link: str) -> str:
        """
        Pseudonym of the rater with this link.

        Raises:
            ValueError: If the link is unknown.
        """
        with self._connection() as database:
            rater, _ = self._rater(database, link)
            return str(database.execute("SELECT pseudonym FROM raters WHERE rater = ?", (rater,)).fetchone()[0])

    def release(self, pseudonym: str) -> int:
        """
        Move a rater's unrated items to a new book, for the next rater who joins.

        Returns:
            `int`: Number of items moved.

        Raises:
            ValueError: If there is no such rater, or no unrated items.
        """
        with self._transaction() as database:
            row = database.execute("SELECT book FROM raters WHERE pseudonym = ?", (pseudonym,)).fetchone()
            if row is None:
                raise ValueError(f"`pseudonym={pseudonym}` is not a rater of this study")
            (new,) = database.execute("SELECT max(book) + 1 FROM slots").fetchone()
            moved = database.execute(
                "UPDATE slots SET book = ? WHERE book = ? AND slot NOT IN (SELECT slot FROM ratings)", (new, row[0])
            ).rowcount
            if not moved:
                raise ValueError(f"`pseudonym={pseudonym}` has rated everything; nothing is left to release")
            return int(moved)

    # ---------------------------------------------------------------- rating

    def next_task(self, link: str) -> Task | None:
        """The first unrated item of a rater's book; `None` if all are rated."""
        with self._transaction(sync=False) as database:
            rater, book = self._rater(database, link)
            row = database.execute(
                "SELECT slot FROM slots WHERE book = ? AND slot NOT IN (SELECT slot FROM ratings) "
                "ORDER BY position LIMIT 1", (book,)
            ).fetchone()  # fmt: skip
            if row is None:
                return None
            database.execute("INSERT OR IGNORE INTO shown VALUES (?, ?, ?)", (rater, row[0], time.time()))
            return self._task(database, rater, book, row[0])

    def task(self, link: str, slot: int) -> Task:
        """
        One item of a rater's own book, rated or not.

        Raises:
            ValueError: If it is not in the book.
        """
        with self._connection() as database:
            rater, book = self._rater(database, link)
            return self._task(database, rater, book, slot)

    def _task(self, database: sqlite3.Connection, rater: int, book: int | None, slot: int) -> Task:
        row = database.execute(
            "SELECT question, prompt_text, clips_a, clips_b, a_left FROM slots JOIN items USING (item) "
            "WHERE slot = ? AND book = ?", (slot, book)
        ).fetchone()  # fmt: skip
        if row is None:
            raise ValueError(f"`slot={short_repr(slot)}` is not in this rater's book")
        question, prompt, *clips, a_left = row
        left, right = map(json.loads, clips if a_left else reversed(clips))
        played = database.execute("SELECT clip FROM played WHERE rater = ? AND slot = ?", (rater, slot))
        return Task(slot, question, prompt, left, right, frozenset(clip for (clip,) in played))

    def mark_played(self, link: str, slot: int, place: str) -> None:
        """
        Record that a clip was played.

        Raises:
            ValueError: If the slot is not in the rater's book, or has no clip at that place.
        """
        if self.task(link, slot).clip(place) is None:
            raise ValueError(f"`place={short_repr(place)}` is not a clip of this item")
        with self._transaction(sync=False) as database:
            rater, _ = self._rater(database, link)
            database.execute("INSERT OR IGNORE INTO played VALUES (?, ?, ?)", (rater, slot, place))

    def rate(self, link: str, slot: int, answer: Answer, must_play: bool = True) -> bool:
        """
        Store a rating; it is on disk when this returns.

        Args:
            link (`str`): Personal link of the rater.
            slot (`int`): Slot from [`Study.next_task`].
            answer ([`Answer`]): Answer for the sides as shown.
            must_play (`bool`, *optional*, defaults to `True`): Refuse the rating of music until every clip was played.

        Returns:
            `bool`: `False` if the slot was already rated; nothing is changed then.

        Raises:
            ValueError: If the slot is not in the rater's book, the answer is invalid, or a clip was not played.
        """
        task = self.task(link, slot)
        answer.check(task.question)
        if must_play and self.about["kind"] == "music" and (unheard := set(task.places) - task.played):
            raise ValueError(f"play every clip first: {len(unheard)} of {len(task.places)} were not played")
        with self._transaction() as database:
            rater, book = self._rater(database, link)
            return self._store(database, rater, book, slot, answer)

    def _store(self, database: sqlite3.Connection, rater: int, book: int | None, slot: int, answer: Answer) -> bool:
        item = database.execute("SELECT item FROM slots WHERE slot = ? AND book = ?", (slot, book)).fetchone()
        if item is None:
            raise ValueError(f"`slot={short_repr(slot)}` is not in this rater's book")
        began = database.execute("SELECT at FROM shown WHERE rater = ? AND slot = ?", (rater, slot)).fetchone()
        now = time.time()
        return bool(
            database.execute(
                "INSERT INTO ratings VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (slot, rater, item[0], answer.left, answer.right, answer.preference,
                 now - began[0] if began else None, now),
            ).rowcount
        )  # fmt: skip

    def import_rating(self, pseudonym: str, slot: int, answer: Answer, simulated: bool = False) -> bool:
        """
        Store a rating made elsewhere; a new rater is added, and may rate slots of any book.

        Returns:
            `bool`: `False` if the slot was already rated, or the rater has already rated its item; nothing is changed
            then.

        Raises:
            ValueError: If there is no such slot, the answer is invalid, or the study has raters of the other kind.
        """
        with self._transaction() as database:
            self._check_kind(database, simulated)
            row = database.execute(
                "SELECT question, book FROM slots JOIN items USING (item) WHERE slot = ?", (slot,)
            ).fetchone()
            if row is None:
                raise ValueError(f"`slot={short_repr(slot)}` is not a slot of this study")
            answer.check(row[0])
            known = database.execute("SELECT rater FROM raters WHERE pseudonym = ?", (pseudonym,)).fetchone()
            if known is None:
                self._add_rater(database, pseudonym, None, simulated)
                known = database.execute("SELECT rater FROM raters WHERE pseudonym = ?", (pseudonym,)).fetchone()
            return self._store(database, known[0], row[1], slot, answer)

    # ---------------------------------------------------------------- reading

    def progress(self, link: str) -> tuple[int, int]:
        """Number of rated items and of all items of a rater."""
        with self._connection() as database:
            rater, book = self._rater(database, link)
            (done,) = database.execute("SELECT count(*) FROM ratings WHERE rater = ?", (rater,)).fetchone()
            (left,) = database.execute(
                "SELECT count(*) FROM slots WHERE book = ? AND slot NOT IN (SELECT slot FROM ratings)", (book,)
            ).fetchone()
            return done, done + left

    def rows(self, sql: str) -> list[dict[str, Any]]:
        """Rows of a SELECT, as dictionaries by column name."""
        with self._connection() as database:
            database.row_factory = sqlite3.Row
            return [dict(row) for row in database.execute(sql)]

    def prompts(self) -> dict[int, str]:
        """The text of each prompt by its number."""
        return {
            row["prompt"]: row["prompt_text"] for row in self.rows("SELECT DISTINCT prompt, prompt_text FROM items")
        }

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """
        Check that an evaluation is on the prompts of this study: it may have been made anew since the design.

        Raises:
            ValueError: If one of them is another.
        """
        for number, text in self.prompts().items():
            found = prompts[number] if number < len(prompts) else None
            if found != text:
                raise ValueError(
                    f"the evaluation has other prompts than the study was designed on: number {number} is "
                    f"{short_repr(found, 40)} there and {short_repr(text, 40)} here; give a copy of the evaluation of "
                    "that time"
                )

    def check_samples(self, digests: Mapping[str, str | None]) -> None:
        """
        Check that an evaluation has the samples that were rated, as far as both know what theirs depend on.

        Args:
            digests (`Mapping[str, str]`): `but_judges` of each model's line of `results.jsonl`.

        Raises:
            ValueError: If the samples of a model are others.
        """
        rated = self.about.get("samples", {})
        for name in self.about["models"]:
            if None not in (pair := (rated.get(name), digests.get(name))) and pair[0] != pair[1]:
                raise ValueError(
                    f"the evaluation has other samples of {name!r} than those that were rated, such as of another "
                    "seed; give a copy of the evaluation of that time"
                )

    def ratings(self) -> list[dict[str, Any]]:
        """All ratings in the order of their slots, joined with items, sides and raters."""
        return self.rows(
            "SELECT ratings.slot, question, prompt, prompt_text, model_a, model_b, clips_a, clips_b, check_kind, "
            "a_left, ratings.item, pseudonym, simulated, score_left, score_right, preference, seconds, at "
            "FROM ratings JOIN slots USING (slot) JOIN items ON items.item = ratings.item JOIN raters USING (rater) "
            "ORDER BY ratings.slot"
        )

    @property
    def simulated(self) -> bool:
        """Whether the study has simulated raters."""
        return bool(self.rows("SELECT 1 FROM raters WHERE simulated = 1 LIMIT 1"))


def _rename_new(source: Path, target: Path) -> None:
    """Give a file a name that no other has: of two processes one fails."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise FileExistsError(
            f"`out={target.parent}` already has a study, which may contain ratings; give another folder"
        ) from None
    except OSError:  # a filesystem without hard links
        source.rename(target)
