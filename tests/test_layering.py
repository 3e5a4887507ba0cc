"""Folders of the package form layers: each imports only from the layers below its own."""

import ast
import functools
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "pipeline_ext"

# From the top down. A folder may import what stands below it; files of one folder may import one another.
LAYERS = (
    "__main__",
    "cli",
    "lm",
    "pipelining",
    "__init__",
    "transformers",
    "hf",
    "pipeline",
    "assemble",
    "partition",
    "settings",
    "step",
    "checkpoint",
    "engines",
    "reduction",
    "calls",
    "stages",
    "microbatches",
    "transport",
    "report",
    "plan",
    "packing",
    "processes",
    "model",
    "base",
    "errors",
    "_C",
)


@functools.cache
def modules(package: Path) -> dict[str, Path]:
    """Module name -> its file, without the package's own name."""
    files = {path.relative_to(package).with_suffix(""): path for path in package.rglob("*.py")}
    return {".".join(name.parts): path for name, path in files.items()} | {"_C": package / "_C.pyi"}


def imports(package: Path, name: str, path: Path) -> Iterator[tuple[str, int]]:
    """The modules of the package that a file imports, wherever in it that stands, with the line."""
    known = modules(package)
    here = [package.name, *name.split(".")[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) + 1 - node.level] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            found = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for parts in found:
            if parts[0] != package.name:
                continue
            while (
                parts[1:]
                and ".".join(parts[1:]) not in known
                and f"{'.'.join(parts[1:])}.__init__" not in known
            ):
                parts = parts[:-1]  # a name in a module
            target = ".".join(parts[1:]) or "__init__"
            yield (target if target in known else f"{target}.__init__"), node.lineno


def layer(name: str) -> str:
    return name.split(".")[0]


def upward(package: Path, layers: tuple[str, ...] = LAYERS) -> list[str]:
    """Every import that does not lead to a lower layer, for people."""
    found = []
    for name, path in modules(package).items():
        for target, line in imports(package, name, path) if path.suffix == ".py" else ():
            own, other = layer(name), layer(target)
            if own != other and layers.index(own) >= layers.index(other):
                found.append(f"{path.relative_to(package.parent)}:{line}: {own} may not import {other}")
    return found


def circles(package: Path) -> list[list[str]]:
    """Circles of imports between files."""
    graph: dict[str, set[str]] = defaultdict(set)
    for name, path in modules(package).items():
        if path.suffix == ".py":
            graph[name] = {target for target, _ in imports(package, name, path) if target != name}
    while leaves := [name for name in graph if not graph[name] & graph.keys()]:
        for name in leaves:
            del graph[name]
    return [sorted(graph)] if graph else []


def test_every_folder_has_its_layer() -> None:
    assert {layer(name) for name in modules(PACKAGE)} <= set(LAYERS)


def test_imports_point_down() -> None:
    assert not upward(PACKAGE), "\n".join(upward(PACKAGE))


def test_files_import_one_another_in_no_circle() -> None:
    assert circles(PACKAGE) == []


def test_an_import_upward_is_seen_wherever_it_stands(tmp_path: Path) -> None:
    package = tmp_path / "package"
    for folder in ("low", "high"):
        (package / folder).mkdir(parents=True)
        (package / folder / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "high" / "top.py").write_text("from ..low import bottom\n")
    planted = {
        "from ..high import top\n": 1,
        "from ..high.top import name\n": 1,
        "import package.high.top\n": 1,
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..high.top import name\n": 3,
        "def f():\n    from package.high import top\n": 2,
    }
    for text, line in planted.items():
        (package / "low" / "bottom.py").write_text(text)
        found = upward(package, ("__init__", "high", "low", "_C"))
        assert found == [f"package/low/bottom.py:{line}: low may not import high"]
        assert circles(package) == [["high.top", "low.bottom"]]
