"""torchrun on two nodes, which are network namespaces: one is lost, and the run goes on after its return."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from faults.namespaces import INTERFACE, Nodes, address, why_not
from launcher import SMALL, environment

from pipeline_ext.cli import main

STEPS = 200
LOST_AFTER = 20
PATIENCE = 240.0  # seconds


@pytest.fixture
def nodes():
    if (why := why_not()) is not None:
        pytest.skip(why)
    with Nodes() as made:
        yield made
        for node in range(2):
            end(made, node)


def command(nodes, node, program):
    """As docs/tutorials/clusters.md says."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    torchrun += [f"--rdzv-endpoint={address(0)}:29400", "--rdzv-backend=c10d", "--rdzv-id=run"]
    torchrun += [f"--rdzv-conf=is_host={1 - node},last_call_timeout=1", f"--local-addr={address(node)}"]
    return [*nodes.command(node), *torchrun, "--max-restarts=3", "--monitor-interval=0.1", *map(str, program)]


def start(nodes, node, program, folder):
    env = {
        **environment(),
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "RES_OPTIONS": "use-vc timeout:1 attempts:1",
    }
    with (folder / f"node {node}.txt").open("a") as said:
        return subprocess.Popen(command(nodes, node, program), env=env, stdout=said, stderr=said)


def end(nodes, node):
    """Kills all processes of a node."""
    found = subprocess.run(["ip", "netns", "pids", nodes.names[node]], capture_output=True, text=True)
    for pid in map(int, found.stdout.split()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def losses(folder):
    try:
        return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]
    except OSError:
        return []


def wait_until(done, nodes, folder):
    until = time.monotonic() + PATIENCE
    while not done():
        said = "".join((folder / f"node {node}.txt").read_text() for node in range(2))
        assert time.monotonic() < until, said
        time.sleep(0.1)


@pytest.mark.parametrize("lost", [1, 0], ids=["a node", "the node with the rendezvous"])
def test_a_run_goes_on_after_a_lost_node_has_returned(nodes, lost, tmp_path):
    """Without the rendezvous the other torchrun ends, and the cluster starts it again too."""
    (tmp_path / "text.txt").write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 400)
    args = ["train", *SMALL, "--steps", str(STEPS), "--data", str(tmp_path / "text.txt")]
    assert main([*args, "--out", str(tmp_path / "alone")]) == 0
    out = tmp_path / "run"
    program = ["-m", "pipeline_ext", *args, "--checkpoint-every", 5, "--out", out, "--resume", "auto"]
    running = [start(nodes, node, program, tmp_path) for node in range(2)]
    wait_until(lambda: len(losses(out)) >= LOST_AFTER, nodes, tmp_path)
    end(nodes, lost)
    running[lost].wait(60)
    if lost == 0:
        assert running[1].wait(PATIENCE) != 0
        running[1] = start(nodes, 1, program, tmp_path)
    assert running[1 - lost].poll() is None and len(losses(out)) < STEPS
    running[lost] = start(nodes, lost, program, tmp_path)
    wait_until(lambda: all(process.poll() is not None for process in running), nodes, tmp_path)
    assert [process.returncode for process in running] == [0, 0]
    assert losses(out) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
