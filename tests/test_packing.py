"""Packing and unpacking do what torch does, natively on the CPU and with the kernels, here interpreted."""

import importlib.util
import math
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_cases import (
    POISON,
    STRIDINGS,
    WIRES,
    check_outside,
    check_pack,
    check_slots,
    check_unpack,
    mixed,
    poisoned,
    same,
    tensors,
)

import pipeline_ext as pe
from pipeline_ext.packing import Layout, as_tensors, packer
from pipeline_ext.packing.layout import FLOATING


def fused(layout, given):
    from pipeline_ext.packing.fused import FusedPacker

    return FusedPacker(layout, given)


interpreted = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="with a GPU the kernels are not interpreted; tests/gpu runs them"
    ),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of numpy, the interpreter's arithmetic
]
both = pytest.mark.parametrize(
    "make", [pytest.param(packer, id="native"), pytest.param(fused, id="fused", marks=interpreted)]
)
wires = st.sampled_from([None, *FLOATING])
scales = st.sampled_from([1.0, 1 / 3, -2.0, 1e-4, 3e38])
some = settings(deadline=None, max_examples=60)


@both
@some
@given(tensors(), wires, scales, st.booleans())
def test_pack_does_what_torch_does(make, given, wire, scale, scaled):
    check_pack(make, given, wire, scale, scaled)


@both
@some
@given(tensors(STRIDINGS[:4]), wires, scales, st.booleans())
def test_unpack_does_what_torch_does(make, given, wire, scale, scaled):
    check_unpack(make, given, wire, scale, scaled)


@both
@some
@given(tensors(STRIDINGS[:4], FLOATING), wires, scales, st.booleans())
def test_unpack_adds_and_rounds_once(make, given, wire, scale, scaled):
    check_unpack(make, given, wire, scale, scaled, accumulate=True)


@both
@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_one_call_moves_every_type_and_size(make, wire):
    check_pack(make, mixed(STRIDINGS), wire)
    check_unpack(make, mixed(), wire)


@both
def test_no_tensors_are_packed_too(make):
    check_pack(make, [])
    check_unpack(make, [])


@both
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_what_travels_as_it_is_keeps_its_bits(make, dtype):
    """Those of a NaN too."""
    bits = torch.randint(256, (20_000,), dtype=torch.uint8)
    tensor = bits.view(dtype)
    layout = Layout.of([tensor])
    buffer, _ = poisoned(layout, "cpu")
    packs = make(layout, [tensor])
    packs.pack(buffer, amax=torch.zeros(1))
    assert torch.equal(layout.views(buffer)[0].view(torch.uint8), bits)
    bits.zero_()
    packs.unpack(buffer)
    assert torch.equal(layout.views(buffer)[0].view(torch.uint8), bits)


@both
@pytest.mark.parametrize("dtype", [t for t in FLOATING if t.itemsize < 4], ids=str)
def test_casts_are_torchs_for_every_number_of_a_type_and_wherever_rounding_turns(make, dtype):
    bits = torch.arange(2 ** (8 * dtype.itemsize))
    codes = bits.to(torch.uint8 if dtype.itemsize == 1 else torch.uint16).view(dtype)
    layout = Layout.of([codes.float()], dtype)
    decoded = torch.zeros(codes.shape)
    make(layout, [decoded]).unpack(codes.view(torch.uint8))
    assert same(decoded, codes.float())
    numbers = codes.double()
    numbers = numbers[numbers.isfinite()].unique()
    between = ((numbers[1:] + numbers[:-1]) / 2).float()
    beside = [between.nextafter(torch.tensor(side)) for side in (math.inf, -math.inf)]
    check_pack(make, [torch.cat([numbers.float(), between, *beside])], wire=dtype)


@both
def test_beyond_its_range_float8_e4m3fn_saturates_and_other_types_overflow(make):
    given = [torch.tensor([449.0, 480.0, 1e5, -1e5, math.inf, -math.inf])]
    for wire, expected in [
        (torch.float8_e4m3fn, [448.0, 448.0, 448.0, -448.0, 448.0, -448.0]),
        (torch.float8_e5m2, [448.0, 512.0, math.inf, -math.inf, math.inf, -math.inf]),
        (torch.float16, [449.0, 480.0, math.inf, -math.inf, math.inf, -math.inf]),
    ]:
        layout = Layout.of(given, wire)
        buffer, _ = poisoned(layout, "cpu")
        make(layout, given).pack(buffer)
        assert layout.views(buffer)[0].float().tolist() == expected


@both
@pytest.mark.parametrize(
    "wire, relative, absolute",
    [
        (torch.bfloat16, 2**-8, 2**-134),
        (torch.float16, 2**-11, 2**-25),
        (torch.float8_e4m3fn, 2**-4, 2**-10),
        (torch.float8_e5m2, 2**-3, 2**-17),
    ],
    ids=str,
)
def test_a_wire_type_loses_no_more_than_half_its_last_bit(make, wire, relative, absolute):
    tensor = torch.randn(10_000) * 10.0 ** torch.linspace(-6, 1, 10_000)
    back = torch.empty_like(tensor)
    layout = Layout.of([tensor], wire)
    buffer, _ = poisoned(layout, "cpu")
    make(layout, [tensor]).pack(buffer)
    make(layout, [back]).unpack(buffer)
    assert ((back - tensor).abs() <= (relative * tensor.abs()).clamp(min=absolute)).all()
    assert ((back - tensor).abs() > relative / 4 * tensor.abs()).any()  # the bound is near


