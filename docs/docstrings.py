"""Docstrings in the style of TRL and transformers, made readable for mkdocstrings, which knows Google's style."""

import re

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


def google_style(text: str) -> str:
    """Types without backticks, and cross references as plain code."""
    text = ARGUMENT.sub(_argument, text)
    text = RESULT.sub(r"\g<indent>\g<type>:", text)
    return REFERENCE.sub(lambda match: f"`{match['name'].rpartition('.')[2]}`", text)


class TrlDocstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring:
            obj.docstring.value = google_style(obj.docstring.value)
