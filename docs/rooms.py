"""Draws which folder of the package imports which, and lists the folders in docs/architecture.md.

Both come from the files themselves: from all imports, also lazy ones and those under TYPE_CHECKING, and from the
first line of each docstring. A folder or module directly under ``pipeline_ext`` is a room, and so is the native
core. Run ``python docs/rooms.py``; ``--check`` only tells whether picture and list are current.
"""

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pipeline_ext"
PICTURE = ROOT / "docs" / "rooms.svg"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- rooms: made by docs/rooms.py -->\n", "<!-- end of rooms -->\n"

CORE = "csrc"
CELL, MARGIN = 26, 120  # pixels
STYLE = """
svg { --ink: #24292f; --paper: #ffffff; --faint: #d8dee4; }
@media (prefers-color-scheme: dark) { svg { --ink: #d0d7de; --paper: #161b22; --faint: #30363d; } }
text { font: 12px sans-serif; fill: var(--ink); text-anchor: end; dominant-baseline: central; }
path { stroke: var(--faint); fill: none; }
.paper { fill: var(--paper); }
.folder { fill: #2f81f7; } .module { fill: #8b949e; } .core { fill: #e08a1e; }
.down { fill: var(--ink); } .up { fill: #cf222e; }
"""


def arrows() -> dict[str, set[str]]:
    """Each room, and the rooms that it imports."""
    found: dict[str, set[str]] = {CORE: set()}
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE)
        room = inside.parts[0].removesuffix(".py")
        if room in ("__init__", "__main__"):
            continue
        imported = {_room(name) for name in _imports(path, ("pipeline_ext", *inside.parent.parts))}
        found.setdefault(room, set()).update(imported - {room, None})
    return found


def _imports(path: Path, package: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """What a file imports of the package, as the parts of each dotted name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (tuple(name.name.split(".")) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            yield from ((*module, name.name) for name in node.names)


def _room(name: tuple[str, ...]) -> str | None:
    if name[0] != "pipeline_ext" or len(name) < 2:
        return None
    if name[1] == "_C":
        return CORE
    return name[1] if (PACKAGE / name[1]).is_dir() or (PACKAGE / f"{name[1]}.py").exists() else None


def in_order(found: dict[str, set[str]]) -> list[str]:
    """The rooms, each above those it imports, as far as there is no circle."""
    order: list[str] = []
    left = set(found)
    while left:
        importers = {room: sum(room in found[other] for other in left) for room in left}
        order.append(min(left, key=lambda room: (importers[room], -len(_below(room, found)), room)))
        left.remove(order[-1])
    return order


def _below(room: str, found: dict[str, set[str]]) -> set[str]:
    """All that a room imports, and what those import."""
    seen: set[str] = set()
    ahead = [room]
    while ahead:
        new = found[ahead.pop()] - seen
        seen |= new
        ahead += new
    return seen


def picture() -> str:
    """A staircase of rooms: a dot right of one and above another is an import of the second by the first."""
    found = arrows()
    order = in_order(found)
    where = {room: (MARGIN + i * CELL + CELL // 2, i * CELL + CELL) for i, room in enumerate(order)}
    side = len(order) * CELL
    lines: list[str] = []
    dots: list[str] = []
    for room, imported in found.items():
        x, y = where[room]
        for other in sorted(imported, key=order.index):
            across, down = where[other]
            lines.append(f'<path d="M{x} {y}H{across}V{down}"/>')
            kind = "down" if down > y else "up"
            dots.append(f'<circle class="{kind}" cx="{across}" cy="{y}" r="4"/>')
    boxes: list[str] = []
    for room, (x, y) in where.items():
        kind = "core" if room == CORE else "folder" if (PACKAGE / room).is_dir() else "module"
        boxes.append(f'<rect class="{kind}" x="{x - 7}" y="{y - 7}" width="14" height="14" rx="3"/>')
        boxes.append(f'<text x="{x - 12}" y="{y}">{room}</text>')
    width, height = MARGIN + side + 8, side + CELL
    size = f'width="{width}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {size}>'
    paper = f'<rect class="paper" {size} rx="6"/>'
    return "\n".join([head, f"<style>{STYLE}</style>", paper, *lines, *dots, *boxes, "</svg>", ""])


def page() -> str:
    """The text of docs/architecture.md with its list of rooms made anew."""
    lines = ["", "| room | what happens there |", "|---|---|"]
    for room in in_order(arrows()):
        if room == CORE:
            lines.append(f"| `{CORE}/` | the native core, as the module `_C` |")
            continue
        folder = PACKAGE / room
        file = folder / "__init__.py" if folder.is_dir() else PACKAGE / f"{room}.py"
        docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
        name = f"{room}/" if folder.is_dir() else f"{room}.py"
        lines.append(f"| `{name}` | {docstring.partition(chr(10))[0].replace('``', '`').replace('|', '/')} |")
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return before + BEGIN + "\n".join([*lines, "", END]) + rest.partition(END)[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if they differ")
    options = parser.parse_args()
    made = {PICTURE: picture(), PAGE: page()}
    stale = [path.name for path, text in made.items() if not path.exists() or path.read_text() != text]
    if options.check:
        sys.exit(f"not of the package as it is: {', '.join(stale)}; run docs/rooms.py" if stale else 0)
    for path, text in made.items():
        path.write_text(text)


if __name__ == "__main__":
    main()
