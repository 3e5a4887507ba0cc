"""Hostile values: numbers at the edges, lists, texts, and orders that are nearly right."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from pipeline_ext import _C

EDGES = (
    -(2**63),
    -(2**31),
    -2,
    -1,
    0,
    1,
    2**15,
    2**31 - 2,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**63 - 1,
    10**30,
)
FLOATS = (0.0, -0.0, -1.0, 1e-320, 1e-9, 0.5, 1.0, 3.0, 1e9, 1e300, math.inf, -math.inf, math.nan)
KINDS = ("F", "B", "I", "W", "SEND_F", "RECV_F", "SEND_B", "RECV_B", "REDUCE_GRAD", "UNSHARD", "RESHARD")
JUNK = (None, True, "x", "\ud800", "\0", b"\xff", 1.5, -1, 10**30, [], [None], {}, object, (1, 2), math.nan)


def whole(r: random.Random, most: int = 9) -> int:
    """Mostly a small number; sometimes one at the edge of a type."""
    return r.choice(EDGES) if r.random() < 0.15 else r.randint(0, most)


def real(r: random.Random) -> float:
    return r.choice(FLOATS) if r.random() < 0.3 else r.random() * 4


def some(r: random.Random, make: Callable[[random.Random], Any], most: int = 6) -> list[Any]:
    return [make(r) for _ in range(r.randint(0, most))]


def exactly(r: random.Random, count: int, make: Callable[[random.Random], Any]) -> list[Any]:
    """A list of that length, or nearly."""
    return [make(r) for _ in range(max(0, count + r.choice((0, 0, 0, 0, 0, 0, -1, 1))))]


def junk(r: random.Random) -> Any:
    return r.choice(JUNK)


def schedule_name(r: random.Random) -> str:
    return r.choice((*_C.schedule_names(), *_C.schedule_names(), "", "zb-auto", "1f1b\0", "\ud800"))


def sizes(r: random.Random, name: str) -> tuple[int, int]:
    """Stages and ranks that fit a schedule."""
    ranks = r.randint(1, 4)
    if name == "dualpipe":
        ranks += ranks % 2
    layout = _C.layout_of(name)
    return ranks * {"v": 2, "looped": r.randint(1, 3)}.get(layout, 1), ranks


def rows(r: random.Random) -> list[list[str]]:
    """An order: one of a schedule, mostly with some harm done to it; or cells at random."""
    if r.random() < 0.2:
        return [[cell(r) for _ in range(r.randint(0, 8))] for _ in range(r.randint(0, 4))]
    name = r.choice(_C.schedule_names())
    plan = _C.make_plan(name, *sizes(r, name), r.randint(1, 6))
    found = list(plan.order().values())
    for _ in range(r.choice((0, 0, 1, 1, 2, 5))):
        row = r.choice(found)
        at = r.randrange(len(row)) if row else 0
        harm = r.randrange(6)
        if harm == 0:
            row.insert(at, cell(r))
        elif harm == 1 and row:
            del row[at]
        elif harm == 2 and row:
            other = r.randrange(len(row))
            row[at], row[other] = row[other], row[at]
        elif harm == 3 and row:
            row[at] = cell(r)
        elif harm == 4 and row:
            r.choice(found).append(row[at])
        elif harm == 5:
            found.append([])
    return found


def cell(r: random.Random) -> str:
    """The text of an action, or something like it."""
    kind = r.random()
    if kind < 0.05:
        return r.choice(
            ("", " ", "F", "0", "(", "()", "(0F0", "0F0;", "\0", "é" * 40, "0" * 70, "0F-1", "-1F0", "0f0")
        )
    if kind < 0.15:
        return "(" + ";".join(cell(r) for _ in range(r.randint(0, 4))) + ")OVERLAP_F_B"
    return f"{whole(r, 3)}{r.choice(KINDS)}{'' if r.random() < 0.2 else whole(r, 3)}"


def csv(r: random.Random) -> str:
    """A file of an order, sometimes with bytes changed."""
    return csv_of(r, rows(r))


def csv_of(r: random.Random, order: list[list[str]]) -> str:
    return harmed(r, "\n".join(map(",".join, order)) + r.choice(("", "\n", "\n\n", "\r\n")))


def harmed(r: random.Random, text: str) -> str:
    """The text with parts changed, doubled or cut off."""
    for _ in range(r.choice((0, 0, 1, 3))):
        at, end = sorted((r.randint(0, len(text)), r.randint(0, len(text))))
        text = r.choice(
            (
                text[:at] + r.choice(',;()0123456789FBIW\n\r\t\0é\ud800[]{}"-.eE') + text[at:],
                text[:at] + text[end:],
                text[:end] + text[at:],
                text[:at],
            )
        )
    return text


def one_of(r: random.Random, values: Sequence[Any]) -> Any:
    return r.choice(values)
