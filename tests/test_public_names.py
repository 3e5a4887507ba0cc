"""The public names, with their parameters: they change only together with their record, public_names.txt."""

import ast
import difflib
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

from test_stub import of_docstring

import pipeline_ext as pe

RECORD = Path(__file__).with_name("public_names.txt")
MODULES = tuple(
    f"pipeline_ext{room}" for room in ("", ".packing", ".partition", ".pipelining", ".transformers")
)


def public_names() -> list[str]:
    """A line for each name of the modules, and for each public method and property of their classes."""
    found = []
    for module in map(importlib.import_module, MODULES):
        for name in sorted(module.__all__):
            value = getattr(module, name)
            origin = (
                value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", module.__name__)
            )
            path = f"{module.__name__}.{name}"
            found += described(path, value) if ours(origin) else [f"{path}: torch's own"]
    return found


def ours(module: str) -> bool:
    return module.split(".")[0] == "pipeline_ext"


def described(path: str, value: object) -> Iterator[str]:
    yield path + (parameters(value) if callable(value) else "")
    if not isinstance(value, type):
        return
    fields = getattr(value, "__dataclass_fields__", getattr(value, "_fields", ()))  # which are parameters, too
    for name in sorted(dir(value)):
        defined = any(name in vars(base) for base in value.__mro__ if ours(base.__module__))
        if defined and name not in fields and not name.startswith("_"):
            attribute = getattr(value, name)
            yield f"{path}.{name}" + (parameters(attribute) if callable(attribute) else "")


def parameters(value: object) -> str:
    """Names, kinds and defaults. Types are left out: each version of Python writes them in another way."""
    if getattr(value, "_is_protocol", False):
        return ""
    function = value.__init__ if isinstance(value, type) else value
    if (getattr(function, "__module__", None) or "").startswith("torch."):
        return ": torch's constructor"
    try:
        signature = inspect.signature(value)
    except ValueError:  # a class or function of the native core, or an exception that adds no parameters
        documented = (function.__doc__ or "").startswith(f"{function.__name__}(")
        return f"({of_docstring(function.__doc__)[0]})" if documented else "()"
    plain = [
        parameter.replace(annotation=inspect.Parameter.empty, default=shown(parameter.default))
        for parameter in signature.parameters.values()
    ]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def shown(default: object) -> object:
    """A default; Ellipsis for one that does not look the same in every run."""
    plain = default is inspect.Parameter.empty or isinstance(default, None | bool | int | float | str | tuple)
    return default if plain else ...


def test_public_names_are_those_of_the_record() -> None:
    changes = difflib.unified_diff(
        RECORD.read_text().splitlines(), public_names(), "recorded", "found", lineterm="", n=0
    )
    changed = "\n".join(changes)
    assert not changed, (
        f"public names have changed:\n{changed}\n"
        "If this is meant, say so in CHANGELOG.md and renew the record: python tests/test_public_names.py"
    )


def test_the_package_has_one_list_of_names() -> None:
    """What type checkers read, what is loaded on first use, the core's names and ``__all__`` agree."""
    tree = ast.parse(Path(pe.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    declared = {
        (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert declared == {(module, name) for name, module in pe._MODULE_OF.items()}
    assert {name for _, name in declared} | {"Plan", "Skip"} == set(pe.__all__)
    assert pe.__all__ == sorted(pe.__all__)


if __name__ == "__main__":
    RECORD.write_text("".join(f"{line}\n" for line in public_names()))
