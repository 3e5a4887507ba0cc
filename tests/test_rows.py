"""What of a batch has a row for each sample is said, or plain; everything else is refused."""

import dataclasses
import warnings
from collections import UserDict, namedtuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_close_gradients, gradients, twin
from torch import nn
from torch.distributed.pipelining.microbatch import TensorChunkSpec, _Replicate
from torch.utils import _pytree as pytree

import pipeline_ext as pe

SCHEDULES = ("gpipe", "1f1b", "zb-h1", "interleaved-1f1b")
S, D = 4, 8


class Attention(nn.Module):
    """Takes a mask and positions, and hands the mask on."""

    def __init__(self, hands_on):
        super().__init__()
        self.qkv, self.hands_on = nn.Linear(D, 3 * D), hands_on

    def forward(self, x, mask=None, positions=None, scale=1.0):
        if isinstance(x, tuple):
            x, mask, scale = x
        if positions is not None:
            x = x + torch.sin(positions.unsqueeze(-1) * torch.arange(1.0, D + 1))
        q, k, v = self.qkv(x).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask) * scale
        return (y, mask, scale) if self.hands_on else y


def attentions():
    return [Attention(True), Attention(False)]


def expected(stages, loss_fn, y, *args, **kwargs):
    """Loss and gradients of the whole batch in plain autograd."""
    plain = twin(nn.ModuleList(stages))
    value = plain[0](*args, **kwargs)
    for stage in plain[1:]:
        value = stage(value)
    loss = loss_fn(value, y)
    loss.backward()
    return loss.detach(), gradients(plain)


