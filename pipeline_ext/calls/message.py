"""What one stage of a model sends the next."""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from .program import INPUTS, Source


class Message(NamedTuple):
    """What a stage gets of those before.

    Between stages it is a flat tuple, which costs least to send: the looks of all tensors that the calls so far
    have left, in one text; ``plain``; the tensors of ``live``; the arguments.

    Attributes:
        looks: of the tensors that earlier calls left, in their order.
        plain: numbers that they left, where they are others than the sample's.
        live: what this stage or a later one needs.
        leaves: of the arguments, if they have the structure of the sample's; looks of those not needed.
        arguments: in place of ``leaves``.
    """

    looks: tuple[str, ...]
    plain: dict[tuple[int, int], Any] | None
    live: dict[tuple[int, int], Tensor]
    leaves: list[Any] | None
    arguments: Any

    @classmethod
    def read(cls, sent: tuple, received: Iterable[tuple[int, int]]) -> "Message":
        """What ``write`` has made."""
        looks, plain, *rest = sent
        live = dict(zip(received, rest))
        count = len(live)
        if plain is not None:
            plain = {_source(key): value for key, value in plain.items()}
        if len(rest) == count + 1 and isinstance(rest[-1], tuple):
            return cls(_split(looks), plain, live, None, rest[-1])
        return cls(_split(looks), plain, live, rest[count:], None)

    def write(self, passed: Iterable[tuple[int, int]]) -> tuple:
        """The tuple that is sent, with these of ``live``."""
        plain = None if self.plain is None else {f"{n}.{part}": v for (n, part), v in self.plain.items()}
        live = [self.live[source] for source in passed]
        rest = [self.arguments] if self.leaves is None else self.leaves
        return (_joined(self.looks), plain, *live, *rest)


def sources_of_calls(sources: frozenset[Source]) -> list[tuple[int, int]]:
    """Those that calls leave, in one order."""
    return sorted((source.call, source.part) for source in sources if source.call != INPUTS)


@functools.lru_cache(maxsize=4096)
def _joined(looks: tuple[str, ...]) -> str:
    return ";".join(looks)


@functools.lru_cache(maxsize=4096)
def _split(looks: str) -> tuple[str, ...]:
    return tuple(looks.split(";")) if looks else ()


def _source(key: str) -> tuple[int, int]:
    call, part = key.split(".")
    return int(call), int(part)
