"""Draws which folder of the package imports which, and lists the folders in docs/architecture.md.

Both come from the files: from their imports, as tests/test_layering.py reads them, and from the first line of
each docstring. Run ``python docs/rooms.py``; ``--check`` only tells whether picture and list are current.
"""

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from test_layering import LAYERS, PACKAGE, imports, layer, modules  # noqa: E402

PICTURE = ROOT / "docs" / "rooms.svg"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- rooms: made by docs/rooms.py -->\n", "<!-- end of rooms -->\n"

CORE, CORE_NAME = "_C", "csrc"
NOT_ROOMS = ("__init__", "__main__")
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
    """Each room, from the top down, and the rooms that it imports."""
    found: dict[str, set[str]] = {}
    for name, path in modules(PACKAGE).items():
        targets = imports(PACKAGE, name, path) if path.suffix == ".py" else ()
        found.setdefault(layer(name), set()).update(layer(target) for target, _ in targets)
    rooms = [room for room in LAYERS if room in found and room not in NOT_ROOMS]
    return {room: found[room] & set(rooms) - {room} for room in rooms}


def picture() -> str:
    """A staircase of rooms: a dot right of one and above another is an import of the second by the first."""
    found = arrows()
    where = {room: (MARGIN + i * CELL + CELL // 2, i * CELL + CELL) for i, room in enumerate(found)}
    lines: list[str] = []
    dots: list[str] = []
    boxes: list[str] = []
    for room, (x, y) in where.items():
        for across, down in sorted(where[other] for other in found[room]):
            lines.append(f'<path d="M{x} {y}H{across}V{down}"/>')
            dots.append(f'<circle class="{"down" if down > y else "up"}" cx="{across}" cy="{y}" r="4"/>')
        kind = "core" if room == CORE else "folder" if (PACKAGE / room).is_dir() else "module"
        boxes.append(f'<rect class="{kind}" x="{x - 7}" y="{y - 7}" width="14" height="14" rx="3"/>')
        boxes.append(f'<text x="{x - 12}" y="{y}">{CORE_NAME if room == CORE else room}</text>')
    width, height = MARGIN + len(found) * CELL + 8, (len(found) + 1) * CELL
    size = f'width="{width}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {size}>'
    paper = f'<rect class="paper" {size} rx="6"/>'
    return "\n".join([head, f"<style>{STYLE}</style>", paper, *lines, *dots, *boxes, "</svg>", ""])


def page() -> str:
    """The text of docs/architecture.md with its list of rooms made anew."""
    lines = ["", "| room | what happens there |", "|---|---|"]
    for room in arrows():
        if room == CORE:
            lines.append(f"| `{CORE_NAME}/` | The native core, as the module `{CORE}`. |")
            continue
        is_folder = (PACKAGE / room).is_dir()
        file = PACKAGE / (f"{room}/__init__.py" if is_folder else f"{room}.py")
        docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
        what = docstring.partition("\n")[0].replace("``", "`").replace("|", "/")
        lines.append(f"| `{room}{'/' if is_folder else '.py'}` | {what} |")
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
