"""Messages of CUDA tensors."""

import pytest
import torch
from message_cases import check_as_is, check_cast, check_overlaps_travel_once, check_shared

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def test_what_is_sent_arrives_as_it_is():
    check_as_is("cuda")


def test_what_shares_memory_shares_it_again():
    check_shared("cuda")
    check_overlaps_travel_once("cuda")


@pytest.mark.parametrize("wire, rounding", [(torch.bfloat16, 2.0**-8), (torch.float8_e4m3fn, 2.0**-4)], ids=str)
def test_what_is_cast_arrives_rounded(wire, rounding):
    check_cast("cuda", wire, rounding)
