"""The process that hosts the store of torch.distributed stands still: the others have their error in time."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import pipeline_ext as pe

LIMIT = 3.0
SLACK = 8.0  # beside other tests; 2 on a quiet machine


def steps(rank, port):
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    stages = [nn.Linear(8, 8), nn.Linear(8, 8)]
    pipe = pe.Pipeline(stages, None, 4, loss_fn=F.mse_loss, mesh=dist.group.WORLD, timeout=LIMIT)
    x = torch.randn(8, 8)
    pipe.step(x, target=x)
    print("ready", flush=True)
    while True:
        began = time.monotonic()
        try:
            pipe.step(x, target=x)
        except pe.PipelineError as error:
            print(f"{time.monotonic() - began:.1f} {error}".replace("\n", " "), flush=True)
            return


def make(rank, port, fault):
    """Process 1 makes a pipeline once the other, which has the store, has had its fault; prints its error."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    print("ready", flush=True)
    sys.stdin.readline()
    if rank == 0:
        os.kill(os.getpid(), getattr(signal, fault))
    began = time.monotonic()
    try:
        pe.Pipeline([nn.Linear(8, 8)] * 2, None, 4, loss_fn=F.mse_loss, mesh=dist.group.WORLD, timeout=LIMIT)
    except pe.PipelineError as error:
        print(f"{time.monotonic() - began:.1f} {type(error).__name__}: {error}".replace("\n", " "), flush=True)


@pytest.mark.parametrize(
    "fault, said",
    [
        ("SIGSTOP", "StepTimeout: the store of torch.distributed does not answer"),
        ("SIGKILL", "PeerError: the store"),
    ],
)
def test_a_pipeline_is_not_waited_for_where_the_host_of_the_store_is_stopped_or_gone(fault, said):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", __file__]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    options = {**pipes, "env": {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}}
    host, other = (subprocess.Popen([*command, str(rank), str(port), fault], **options) for rank in (0, 1))
    try:
        for process in (host, other):
            assert process.stdout.readline() == "ready\n"
        host.stdin.write("go\n")
        host.stdin.flush()
        os.waitid(os.P_PID, host.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        text, _ = other.communicate("go\n", timeout=60)
        seconds, _, text = text.partition(" ")
        assert text.startswith(said), text
        assert float(seconds) < LIMIT + SLACK
    finally:
        for process in (host, other):
            process.kill()
            process.communicate()


def test_where_the_host_of_the_store_stops_the_other_says_so_and_ends():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", __file__]
    options = {"stdout": subprocess.PIPE, "text": True, "env": {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}}
    host, other = (subprocess.Popen([*command, str(rank), str(port)], **options) for rank in (0, 1))
    try:
        for process in (host, other):
            assert process.stdout.readline() == "ready\n"
        host.send_signal(signal.SIGSTOP)
        seconds, _, text = other.stdout.readline().partition(" ")
        assert "the store of torch.distributed does not answer" in text
        assert "from rank 0 (process 0)" in text
        assert float(seconds) < LIMIT + SLACK
        assert other.wait(30) == 0
    finally:
        for process in (host, other):
            process.kill()
            process.communicate()


if __name__ == "__main__":
    if len(sys.argv) == 3:
        steps(int(sys.argv[1]), int(sys.argv[2]))
    else:
        make(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
