"""Colours of the kinds of tasks, in pictures and on pages."""

from collections.abc import Sequence

# From Okabe and Ito, for colour-blind readers. In grey print F is darkest, then W, B and I.
COLORS = {"F": "#0A5A94", "B": "#E69F00", "I": "#F7D06B", "W": "#009E73"}
NAMES = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}


def paleness(rank_of_stage: Sequence[int]) -> list[float]:
    """How pale to draw each stage: from 0 for the first stage of its rank to 1 for the last one."""
    return [
        rank_of_stage[:stage].count(rank) / max(1, rank_of_stage.count(rank) - 1)
        for stage, rank in enumerate(rank_of_stage)
    ]
