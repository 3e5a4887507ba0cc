"""The driver of the software GPU (tests/softgpu), which needs no torch for CUDA: built and held by Python."""

import ctypes
from collections.abc import Sequence
from ctypes import c_char_p, c_int, c_long, c_uint64, c_void_p
from pathlib import Path
from typing import NamedTuple

from native_builds import ROOT, compile_all, link, one_at_a_time

KINDS = ("stream", "event", "graph", "graph_exec", "context")


def build_standin(flags: Sequence[str] = ("-O1", "-g")) -> Path:
    """The path of the stand-in driver, compiled with ``flags``."""
    shared = ["-fPIC", "-shared", *flags]
    name = f"libcuda-standin{''.join(flags)}.so"
    folder = ROOT / "tests" / "softgpu"
    sources = [*sorted(folder.glob("machine/*.cpp")), folder / "driver.cpp"]
    with one_at_a_time():
        return link(name, compile_all(sources, shared), shared)


class Call(NamedTuple):
    """One line of the log: a call of the driver, or a note of the test's own, which has no arguments."""

    name: str
    args: dict[str, int]


def parse_call(line: str) -> Call:
    """`cuEventQuery event=5 result=600` as a call; any line that does not begin with `cu` is a note."""
    if not line.startswith("cu"):
        return Call(line, {})
    name, *args = line.split()
    return Call(name, {key: int(value) for key, value in (arg.split("=") for arg in args)})


class StandIn:
    """The stand-in driver as a test scripts it and looks at it.

    The library is the one that `pipeline_ext` opens when `PIPELINE_EXT_LIBCUDA` names the same path. It
    lives once per process: a test begins with `reset`. tests/softgpu/machine/script.cpp says what each function
    does.
    """

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        for name, result, *parameters in (
            ("cuGetProcAddress_v2", c_int, c_char_p, c_void_p, c_int, c_uint64, c_void_p),
            ("standin_reset", None, c_int),
            ("standin_fail_at", None, c_long, c_int),
            ("standin_fail_sticky", None, c_long, c_int),
            ("standin_num_calls", c_long),
            ("standin_log", c_char_p),
            ("standin_note", None, c_char_p),
            ("standin_live", c_long, c_char_p),
            ("standin_number", c_int, c_void_p),
            ("standin_set_version", None, c_int),
            ("standin_hide", None, c_char_p),
            ("standin_pause", None, c_int),
            ("standin_drain", None),
        ):
            function = getattr(self._library, name)
            function.restype, function.argtypes = result, parameters

    def reset(self, devices: int = 2) -> None:
        self._library.standin_reset(devices)

    def fail_at(self, call: int, code: int) -> None:
        self._library.standin_fail_at(call, code)

    def fail_sticky(self, call: int, code: int) -> None:
        self._library.standin_fail_sticky(call, code)

    def calls(self) -> int:
        """The number of calls since the last reset."""
        return self._library.standin_num_calls()

    def log(self) -> list[Call]:
        return [parse_call(line) for line in self._library.standin_log().decode().splitlines()]

    def note(self, text: str) -> None:
        self._library.standin_note(text.encode())

    def live(self) -> dict[str, int]:
        """How many streams, events, graphs, graph_execs and retained contexts there are now."""
        return {kind: self._library.standin_live(kind.encode()) for kind in KINDS}

    def number(self, handle: int) -> int:
        return self._library.standin_number(handle)

    def set_version(self, version: int) -> None:
        self._library.standin_set_version(version)

    def hide(self, function: str) -> None:
        self._library.standin_hide(function.encode())

    def pause(self, paused: bool = True) -> None:
        self._library.standin_pause(paused)

    def drain(self) -> None:
        self._library.standin_drain()

    def call(self, name: str, version: int, *args: object) -> int:
        """Calls a function of the driver as torch would, with ctypes values; returns its result."""
        address = c_void_p()
        found = self._library.cuGetProcAddress_v2(name.encode(), ctypes.byref(address), version, 0, None)
        assert found == 0, f"the stand-in hands out no {name} of version {version}"
        return ctypes.CFUNCTYPE(c_int)(address.value)(*args)
