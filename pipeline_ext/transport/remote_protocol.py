"""How two processes agree on what a message holds without describing it each time.

A message is a header and the packed results of a group. The receiver posts a receive for the last message it
knows for that group, or else for the message before. If the format changed, a notice of the expected size says
so; the new description and then the message follow under the peer's second tag. Both processes derive what the
other one knows from the messages before. After a failure a header alone says that nothing more is sent, because
gloo cannot end a receive that waits.
"""

from .description import Description

AS_KNOWN, DESCRIBED, NO_MORE = 1, 2, 3  # kinds of headers


class Known:
    """What the receiver of a channel can expect."""

    def __init__(self) -> None:
        self._of_group: dict[int, Description] = {}
        self._last: Description | None = None

    def of(self, group: int, is_next: bool = True) -> Description | None:
        """For a group; before its first message, that of the message before if the group ``is_next``."""
        return self._of_group.get(group, self._last if is_next else None)

    def learn(self, group: int, description: Description) -> None:
        self._of_group[group] = self._last = description


def sent_nbytes(description: Description | None) -> int:
    """Of an expected message, without its header."""
    return 0 if description is None else description.format.sent_nbytes


def buffer_nbytes(description: Description | None) -> int:
    """Of the buffer for it."""
    return 0 if description is None else description.format.nbytes
