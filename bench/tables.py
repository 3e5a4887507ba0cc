"""Writes the figures of bench/results as tables, between the comments that mark them in docs, and as charts.

``python bench/tables.py --check`` only tells whether the pages and charts have them already.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
CHARTS = ROOT / "docs" / "charts"


def cpu_step(results: dict) -> list[str]:
    by_case: dict[tuple, dict] = {}
    for row in results["rows"]:
        case = by_case.setdefault((row["model"], row["microbatches"]), {})
        case[row["engine"], row["schedule"].lower()] = row
    names = {"ours": "pipeline_ext", "torch": "torch.distributed.pipelining"}
    lines = [
        "| model | M | | 1F1B, share of ideal | GPipe, share of ideal | interleaved 1F1B, speed-up "
        "| ZBV, speed-up |",
        "|---|---|---|---|---|---|---|",
    ]
    for (model, microbatches), case in by_case.items():
        columns = {
            "ours": ("1f1b", "gpipe", "interleaved-1f1b", None),
            "torch": ("1f1b", "gpipe", "interleaved1f1b", "zbvzerobubble"),
        }
        for engine, schedules in columns.items():
            cells = []
            for schedule in schedules:
                row = case.get(("pipeline_ext" if engine == "ours" else engine, schedule))
                if row is None:
                    cells.append("")
                elif "share_of_ideal" in row:
                    cells.append(_spread(row["share_of_ideal"]))
                else:
                    cells.append(_spread(row["speedup"]))
            lines.append(f"| {model} | {microbatches} | {names[engine]} | {' | '.join(cells)} |")
    return lines


def dist_step(results: dict) -> list[str]:
    by_case: dict[tuple, dict] = {}
    for row in results["rows"]:
        if row["schedule"]:
            case = by_case.setdefault((row["model"], row["microbatches"], row["schedule"]), {})
            case[row["engine"]] = row
    lines = [
        "| model | M | schedule | | Pipeline | drop-in | torch | Pipeline faster by | drop-in faster by "
        "| promised over measured |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (model, microbatches, schedule), engines in by_case.items():
        figure = "share_of_ideal" if "share_of_ideal" in engines["torch"] else "speedup"
        cells = [_spread(engines[engine][figure]) for engine in ("Pipeline", "drop-in", "torch")]
        cells += [_spread(engines[engine]["faster_than_torch"]) for engine in ("Pipeline", "drop-in")]
        cells.append(_spread(engines["Pipeline"]["promised_over_measured"]))
        kind = "of ideal" if figure == "share_of_ideal" else "speed-up"
        lines.append(f"| {model} | {microbatches} | {schedule} | {kind} | {' | '.join(cells)} |")
    lines += ["", "| model | M | two processes that exchange nothing, speed-up |", "|---|---|---|"]
    for row in results["rows"]:
        if row["engine"] == "apart":
            lines.append(f"| {row['model']} | {row['microbatches']} | {_spread(row['speedup'])} |")
    return lines


def overlap_dp(results: dict) -> list[str]:
    lines = [
        "| compute | schedule | | reduced during the step, ms | after it | not at all | promised, not at all "
        "| hidden by the traces |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        cells = [_spread(row[f"{way}_ms"], ".0f") for way in ("during", "after", "none")]
        cells.append(_spread(row["promised_ms"], ".0f") if "promised_ms" in row else "")
        cells.append(_spread(row["hidden_by_trace"]) if "hidden_by_trace" in row else "")
        lines.append(f"| {row['case']} | {row['schedule']} | {row['engine']} | {' | '.join(cells)} |")
    return lines


def dispatch(results: dict) -> list[str]:
    lines = ["| | step, us | an action above the eager compute, us |", "|---|---|---|"]
    lines.append(f"| the eager calls alone | {_spread(results['eager_step_us'], '.0f')} | |")
    for row in results["rows"]:
        step, overhead = _spread(row["step_us"], ".0f"), _spread(row["overhead_us"], ".0f")
        lines.append(f"| {row['contender']} | {step} | {overhead} |")
    return lines


def simulate(results: dict) -> list[str]:
    lines = [
        "| plan | ranks | tasks | planned in, s | simulated in, s | both, ns a task | most memory, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        name = row["schedule"] + (", reactive" if row["reactive"] else "")
        lines.append(
            f"| {name} | {row['ranks']:,} | {row['tasks']:,} | {_spread(row['plan_seconds'], '.3f')} | "
            f"{_spread(row['simulate_seconds'], '.3f')} | {_spread(row['nanoseconds_per_task'], '.0f')} | "
            f"{row['peak_rss_gib']:.2f} |"
        )
    lines += [
        "",
        "| | ranks | tasks | torch, s | ours faster by | planning alone faster by |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["peers"]:
        lines.append(
            f"| {row['schedule']} | {row['ranks']} | {row['tasks']:,} | "
            f"{_spread(row['torch_seconds'], '.3f')} | {_spread(row['faster_by'], '.0f')} | "
            f"{_spread(row['plan_faster_by'], '.0f')} |"
        )
    return lines


def reaction(results: dict) -> list[str]:
    by_case: dict[tuple, dict[int, dict]] = {}
    for row in results["rows"]:
        by_case.setdefault((row["schedule"], row["slots"]), {})[row["ranks"]] = row
    columns = list(next(iter(by_case.values())))
    lines = [
        f"| schedule | {' | '.join(f'{ranks} ranks' for ranks in columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for (schedule, slots), case in by_case.items():
        name = schedule if slots == 1 else f"{schedule}, {slots} times its slots"
        cells = [
            f"{row['static']:.1f} -> {row['reactive']:.1f}: {row['ratio']:.3f} "
            f"± {row['ratio_standard_error']:.3f}"
            for row in case.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def variability(results: dict) -> list[str]:
    lines = [
        "| times | schedule | | step, ms | faster than static | faster than torch | promised over measured "
        "| bound over measured |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        figures = ("faster_than_static", "faster_than_torch", "promised_over_measured", "bound_over_measured")
        cells = [
            _spread(row["step_ms"], ".0f"),
            *(_spread(row[name]) if name in row else "" for name in figures),
        ]
        place = f"{row['scenario']} | {row['schedule']} | {row['engine']}"
        lines.append(f"| {place} | {' | '.join(cells)} |")
    return lines


def planner_quality(results: dict) -> list[str]:
    lines = ["| | schedule | published | ours | no order below |", "|---|---|---|---|---|"]
    for row in results["rows"]:
        bound = "" if row["lower_bound"] is None else f"{row['lower_bound']:.6f}"
        lines.append(
            f"| {row['case']} | {row['method']} | {row['published']:.6g} | {row['ours']:.6f} | {bound} |"
        )
    return lines


def pack(results: dict) -> list[str]:
    by_case: dict[tuple, dict] = {}
    for row in results["rows"]:
        case = by_case.setdefault((row["tensors"], row["bytes"], row["mode"]), {})
        types = row["dtype"] if row["dtype"] == row["wire"] else f"{row['dtype']} as {row['wire']}"
        case.setdefault(types, {})[row["contender"]] = row
    columns = next(iter(by_case.values()))
    lines = [f"| tensors | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for (count, nbytes, mode), case in by_case.items():
        cells = []
        for rows in case.values():
            speed = rows[results["ours"]]["gigabytes_per_second"]["median"]
            share = rows[results["ceiling"]]["ours_is_faster_by"]["median"]
            faster = [rows[name]["ours_is_faster_by"] for name in results["peers"] if name in rows]
            least = _spread(min(faster, key=lambda ratio: ratio["median"]))
            cells.append(f"{speed:.0f} GB/s, {share:.2f}; {least}")
        size = f"{nbytes} B" if nbytes < 1024 else f"{nbytes >> 10} KiB"
        name = f"{count} x {size}" + (", captured" if mode == "captured" else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def k_tradeoff(results: dict) -> list[str]:
    ks = [by_k["k"] for by_k in results["rows"][0]["by_k"] if by_k["k"] != "auto"]
    columns = " | ".join(f"K = {k}" for k in ks)
    lines = [
        f'| ranks | a message costs | {columns} | pack="auto" takes | over the best K |',
        "|---" * (len(ks) + 4) + "|",
    ]
    for row in results["rows"]:
        *by_k, _ = row["by_k"]
        cells = [f"{at['step_ms']['median']:.0f} ({at['predicted_ms']:.0f})" for at in by_k]
        chosen = sorted(set(row["chosen"]))
        taken = f"K = {chosen[0]}" if len(chosen) == 1 else f"K = {row['chosen']} by boundary"
        over = f"{_spread(row['chosen_over_best'])} of K = {row['best_k']}"
        share = f"{row['overhead_share_of_f']:.0%} of an F"
        lines.append(f"| {row['case']} | {share} | {' | '.join(cells)} | {taken} | {over} |")
    return lines


def recompute(results: dict) -> list[str]:
    peer = "torch.distributed.pipelining"
    lines = [
        "| width | checkpointed | a layer is recomputed: ours, torch's | ours, ms | torch's, ms "
        "| ours faster by |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        times, counts = row["milliseconds"], row["recomputations_of_a_layer"]
        recomputed = f"{counts['pipeline_ext']:g}, {counts[peer]:g}" if row["recomputed"] else ""
        lines.append(
            f"| {row['width']} | {'yes' if row['recomputed'] else 'no'} | {recomputed} | "
            f"{_spread(times['pipeline_ext'], '.1f')} | {_spread(times[peer], '.1f')} | "
            f"{_spread(row['ours_is_faster_by'][peer])} |"
        )
    return lines


def torchtitan_step(results: dict) -> list[str]:
    ours, torch = "pipeline_ext.pipelining", "torch.distributed.pipelining"
    lines = ["| schedule | | ours, ms | torch's, ms | ours faster by |", "|---|---|---|---|---|"]
    for row in results["rows"]:
        times = row["step_ms"]
        theirs = _spread(times[torch], ".0f") if torch in times else "refused"
        faster = _spread(row["faster_than_torch"]) if "faster_than_torch" in row else ""
        lines.append(
            f"| {row['schedule']} | {row['wrap']} | {_spread(times[ours], '.0f')} | {theirs} | {faster} |"
        )
    return lines


def any_model(results: dict) -> list[str]:
    lines = [
        "| layers | schedule | a list of stages, ms | its own forward, ms | longer by | CPU time: list, ms "
        "| own, ms | more by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        cells = [row["model"], row["schedule"]]
        for times, ratio in (("step_ms", "own_by_list"), ("cpu_ms", "cpu_own_by_list")):
            cells += [_spread(of_form, ".1f") for of_form in row[times].values()]
            cells.append(_spread(row[ratio]))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def default_cut(results: dict) -> list[str]:
    lines = [
        "| model | calls | stages | schedule | bubble of the default cut | of the best of all cuts "
        "| the step, by the best's |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        bubbles = f"{row['default']['bubble']:.1%} | {row['best']['bubble']:.1%} of {row['cuts']}"
        lines.append(
            f"| {row['model']} | {row['calls']} | {row['stages']} | {row['schedule']} | {bubbles} | "
            f"{row['default_by_best']:.3f} |"
        )
    return lines


def big_model(results: dict) -> list[str]:
    lines = [
        "| stage | bytes, MB | peak of the process, MB | by the bytes | aim | after saving, by the bytes |",
        "|---|---|---|---|---|---|",
    ]
    for stage, row in enumerate(results["rows"]):
        peak = (row["peak"] - results["empty_process"]) / 1e6
        figures = f"{row['over_share']:.2f} | under {results['aim']} | {row['saved_over_share']:.2f}"
        lines.append(f"| {stage} | {row['share'] / 1e6:.0f} | {peak:.0f} | {figures} |")
    return lines


def gpu_step(results: dict) -> list[str]:
    names = list(dict.fromkeys(name for row in results["rows"] for name in (*row["step_ms"], *row["left_out"])))
    lines = [
        f"| size | stages | {' | '.join(f'{name}: ms (GiB)' for name in names)} |",
        "|---" * (len(names) + 2) + "|",
    ]
    for row in results["rows"]:
        cells = [
            f"{_spread(row['step_ms'][name], '.1f')} ({row['peak_gib'][name]:.1f})"
            if name in row["step_ms"]
            else f"left out: {row['left_out'][name]}"
            for name in names
        ]
        lines.append(f"| {row['size']} | {row['stages']} | {' | '.join(cells)} |")
    lines += ["", "| size | stages | | faster than | by | aim |", "|---|---|---|---|---|---|"]
    for row in results["rows"]:
        for ratio in row["ratios"]:
            names = f"{ratio['ours']} | {ratio['other']}"
            by, aim = _spread(ratio["faster_by"]), ratio["aim"] or ""
            lines.append(f"| {row['size']} | {row['stages']} | {names} | {by} | {aim} |")
    return lines


def gpu_host(results: dict) -> list[str]:
    lines = [
        "| stages | layers | microbatches | nodes of the graph | host time of a step, us | aim |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["graphs"]:
        size = f"{row['stages']} | {row['layers']} | {row['microbatches']}"
        nodes = f"none: {row['fallback']}" if row["fallback"] else f"{row['nodes']:,}"
        aim = "" if row["aim_us"] is None else f"under {row['aim_us']}"
        lines.append(f"| {size} | {nodes} | {_spread(row['host_us'], '.1f')} | {aim} |")
    return [*lines, "", *dispatch(results["eager"])]


TABLES: dict[str, Callable[[dict], list[str]]] = {
    "cpu_step": cpu_step,
    "dist_step": dist_step,
    "overlap_dp": overlap_dp,
    "dispatch": dispatch,
    "simulate": simulate,
    "reaction": reaction,
    "variability": variability,
    "planner_quality": planner_quality,
    "pack": pack,
    "k_tradeoff": k_tradeoff,
    "recompute": recompute,
    "torchtitan_step": torchtitan_step,
    "any_model": any_model,
    "default_cut": default_cut,
    "big_model": big_model,
    "gpu_step": gpu_step,
    "gpu_host": gpu_host,
}
PAGES = {
    "docs/benchmarks.md": [name for name in TABLES if name != "planner_quality"],
    "docs/planner_quality.md": ["planner_quality"],
}
ON_GPUS = ("pack", "gpu_step", "gpu_host")


def with_tables(page: str) -> str:
    """The text of a page with its tables made anew."""
    text = (ROOT / page).read_text()
    for name in PAGES[page]:
        begin, end = f"<!-- {name}: made by bench/tables.py -->\n", f"<!-- end of {name} -->\n"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise SystemExit(f"{page} has no marks for the table {name}")
        text = before + begin + "\n".join(["", *_figures(name), ""]) + end + after
    return text


def _figures(name: str) -> list[str]:
    """The tables of a benchmark: of the CPU and of each GPU, as far as it was run there."""
    of_gpus = sorted(RESULTS.glob(f"*/{name}.json"))
    lines: list[str] = []
    for path in filter(Path.exists, [RESULTS / f"{name}.json", *of_gpus]):
        results = json.loads(path.read_text())
        lines += [*TABLES[name](results), "", _source(results["environment"]), ""]
    if name in ON_GPUS and not of_gpus:
        lines += ["GPU: not yet run.", ""]
    return lines[:-1]


def _source(where: dict) -> str:
    """Where figures come from."""
    device = f"{where['cores']} cores of {where['processor']}"
    if "device" in where:
        device = f"{where['device']}, driver {where['driver']}, triton {where['triton']}"
    return (
        f"Commit {where['commit'] or 'unknown'}, {device}, torch {where['torch']}; minimum / median / maximum."
    )


def _spread(values: dict, form: str = ".2f") -> str:
    return " / ".join(format(values[key], form) for key in ("min", "median", "max"))


def chart_is_current(name: str) -> bool:
    """Whether the chart of a benchmark is of the figures in its results."""
    chart = CHARTS / f"{name}.svg"
    return chart.exists() and _digest(name) in chart.read_text()


def draw_charts() -> None:
    """Draws the charts of all benchmarks that were run on the CPU."""
    import charts  # needs matplotlib, which checking does not

    for name in charts.CHARTS:
        results = json.loads((RESULTS / f"{name}.json").read_text())
        CHARTS.mkdir(exist_ok=True)
        (CHARTS / f"{name}.svg").write_text(charts.svg(name, results, _digest(name)))


def _digest(name: str) -> str:
    return "figures " + hashlib.sha256((RESULTS / f"{name}.json").read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if they differ")
    options = parser.parse_args()
    pages = {page: with_tables(page) for page in PAGES}
    if options.check:
        stale = [page for page, text in pages.items() if (ROOT / page).read_text() != text]
        stale += [path.name for path in sorted(CHARTS.glob("*.svg")) if not chart_is_current(path.stem)]
        sys.exit(f"not of bench/results: {', '.join(stale)}" if stale else 0)
    for page, text in pages.items():
        (ROOT / page).write_text(text)
    try:
        draw_charts()
    except ImportError as error:
        print(f"charts are left as they are: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
