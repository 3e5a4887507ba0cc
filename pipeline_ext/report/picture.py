"""Draws timelines with matplotlib, which is why it is imported only to draw."""

import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any, NamedTuple

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .. import _C
from ..plan.records import TaskRecord, lanes
from .colors import COLORS, NAMES, paleness
from .panel import Panel, percent

Color = tuple[float, float, float]

BUBBLE = "#EBEBEB"
INK = "#262626"
FAINT = "#6E6E6E"

# Inches. A picture is as wide as the text of a page.
WIDTH = 7.0
MARGIN = 0.04
HEADLINE = 0.22
TITLE = 0.24
AXIS = 0.40
BUBBLES = 0.46
ROW = 0.84  # of the distance between ranks

# Points.
HEADLINE_SIZE = 9
TITLE_SIZE = 8
LABEL_SIZE = 7.5
SMALL_SIZE = 6.5
NUMBER_SIZES = (7.0, 6.5, 6.0, 5.5, 5.0, 4.5)
NUMBER_PAD = 0.7  # on either side

STYLE = {
    "font.size": TITLE_SIZE,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.5,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 7,
    "xtick.major.size": 2.5,
    "xtick.major.width": 0.5,
    "ytick.labelcolor": INK,
    "ytick.labelsize": LABEL_SIZE,
    "ytick.major.size": 0,
    "pdf.fonttype": 42,  # many publishers refuse the other kind
}


def style() -> AbstractContextManager[None]:
    """Inside, the user's settings of matplotlib do not change the picture."""
    return matplotlib.style.context(STYLE, after_reset=True)


def figure(panels: Sequence[Panel], unit: str, units: float = 1.0) -> Figure:
    """The picture; arguments as in ``timeline.save_picture``."""
    most = max(panel.plan.num_ranks for panel in panels)
    row = min(0.30, max(0.14, 3.2 / most))
    left = MARGIN + _text_width(f"rank {most - 1}", LABEL_SIZE) / 72 + 0.06
    by_rank = any(len({percent(b) for b in panel.bubble_by_rank}) > 1 for panel in panels)
    width = WIDTH - left - (BUBBLES if by_rank else 2 * MARGIN)
    height = HEADLINE + sum(TITLE + row * panel.plan.num_ranks for panel in panels) + AXIS
    makespan = max(panel.makespan for panel in panels) or 1.0  # costs may all be zero

    picture = Figure(figsize=(WIDTH, height))
    middle = 1 - HEADLINE / 2 / height
    headline = _headline([panel.plan for panel in panels])
    picture.text(left / WIDTH, middle, headline, size=HEADLINE_SIZE, weight="bold", va="center")
    _add_legend(picture, panels, ((left + width) / WIDTH, middle))
    axes: list[Axes] = []
    bottom = height - HEADLINE
    for panel in panels:
        rows = row * panel.plan.num_ranks
        bottom -= TITLE + rows
        place = left / WIDTH, bottom / height, width / WIDTH, rows / height
        ax = picture.add_axes(place, sharex=axes[0] if axes else None)
        axes.append(ax)
        ax.set_xlim(0, makespan)
        ax.tick_params(labelbottom=panel is panels[-1])
        _draw(ax, panel, across=width * 72 / makespan, down=row * 72)
        if by_rank:
            _add_bubbles(ax, panel)
    ax = axes[-1]
    ax.set_xlabel(f"time ({unit})", labelpad=2)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda time, _: f"{time * units:g}"))
    if any(panel.plan.num_stages > panel.plan.num_ranks for panel in panels):
        picture.text(
            (left + width) / WIDTH,
            MARGIN / height,
            "paler: a rank's later stages",
            size=SMALL_SIZE,
            color=FAINT,
            ha="right",
            va="bottom",
        )
    return picture


def _headline(plans: Sequence[_C.Plan]) -> str:
    """What the plans have in common."""

    def count(numbers: set[int], one: str, more: str) -> str:
        return f"{max(numbers)} {one if max(numbers) == 1 else more}" if len(numbers) == 1 else ""

    stages = count({plan.num_stages for plan in plans}, "stage", "stages")
    ranks = count({plan.num_ranks for plan in plans}, "rank", "ranks")
    microbatches = count({plan.num_microbatches for plan in plans}, "microbatch", "microbatches")
    placed = " on ".join(filter(None, (stages, ranks)))
    return ", ".join(filter(None, (placed, microbatches)))


class Box(NamedTuple):
    """A task as drawn: time across, ranks down."""

    kind: str
    number: str
    begin: float
    end: float
    top: float
    bottom: float
    color: Color


