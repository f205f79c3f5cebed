"""The mutation check can be run: each line is where it was, each test exists, and CONTRIBUTING.md has the list."""

import pytest
from mutation import MUTATIONS, ROOT, problems, table


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.name for mutation in MUTATIONS])
def test_the_line_and_the_test_are_there(mutation):
    assert problems(mutation) == []
    assert mutation.broken != mutation.line


def test_the_list_is_the_one_in_contributing():
    assert table() in (ROOT / "CONTRIBUTING.md").read_text()
