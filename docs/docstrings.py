"""Docstrings in the style of TRL and transformers, made readable for mkdocstrings, which knows Google's style."""

import re
from collections.abc import Iterator

import griffe

# "name (`type`, *optional*, defaults to `value`):"; the default stands in the signature already
ARGUMENT = re.compile(r"^(?P<name>[ ]+\*{0,2}\w+(?:, \w+)*) \((?P<type>[`*\[][^\n]*)\):", re.M)
DEFAULT = re.compile(r"(,? ?\*optional\*)?(, defaults to .*)?$")
RESULT = re.compile(r"^(?P<indent>[ ]+)`(?P<type>[^`]+)`:", re.M)
REFERENCE = re.compile(r"\[`~?(?P<name>[\w.]+)`\](?![(\[])")


def _argument(match: re.Match[str]) -> str:
    types = DEFAULT.sub("", match["type"])
    types = re.sub(r"[`\[\]~]", "", types) if "[`" in types else types.replace("`", "")
    return f"{match['name']} ({types or 'Any'}):"


def google_style(text: str, paths: dict[str, str]) -> str:
    """
    Types without backticks, and references as links where the name has a page.

    Args:
        text (`str`): A docstring.
        paths (`dict[str, str]`): Name to full path of what the package defines.
    """

    def link(match: re.Match[str]) -> str:
        name = match["name"].rpartition(".")[2]
        path = match["name"] if match["name"].startswith("trl_drcd.") else paths.get(name, name)
        return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'

    text = ARGUMENT.sub(_argument, text)
    text = RESULT.sub(r"\g<indent>\g<type>:", text)
    return REFERENCE.sub(link, text)


def _own_objects(parent: griffe.Object) -> Iterator[griffe.Object]:
    yield parent
    for member in parent.members.values():
        if isinstance(member, griffe.Object):  # not an import
            yield from _own_objects(member)


class TrlDocstrings(griffe.Extension):
    """Rewrites the docstrings of a package once all of it is read."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: object) -> None:
        objects = list(_own_objects(pkg))
        paths = {item.name: item.path for item in reversed(objects)}
        for item in objects:
            if item.docstring:
                item.docstring.value = google_style(item.docstring.value, paths)
