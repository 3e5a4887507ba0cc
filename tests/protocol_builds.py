"""Builds of the program that explores the core: with the core as it is, and with planted faults."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from native_builds import BUILDS, ROOT, compile_all, link, one_at_a_time

CORE = ROOT / "csrc"
CORE_FILES = [*sorted((CORE / "plan").glob("*.cpp")), CORE / "schedule" / "list_scheduler.cpp"]
CORE_FILES += [CORE / "schedule" / "cycle.cpp"]
CORE_FILES += [CORE / "runtime" / f"{name}.cpp" for name in ("host_executor", "process_end")]
FLAGS = ["-O2", f"-I{ROOT / 'tests'}"]


class Edit(NamedTuple):
    """Where ``text`` stands once in a file of the core, ``otherwise`` stands."""

    file: str
    text: str
    otherwise: str


Faults = Mapping[str, Sequence[Edit]]  # by name; planted("name") is true if $PLANTED is that name

_PLANTED = """#pragma once
#include <cstdlib>
#include <string_view>
inline bool planted(std::string_view name) {
  static const char* const found = std::getenv("PLANTED");
  return found != nullptr && name == found;
}
"""


def build() -> Path:
    """The program, with the core as it is."""
    with one_at_a_time():
        return link("steps", compile_all([*CORE_FILES, *_own()], FLAGS), ["-pthread"])


def build_with(faults: Faults) -> Path:
    """The program with all faults in the core; the environment variable PLANTED switches one on."""
    texts = {"planted.hpp": _PLANTED}
    for edits in faults.values():
        for file, text, otherwise in edits:
            before = texts.get(file) or '#include "planted.hpp"\n' + (CORE / file).read_text()
            assert before.count(text) == 1, f"{file} has {before.count(text)} times: {text}"
            texts[file] = before.replace(text, otherwise)
    folder = BUILDS / f"faults-{hashlib.sha256(repr(texts).encode()).hexdigest()[:8]}"
    with one_at_a_time():
        for file, text in texts.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text)
        files = [file.relative_to(CORE) for file in CORE_FILES]
        changed = [folder / file for file in files if f"{file}" in texts]
        # What includes a changed header is compiled again too: the linker keeps one copy of an inline function.
        changed += [CORE / "schedule" / "list_scheduler.cpp", *_own()]
        same = [CORE / file for file in files if f"{file}" not in texts and CORE / file not in changed]
        objects = compile_all(same, FLAGS)
        objects += compile_all(changed, [*FLAGS, f"-iquote{folder}"])
        return link("steps with faults", objects, ["-pthread"])


def _own() -> list[Path]:
    return sorted((ROOT / "tests" / "protocol").glob("*.cpp"))
