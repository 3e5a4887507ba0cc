"""Which releases of torch this package is tested with."""

import functools
import re
import warnings

OLDEST = (2, 11)  # as in pyproject.toml
NEWEST = (2, 14)


@functools.cache  # warns once
def check(version: str) -> None:
    """Warns of a torch newer than those tested. Raises ImportError for one that is older."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    release = (int(numbers[1]), int(numbers[2])) if numbers else NEWEST  # a build without number: unknown
    if release < OLDEST:
        raise ImportError(f"pipeline_ext needs torch {_text(OLDEST)} or newer; this is torch {version}")
    if release > NEWEST:
        warnings.warn(
            f"this is torch {version}; pipeline_ext is tested with torch {_text(OLDEST)} to {_text(NEWEST)}, "
            "and uses parts of torch that change between releases",
            stacklevel=2,
        )


def _text(release: tuple[int, int]) -> str:
    return f"{release[0]}.{release[1]}"