@both
def test_scales_of_slots_use_the_range_of_float8(make):
    """As they are meant: amax of one step scales the next, and its inverse undoes that."""
    given = [torch.randn(50, 50) * size for size in (1e-6, 1.0, 1e6)]
    layout = Layout.of(given, torch.float8_e4m3fn)
    buffer, _ = poisoned(layout, "cpu")
    amax = torch.zeros(3)
    packs = make(layout, given)
    packs.pack(buffer, amax=amax)
    assert amax.tolist() == [tensor.abs().max().item() for tensor in given]
    scales = 448 / amax
    packs.pack(buffer, scales=scales)
    back = [torch.empty_like(tensor) for tensor in given]
    make(layout, back).unpack(buffer, scales=1 / scales)
    for a, b, largest in zip(given, back, amax):
        assert ((a - b).abs() <= (a.abs() * 2**-4 * 1.001).clamp(min=2**-10 * largest / 448 * 1.001)).all()


@both
def test_amax_only_rises_and_the_flag_is_never_cleared(make):
    given = [torch.tensor([1.0, -3.0]), torch.tensor([5, 6]), torch.empty(0)]
    layout = Layout.of(given)
    buffer, _ = poisoned(layout, "cpu")
    amax, nonfinite = torch.full((3,), 2.0), torch.zeros(1, dtype=torch.int32)
    packs = make(layout, given)
    packs.pack(buffer, 10.0, amax=amax, nonfinite=nonfinite)
    assert (amax.tolist(), nonfinite.item()) == ([3.0, 2.0, 2.0], 0)
    for bad in (-math.inf, math.nan, 1.0):
        given[0][0] = bad
        packs.pack(buffer, amax=amax, nonfinite=nonfinite)
        assert nonfinite.item() == 1
        assert amax[0] == math.inf if bad == -math.inf else amax[0].isnan()
    assert amax[1:].tolist() == [2.0, 2.0]


@both
def test_other_tensors_of_any_strides_are_packed_once_bound(make):
    first = mixed(["row-major"])
    layout = Layout.of(first, torch.bfloat16)
    packs = make(layout, first)
    second = mixed(STRIDINGS)
    packs.rebind(second)
    buffer, around = poisoned(layout, "cpu")
    packs.pack(buffer)
    check_slots(layout, buffer, second)
    check_outside(layout, around)


@both
def test_tensors_that_do_not_fit_leave_the_packer_as_it_was(make):
    given = [torch.randn(4), torch.randn(3, 2)]
    layout = Layout.of(given)
    packs = make(layout, given)
    for others, said in [
        ([torch.zeros(4)], r"1 tensors; the layout has 2 slots"),
        ([torch.zeros(4), torch.zeros(2, 3)], r"tensor 1 is float32\[2, 3\]; its slot is for float32\[3, 2\]"),
        ([torch.zeros(4).half(), torch.zeros(3, 2)], r"tensor 0 is float16\[4\]; its slot is for float32\[4\]"),
        ([torch.zeros(4, dtype=torch.cfloat).conj().imag, given[1]], r"tensor 0 is a view that negates"),
        ([given[0], torch.zeros(3, 2).to_sparse()], "tensor 1 "),
        ([given[0], torch.zeros(3, 2, device="meta")], "tensor 1 .*on meta"),
        ([given[0], 3.0], "tensor 1 is of type float; give a tensor or an array"),
    ]:
        with pytest.raises(pe.InvalidArgument, match=said):
            packs.rebind(others)
        with pytest.raises(pe.InvalidArgument, match=said):
            make(layout, others)
    buffer, _ = poisoned(layout, "cpu")
    packs.pack(buffer)
    check_slots(layout, buffer, given)


