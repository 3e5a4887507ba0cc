"""Finds whether lists of lines in different processes are the same, and where they differ."""

import hashlib
import itertools
from collections.abc import Sequence


def digest(lines: Sequence[str]) -> str:
    """64 hexadecimal digits that are equal if the lines are equal."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def first_difference(ours: Sequence[str], theirs: Sequence[str]) -> tuple[str, str]:
    """The first pair of lines that differ; "nothing more" stands for a line that one side lacks."""
    pairs = itertools.zip_longest(ours, theirs, fillvalue="nothing more")
    return next(pair for pair in pairs if pair[0] != pair[1])