def _draw(ax: Axes, panel: Panel, across: float, down: float) -> None:
    """Draws one panel; ``across``: points per unit of time, ``down``: points from rank to rank."""
    ranks = range(panel.plan.num_ranks)
    ax.set_ylim(panel.plan.num_ranks - 0.5, -0.5)
    ax.set_yticks(ranks, [f"rank {rank}" for rank in ranks])
    ax.set_title(panel.title, loc="left", size=TITLE_SIZE, pad=4)
    ax.barh(ranks, panel.makespan, height=ROW, color=BUBBLE)

    boxes = _boxes(panel.plan, panel.tasks)
    median = statistics.median(box.end - box.begin for box in boxes) * across
    rectangles = PolyCollection(
        [[(b.begin, b.top), (b.end, b.top), (b.end, b.bottom), (b.begin, b.bottom)] for b in boxes],
        facecolors=[box.color for box in boxes],
        edgecolors="white",
        linewidths=min(0.5, 0.15 * median),
    )
    rectangles.set_snap(False)  # with it, equal boxes could differ by a pixel
    ax.add_collection(rectangles, autolim=False)
    for kind in COLORS:
        _add_numbers(ax, [box for box in boxes if box.kind == kind], across, down)


def _boxes(plan: _C.Plan, tasks: Sequence[TaskRecord]) -> list[Box]:
    shades = _shades(plan)
    boxes = []
    for record, lane in zip(tasks, lanes(plan, tasks), strict=True):
        if record.kind not in COLORS:
            continue
        top = record.rank if lane == 2 else record.rank - ROW / 2
        bottom = record.rank if lane == 1 else record.rank + ROW / 2
        color = shades[record.kind, record.stage]
        number = str(record.microbatch)
        boxes.append(Box(record.kind, number, record.begin, record.end, top, bottom, color))
    return boxes


def _add_numbers(ax: Axes, boxes: Sequence[Box], across: float, down: float) -> None:
    """Writes the microbatch into each box of one kind where it fits, unless it does not fit into most."""
    for size in NUMBER_SIZES:
        fitting = [
            box
            for box in boxes
            if (box.end - box.begin) * across >= _text_width(box.number, size) + 2 * NUMBER_PAD
            and (box.bottom - box.top) * down >= 1.2 * size
        ]
        if len(fitting) >= 0.9 * len(boxes):
            break
    if 2 * len(fitting) < len(boxes):
        return
    for box in fitting:
        ax.text(
            (box.begin + box.end) / 2,
            (box.top + box.bottom) / 2,
            box.number,
            size=size,
            ha="center",
            va="center_baseline",
            color="white" if _lightness(box.color) < 0.55 else INK,
        )


def _add_bubbles(ax: Axes, panel: Panel) -> None:
    """The bubble of each rank, right of its row."""
    write = partial(
        ax.annotate,
        xycoords=ax.get_yaxis_transform(),
        textcoords="offset points",
        size=SMALL_SIZE,
        color=FAINT,
    )
    write("bubble", (1, -0.5), (4, 4))
    for rank, bubble in enumerate(panel.bubble_by_rank):
        write(percent(bubble), (1, rank), (4, 0), va="center_baseline")


def _shades(plan: _C.Plan) -> dict[tuple[str, int], Color]:
    """The colour of each kind and stage."""
    shades = {}
    for stage, share in enumerate(paleness(plan.rank_of_stage)):
        white = 0.34 * share  # little enough that in grey any F is darker than any B
        for kind, color in COLORS.items():
            red, green, blue = (part + white * (1 - part) for part in to_rgb(color))
            shades[kind, stage] = red, green, blue
    return shades


def _lightness(color: Color) -> float:
    red, green, blue = color
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _add_legend(picture: Figure, panels: Sequence[Panel], right: tuple[float, float]) -> None:
    """Names the kinds that occur, in the shades of the rank with the most stages."""
    present = {record.kind for panel in panels for record in panel.tasks}
    kinds = [kind for kind in COLORS if kind in present]
    plan = max((panel.plan for panel in panels), key=lambda plan: plan.num_stages)
    shades = _shades(plan)
    fullest = statistics.mode(plan.rank_of_stage)
    stages = [stage for stage, rank in enumerate(plan.rank_of_stage) if rank == fullest]
    # Any, because the stubs of matplotlib know no handle of several patches.
    swatches: list[Any] = [tuple(Patch(facecolor=shades[kind, stage]) for stage in stages) for kind in kinds]
    picture.legend(
        [*swatches, Patch(facecolor=BUBBLE)],
        [*(NAMES[kind] for kind in kinds), "bubble"],
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        loc="center right",
        bbox_to_anchor=right,
        ncols=len(kinds) + 1,
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.4,
        handletextpad=0.5,
        columnspacing=1.4,
        fontsize=LABEL_SIZE,
    )


@cache
def _text_width(text: str, size: float) -> float:
    """In points."""
    return text_to_path.get_text_width_height_descent(text, FontProperties(size=size), False)[0]
