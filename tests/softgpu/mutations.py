"""Engines that are broken on purpose, to see that tests on the software GPU would notice.

A plugin of pytest: ``SOFTGPU_MUTANT`` names what the process breaks in the package. The machine itself leaves
out waits of streams, as ``SOFTGPU_DROP_WAIT`` and ``SOFTGPU_DROP_JOIN`` say.
"""

import os
from collections.abc import Callable
from pathlib import Path

# The tests that have to see it: those of memory, of order, and of what callers do. Together they take a minute.
GPU = Path(__file__).parent.parent / "gpu"
SEEING = [
    *(
        f"test_memory_gpu.py::test_what_all_stages_hand_on_and_read_is_kept_for_each[{which}]"
        for which in ("zb-h1-a lane for each rank", "zb-h2-a lane for each rank", "zb-h2-lanes")
    ),
    *(
        f"test_schedules_gpu.py::test_every_step_has_the_bits_of_plain_autograd[{which}]"
        for which in (
            "residual-lanes-1f1b",
            "encoder and decoder-two devices-1f1b",
            "tree-lanes-zb-h1",
            "dropout-lanes-1f1b",
            "residual-graphs-1f1b",
            "in place-two devices-gpipe",
        )
    ),
    *(
        f"test_callers_gpu.py::test_{which}[{mode}]"
        for mode in ("lanes", "two devices")
        for which in (
            "inputs_on_the_gpu_may_be_overwritten_at_once",
            "a_step_waits_for_inputs_that_are_still_being_made",
            "an_optimizer_and_the_next_step_follow_at_once",
            "gradients_may_be_set_to_zero_in_place",
            "outputs_and_losses_are_the_callers_own",
        )
    ),
]
LATE = {"SOFTGPU_DELAY_US": "3000", "SOFTGPU_POISON": "1"}
EVERY = {7: (0, 3, 5), 31: (0, 4, 9, 13, 17, 22, 26, 30), 97: (0, 8, 17, 29, 41, 52, 64, 77, 89, 96)}
WAITS = [f"wait {n}/{m}" for m, ns in EVERY.items() for n in ns]
JOINS = [f"join {n}/{m}" for m in (3, 7) for n in range(0, m, 2)]


def keep_nothing() -> None:
    """Memory that another stream uses goes back to the allocator at once."""
    from pipeline_ext.engines.cuda.keepalive import KeepAlive

    KeepAlive.keep = lambda *_: None


def keep_for_the_last_holder_only() -> None:
    """Memory is kept for the stream that handed it on, not for the one that allocated it."""
    from pipeline_ext.engines.cuda.keepalive import KeepAlive

    keep = KeepAlive.keep

    def forgetful(self, value, made, used):
        self._streams.clear()
        keep(self, value, made, used)

    KeepAlive.keep = forgetful


def drop_early() -> None:
    """What is kept goes one op too early."""
    from pipeline_ext.engines.cuda.keepalive import KeepAlive

    release = KeepAlive.release
    KeepAlive.release = lambda self, op: [release(self, later) for later in range(op, op + 9)]


def one_generator_state() -> None:
    """A task draws on from where the last one stopped, not from a state of its own."""
    from pipeline_ext.engines.cuda import device_streams

    device_streams._OnDevices.enter = lambda *_, **__: None


IN_PYTHON: dict[str, Callable[[], None]] = {
    broken.__name__: broken
    for broken in (keep_nothing, keep_for_the_last_holder_only, drop_early, one_generator_state)
}
MUTANTS = [*IN_PYTHON, *WAITS, *JOINS]


def environment_of(mutant: str) -> dict[str, str]:
    """The environment in which this engine is broken."""
    here = {"PYTHONPATH": str(Path(__file__).parent), "PYTEST_PLUGINS": "mutations"}
    kind, _, which = mutant.partition(" ")
    if not which:
        return {**LATE, **here, "SOFTGPU_MUTANT": mutant}
    return {**LATE, f"SOFTGPU_DROP_{kind.upper()}": which}


def pytest_configure(config) -> None:
    if name := os.environ.get("SOFTGPU_MUTANT"):
        IN_PYTHON[name]()
