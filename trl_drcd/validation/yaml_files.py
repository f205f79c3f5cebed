"""YAML files: plain values, of a bounded size, without a key twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from trl_drcd.validation.messages import short_repr

MAX_YAML_BYTES = 2**20
MAX_YAML_NODES = 100_000


def read_yaml(file: str | Path) -> dict[str, Any]:
    """
    The mapping in a YAML file: plain values only, as with `yaml.safe_load`, and of a bounded size.

    Anchors are counted as often as they are used, before any of them is expanded, so that a few lines cannot become
    gigabytes.

    Args:
        file (`str` or `Path`): At most 1 MiB of UTF-8.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no YAML mapping of plain values, repeats a key, or is too large.
    """
    path = Path(file)
    where = f"`config={file}`"
    if not path.is_file():
        raise FileNotFoundError(f"{where} is no file; give a YAML file, such as those in recipes/")
    if (size := path.stat().st_size) > MAX_YAML_BYTES:
        raise ValueError(f"{where} has {size} bytes; a configuration has at most {MAX_YAML_BYTES}")
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            _count(root, {}, where)
        values = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is no text in UTF-8 (byte {error.start}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        mark = getattr(error, "problem_mark", None)
        at = f" (line {mark.line + 1})" if mark is not None else ""
        raise ValueError(f"{where} is no YAML of plain values: {problem}{at}; mend that line") from error
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply; a configuration is a mapping of a few levels") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{where} must hold a mapping, lines of `name: value`, got {short_repr(values)}")
    return values


def _count(node: yaml.Node, counted: dict[int, int], where: str) -> int:
    """Nodes below and with this one, each anchor as often as it is used."""
    if id(node) in counted:
        if counted[id(node)] == 0:
            raise ValueError(f"{where} has an anchor inside itself (line {node.start_mark.line + 1}); write it out")
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
            f"{where} has more than {MAX_YAML_NODES} values when its anchors are expanded; write out what is meant"
        )
    counted[id(node)] = total
    return total
