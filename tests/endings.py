"""How programs end: each runs as a script in a process of its own, up to the end of its interpreter.

A server that has imported torch once forks the processes, so that one begins in a moment.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

LIMIT = 120.0  # seconds after which a program hangs; the machine may be busy

_SERVER = """
import json, os, signal, sys, time
import torch, torch.distributed, pipeline_ext
torch.set_num_threads(1)
for line in sys.stdin:
    path, limit = json.loads(line)
    child = os.fork()
    if child == 0:
        for stream, name in ((0, os.devnull), (1, path + ".out"), (2, path + ".err")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), stream)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        break
    until = time.monotonic() + limit
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < until:
        time.sleep(0.005)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    print("hangs" if ended == (0, 0) else os.waitstatus_to_exitcode(ended[1]), flush=True)
else:
    os._exit(0)
exec(compile(open(path).read(), path, "exec"), {"__name__": "__main__"})
"""


@dataclass(frozen=True)
class Ending:
    """``code``: the exit status, minus a signal's number, or "hangs"."""

    code: int | str
    out: str
    err: str


def end_of(program: str) -> Ending:
    """How ``program``, the text of a script, ends."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "program.py")
        path.write_text(textwrap.dedent(program))
        server = _server()
        print(json.dumps([str(path), LIMIT]), file=server.stdin, flush=True)
        said = server.stdout.readline().strip()
        out, err = (Path(f"{path}{suffix}").read_text() for suffix in (".out", ".err"))
        return Ending(said if said == "hangs" else int(said), out, err)


@functools.cache
def _server() -> subprocess.Popen:
    """It ends with this process, whose end of the pipe is then closed."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _SERVER],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
