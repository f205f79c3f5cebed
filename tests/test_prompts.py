"""Prompts of the forms that data sets have: what becomes of them, and what of a file stays."""

import csv
import json

import pytest
from datasets import Dataset, IterableDataset

from trl_drcd.files import distinct_names, plain_name
from trl_drcd.prompts import distinct, load_prompts, read_prompts, with_system_prompt
from trl_drcd.validation.rows import check_rows

USER = {"role": "user", "content": "Write a poem."}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "Roses are red."}


def write(folder, *rows):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def shared(turn: dict) -> dict:
    """A turn as ShareGPT has it."""
    roles = {"user": "human", "assistant": "gpt", "system": "system"}
    return {"from": roles[turn["role"]], "value": turn["content"]}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER]),
        ({"messages": [USER, ANSWER, USER, ANSWER]}, [USER, ANSWER, USER]),
        ({"messages": [USER], "prompt": "a text"}, "a text"),  # what is called a prompt is one
        ({"conversations": [shared(SYSTEM), shared(USER), shared(ANSWER)]}, [SYSTEM, USER]),
        ({"conversations": [USER, ANSWER]}, [USER]),
        ({"instruction": "Write a poem.", "input": "", "output": "Roses"}, [USER]),
        ({"instruction": "Translate.", "input": "Bonjour"}, [{"role": "user", "content": "Translate.\n\nBonjour"}]),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_chats_sharegpt_and_alpaca_become_prompts(tmp_path, row, prompt, streaming):
    dataset = read_prompts("dataset", write(tmp_path, row, row), "train", streaming)
    assert isinstance(dataset, IterableDataset if streaming else Dataset)
    assert list(dataset) == [{"prompt": prompt}] * 2
    check_rows(dataset, "`dataset`")


def test_a_chat_without_a_turn_of_the_user_is_refused_with_its_row(tmp_path):
    file = write(tmp_path, {"messages": [USER]}, {"messages": [SYSTEM, ANSWER]})
    with pytest.raises(ValueError, match=r"`dataset=.*` has no prompt in rows \[1\] \(1 in total\)"):
        load_prompts("dataset", file, "train")


def test_an_unknown_form_is_refused_with_those_that_are_known(tmp_path):
    with pytest.raises(ValueError, match=r"must have a column `prompt`, got .*'text'.*`instruction`"):
        load_prompts("dataset", write(tmp_path, {"text": "a"}), "train")


def test_turns_may_have_more_keys_even_in_some_rows_only(tmp_path):
    named = USER | {"name": "Ann", "weight": 1}
    dataset = load_prompts("dataset", write(tmp_path, {"prompt": [named]}, {"prompt": [USER]}), "train")
    assert [{key: turn[key] for key in USER} for row in dataset for turn in row["prompt"]] == [USER, USER]


def test_other_columns_are_kept_for_reward_functions(tmp_path):
    file = write(tmp_path, {"prompt": "a", "answer": 4}, {"prompt": "b", "answer": 5})
    assert load_prompts("dataset", file, "train").column_names == ["prompt"]
    assert read_prompts("dataset", file, "train", keep_columns=True)["answer"][:] == [4, 5]


@pytest.mark.parametrize(("given", "expected"), [(["", ""], None), (["", "bad"], [None, "bad"])])
def test_an_empty_negative_prompt_of_a_table_is_none_of_its_own(tmp_path, given, expected):
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["prompt", "negative_prompt"], *zip("ab", given, strict=True)])
    dataset = load_prompts("dataset", str(tmp_path / "a.csv"), "train")
    assert ("negative_prompt" in dataset.column_names) == (expected is not None)
    if expected:
        assert dataset["negative_prompt"][:] == expected


def test_a_system_prompt_does_not_replace_one():
    other = [SYSTEM, USER]
    assert with_system_prompt({"prompt": other}, "Be long.") == {"prompt": other}
    assert with_system_prompt({"prompt": USER["content"]}, SYSTEM["content"]) == {"prompt": other}
    for nothing in (None, "", []):  # which the trainer refuses, by its row
        assert with_system_prompt({"prompt": nothing}, "x") == {"prompt": nothing}


def test_distinct_prompts_are_the_first_ones():
    assert distinct(["a", "b", "a", "c"], 2) == ["a", "b"]
    assert distinct([[USER], [USER], [SYSTEM, USER]], 3) == [[USER], [SYSTEM, USER]]


def test_a_system_prompt_is_the_teachers_too():
    row = {"prompt": USER["content"], "teacher_prompt": "Write a very slow tune.", "negative_prompt": "fast"}
    turns = [SYSTEM, {"role": "user", "content": "Write a very slow tune."}]
    assert with_system_prompt(row, SYSTEM["content"])["teacher_prompt"] == turns
    assert with_system_prompt(row | {"teacher_prompt": None}, SYSTEM["content"])["teacher_prompt"] is None
    assert "negative_prompt" not in with_system_prompt(row, SYSTEM["content"])  # the null prompt has none


def test_names_of_files_are_distinct_and_fit():
    assert len(set(distinct_names(["a", "2 a", "a", "a"]))) == 4
    assert len(plain_name("音" * 90).encode()) <= 160 and plain_name("音" * 90).startswith("音")
    assert len(plain_name("a" * 90)) == 80
    assert len(set(distinct_names(["1 " * 40] * 4))) == 4
