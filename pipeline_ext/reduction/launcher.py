"""Launches the reduction of buckets as soon as they are full, in one order for all replicas."""

import contextlib
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import nn

from ..stages.last_backward import Body
from .buckets import FlatBucket


class BucketLauncher:
    """Launches the buckets of later stages first, and those of a stage in the order in which backward fills
    them.

    In a stage's last backward a bucket is full once each of its parameters was accumulated into as often as in
    the last backward of the step before. When that backward ends, all buckets of the stage are full.
    """

    def __init__(self, launch: Callable[[FlatBucket], None]) -> None:
        self._launch = launch
        self._counts: dict[int, Counter[nn.Parameter]] = {}  # accumulations by stage, in its last backward
        self._buckets: Mapping[int, Sequence[FlatBucket]] = {}
        self._left: dict[int, int] = {}  # backwards, by stage
        self._due: deque[FlatBucket] = deque()
        self._full: set[FlatBucket] = set()
        self._launching = threading.Lock()

    def begin(self, buckets: Mapping[int, Sequence[FlatBucket]], microbatches: int) -> None:
        """Begins a step that reduces ``buckets``, by stage; each stage runs ``microbatches`` backwards."""
        self._buckets = buckets
        self._left = dict.fromkeys(buckets, microbatches)
        self._due = deque(bucket for stage in sorted(buckets, reverse=True) for bucket in buckets[stage])
        self._full = set()

    def pause(self) -> None:
        """Begins a step in which nothing is launched."""
        self._left = {}

    def watch(self, stage: int, backward: Body) -> Body:
        """``backward`` of a stage: `B`, or `W` if the backward is split."""

        def watched(m: int) -> None:
            left = self._left.get(stage)
            if left == 1:
                with self._counting(stage):
                    backward(m)
                self._fill(self._buckets[stage])
                return
            backward(m)
            if left is not None:
                self._left[stage] = left - 1

        return watched

    @contextlib.contextmanager
    def _counting(self, stage: int) -> Iterator[None]:
        """Launches buckets that become full during the last backward of a stage."""
        before = self._counts.get(stage, Counter())
        counts = self._counts[stage] = Counter()
        handles = []
        for bucket in self._buckets[stage]:
            missing = {parameter: before[parameter] for parameter in bucket.parameters}

            def accumulated(
                parameter: nn.Parameter, bucket: FlatBucket = bucket, missing: dict[nn.Parameter, int] = missing
            ) -> None:
                counts[parameter] += 1
                if counts[parameter] == missing.get(parameter):
                    del missing[parameter]
                    if not missing:
                        self._fill([bucket])

            handles += [p.register_post_accumulate_grad_hook(accumulated) for p in bucket.parameters]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _fill(self, buckets: Sequence[FlatBucket]) -> None:
        with self._launching:
            self._full.update(buckets)
            while self._due and self._due[0] in self._full:
                self._launch(self._due.popleft())