CAUSAL = torch.full((S, S), float("-inf")).triu(1)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("said", "kwargs", "options"),
    [
        ("whole", {"mask": pe.whole(CAUSAL)}, {}),
        ("kwargs_spec", {"mask": CAUSAL}, {"kwargs_spec": {"mask": pe.whole()}}),
        ("torch's spec", {"mask": CAUSAL}, {"kwargs_spec": {"mask": _Replicate}}),
        ("positions", {"positions": pe.whole(torch.arange(4.0))}, {}),
        ("broadcast", {"positions": pe.whole(torch.arange(4.0)[None])}, {}),
        ("number", {"scale": 0.5}, {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_goes_whole_to_every_microbatch(schedule, said, kwargs, options):
    stages = attentions()
    x, y = torch.randn(4, S, D), torch.randn(4, S, D)
    plain = {k: v.value if hasattr(v, "value") else v for k, v in kwargs.items()}
    loss, wanted = expected(stages, F.mse_loss, y, x, **plain)
    devices = ["cpu"] if schedule.startswith("interleaved") else None
    with pe.Pipeline(
        stages, microbatches=4, schedule=schedule, loss_fn=F.mse_loss, devices=devices, **options
    ) as pipe:
        torch.testing.assert_close(pipe.step(x, target=y, **kwargs), loss)
        assert_close_gradients(nn.ModuleList(stages), wanted)
        assert pipe.eval(x, **kwargs).shape == y.shape


class Table(Attention):
    def forward(self, x, table):
        return super().forward(x + table)


class Averaged(Attention):
    def forward(self, x, weights):
        return super().forward(x * weights.mean())


class Times(Attention):
    """A diffusion model's time, one for each sample."""

    def forward(self, x, times):
        return super().forward(x + torch.sin(times)[:, None, None])


class Unused(Attention):
    def forward(self, x, index=None):
        return super().forward(x)


class Written(Attention):
    """Counts forwards, and writes to its input."""

    def __init__(self, hands_on):
        super().__init__(hands_on)
        self.register_buffer("forwards", torch.zeros(()))

    def forward(self, x, weights):
        self.forwards += 1
        weights.mul_(2)
        return super().forward(x * weights[:, None, None])


def of_kind(kind, form):
    """The same model as a list of stages, or one module with a forward of its own."""
    stages = [kind(True), Attention(False)]
    if form == "list":
        return stages, {}

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(stages)

        def forward(self, *args, **kwargs):
            return self.layers[1](self.layers[0](*args, **kwargs))

    return Chain(), {"num_stages": 2}


@pytest.mark.parametrize("form", ["list", "own forward"])
@pytest.mark.parametrize("microbatches", [2, 4])
@pytest.mark.parametrize(
    "kind, inputs, why",
    [
        (Attention, {"mask": CAUSAL}, r"\['mask'\], of shape \[4, 4\], has .* by chance: the model takes all"),
        (Attention, {"positions": torch.arange(4.0)}, r"\['positions'\], of shape \[4\], has .* takes all"),
        (
            Attention,
            {"mask": CAUSAL, "positions": torch.arange(4.0)},
            r"\['mask'\], of shape \[4, 4\], and .*\['positions'\], of shape \[4\], have .* takes all",
        ),
        (
            Table,
            {"table": torch.rand(S, D)},
            r"\['table'\], of shape \[4, 8\], has .* takes all",
        ),
        (Averaged, {"weights": torch.rand(S)}, r"perhaps by chance: .* as well as .* returns something else"),
    ],
)
def test_an_input_that_has_as_many_rows_as_the_batch_by_chance_is_refused(
    form, microbatches, kind, inputs, why
):
    model, options = of_kind(kind, form)
    stages = [*(model if form == "list" else model.layers)]
    x, y = torch.randn(S, S, D), torch.randn(S, S, D)
    if kind is Table and microbatches == 2:
        why = "The size of tensor a"  # the part of a table fits nowhere
    with pe.Pipeline(model, microbatches=microbatches, loss_fn=F.mse_loss, **options) as pipe:
        for _ in range(2):
            with pytest.raises((pe.InvalidArgument, pe.StageError, RuntimeError), match=why):
                pipe.step(x, target=y, **inputs)
            assert all(p.grad is None for p in nn.ModuleList(stages).parameters())
        loss, wanted = expected(stages, F.mse_loss, y, x, **inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            said = {name: pe.whole(value) for name, value in inputs.items()}
            torch.testing.assert_close(pipe.step(x, target=y, **said), loss)
        assert_close_gradients(nn.ModuleList(stages), wanted)


@pytest.mark.parametrize("form", ["list", "own forward"])
@pytest.mark.parametrize("rows, microbatches", [(2, 2), (4, 2), (4, 4), (5, 4), (6, 2)])
@pytest.mark.parametrize(
    "kind, name", [(Times, "times"), (Unused, "index"), (Written, "weights"), (Attention, "mask")]
)
def test_an_input_whose_rows_the_model_takes_is_not_doubted(form, rows, microbatches, kind, name):
    model, options = of_kind(kind, form)
    stages = [*(model if form == "list" else model.layers)]
    x, y = torch.randn(rows, S, D), torch.randn(rows, S, D)
    value = torch.rand(rows, S, S) if name == "mask" else torch.rand(rows)
    loss, wanted = expected(stages, F.mse_loss, y, x, **{name: value.clone()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pe.Pipeline(model, microbatches=microbatches, loss_fn=F.mse_loss, **options) as pipe:
            given = value.clone()
            torch.testing.assert_close(pipe.step(x, target=y, **{name: given}), loss)
    assert_close_gradients(nn.ModuleList(stages), wanted)
    if kind is Written:
        assert stages[0].forwards == microbatches  # those of a trial are undone
        torch.testing.assert_close(given, 2 * value)


ROWS = {
    "times": lambda b, s, d: torch.rand(b),
    "classes": lambda b, s, d: torch.randint(8, (b,)),
    "row mask": lambda b, s, d: torch.rand(b, s),
}
NO_ROWS = {
    "positions": lambda b, s, d: torch.rand(s),
    "ids of positions": lambda b, s, d: torch.randint(8, (s,)),
    "mask": lambda b, s, d: torch.randn(s, s),
    "table": lambda b, s, d: torch.randn(s, d),
    "channels": lambda b, s, d: torch.rand(d),
    "square": lambda b, s, d: torch.randn(d, d),
}


class Uses(nn.Module):
    """Uses each input as its name says."""

    def __init__(self, width):
        super().__init__()
        self.linear, self.table = nn.Linear(width, width), nn.Embedding(8, width)

    def forward(self, x, **inputs):
        for name, value in inputs.items():
            if name == "times":
                x = x + torch.sin(value)[:, None, None]
            elif name == "classes":
                x = x + self.table(value)[:, None]
            elif name == "row mask":
                x = x * value[:, :, None]
            elif name == "positions":
                x = x + torch.sin(value)[:, None]
            elif name == "ids of positions":
                x = x + self.table(value)
            elif name == "mask":
                x = torch.softmax(x @ x.transpose(1, 2) + value, -1) @ x
            elif name == "table":
                x = x + value
            else:
                x = x * value if name == "channels" else x @ value
        return self.linear(x)


@given(data=st.data())
def test_any_inputs_of_any_sizes_train_right_or_are_refused_and_rows_never_are(data):
    rows = data.draw(st.integers(2, 6))
    length = data.draw(st.one_of(st.just(rows), st.integers(2, 6)))
    width = data.draw(st.one_of(st.just(rows), st.just(8), st.integers(2, 6)))
    microbatches = data.draw(st.integers(1, rows))
    names = data.draw(st.lists(st.sampled_from([*ROWS, *NO_ROWS]), min_size=1, max_size=3, unique=True))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    inputs = {name: (ROWS | NO_ROWS)[name](rows, length, width) for name in names}
    x, y = torch.randn(rows, length, width), torch.randn(rows, length, width)
    stages = [Uses(width), nn.Linear(width, width)]
    loss, wanted = expected(stages, F.mse_loss, y, x, **inputs)
    with pe.Pipeline(stages, microbatches=microbatches, loss_fn=F.mse_loss) as pipe, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if set(names) <= set(ROWS):
            warnings.filterwarnings("error", "input .* as many rows")
        try:
            found = pipe.step(x, target=y, **inputs)
        except (pe.InvalidArgument, pe.StageError):
            assert not set(names) <= set(ROWS)
            return
    torch.testing.assert_close(found, loss)
    for name, p in nn.ModuleList(stages).named_parameters():
        if wanted[name] is not None:
            torch.testing.assert_close(p.grad, wanted[name], rtol=1e-4, atol=1e-5)


def test_an_input_that_had_rows_before_is_not_doubted_when_its_shape_happens_to_be_square():
    class Masked(nn.Linear):
        def forward(self, x, mask):
            return super().forward(x * mask.sum(1, keepdim=True))

    with pe.Pipeline([Masked(3, 3), nn.Linear(3, 1)], microbatches=2, loss_fn=F.mse_loss) as pipe:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for length in (5, 4):
                pipe.step(torch.randn(4, 3), torch.ones(4, length), target=torch.randn(4, 1))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_batch_may_be_another_dimension(schedule):
    model = nn.Sequential(*(nn.TransformerEncoderLayer(D, 2, 16, dropout=0.0) for _ in range(2)))
    x, y = torch.randn(6, 4, D), torch.randn(6, 4, D)
    plain = twin(model)
    F.mse_loss(plain(x), y).backward()
    devices = ["cpu"] if schedule.startswith("interleaved") else None
    with pe.Pipeline(model, 2, 4, schedule, loss_fn=F.mse_loss, batch_dim=1, devices=devices) as pipe:
        _, out = pipe.step(x, target=y, return_outputs=True)
        for p, q in zip(model.parameters(), plain.parameters()):
            torch.testing.assert_close(p.grad, q.grad)
        torch.testing.assert_close(out, plain(x))


def test_a_layer_that_is_sequence_first_is_warned_of_unless_the_dimension_is_said():
    model = nn.Sequential(nn.TransformerEncoderLayer(D, 2, 16), nn.Linear(D, D))
    with pytest.warns(UserWarning, match="batch_first=False.*batch_dim=1.*batch_dim=0"):
        pe.Pipeline(model, 2, 2).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pe.Pipeline(model, 2, 2, batch_dim=0).close()


# -- microbatches that the caller made


class Eyes(nn.Module):
    """Pictures by total number: a row of text may have none, one or several."""

    def __init__(self):
        super().__init__()
        self.words, self.see = nn.Embedding(11, D), nn.Linear(3, D)

    def forward(self, ids, pictures):
        pictures = torch.cat(pictures) if isinstance(pictures, (list, tuple)) else pictures
        return self.words(ids).masked_scatter((ids == 0).unsqueeze(-1), self.see(pictures))


def pictures_and_text():
    ids = torch.randint(1, 11, (4, 6))
    for row, count in enumerate((1, 2, 0, 3)):
        ids[row, :count] = 0
    return ids, torch.randn(6, 3), torch.randint(11, (4,))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("how", ["presplit", "iterators", "rows of a list", "spec of a list"])
def test_pictures_by_row(schedule, how):
    stages = [Eyes(), nn.Sequential(nn.Flatten(), nn.Linear(D * 6, 11))]
    ids, pictures, y = pictures_and_text()
    loss, wanted = expected(stages, F.cross_entropy, y, ids, pictures)
    by_row = [pictures[:1], pictures[1:3], pictures[3:3], pictures[3:]]
    options = {"kwargs_spec": {"pictures": TensorChunkSpec(0)}} if how == "spec of a list" else {}
    devices = ["cpu"] if schedule.startswith("interleaved") else None
    with pe.Pipeline(
        stages, microbatches=2, schedule=schedule, loss_fn=F.cross_entropy, devices=devices, **options
    ) as pipe:
        if how in ("presplit", "iterators"):
            made = iter if how == "iterators" else list
            found = pipe.step(
                arg_mbs=made([(ids[:2],), (ids[2:],)]),
                kwarg_mbs=made([{"pictures": pictures[:3]}, {"pictures": pictures[3:]}]),
                target_mbs=made([y[:2], y[2:]]),
            )
        else:
            given = pe.rows(by_row) if how == "rows of a list" else by_row
            found = pipe.step(ids=ids, pictures=given, target=y)
    torch.testing.assert_close(found, loss)
    assert_close_gradients(nn.ModuleList(stages), wanted)


def test_microbatches_of_the_caller_are_weighted_by_their_rows_and_may_be_of_any_shape():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    parts = [torch.randn(n, 3) for n in (1, 5, 2)]
    targets = [torch.randn(len(part), 1) for part in parts]
    plain = twin(model)
    F.mse_loss(plain(torch.cat(parts)), torch.cat(targets)).backward()
    with pe.Pipeline(model, 2, 3, loss_fn=F.mse_loss) as pipe:
        pipe.step(arg_mbs=[(part,) for part in parts], target_mbs=targets)
        for p, q in zip(model.parameters(), plain.parameters()):
            torch.testing.assert_close(p.grad, q.grad)
        torch.testing.assert_close(pipe.eval(arg_mbs=parts[:2]), model(torch.cat(parts[:2])))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"arg_mbs": [(torch.ones(1, 3),)] * 3}, "arg_mbs has 3 microbatches; the pipeline takes 2"),
        ({"arg_mbs": [torch.ones(1, 3).tolist()] * 2}, r"arg_mbs\[0\] is a list; give the tuple"),
        ({"arg_mbs": torch.ones(2, 3)}, "arg_mbs is a Tensor; give a list"),
        ({"kwarg_mbs": [()] * 2}, r"kwarg_mbs\[0\] is a tuple; give the dict"),
        ({"arg_mbs": [(torch.ones(1, 3),)] * 2, "target": None, "target_mbs": [1]}, "target_mbs has 1"),
        ({"arg_mbs": [(torch.ones(1, 3),)] * 2, "x": torch.ones(2, 3)}, "both given"),
        (
            {"arg_mbs": [(torch.ones(1, 3),)] * 2, "target": torch.ones(2, 1), "target_mbs": [1, 1]},
            "target and target_mbs are both given",
        ),
        ({}, r"no inputs are given.*call train\(\) or eval\(\) of the model"),
    ],
)
def test_wrong_microbatches_are_refused(kwargs, message):
    with pe.Pipeline(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)), 2, 2, loss_fn=F.mse_loss) as pipe:
        with pytest.raises(pe.InvalidArgument, match=message):
            pipe.step(**kwargs)


