"""Builds of the C++ core with programs that use it: plain, and with the sanitizers."""

from collections.abc import Sequence
from pathlib import Path

from native_builds import ROOT, compile_all, link, one_at_a_time

CORE = sorted(f for f in (ROOT / "csrc").glob("*/*.cpp") if f.parent.name != "bindings")
MODES = {
    "plain": [],
    "address and undefined": ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-g1", "-fsanitize=thread"],
}
RANDOM_PLANS = ROOT / "tests" / "hostile" / "random_plans.cpp"


def build(name: str, sources: Sequence[Path], mode: str) -> Path:
    """The program of these sources and the core, not optimised: there is more to compile than to run."""
    flags = ["-O0", *MODES[mode], "-ffp-contract=off", f"-I{ROOT / 'tests' / 'cpp'}"]
    with one_at_a_time():
        return link(f"{name}, {mode}", compile_all([*CORE, *sources], flags), ["-pthread", *MODES[mode]])
