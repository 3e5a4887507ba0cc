"""Texts: reads the files that users name, schedules and costs; lays out tables."""

import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import InvalidArgument

MOST_BYTES = 64 << 20  # the order of some eight million tasks


def read_text(what: str, path: str | os.PathLike[str]) -> str:
    """The text of a file, in UTF-8; ``what`` names it in errors.

    Raises InvalidArgument if it cannot be read, is longer than ``MOST_BYTES``, as a device that never ends is,
    or is not text.
    """
    named = f"{what} {os.fspath(path)!r}"
    try:
        with Path(path).open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InvalidArgument(f"{named} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > MOST_BYTES:
        raise InvalidArgument(f"{named} is longer than {MOST_BYTES >> 20} MiB; give a shorter file")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{named} is not text in UTF-8: {error}") from error


def table(rows: Sequence[Sequence[str]], align: str = "") -> list[str]:
    """The lines of a table; ``align`` has a "<" or ">" for each column, and "<" holds for those beyond it."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = align.ljust(len(widths), "<")
    return ["  ".join(map("{:{}{}}".format, row, sides, widths)).rstrip() for row in rows]
