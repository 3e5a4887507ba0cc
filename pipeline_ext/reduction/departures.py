"""When the buffers of a step's gradients leave: as soon as they are final, in one order for all replicas."""

import contextlib
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import nn

from ..stages.last_backward import Body
from .buckets import Bucket


class Departures:
    """Sends buckets: those of later stages first, of each stage in the order in which backward fills them.

    In a stage's last backward a bucket is full once each of its parameters was added to as often as in the last
    backward of the step before. What is not full when that backward ends leaves then.
    """

    def __init__(self, send: Callable[[Bucket], None]) -> None:
        self._send = send
        self._added_to: dict[int, Counter[nn.Parameter]] = {}  # by stage, in its last backward
        self._buckets: Mapping[int, Sequence[Bucket]] = {}
        self._left: dict[int, int] = {}  # backwards, by stage
        self._due: deque[Bucket] = deque()
        self._full: set[Bucket] = set()
        self._sending = threading.Lock()

    def begin(self, buckets: Mapping[int, Sequence[Bucket]], microbatches: int) -> None:
        """Begins a step that reduces ``buckets``, by stage, each of which runs so many backwards."""
        self._buckets = buckets
        self._left = dict.fromkeys(buckets, microbatches)
        self._due = deque(bucket for stage in sorted(buckets, reverse=True) for bucket in buckets[stage])
        self._full = set()

    def pause(self) -> None:
        """Begins a step in which nothing leaves."""
        self._left = {}

    def watch(self, stage: int, backward: Body) -> Body:
        """``backward`` of a stage: B, or W where that is split."""

        def watched(m: int) -> None:
            left = self._left.get(stage)
            if left == 1:
                with self._filling(stage):
                    backward(m)
                self._fill(self._buckets[stage])
                return
            backward(m)
            if left is not None:
                self._left[stage] = left - 1

        return watched

    @contextlib.contextmanager
    def _filling(self, stage: int) -> Iterator[None]:
        """Around the last backward of a stage."""
        before = self._added_to.get(stage, Counter())
        added_to = self._added_to[stage] = Counter()
        handles = []
        for bucket in self._buckets[stage]:
            missing = {parameter: before[parameter] for parameter in bucket.parameters}

            def added(parameter: nn.Parameter, bucket: Bucket = bucket, missing: dict = missing) -> None:
                added_to[parameter] += 1
                if added_to[parameter] == missing.get(parameter):
                    del missing[parameter]
                    if not missing:
                        self._fill([bucket])

            handles += [p.register_post_accumulate_grad_hook(added) for p in bucket.parameters]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _fill(self, buckets: Sequence[Bucket]) -> None:
        with self._sending:
            self._full.update(buckets)
            while self._due and self._due[0] in self._full:
                self._send(self._due.popleft())
