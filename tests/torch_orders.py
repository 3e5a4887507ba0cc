"""What torch.distributed.pipelining lists for a schedule, without processes or stages."""

import pytest


def rank_operations(name, ranks, chunks, microbatches):
    """Rank -> the compute actions of torch's schedule ``name``, None where a rank is idle."""
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")

    class Bare(getattr(schedules, name)):
        def __init__(self):
            self._stages = [None] * chunks
            self.pp_group_size, self.num_stages = ranks, ranks * chunks
            self.n_local_stages, self._n_microbatches = chunks, microbatches
            self.number_of_rounds = max(1, microbatches // ranks)
            self.microbatches_per_round = microbatches // self.number_of_rounds

    return {rank: Bare()._calculate_single_rank_operations(rank) for rank in range(ranks)}


def texts(actions):
    """Rank -> its actions as text, without idle time."""
    return {rank: [str(a) for a in row if a is not None] for rank, row in actions.items()}
