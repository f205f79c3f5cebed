"""
Private names of other libraries that a package uses, found by reading its source and its classes.

Private is a name with an underscore, and one that a library holds two modules deep without offering it above. Used is
what the package imports, reaches as an attribute (also by `getattr` and the like), reads or sets on an object whose
class comes from the library, and what it overrides, private or not.

    python tests/contract/foreign.py    # what is found, as `test_private_names.py` writes it down
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

# Offer their names at the top or one module deep; of others only an underscore says that a name is private
WITH_PUBLIC_TOP = {"trl", "transformers", "accelerate", "peft", "huggingface_hub", "datasets"}
LIBRARIES = {*WITH_PUBLIC_TOP, "torch", "safetensors"}
PUBLIC = {"transformers.utils.logging"}  # documented, two modules deep
BY_NAME = {"getattr", "hasattr", "setattr", "delattr", "object"}  # `object` as in `mock.patch.object`


def is_private(name: str) -> bool:
    """`_x`, and neither `_` nor `__x__`."""
    return name.startswith("_") and not name.startswith("__") and name != "_"


def modules_of(package: ModuleType) -> list[ModuleType]:
    """The package and all modules in it; those that need what is not installed are left out."""
    found = [package]
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        try:
            found.append(importlib.import_module(info.name))
        except ImportError:
            continue
    return found


def files_of(package: ModuleType) -> list[Path]:
    """All source files, also of modules that cannot be imported here."""
    return sorted(Path(package.__path__[0]).rglob("*.py"))


# ---------------------------------------------------------------- what is imported


def private_imports(tree: ast.AST) -> Iterator[str]:
    """Full names of all that is imported and private."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in LIBRARIES:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if any(map(is_private, full.split("."))) or not _offered(node.module, alias.name):
                    yield full


def _offered(module: str, name: str) -> bool:
    top, *rest = module.split(".")
    if top not in WITH_PUBLIC_TOP or len(rest) < 2 or module in PUBLIC:
        return True
    above = [top, *[f"{top}.{rest[0]}"]]
    return any(hasattr(importlib.import_module(place), name) for place in above)


# ---------------------------------------------------------------- what is reached as an attribute


def attributes(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Private attributes, and whether they are those of `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            value = node.value
            of_super = isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "super"
            yield node.attr, of_super or (isinstance(value, ast.Name) and value.id in ("self", "cls"))
        elif isinstance(node, ast.Call) and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            name = node.args[1].value
            if called in BY_NAME and isinstance(name, str) and is_private(name):
                yield name, False


def definitions(tree: ast.AST) -> Iterator[str]:
    """Names that a source gives to functions, classes, variables, fields, and attributes of `self`."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.asname or node.name


# ---------------------------------------------------------------- what is overridden, or shared with a base


def foreign_bases(cls: type) -> list[type]:
    """Bases that come from another library, in order."""
    return [base for base in cls.__mro__ if base.__module__.partition(".")[0] in LIBRARIES]


@cache
def names_of(cls: type) -> frozenset[str]:
    """What a class has: in its body, and set on `self` in its source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):
        return frozenset(cls.__dict__)
    stored = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and getattr(node.value, "id", "") in ("self", "cls")
    }
    return frozenset({*cls.__dict__, *stored})


def owner(cls: type, name: str) -> type | None:
    """The first foreign base that has the name."""
    return next((base for base in foreign_bases(cls) if name in names_of(base)), None)


def own_classes(package: ModuleType) -> Iterator[tuple[type, ast.ClassDef]]:
    """Classes that the package defines on top of another library's, with their source."""
    for module in modules_of(package):
        classes = {
            node.name: node
            for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text()))
            if isinstance(node, ast.ClassDef)
        }
        for cls in vars(module).values():
            if isinstance(cls, type) and cls.__module__ == module.__name__ and foreign_bases(cls):
                yield cls, classes[cls.__name__]


def full_name(cls: type, name: str) -> str:
    """`module.Class.name`."""
    return f"{cls.__module__}.{cls.__qualname__}.{name}"


def inherited(package: ModuleType) -> Iterator[str]:
    """Full names of what classes of the package override, and of private names that they use on `self`."""
    for cls, node in own_classes(package):
        overridden = {name for name in definitions(ast.Module(node.body, [])) if name in vars(cls)}
        overridden = {name for name in overridden if not name.startswith("__")}
        used = {name for name, of_self in attributes(node) if of_self}
        for name in overridden | used:
            base = owner(cls, name)
            if base and (is_private(name) or _is_method(base, name)):
                yield full_name(base, name)


def _is_method(base: type, name: str) -> bool:
    """Fields that get another default are no contract, nor are methods that a base has only to be given."""
    given = base.__module__ in ("torch.nn.modules.module", "torch.autograd.function")
    return callable(getattr(base, name, None)) and not given


@cache
def found(package: ModuleType) -> set[str]:
    """
    All private names of other libraries in use: full names where the owner is known, `?.name` where an attribute is
    neither the package's own nor that of a base.
    """
    trees = [ast.parse(file.read_text()) for file in files_of(package)]
    full = {name for tree in trees for name in private_imports(tree)} | set(inherited(package))
    own = {name for tree in trees for name in definitions(tree)}
    known = own | {name.rpartition(".")[2] for name in full}
    return full | {f"?.{name}" for tree in trees for name, _ in attributes(tree) if name not in known}


# ---------------------------------------------------------------- signatures


def resolve(name: str) -> tuple[object, str]:
    """The object that has the last part of a full name, and that part."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            holder: object = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:-1]:
            holder = getattr(holder, part)
        return holder, parts[-1]
    raise ImportError(name)


def signature(name: str) -> str:
    """
    Arguments of a function or class as `self, a, b=, *args`; `property`, `attribute` for others.

    Raises:
        AttributeError: If there is no such thing.
    """
    holder, last = resolve(name)
    value = inspect.getattr_static(holder, last, None)
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if value is None and isinstance(holder, type) and last in names_of(holder):
        return "attribute"
    if isinstance(holder, type(torch.ops.aten)):  # operators are looked up when they are asked for
        given = getattr(holder, last).default._schema.arguments
        return ", ".join(argument.name + "=" * argument.has_default_value() for argument in given)
    if value is None:
        raise AttributeError(name)
    if isinstance(value, property):
        return "property"
    if not callable(value):
        return "attribute"
    try:
        return ", ".join(map(_parameter, inspect.signature(value).parameters.values()))
    except ValueError:
        return "builtin"


def _parameter(parameter: inspect.Parameter) -> str:
    star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    return f"{star}{parameter.name}{'' if parameter.default is parameter.empty else '='}"


def main() -> None:
    """Prints what is found, by library."""
    import trl_drcd

    table = defaultdict(list)
    for name in sorted(found(trl_drcd)):
        table[name.partition(".")[0]].append(name)
    for library, names in table.items():
        print(library, getattr(importlib.import_module(library), "__version__", "") if library != "?" else "")
        for name in names:
            print(f"    {name!r}: {'?' if library == '?' else signature(name)!r},")


if __name__ == "__main__":
    main()
