"""Charts of the figures in bench/results: a dot is the median, a line reaches from the least to the largest."""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# Colours of a light and of a dark reader: a viewer takes the second where it prefers dark.
INK, PAPER, FAINT = ("#24292f", "#d0d7de"), ("#ffffff", "#161b22"), ("#d8dee4", "#30363d")
OURS, PEER, THIRD, FOURTH = "#2f81f7", "#e08a1e", "#2da44e", "#a371f7"
WIDTH = 7.6  # inches
TORCH = "torch.distributed.pipelining"

Spread = Mapping[str, float]

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pipeline_ext",
    "font.size": 9,
    "text.color": INK[0],
    "axes.labelcolor": INK[0],
    "axes.edgecolor": FAINT[0],
    "xtick.color": INK[0],
    "ytick.color": INK[0],
    "axes.facecolor": "none",
    "figure.facecolor": PAPER[0],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT[0],
    "grid.linewidth": 0.6,
}


def cpu_step(results: dict) -> Figure:
    rows = [row for row in results["rows"] if "share_of_ideal" in row]
    panels = {}
    for schedule in ("1f1b", "gpipe"):
        case = panels[{"1f1b": "1F1B", "gpipe": "GPipe"}[schedule]] = {}
        for row in rows:
            if row["schedule"].lower() == schedule:
                name = TORCH if row["engine"] == "torch" else "pipeline_ext"
                case.setdefault(_size(row), {})[name] = row["share_of_ideal"]
    figure = _dots(panels, {"pipeline_ext": OURS, TORCH: PEER}, "share of the ideal speed-up")
    for axes in figure.axes:
        axes.set_xlim(0, 1.2)
    return figure


def dist_step(results: dict) -> Figure:
    panels: dict[str, dict] = {}
    for row in results["rows"]:
        if "faster_than_torch" in row and row["engine"] in ("Pipeline", "drop-in"):
            panel = panels.setdefault(row["model"], {})
            name = f"{row['schedule']}, M = {row['microbatches']}"
            panel.setdefault(name, {})[row["engine"]] = row["faster_than_torch"]
    return _dots(panels, {"Pipeline": OURS, "drop-in": THIRD}, f"faster than {TORCH} by the factor")


def overlap_dp(results: dict) -> Figure:
    names = {"Pipeline": "pipeline_ext", "torch": "torch"}
    colours = dict(zip(("during the step", "after it"), (OURS, THIRD)))
    panels: dict[str, dict] = {}
    for row in results["rows"]:
        panel = panels.setdefault(f"compute: {row['case']}", {})
        spreads = {
            "during the step": row["during_ms"],
            "after it": row["after_ms"],
            "not at all": row["none_ms"],
        }
        panel[f"{row['schedule']}, {names[row['engine']]}"] = spreads
    return _dots(panels, colours | {"not at all": PEER}, "a step, its gradients reduced, ms", line=None)


def dispatch(results: dict) -> Figure:
    rows = {row["contender"]: {"": row["overhead_us"]} for row in results["rows"]}
    label = "time of an action above the eager compute, microseconds"
    return _dots({"": rows}, lambda name: {"": PEER if name.startswith("torch") else OURS}, label, line=0)


def simulate(results: dict) -> Figure:
    figure, (left, right) = _panels(2, 2.6)
    colours = {"zbv": OURS, "1f1b": THIRD, "1f1b, reactive": FOURTH, "interleaved-1f1b": PEER}
    by_plan: dict[str, list] = {}
    for row in results["rows"]:
        by_plan.setdefault(row["schedule"] + (", reactive" if row["reactive"] else ""), []).append(row)
    for name, rows in by_plan.items():
        _line(left, [r["tasks"] for r in rows], [r["nanoseconds_per_task"] for r in rows], colours[name], name)
    left.set(title="plan and simulate, ns a task", xlabel="tasks", xscale="log")
    left.set_ylim(0, 1.5 * left.get_ylim()[1])  # room for the legend
    left.legend(fontsize=8, loc="upper left")
    tasks = [row["tasks"] for row in results["peers"]]
    for key, colour, name in (
        ("plan_faster_by", THIRD, "planning alone"),
        ("faster_by", OURS, "planning and simulating"),
    ):
        _line(right, tasks, [row[key] for row in results["peers"]], colour, name)
    right.set(title="zbv: faster than torch by the factor", xlabel="tasks", xscale="log", yscale="log")
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    right.legend(fontsize=8)
    return figure


