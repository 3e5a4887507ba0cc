"""Inputs with rows that ``Tensor.tensor_split`` cannot cut: FlexAttention's block masks and nested tensors."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..base.imported import imported_class


def is_block_mask(value: Any) -> bool:
    """Whether it is a torch.nn.attention.flex_attention.BlockMask."""
    return isinstance(value, imported_class("torch.nn.attention.flex_attention", "BlockMask"))


def block_mask_rows(mask: Any) -> int | None:
    """The batch that a block mask was made for; None if it broadcasts over any batch."""
    rows = mask.kv_num_blocks.shape[0]
    return None if rows == 1 else rows


def cut_block_mask(mask: Any, lengths: Sequence[int]) -> list[Any]:
    """The mask of each microbatch. A part asks ``mask.mask_mod`` about the rows of the whole batch."""
    tables = [mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices]
    columns = [[None] * len(lengths) if t is None else t.split(list(lengths)) for t in tables]
    begins = [0, *itertools.accumulate(lengths)]
    return [
        type(mask).from_kv_blocks(
            *of_part,
            BLOCK_SIZE=mask.BLOCK_SIZE,
            mask_mod=_shifted(mask.mask_mod, begin),
            seq_lengths=mask.seq_lengths,
        )
        for begin, of_part in zip(begins, zip(*columns, strict=True))
    ]


def _shifted(mask_mod: Any, begin: int) -> Any:
    def of_part(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return mask_mod(b + begin, h, q, k)

    return of_part


def cut_nested(nested: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """The rows of a nested tensor by microbatch, in its layout."""
    rows = iter(nested.unbind())
    return [join_nested(list(itertools.islice(rows, length)), nested.layout) for length in lengths]


def join_nested(rows: list[Tensor], layout: torch.layout) -> Tensor:
    """A nested tensor of these rows."""
    return torch.nested.as_nested_tensor(rows, layout=layout)
