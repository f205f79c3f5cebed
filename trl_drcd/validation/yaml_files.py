"""Read YAML files: plain values only, bounded size, no repeated keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from trl_drcd.validation.messages import short_repr

MAX_YAML_BYTES = 2**20
MAX_YAML_NODES = 100_000


def read_yaml(file: str | Path) -> dict[str, Any]:
    """
    Read the mapping in a YAML file: plain values only, as with `yaml.safe_load`, and of bounded size.

    The size with all anchors expanded is computed before expanding any, so that a small file cannot use up the memory.

    Args:
        file (`str` or `Path`): UTF-8 file of at most 1 MiB.

    Returns:
        `dict`: The mapping; its keys are strings.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not a YAML mapping of plain values, repeats a key, or is too large.
    """
    path = Path(file)
    where = f"`config={file}`"
    if not path.is_file():
        raise FileNotFoundError(f"{where} is not a file; give a YAML file, such as those in recipes/")
    if (size := path.stat().st_size) > MAX_YAML_BYTES:
        raise ValueError(f"{where} has {size} bytes; at most {MAX_YAML_BYTES} are allowed")
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            _count(root, {}, where)
        values = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not valid UTF-8 (byte {error.start}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        mark = getattr(error, "problem_mark", None)
        at = f" (line {mark.line + 1})" if mark is not None else ""
        raise ValueError(f"{where} is not YAML of plain values: {problem}{at}; correct that line") from error
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply; use a mapping with a few levels") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{where} must contain a mapping, lines of `name: value`, got {short_repr(values)}")
    return values


def _count(node: yaml.Node, counted: dict[int, int], where: str) -> int:
    """Number of nodes in this subtree, counting an anchor each time it is used."""
    if id(node) in counted:
        if counted[id(node)] == 0:
            raise ValueError(f"{where} has an anchor inside itself (line {node.start_mark.line + 1}); remove it")
        return counted[id(node)]
    counted[id(node)] = 0
    total = 1
    if isinstance(node, yaml.MappingNode):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if repeated := next((name for name in names if names.count(name) > 1), None):
            line = node.start_mark.line + 1
            raise ValueError(f"{where} has `{repeated}` twice in the mapping of line {line}; keep one")
        total += sum(_count(part, counted, where) for pair in node.value for part in pair)
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_count(part, counted, where) for part in node.value)
    if total > MAX_YAML_NODES:
        raise ValueError(
            f"{where} has more than {MAX_YAML_NODES} values when its anchors are expanded; use fewer anchors"
        )
    counted[id(node)] = total
    return total
