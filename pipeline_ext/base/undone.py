"""What is changed for a while."""

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def undone(put_back: Callable[[], object]) -> Iterator[None]:
    """Calls ``put_back`` when its block has ended; again if Ctrl-C came meanwhile, so it must allow that."""
    try:
        try:
            yield
        finally:
            put_back()
    except BaseException:
        put_back()
        raise
