"""What a message passes through between two ranks of one process."""

import math
import time

from ..errors import InvalidArgument


class LocalLink:
    """Hands messages over by reference.

    Args:
        overhead: seconds that the sender spends on each message beside packing it; to try on one machine
            what a network would cost.

    Raises:
        InvalidArgument: for an overhead that is no time.
    """

    def __init__(self, overhead: float = 0.0) -> None:
        if not (isinstance(overhead, (int, float)) and 0 <= overhead < math.inf):
            raise InvalidArgument(f"overhead is {overhead!r}; give seconds, 0 or more")
        self.overhead = float(overhead)

    def send(self) -> float:
        """Called by the sender for each message; returns the seconds that took."""
        if not self.overhead:
            return 0.0
        begin = time.perf_counter()
        time.sleep(self.overhead)
        return time.perf_counter() - begin


FREE_LINK = LocalLink()