# -- values that torch's pytrees do not see, and the advice that the refusal gives


@dataclasses.dataclass
class Sizes:
    x: torch.Tensor


class Plain:
    def __init__(self, x):
        self.x = x


class Reads(nn.Linear):
    def forward(self, x, extra):
        extra = extra["x"] if isinstance(extra, (dict, UserDict)) else extra.x
        return super().forward(x + extra)


@pytest.mark.parametrize(
    "kind", [Sizes, Plain, lambda x: UserDict(x=x)], ids=["dataclass", "class", "UserDict"]
)
def test_an_object_that_holds_tensors_is_refused_and_the_advice_works(kind):
    x, extra, y = torch.randn(8, 4), torch.randn(8, 4), torch.randn(8, 1)
    stages = [Reads(4, 4), nn.Linear(4, 1)]
    loss, wanted = expected(stages, F.mse_loss, y, x, kind(extra))
    with pe.Pipeline(stages, microbatches=4, loss_fn=F.mse_loss) as pipe:
        with pytest.raises(pe.InvalidArgument, match=r"input \[1\] is a .*whole\(") as refused:
            pipe.step(x, kind(extra), target=y)
        with pytest.raises(pe.InvalidArgument, match="target is a "):
            pipe.step(x, {"x": extra}, target=kind(y))
        with pytest.raises(pe.InvalidArgument, match=r"input \[0\] is a .*whole\("):
            pipe.step(kind(x), target=y)
        if "dict(...)" in str(refused.value):
            given = dict(kind(extra))
        elif "register_dataclass(Sizes) once" in str(refused.value):
            pytree.register_dataclass(Sizes)
            given = kind(extra)
        else:
            assert "register_dataclass(Plain, field_names=['x']) once" in str(refused.value)
            pytree.register_dataclass(Plain, field_names=["x"])
            given = kind(extra)
        try:
            torch.testing.assert_close(pipe.step(x, given, target=y), loss)
        finally:
            if not isinstance(given, dict):
                pytree._deregister_pytree_node(type(given))
    assert_close_gradients(nn.ModuleList(stages), wanted)


