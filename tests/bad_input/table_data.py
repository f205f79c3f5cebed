"""Bad data: data sets given to the trainer, and files of prompts."""

from typing import Any

from bad_world import Bad
from datasets import Dataset

from trl_drcd.prompts import load_prompts


def rows(name: str, columns: dict[str, list], value: str, remedy: str, argument: str = "`train_dataset`", **more: Any):
    """A data set with these columns, given to the trainer."""
    return Bad(
        name, lambda w, tmp: w.trainer(tmp, dataset=Dataset.from_dict(columns), **more), ValueError, argument, value,
        remedy,
    )  # fmt: skip


def file(name: str, content: str | bytes, value: str, remedy: str, suffix: str = ".jsonl") -> Bad:
    """A file of prompts with this content."""

    def act(world: Any, tmp: Any) -> Any:
        return load_prompts("dataset", str(world.prompts(tmp, content, suffix)), "train")

    return Bad(name, act, ValueError, "`dataset=", value, remedy)


def named(name: str, given: str, error: type[BaseException], remedy: str) -> Bad:
    """A data set that is not there."""
    return Bad(name, lambda w, tmp: load_prompts("dataset", given, "train"), error, "`dataset=", given, remedy)


CHAT = [[{"role": "user", "content": "slow"}], [{"role": "user", "content": "fast"}]]
SYSTEM = Dataset.from_dict({"prompt": [[{"role": "system", "content": "harp"}, *turns] for turns in CHAT]})
REFUSES = (
    "{{% for m in messages %}}{{% if m['role'] == '{role}' %}}{{{{ raise_exception('no such role') }}}}{{% endif %}}"
    "{{{{ m['content'] }}}}{{% endfor %}}"
)

ROWS = [
    Bad(
        "no data set",
        lambda w, tmp: w.trainer(tmp, dataset=[]),
        TypeError,
        "`train_dataset`",
        "list",
        "must be a `Dataset` or `IterableDataset`",
    ),
    rows("empty data set", {"prompt": []}, "empty", "at least one row with a `prompt`"),
    rows("no column of prompts", {"text": ["a"]}, "['text']", "must have a column `prompt`"),
    rows("numbers for prompts", {"prompt": [1, 2]}, "int64", "texts or lists of turns"),
    rows("a row without a prompt", {"prompt": ["a", None]}, "rows [1]", "give every row a prompt"),
    rows("an empty prompt", {"prompt": ["", "a"]}, "rows [0]", "give every row a prompt"),
    rows(
        "a conversation without turns", {"prompt": [[], [{"role": "user", "content": "a"}]]}, "rows [0]", "give every"
    ),
    rows(
        "turns without a role",
        {"prompt": [[{"content": "a"}], [{"content": "b"}]]},
        "['content']",
        "`role` and `content`",
    ),
    rows("an enormous prompt", {"prompt": ["slow", "harp " * 3000]}, "3002 tokens", "shorten it"),
    rows("numbers for negative prompts", {"prompt": ["a", "b"], "negative_prompt": [1, 2]}, "int64", "texts"),
    rows("fewer rows than a rollout", {"prompt": ["a"]}, "1 rows", "give more prompts", num_generations=2),
    rows(
        "a turn without a text", {"prompt": [[{"role": "user", "content": None}], [{"role": "user", "content": "b"}]]},
        "row 0", "lists of turns with `role` and `content`",
    ),
    rows("lists of words for prompts", {"prompt": [["a", "b"], ["c"]]}, "lists of string", "texts or lists of turns"),
    rows("conversations without a template", {"prompt": CHAT}, "conversations", "set `tokenizer.chat_template`"),
    Bad(
        "a system turn that the template leaves out",
        lambda w, tmp: w.trainer(tmp, dataset=SYSTEM, processing_class=w.chat("{{ messages[-1]['content'] }}")),
        ValueError, "`train_dataset`", "drops it", "at the start of the user's turn",
    ),
    Bad(
        "a system turn that the template refuses",
        lambda w, tmp: w.trainer(tmp, dataset=SYSTEM, processing_class=w.chat(REFUSES.format(role="system"))),
        ValueError, "`train_dataset`", "no such role", "at the start of the user's turn",
    ),
    Bad(
        "a turn that the template refuses",
        lambda w, tmp: w.trainer(
            tmp, dataset=Dataset.from_dict({"prompt": CHAT}), processing_class=w.chat(REFUSES.format(role="user"))
        ),
        ValueError, "`train_dataset`", "no such role", "use turns that it accepts",
    ),
    Bad(
        "a stream of fewer rows than a rollout",
        lambda w, tmp: w.trainer(
            tmp, dataset=Dataset.from_dict({"prompt": ["a"]}).to_iterable_dataset(), max_steps=1, num_generations=2
        ),
        ValueError, "`train_dataset`", "1 rows", "give more prompts",
    ),
    Bad(
        "a stream without an end",
        lambda w, tmp: w.trainer(tmp, dataset=Dataset.from_dict({"prompt": ["a"]}).to_iterable_dataset()),
        ValueError, "`train_dataset`", "-1", "set `max_steps`",
    ),
    Bad(
        "evaluation without data", lambda w, tmp: w.trainer(tmp, eval_strategy="steps"), ValueError, "`eval_strategy",
        "None", "needs `eval_dataset`",
    ),
    Bad(
        "evaluation data without prompts",
        lambda w, tmp: w.trainer(tmp, eval_dataset={"held_out": Dataset.from_dict({"x": [1]})}),
        ValueError,
        "`held_out`",
        "['x']",
        "must have a column `prompt`",
    ),
    named("no such file", "none.jsonl", FileNotFoundError, "give a JSONL, CSV or Parquet file"),
    named("a folder for a file", "tests", FileNotFoundError, "give a JSONL, CSV or Parquet file"),
    named("a path out of the folder", "../../etc/none", FileNotFoundError, "give a JSONL, CSV or Parquet file"),
    named("nothing on the hub", "nobody/nothing-of-that-name", FileNotFoundError, "or a Hub name"),
    file("empty file", "", "prompts.jsonl", "at least one row"),
    file("line broken off", '{"prompt": "a"}\n{"prompt": "b"\n', "line 2", "one JSON object on each line"),
    file("lines of numbers", "1\n2\n", "line 1", "one JSON object on each line"),
    file("lines without the column", '{"text": "a"}\n', "['text']", "must have a column `prompt`"),
    file("a line without a prompt", '{"prompt": "a"}\n{"prompt": ""}\n', "rows [1]", "give every row a prompt"),
    file("prompts of two kinds", '{"prompt": "a"}\n{"prompt": 3}\n', "line 2", "text or list of turns"),
    file("numbers in a table", "prompt\n1\n2\n", "int64", "texts or lists of turns", ".csv"),
    file("bytes that are no text", b'{"prompt": "\xff\xfe"}\n', "line 1", "UTF-8"),
    file("a pickle for a table", b"\x80\x04\x95", "line 1", "UTF-8"),
    file("an unpaired surrogate", '{"prompt": "\\ud800 tune"}\n', "line 1", "valid Unicode"),
    file("unknown format", "a", ".txt", "expected one of", ".txt"),
    file("table that is none", b"PAR1 and no more", "prompts.parquet", "copy or save it again", ".parquet"),
    file("table without the column", "text,other\na,b\n", "['text', 'other']", "must have a column `prompt`", ".csv"),
    file("table with a row too long", "prompt\na\nb,c,d\n", "prompts.csv", "same columns", ".csv"),
]  # fmt: skip
