"""Costs as a JSON file: one object of ``Costs``' fields, each a number or a list of numbers.

The factors of microbatches may be lists in lists. A field that is left out or null has its default. A bandwidth
of null, also in a list, is infinite.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..base.files import whole_file
from ..base.texts import read_text
from ..errors import InvalidArgument
from . import microbatch_factors

MICROBATCH = "microbatch"  # the field whose value has a form of its own
STAGE, BOUNDARY, RANK = "one for each stage", "one for each boundary", "one for each rank"
LISTED_BY = {
    "forward": STAGE,
    "backward": STAGE,
    "input_grad": STAGE,
    "weight_grad": STAGE,
    "latency": BOUNDARY,
    "overhead": BOUNDARY,
    "bandwidth": BOUNDARY,
    "message_bytes": BOUNDARY,
    "contention": None,
    "pair": None,
    "act_memory": STAGE,
    "mem_i": STAGE,
    "mem_w": STAGE,
    "memory_limit": RANK,
    MICROBATCH: None,
}
_LEAST = {"contention": 1.0}
_ABOVE_ZERO = ("bandwidth", "pair")


def read(path: str | os.PathLike) -> dict[str, Any]:
    """The fields in a file, checked.

    Raises InvalidArgument if the file cannot be read or holds values that are not valid.
    """
    file = repr(str(path))
    text = read_text("the costs", path)
    try:
        given = json.loads(text)
    except ValueError as error:
        raise InvalidArgument(f"the costs {file} are not JSON: {error}") from error
    except RecursionError as error:
        raise InvalidArgument(
            f"the costs {file} nest lists too deeply; a cost is a number or a list of numbers"
        ) from error
    if not isinstance(given, dict):
        raise InvalidArgument(
            f'the costs {file} are not a JSON object; write one such as {{"forward": 1, "backward": [2, 3]}}'
        )
    for key in given:
        if key not in LISTED_BY:
            raise InvalidArgument(f"{key!r:.60} in {file} is not a cost; the costs are {', '.join(LISTED_BY)}")
    found = {key: _checked(key, value, file) for key, value in given.items()}
    _check_lengths(found, file)
    return {key: value for key, value in found.items() if value is not None}


def write(path: str | os.PathLike, fields: Mapping[str, Any]) -> None:
    """Writes a file for ``read``. Raises PipelineError if it cannot be written."""
    lines = ",\n".join(f'  "{key}": {json.dumps(_finite(fields[key]))}' for key in LISTED_BY if key in fields)
    with whole_file(Path(path)) as out:
        out.write(f"{{\n{lines}\n}}\n".encode())


def _checked(key: str, value: Any, file: str) -> Any:
    if value is None:
        return None
    if key == MICROBATCH:
        return microbatch_factors.checked(f"{key!r} in {file}", value)
    numbers = value if isinstance(value, list) and LISTED_BY[key] else [value]
    if key == "bandwidth":
        numbers = [math.inf if number is None else number for number in numbers]
    least = _LEAST.get(key, 0.0)
    for given in numbers:
        number = _number(given)
        if not (
            number > 0 if key == "bandwidth" else least <= number < math.inf and (key != "pair" or number > 0)
        ):
            accepted = "a number above 0" if key in _ABOVE_ZERO else f"a finite number of at least {least:g}"
            verb = "holds" if isinstance(value, list) and LISTED_BY[key] else "is"
            raise InvalidArgument(
                f"{key!r} in {file} {verb} {_shown(given)}; give {accepted}"
                + (f", or a list of {LISTED_BY[key]}" if LISTED_BY[key] else "")
            )
    found = [_number(given) for given in numbers]
    return found if isinstance(value, list) else found[0]


def _number(value: Any) -> float:
    """``value`` as a float; NaN if it is no number, infinite if it is too large."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _shown(value: Any) -> str:
    try:
        return f"{json.dumps(value):.60}"
    except (RecursionError, ValueError):  # lists in lists; a number of thousands of digits
        return f"a {type(value).__name__}"


def _check_lengths(found: Mapping[str, Any], file: str) -> None:
    """Raises InvalidArgument for lists whose lengths do not fit one model."""
    stages: dict[str, int] = {}
    for key, value in found.items():
        if key == MICROBATCH and value is not None:
            listed = microbatch_factors.num_stages(value)
            if listed is not None:
                stages[key] = listed
        elif isinstance(value, list) and LISTED_BY[key] != RANK:
            stages[key] = len(value) + (LISTED_BY[key] == BOUNDARY)
    for key, number in stages.items():
        first, expected = next(iter(stages.items()))
        if number != expected:
            raise InvalidArgument(
                f"{key!r} in {file} has {len(found[key])} entries, for {number} stages, and {first!r} has "
                f"{len(found[first])}, for {expected}; there is a boundary between each two stages"
            )


def _finite(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_finite(number) for number in value]
    return None if value == math.inf else value