def test_a_list_with_an_entry_for_each_row_is_refused_until_it_is_said_what_it_is():
    seen = []

    class Named(nn.Linear):
        def forward(self, x, names):
            seen.append((len(x), names))
            return super().forward(x)

    x, y, names = torch.randn(4, 3), torch.randn(4, 1), ["a", "b", "c", "d"]
    with pe.Pipeline([Named(3, 3), nn.Linear(3, 1)], microbatches=2, loss_fn=F.mse_loss) as pipe:
        with pytest.raises(pe.InvalidArgument, match=r"\['names'\] is a list with as many entries"):
            pipe.step(x, names=names, target=y)
        assert not seen
        pipe.step(x, names=pe.rows(names), target=y)
        assert sorted(seen, key=str) == [(2, ["a", "b"]), (2, ["c", "d"])]
        pipe.step(x, names=pe.whole(names), target=y)
        pipe.step(x, names=["one", "two"], target=y)
        assert seen[-1] == (2, ["one", "two"])


def test_offsets_in_a_named_tuple_are_refused_where_they_are_no_rows():
    Packed = namedtuple("Packed", "offsets longest")

    class Reads(nn.Linear):
        def forward(self, x, packed):
            return super().forward(x)

    with pe.Pipeline([Reads(3, 3), nn.Linear(3, 1)], microbatches=2, loss_fn=F.mse_loss) as pipe:
        with pytest.raises(pe.InvalidArgument, match=r"input \[1\].*offsets.* has 5"):
            pipe.step(torch.randn(4, 3), Packed(torch.arange(5), 3), target=torch.randn(4, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"args_spec": {"x": pe.whole()}}, "args_spec is of the positional arguments"),
        ({"kwargs_spec": (pe.whole(),)}, "kwargs_spec is of the keyword arguments"),
        ({"target_spec": 1}, "target_spec is 1; give pipeline_ext.rows"),
        ({"args_spec": (pe.rows(dim=0), "rows")}, r"args_spec\[1\] is 'rows'"),
        ({"batch_dim": -1}, "batch_dim is -1; give the number of a dimension"),
    ],
)
def test_wrong_specs_are_refused(options, message):
    with pytest.raises(pe.InvalidArgument, match=message):
        pe.Pipeline(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)), 2, 2, **options)