def reaction(results: dict) -> Figure:
    rows: dict[str, dict] = {}
    for row in results["rows"]:
        name = row["schedule"] + ("" if row["slots"] == 1 else f", {row['slots']} times its slots")
        error = row["ratio_standard_error"]
        spread = {"min": row["ratio"] - error, "median": row["ratio"], "max": row["ratio"] + error}
        rows.setdefault(name, {})[f"{row['ranks']} ranks"] = spread
    names = list(next(iter(rows.values())))
    label = "makespan of reactive ranks over that of the planned order; lines: the standard error"
    return _dots({"": rows}, dict(zip(names, (OURS, THIRD, FOURTH))), label)


def planner_quality(results: dict) -> Figure:
    kinds = (
        "ours is lower, and no order is better",
        "ours is lower",
        "equal, and no order is better",
        "equal",
        "ours is higher",
    )
    counts: dict[str, dict[str, int]] = {}
    for row in results["rows"]:
        of_method = counts.setdefault(row["method"].partition(",")[0], dict.fromkeys(kinds, 0))
        of_method[_beside(row, kinds)] += 1
    figure, (axes,) = _panels(1, 0.26 * len(counts) + 1.0)
    for kind, colour in zip(kinds, (THIRD, "#8fd19e", OURS, "#a9ccf8", "#cf222e")):
        widths = [by_kind[kind] for by_kind in counts.values()]
        if not any(widths):
            continue
        lefts = [sum(by_kind[k] for k in kinds[: kinds.index(kind)]) for by_kind in counts.values()]
        axes.barh(list(counts), widths, left=lefts, color=colour, height=0.65, label=kind)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("published figures of a method, by how ours compares")
    _legend(figure, axes)
    return figure


def pack(results: dict) -> Figure:
    rows: dict[str, dict] = {}
    by_case: dict[tuple, list] = {}
    for row in results["rows"]:
        if row["contender"] in results["peers"]:
            types = row["dtype"] if row["dtype"] == row["wire"] else f"{row['dtype']} as {row['wire']}"
            by_case.setdefault((row["tensors"], row["bytes"], types), []).append(row["ours_is_faster_by"])
    for (count, nbytes, types), faster in by_case.items():
        size = f"{nbytes} B" if nbytes < 1024 else f"{nbytes >> 10} KiB"
        rows.setdefault(f"{count} x {size}", {})[types] = min(faster, key=lambda spread: spread["median"])
    names = list(next(iter(rows.values())))
    return _dots(
        {"": rows},
        dict(zip(names, (OURS, THIRD, FOURTH, PEER))),
        "faster than the best other way by the factor",
    )