@both
@pytest.mark.parametrize(
    "use, said",
    [
        (lambda p, b: p.pack(b[:263]), "the buffer has 263 bytes; the layout needs 264"),
        (lambda p, b: p.pack(b[1:]), "the buffer's address is not a multiple of 16"),
        (lambda p, b: p.pack(b[::2]), r"the buffer is uint8\[140\]; give contiguous uint8\[264\]"),
        (lambda p, b: p.pack(b.view(2, 140)), r"the buffer is uint8\[2, 140\]; give contiguous uint8\[264\]"),
        (lambda p, b: p.unpack(b.view(torch.int8)), r"the buffer is int8\[280\]; give contiguous uint8\[264\]"),
        (lambda p, b: p.pack(b.to("meta")), r"the buffer .*on meta"),
        (lambda p, b: p.pack(3), r"the buffer is of type int; give a tensor or an array"),
        (lambda p, b: p.pack(b, scales=torch.ones(3)), r"scales is float32\[3\]; give contiguous float32\[2\]"),
        (lambda p, b: p.unpack(b, scales=torch.ones(4)[::2]), r"give contiguous float32\[2\]"),
        (lambda p, b: p.pack(b, amax=torch.ones(2).half()), r"amax is float16\[2\]"),
        (lambda p, b: p.pack(b, nonfinite=torch.ones(1)), r"nonfinite is float32\[1\]; .* int32\[1\]"),
        (lambda p, b: p.unpack(b, accumulate=True), r"tensor 1 is int64\[1\]; only floating-point types"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(make, use, said):
    given = [torch.zeros(2), torch.zeros(1, dtype=torch.int64)]
    buffer = torch.full((280,), POISON, dtype=torch.uint8)
    with pytest.raises(pe.InvalidArgument, match=said):
        use(make(Layout.of(given), given), buffer)
    assert (buffer == POISON).all()
    assert not any(tensor.any() for tensor in given)


@both
def test_unpacking_into_shared_memory_is_refused(make):
    given = [torch.zeros(4), torch.zeros(1).expand(4)]
    layout = Layout.of(given)
    buffer, _ = poisoned(layout, "cpu")
    with pytest.raises(pe.InvalidArgument, match="tensor 1 is expanded"):
        make(layout, given).unpack(buffer)
    assert not given[0].any()


class Lent:
    """Lends a tensor's memory through DLPack, and can nothing else."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


@both
def test_a_packer_lets_go_of_its_tensors(make):
    given = [torch.arange(6.0)]
    layout = Layout.of(given)
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
    bound = make(layout, given)
    kept = weakref.ref(given[0])
    bound.release()
    given.clear()
    assert kept() is None
    for use in (bound.pack, bound.unpack):
        with pytest.raises(pe.InvalidArgument, match="no tensors are bound; call rebind first"):
            use(buffer)
    bound.rebind([torch.arange(6.0)])
    bound.pack(buffer)
    assert torch.equal(layout.views(buffer)[0], torch.arange(6.0))


@both
@pytest.mark.parametrize("lend", [torch.Tensor.numpy, Lent], ids=["numpy", "DLPack alone"])
def test_arrays_are_taken_wherever_tensors_are(make, lend):
    given = [torch.randn(4, 6).t(), torch.randn(3), torch.tensor(3), torch.zeros(0, 2, dtype=torch.bool)]
    back = [torch.zeros_like(tensor) for tensor in given]
    layout = Layout.of(map(lend, given))
    assert layout == Layout.of(given)
    buffer, scales = torch.zeros(layout.nbytes, dtype=torch.uint8), torch.full((4,), 2.0)
    amax, nonfinite = torch.zeros(4), torch.zeros(1, dtype=torch.int32)
    packs = make(layout, [lend(tensor) for tensor in back])
    packs.rebind([lend(tensor) for tensor in given])
    packs.pack(lend(buffer), scales=lend(scales), amax=lend(amax), nonfinite=lend(nonfinite))
    assert torch.equal(layout.views(lend(buffer))[0], 2 * given[0])
    assert amax[1] == given[1].abs().max()
    packs.rebind([lend(tensor) for tensor in back])
    packs.unpack(lend(buffer), 0.5)
    assert all(map(torch.equal, back, given))


def test_arrays_become_tensors_of_the_same_memory():
    array, tensor = np.zeros((2, 3), dtype=np.float32), torch.zeros(3)
    first, second, third = as_tensors([array, tensor, Lent(tensor)])
    first += 1
    third += 1
    assert second is tensor
    assert (array == 1).all() and (tensor == 1).all()


def test_what_lends_no_memory_is_refused():
    constant = np.zeros(3)
    constant.flags.writeable = False
    for value, said in [
        (3.0, "tensor 1 is of type float; give a tensor or an array"),
        (constant, "tensor 1 does not lend its memory: .*readonly"),
        (np.zeros(2, dtype="datetime64[s]"), "tensor 1 does not lend its memory"),
    ]:
        with pytest.raises(pe.InvalidArgument, match=said):
            as_tensors([torch.zeros(1), value])


@both
def test_tensors_that_require_gradients_are_packed(make):
    check_pack(make, [torch.nn.Parameter(torch.randn(3, 5))])


def test_only_packing_on_a_gpu_needs_triton():
    code = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, pipeline_ext
from torch._subclasses import FakeTensorMode
from pipeline_ext.packing import Layout, packer
tensors = [torch.zeros(3)]
packer(Layout.of(tensors), tensors).pack(torch.empty(12, dtype=torch.uint8))
with FakeTensorMode():
    tensors = [torch.empty(3, device="cuda")]
try:
    packer(Layout.of(tensors), tensors)
except pipeline_ext.PipelineError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = 'packing on a GPU needs triton, which is not installed: pip install "pipeline_ext[gpu]"\n'
    assert result.stdout == expected
