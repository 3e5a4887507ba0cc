"""Writes what a run of all cases came to into docs/reliability.md, between the comments that mark it."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .cases import FAULTS, MOMENTS, Case
from .cell import Result
from .driver import Driver

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
_BEGIN, _END = "<!-- faults: made by make faults -->", "<!-- end of faults -->"


def write(results: Sequence[Result], impossible: Sequence[Case], driver: Driver) -> None:
    """``impossible``: the cases that there are not."""
    before, _, rest = PAGE.read_text().partition(_BEGIN)
    _, _, after = rest.partition(_END)
    lines = [_BEGIN, "", *lines_of(results, impossible, driver), "", _END]
    PAGE.write_text(before + "\n".join(lines) + after)


def lines_of(results: Sequence[Result], impossible: Sequence[Case], driver: Driver) -> list[str]:
    """A table with the number of cases in each cell, and why there are none in others."""
    counts = Counter((result.case.fault, result.case.moment) for result in results)
    why = {(case.fault, case.moment): case.why_not for case in impossible if case.why_not is not None}
    letters = {reason: chr(ord("a") + number) for number, reason in enumerate(dict.fromkeys(why.values()))}
    rows = [f"| | {' | '.join(MOMENTS)} |", "|---" * (len(MOMENTS) + 1) + "|"]
    for fault in FAULTS:
        cells = [
            f"{counts[fault, moment] or ''} {letters.get(why.get((fault, moment)), '')}".strip()
            for moment in MOMENTS
        ]
        rows.append(f"| {fault} | {' | '.join(cells)} |")
    reasons = [f"- {letter}: {reason}" for reason, letter in letters.items()]
    late = max(result.seconds - result.case.expected.within for result in results if result.seconds is not None)
    latest = f"{abs(late):.1f} s {'after' if late > 0 else 'before'} its limit"
    return [
        *rows,
        "",
        *reasons,
        "",
        f"{len(results)} cases, all as documented. The latest error came {latest}, beside other cases",
        f"on the same cores. Each call of the CUDA driver failing: {driver.passed} tests of",
        "`tests/test_device_failure.py`, over the stand-in driver.",
    ]
