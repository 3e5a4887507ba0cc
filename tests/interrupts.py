"""Ctrl-C at a chosen moment: KeyboardInterrupt at the n-th place of the package in this thread.

Places are those where Python runs signal handlers: as a function begins, after a call, as a loop goes on.
"""

import dis
import os
import sys

import pipeline_ext as pe

_PACKAGE = os.path.dirname(pe.__file__) + os.sep


class Interrupt:
    """A context that interrupts what runs in it.

    Attributes:
        at: where, for people; None if fewer instructions ran.
    """

    def __init__(self, instruction):
        self._left = instruction
        self._last = {}  # by frame: the instruction that has run last
        self.at = None

    def __enter__(self):
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _enter(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(_PACKAGE):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._look

    def _look(self, frame, event, argument):
        if event == "opcode":
            name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            last, line = self._last.get(frame, ("", 0))
            self._last[frame] = name, frame.f_lineno
            # On another line it may be outside of a block that the call was in, where the error belongs.
            if line != frame.f_lineno or not last.startswith(("RESUME", "CALL", "JUMP_BACKWARD")):
                return self._look
            if self._left == 0:
                sys.settrace(None)
                self.at = f"{frame.f_code.co_filename.removeprefix(_PACKAGE)}:{frame.f_lineno}"
                raise KeyboardInterrupt
            self._left -= 1
        return self._look


def count(call):
    """How many instructions of the package ``call`` runs in this thread."""
    many = 10**9
    with Interrupt(many) as interrupt:
        call()
    return many - interrupt._left