def k_tradeoff(results: dict) -> Figure:
    cases: dict[str, list] = {}
    for row in results["rows"]:
        cases.setdefault(row["case"], []).append(row)
    figure, panels = _panels(len(cases), 2.9)
    for axes, (case, rows) in zip(panels, cases.items()):
        for row, colour in zip(rows, (OURS, THIRD, PEER, FOURTH)):
            at = [by_k for by_k in row["by_k"] if by_k["k"] != "auto"]
            ks = [by_k["k"] for by_k in at]
            _line(
                axes, ks, [by_k["step_ms"] for by_k in at], colour, f"{row['overhead_share_of_f']:.0%} of an F"
            )
            axes.plot(ks, [by_k["predicted_ms"] for by_k in at], "--", color=colour, linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(title=case, xlabel="K", ylim=(0, None))
    panels[0].set_ylabel("a step, ms; dashed: predicted")
    panels[0].legend(title="a message costs", fontsize=8, loc="upper left")
    return figure


def recompute(results: dict) -> Figure:
    rows = {}
    for row in results["rows"]:
        times = row["milliseconds"]
        name = f"width {row['width']}" + (", checkpointed" if row["recomputed"] else "")
        rows[name] = {key: times[key] for key in ("pipeline_ext", TORCH)}
    return _dots({"": rows}, {"pipeline_ext": OURS, TORCH: PEER}, "I and W of a stage, ms", log=True, line=None)


CHARTS: dict[str, Callable[[dict], Figure]] = {
    "cpu_step": cpu_step,
    "dist_step": dist_step,
    "overlap_dp": overlap_dp,
    "dispatch": dispatch,
    "simulate": simulate,
    "reaction": reaction,
    "planner_quality": planner_quality,
    "pack": pack,
    "k_tradeoff": k_tradeoff,
    "recompute": recompute,
}


def svg(name: str, results: dict, source: str) -> str:
    """A chart as SVG text that is the same for the same figures; ``source`` is kept in it."""
    with matplotlib.rc_context(STYLE):
        figure = CHARTS[name](results)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Description": source})
    return _for_light_and_dark(text.getvalue())


def _for_light_and_dark(text: str) -> str:
    variables = {"ink": INK, "paper": PAPER, "faint": FAINT}
    for name, (light, _) in variables.items():
        text = text.replace(light, f"var(--{name}, {light})")
    dark = "".join(f"--{name}:{colours[1]};" for name, colours in variables.items())
    rules = f"@media (prefers-color-scheme:dark){{svg{{{dark}}}}}text{{font-family:sans-serif!important}}"
    return text.replace("<defs>", f"<style>{rules}</style>\n <defs>", 1)


def _size(row: dict) -> str:
    return f"{row['model']}, M = {row['microbatches']}"


def _beside(row: dict, kinds: Sequence[str]) -> str:
    """Which of ``kinds`` holds, to the digits that were published."""
    digits = len(f"{row['published']:.6g}".partition(".")[2])
    tolerance = 0.51 * 10**-digits
    best = row["lower_bound"] is not None and row["ours"] <= row["lower_bound"] + 1e-6
    if row["ours"] < row["published"] - tolerance:
        return kinds[0 if best else 1]
    if row["ours"] <= row["published"] + tolerance:
        return kinds[2 if best else 3]
    return kinds[4]


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _dots(
    panels: Mapping[str, Mapping[str, Mapping[str, Spread]]],
    colours: Mapping[str, str] | Callable[[str], Mapping[str, str]],
    label: str,
    *,
    log: bool = False,
    line: float | None = 1,
) -> Figure:
    """Rows of spreads, one below the other, by panel, row and series; ``line`` is where ours is the other."""
    most = max(map(len, panels.values()))
    series = 1 if callable(colours) else len(colours)
    figure, all_axes = _panels(len(panels), most * (0.16 + 0.13 * series) + 0.95)
    for axes, (title, rows) in zip(all_axes, panels.items()):
        for y, (name, spreads) in enumerate(rows.items()):
            of_row = colours(name) if callable(colours) else colours
            for position, (key, colour) in enumerate(of_row.items()):
                if key in spreads:
                    spread = spreads[key]
                    at = y + (position - (len(of_row) - 1) / 2) * 0.7 / max(len(of_row), 2)
                    axes.plot([spread["min"], spread["max"]], [at, at], color=colour, linewidth=2, alpha=0.55)
                    first = key if y == 0 and key else None
                    axes.plot(spread["median"], at, "o", color=colour, markersize=5, label=first)
        axes.set_yticks(
            range(len(rows)), list(rows) if axes is all_axes[0] or not _same(panels) else [""] * len(rows)
        )
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_title(title)
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        if line is not None:
            axes.axvline(line, color=INK[0], linewidth=0.8, linestyle=(0, (3, 3)))
    figure.supxlabel(label, fontsize=9)
    if series > 1:
        _legend(figure, all_axes[0])
    return figure


def _same(panels: Mapping[str, Iterable[str]]) -> bool:
    """Whether all panels have the same rows, so that they are named once."""
    first, *others = (list(rows) for rows in panels.values())
    return all(rows == first for rows in others)


def _line(axes: Axes, x: Sequence[float], spreads: Sequence[Spread], colour: str, name: str) -> None:
    axes.plot(x, [spread["median"] for spread in spreads], "o-", color=colour, markersize=4, label=name)
    least, most = ([spread[key] for spread in spreads] for key in ("min", "max"))
    axes.fill_between(x, least, most, color=colour, alpha=0.18, linewidth=0)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", ncols=len(labels) if len(labels) < 4 else 2, fontsize=9
    )
