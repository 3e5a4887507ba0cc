"""A notebook: cells that fail, cells that are interrupted, cells that run again, and the end of its kernel."""

import os
import re
import signal
import sys
import threading
import time
from contextlib import contextmanager

import pytest

pytest.importorskip("ipykernel", reason="needs ipykernel, of the extra `test`")
nbformat = pytest.importorskip("nbformat", reason="needs nbclient, of the extra `test`")
nbclient = pytest.importorskip("nbclient", reason="needs nbclient, of the extra `test`")

BEGINNING = """
import threading, time
import torch
from torch import nn
import pipeline_ext as pe
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
x, y = torch.randn(8, 4), torch.randn(8, 4)
def make():
    return pe.Pipeline(model, num_stages=2, microbatches=4, loss_fn=nn.functional.mse_loss)
pipe = make()
"""
STEP = "print(pipe.verify(x, target=y).bit_for_bit)"


class Notebook:
    """Runs one cell after another in a kernel."""

    def __init__(self, client):
        self._client = client

    def run(self, code):
        """What the cell prints; raises CellExecutionError, with the traceback as IPython shows it."""
        self._client.nb.cells.append(nbformat.v4.new_code_cell(code))
        cell = self._client.execute_cell(self._client.nb.cells[-1], len(self._client.nb.cells) - 1)
        return "".join(output.text for output in cell.outputs if output.output_type == "stream")

    @property
    def process(self):
        """The kernel's, a Popen."""
        return self._client.km.provisioner.process


@contextmanager
def notebook(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    client = nbclient.NotebookClient(nbformat.v4.new_notebook(), timeout=300, startup_timeout=300)
    with client.setup_kernel():
        client.km.shutdown_wait_time = 120  # seconds before it is killed
        opened = Notebook(client)
        opened.run(BEGINNING)
        yield opened


def test_a_notebook(tmp_path, monkeypatch):
    with notebook(tmp_path, monkeypatch) as cells:
        assert cells.run(STEP) == "True\n"

        # A cell that fails shows the user's own line; the next one works.
        with pytest.raises(nbclient.exceptions.CellExecutionError) as shown:
            cells.run(
                "def bad(module, args):\n    raise ValueError('mine')\n"
                "hook = model[1].register_forward_pre_hook(bad)\npipe = make()\npipe.step(x, target=y)"
            )
        for part in (
            "ValueError: mine",
            "StageError",
            "1F0, the forward of microbatch 0",
            "in bad(module, args)",
        ):
            assert part in re.sub(r"\x1b\[[\d;]*m", "", shown.value.traceback)
        cells.run("hook.remove()\npipe = make()")
        assert cells.run(STEP) == "True\n"

        # A cell is interrupted in a step.
        process = cells.process

        def press():
            time.sleep(1)
            process.send_signal(signal.SIGINT)  # as the button does

        threading.Thread(target=press).start()
        with pytest.raises(nbclient.exceptions.CellExecutionError) as shown:
            cells.run("while True: pipe.step(x, target=y)")
        assert shown.value.ename == "KeyboardInterrupt"
        assert cells.run(STEP) == "True\n"

        # A cell that makes a pipeline runs again and again, and IPython remembers an error of it.
        count = "import os; print(len([n for n in os.listdir('/proc/self/task')]))"
        once = int(cells.run("pipe = make(); pipe.step(x, target=y)\n" + count))
        for _ in range(10):
            again = int(cells.run("pipe = make(); pipe.step(x, target=y)\n" + count))
        assert again <= once + 2  # the one before lives until the name is bound again


@pytest.mark.parametrize("stuck", [False, True])
def test_the_kernel_ends_by_itself(stuck, tmp_path, monkeypatch):
    with notebook(tmp_path, monkeypatch) as cells:
        cells.run(
            "import atexit, os\n"
            f"atexit.register(lambda: open({str(tmp_path / 'ended')!r}, 'w').write('ended'))\n"
            "class Stuck(nn.Linear):\n    def forward(self, x):\n"
            f"        while {stuck}: x = torch.tanh(x @ x.T @ x)\n        return super().forward(x)\n"
            "stages = [nn.Linear(4, 4), Stuck(4, 4)]\n"
            "pipe = pe.Pipeline(stages, microbatches=2, loss_fn=lambda out: out.sum(), timeout=0.5)\n"
            "try:\n    pipe.step(x)\nexcept pe.StepTimeout: pass"
        )
        process = cells.process
    assert process.wait(60) == 0
    assert (tmp_path / "ended").read_text() == "ended"
