"""The threads behind connections between processes."""

import contextlib
import os
from datetime import timedelta

import pytest
import torch.distributed as dist
from processes import run

from pipeline_ext.processes.connections import Connections


def policies():
    """How the system schedules the threads that a connection begins, and the one that has made it."""
    before = set(os.listdir("/proc/self/task"))
    store = dist.PrefixStore("connections", dist.distributed_c10d._get_default_store())
    connections = Connections(store, range(dist.get_world_size()), timedelta(seconds=30))
    begun = set(os.listdir("/proc/self/task")) - before
    found = []
    for task in begun:
        with contextlib.suppress(ProcessLookupError):  # the one that has opened the connections ends
            found.append(os.sched_getscheduler(int(task)))
    connections.close(idle=True)
    return found, os.sched_getscheduler(0)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="looks at threads in /proc")
def test_threads_of_connections_do_not_interrupt_a_stage():
    for begun, own in run(2, policies):
        assert begun and set(begun) == {os.SCHED_BATCH}
        assert own == os.SCHED_OTHER
