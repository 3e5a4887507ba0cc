"""Draws one batch whose task times vary: ranks that keep the order of 1F1B above, ranks that react below.

Both are simulated with the same random times. Of 200 random batches it is the one with the median gain. Run
``python docs/varying_times.py``, or give it another file to write.
"""

import argparse
from pathlib import Path

import pipeline_ext as pe
from pipeline_ext.report.panel import percent, simulated_panel
from pipeline_ext.report.timeline import save_picture

PICTURE = Path(__file__).parent / "varying_times.png"
NOISE = 1.0
BATCHES = 200


def plans() -> tuple[pe.Plan, pe.Plan]:
    """Static, and reactive with room for twice as many microbatches."""
    static = pe.build_plan("1f1b", num_stages=4, microbatches=12)
    room = [2 * slots for slots in static.limits]
    return static, pe.build_plan("1f1b", num_stages=4, microbatches=12, reactive=True, room=room)


def median_batch() -> tuple[pe.Simulation, pe.Simulation]:
    """The batch as the two plans run it."""
    batches = [[pe.simulate(plan, noise=NOISE, seed=seed) for plan in plans()] for seed in range(BATCHES)]
    batches.sort(key=lambda ran: ran[0].makespan / ran[1].makespan)
    static, reactive = batches[BATCHES // 2]
    return static, reactive


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", nargs="?", type=Path, default=PICTURE)
    options = parser.parse_args()
    static, reactive = median_batch()
    gain = static.makespan / reactive.makespan
    titles = {
        f"The planned order: bubble {percent(static.bubble)}": static,
        f"Ranks that react: bubble {percent(reactive.bubble)}, {gain:.2f} times as fast": reactive,
    }
    save_picture(options.picture, [simulated_panel(*panel) for panel in titles.items()], "F = 1 in the mean")


if __name__ == "__main__":
    main()