def test_a_spec_that_does_not_fit_the_value_is_refused():
    with pytest.raises(pe.InvalidArgument, match="dim is 'x'"):
        pe.rows(torch.ones(2), dim="x")
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    with pe.Pipeline(model, 2, 2, loss_fn=F.mse_loss, target_spec=(pe.rows(), pe.whole())) as pipe:
        with pytest.raises(
            pe.InvalidArgument, match="the spec of target has 2 entries, but target is a Tensor"
        ):
            pipe.step(torch.ones(2, 3), target=torch.ones(2, 1))
        with pytest.raises(
            pe.InvalidArgument, match=r"rows along dimension 3, but holds a tensor of shape \[2, 3\]"
        ):
            pipe.step(torch.ones(2, 3), pe.rows(torch.ones(2, 3), dim=3), target=(torch.ones(2, 1), 1))


# -- kinds of tensors with a way of their own to be cut


@pytest.mark.parametrize("microbatches", [4, 3, 2])
def test_a_block_mask_is_cut_by_rows(microbatches):
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    border = torch.tensor([20, 40, 60, 80])

    def mask_mod(b, h, q, k):
        return (q >= k) & ((q < border[b]) == (k < border[b]))

    class Dense(nn.Linear):
        def forward(self, x, mask):
            dense = flex.create_mask(mask.mask_mod, B=len(x), H=1, Q_LEN=128, KV_LEN=128, device="cpu")
            return super().forward(F.scaled_dot_product_attention(x, x, x, attn_mask=dense[:, 0]))

    mask = flex.create_block_mask(mask_mod, B=4, H=None, Q_LEN=128, KV_LEN=128, device="cpu")
    shared = flex.create_block_mask(
        lambda b, h, q, k: q >= k, B=None, H=None, Q_LEN=128, KV_LEN=128, device="cpu"
    )
    x, y = torch.randn(4, 128, D), torch.randn(4, 128, 1)
    for value in (mask, shared):
        stages = [Dense(D, D), nn.Linear(D, 1)]
        loss, wanted = expected(stages, F.mse_loss, y, x, mask=value)
        with pe.Pipeline(stages, microbatches=microbatches, loss_fn=F.mse_loss) as pipe:
            torch.testing.assert_close(pipe.step(x, mask=value, target=y), loss)
            assert_close_gradients(nn.ModuleList(stages), wanted)
    with pe.Pipeline(stages, microbatches=2, loss_fn=F.mse_loss) as pipe:
        with pytest.raises(pe.InvalidArgument, match=r"\['mask'\] has 4"):
            pipe.step(x[:3], mask=mask, target=y[:3])


