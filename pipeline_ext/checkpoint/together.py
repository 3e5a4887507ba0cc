"""What all processes do together: if it fails in one, it fails in all."""

import contextlib
from collections.abc import Iterator

from ..errors import InvalidArgument, PeerError, PipelineError
from ..processes.gather import of_all


@contextlib.contextmanager
def together(what: str, alone: bool = False) -> Iterator[None]:
    """If the block raises in any process, raises in all of them, and none waits for it.

    ``alone``: this process does it without the others.
    """
    error: Exception | None = None
    try:
        yield
    except PeerError:
        raise  # all that are left have it, and one that is gone would be waited for once more
    except Exception as raised:
        error = raised
    failed = None if error is None else (isinstance(error, InvalidArgument), str(error))
    for failure in of_all(failed, alone=alone):
        if failure is not None:
            refused, text = failure
            raise (InvalidArgument if refused else PipelineError)(f"{what}: {text}") from error