def test_a_jagged_tensor_is_cut_by_rows():
    class Pool(nn.Linear):
        def forward(self, rows):
            return torch.stack([row.mean(0) for row in super().forward(rows).unbind()])

    ragged = torch.nested.nested_tensor([torch.randn(n, D) for n in (2, 5, 1, 3)], layout=torch.jagged)
    y, stages = torch.randn(4, 1), [Pool(D, 2), nn.Linear(2, 1)]
    loss, wanted = expected(stages, F.mse_loss, y, ragged)
    with pe.Pipeline(stages, microbatches=2, loss_fn=F.mse_loss) as pipe:
        torch.testing.assert_close(pipe.step(ragged, target=y), loss)
        assert_close_gradients(nn.ModuleList(stages), wanted)


# -- outputs


def test_ragged_outputs_come_by_microbatch_and_the_gradients_stay():
    class Trim(nn.Linear):
        def forward(self, x):
            return super().forward(x[:, : int(x[0, 0, 0].abs()) + 1])

    model = nn.Sequential(Trim(2, 2), nn.Linear(2, 1))
    x = torch.randn(4, 5, 2)
    x[:, 0, 0] = torch.tensor([1.0, 1.0, 3.0, 3.0])
    loss_fn = lambda out: out.square().mean()  # noqa: E731
    with pe.Pipeline(model, 2, 2, loss_fn=loss_fn, loss_weight="rows") as pipe:
        _, outputs = pipe.step(x, return_outputs=True)
        assert [tuple(out.shape) for out in outputs] == [(2, 2, 1), (2, 4, 1)]
        assert not any(out.requires_grad for out in outputs) and model[0].weight.grad is not None
        assert [tuple(out.shape) for out in pipe.eval(x)] == [(2, 2, 1), (2, 4, 1)]


class Cache:
    def __init__(self, keys):
        self.keys = keys


class Caches(nn.Linear):
    def forward(self, x):
        return super().forward(x), Cache(super().forward(x))


def test_an_object_in_the_output_is_never_microbatch_0_s_for_all():
    model = nn.Sequential(nn.Linear(3, 3), Caches(3, 1))
    with pe.Pipeline(model, 2, 2, loss_fn=lambda out: out[0].sum()) as pipe:
        with pytest.raises(pe.StageError, match=r"would keep a Cache.*use_cache=False"):
            pipe.step(torch.randn(4, 3), return_outputs=True)
        assert model[0].weight.grad is None
        pipe.step(torch.randn(4, 3))
        outputs = pipe.eval(torch.randn(4, 3))
        assert [len(cache.keys) for _, cache in outputs] == [2, 2]
        assert not any(cache.keys.requires_grad for _, cache in outputs)


def test_eval_runs_in_evaluation_mode_and_puts_each_module_s_mode_back():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    model[3].eval()
    x = torch.randn(8, 4)
    with pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss) as pipe:
        assert torch.equal(pipe.eval(x), pipe.eval(x))
        assert model[2].running_mean.abs().sum() == 0
        assert [m.training for m in model] == [True, True, True, False, True]
        pipe.eval(x, keep_mode=True)
        assert model[2].running_mean.abs().sum() > 0
        with pytest.raises(pe.StageError):
            pipe.eval(torch.randn(8, 3))
        assert model[0].training
        model.eval()
        torch.testing.assert_close(pipe.eval(x), model(x))
