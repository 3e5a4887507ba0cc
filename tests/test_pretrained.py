"""Models on the meta device, and folders of safetensors files, in one process."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pipeline_ext as pe
from pipeline_ext.checkpoint import save_pretrained as saving

transformers = pytest.importorskip("transformers", reason="needs transformers, of the extra `test`")
pytest.importorskip("safetensors", reason="needs safetensors, of the extra `test`")

from tiny_models import NAMES, auto_class, batch, made  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:input keyword .'labels'.")  # of a ViT: one for each row


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def pipeline(model, name, **options):
    return pe.Pipeline(model, 2, 2, sample=batch(name), **options)


def same(a, b):
    assert list(a) == list(b)
    for name, value in b.items():
        assert torch.equal(a[name], value), name


# -- models on the meta device


@pytest.mark.parametrize("name", NAMES)
def test_a_model_from_meta_has_the_values_of_one_made_on_the_cpu_and_trains(name):
    model, other = made(name), made(name, "cpu")
    with pipeline(model, name) as pipe:
        same(dict(model.named_buffers()), dict(other.named_buffers()))  # also those that are not persistent
        for (at, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
            assert not ours.is_meta, at
            expected, found = theirs.detach().std().item(), ours.detach().std().item()
            if ours.numel() >= 256:
                assert found == pytest.approx(expected, rel=0.3), at
        found = pipe.verify(**batch(name))
        assert found.ok, found


@pytest.mark.parametrize("on_meta", [False, True])
def test_the_sample_may_be_on_the_meta_device_if_the_model_does_not_look_at_it(on_meta):
    text = {name: value for name, value in batch("llama").items() if name != "attention_mask"}
    sample = {name: value.to("meta") if on_meta else value for name, value in text.items()}
    with pe.Pipeline(made("llama"), 2, 2, sample=sample) as pipe:
        assert pipe.step(**text) > 0


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.scale = nn.Parameter(torch.empty(8))
        self.register_buffer("mask", torch.empty(16, 16, dtype=torch.bool), persistent=False)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.ones_(self.scale)
        self.mask.copy_(torch.ones(16, 16).triu(1).bool())

    def forward(self, x):
        mask = self.mask[: x.shape[1], : x.shape[1]]
        return x + self.scale * self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]


class Plain(nn.Module):
    """Its head is its embedding, by code around the layers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.unused = nn.Linear(2, 2)

    def forward(self, ids, mask=None):
        x = self.embed(ids)
        if mask is not None and not mask.all():  # known on meta: it comes from the inputs alone
            x = x * mask[..., None]
        for block in self.blocks:
            x = block(x)
        return F.linear(x, self.embed.weight)


def of_rows(output, target):
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


IDS = torch.arange(32).view(4, 8) % 12


def test_a_model_written_by_hand_is_initialised_by_its_layers():
    with torch.device("meta"):
        model = Plain()
    with pe.Pipeline(model, 2, 2, loss_fn=of_rows, sample={"ids": IDS, "mask": IDS > 2}) as pipe:
        assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
        same(dict(model.named_buffers()), dict(Plain().named_buffers()))
        assert torch.equal(model.blocks[3].scale, torch.ones(8))
        assert pipe.verify(ids=IDS, mask=IDS > 2, target=IDS).ok
        assert list(pipe.state_dict()) == list(Plain().state_dict())


def test_an_initialiser_of_the_model_comes_after_that_of_the_layer_and_leaves_values_alone():
    class Model(Plain):
        def _init_weights(self, module):
            if isinstance(module, nn.Embedding):
                nn.init.constant_(module.weight, 3.0)
            if isinstance(module, Block):
                nn.init.constant_(module.attention.out_proj.weight, 0.5)

    with torch.device("meta"):
        model = Model()
    given = model.blocks[1] = Block()
    before = {name: value.clone() for name, value in given.state_dict().items()}
    with pe.Pipeline(model, 2, 2, loss_fn=of_rows, sample={"ids": IDS}):
        assert (model.embed.weight == 3).all()
        assert (model.blocks[0].attention.out_proj.weight == 0.5).all()
        same(given.state_dict(), before)


def refused(match, model=None, error=pe.InvalidArgument, **sample):
    with pytest.raises(error, match=match):
        pe.Pipeline(model, 2, 2, loss_fn=of_rows, sample=sample or {"ids": IDS})


def test_what_nothing_initialises_is_refused_by_name():
    with torch.device("meta"):
        model, other = Plain(), Plain()
        model.blocks[2].register_parameter("extra", nn.Parameter(torch.ones(3)))
        other.blocks[2].table = torch.ones(3)
    refused("Block has extra on the meta device and no reset_parameters.. that could initialise", model)
    refused("Block keeps a tensor on the meta device in its attribute table.*register it as a buffer", other)


def test_code_that_needs_values_of_weights_is_refused_by_its_place():
    class Looks(Plain):
        def forward(self, ids):
            if self.embed(ids).sum() > 0:
                ids = ids.flip(1)
            return super().forward(ids)

    with torch.device("meta"):
        model = Looks()
    refused(
        r"Looks cannot run on the meta device.*test_pretrained.py:\d+, if self.embed.*on the CPU in each", model
    )


def test_a_tensor_that_the_forward_keeps_for_later_is_made_again_on_the_cpu():
    class Keeps(Plain):
        table = None

        def forward(self, ids):
            if self.table is None:
                self.table = torch.arange(8.0, device=ids.device)
            return super().forward(ids) + self.table.sum()

    with torch.device("meta"):
        model = Keeps()
    with pe.Pipeline(model, 2, 2, loss_fn=of_rows, sample={"ids": IDS}) as pipe:
        assert pipe.step(ids=IDS, target=IDS) > 0
        assert not model.table.is_meta


# -- folders


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_transformers_loads_and_a_saved_one_is_read_by_it(name, tmp_path):
    source = made(name, "cpu", seed=7)
    # Mixtral is else written with its experts one by one.
    source.save_pretrained(tmp_path / "theirs", **{"save_original_format": False} if name == "mixtral" else {})
    model = made(name)
    with pipeline(model, name) as pipe:
        assert pe.load_pretrained(pipe, tmp_path / "theirs") == ([], [])
        same(model.state_dict(), source.state_dict())
        with torch.no_grad():
            next(pipe.parameters()).add_(1.0)
        pe.save_pretrained(pipe, tmp_path / "ours", max_shard_size=4000)
    back, info = auto_class(name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    same(back.state_dict(), model.state_dict())
    assert back.config.architectures == [type(model).__name__]
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == len(dict(model.named_parameters()))  # tied ones once
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())


def test_a_plain_model_is_saved_in_one_file_and_loads_in_a_pipeline_or_alone(tmp_path):
    source = Plain()
    pe.save_pretrained(source, tmp_path / "of plain")
    assert [path.name for path in (tmp_path / "of plain").iterdir()] == ["model.safetensors"]
    model, alone = Plain(), Plain()
    with pe.Pipeline(model, 2, 2, loss_fn=of_rows, sample={"ids": IDS}) as pipe:
        pe.load_pretrained(pipe, tmp_path / "of plain")
        pe.save_pretrained(pipe, tmp_path / "again")
    pe.load_pretrained(alone, tmp_path / "again")
    same(model.state_dict(), source.state_dict())
    same(alone.state_dict(), source.state_dict())


def test_scalars_buffers_and_large_tensors_are_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline_ext.checkpoint.safetensors_folder._MAPPED", 64)
    source, model = (nn.Sequential(nn.Linear(3, 50), nn.BatchNorm1d(50)) for _ in range(2))
    source(torch.randn(4, 3))
    pe.save_pretrained(source, tmp_path)
    pe.load_pretrained(model, tmp_path)
    same(model.state_dict(), source.state_dict())
    assert model[1].num_batches_tracked == 1


def test_the_base_models_folder_loads_into_the_model_around_it_and_the_other_way(tmp_path):
    source = made("gpt2", "cpu", seed=7)
    source.transformer.save_pretrained(tmp_path / "base")
    source.save_pretrained(tmp_path / "whole")
    model, base = made("gpt2", "cpu"), made("gpt2", "cpu").transformer
    pe.load_pretrained(model, tmp_path / "base")
    pe.load_pretrained(base, tmp_path / "whole")
    same(model.state_dict(), source.state_dict())
    same(base.state_dict(), source.transformer.state_dict())


def written(tmp_path, tensors, name="model.safetensors"):
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / name)
    return tmp_path


def linear(**changes):
    return {"weight": torch.ones(2, 3), "bias": torch.ones(2), **changes}


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"weight": torch.ones(2, 3)}, "the model has bias, where the other side has nothing"),
        (linear(more=torch.ones(1)), "the files have more, where .*strict=False"),
        (
            linear(weight=torch.ones(3, 3)),
            r"'weight' is float32\[3, 3\] where the model's .* is float32\[2, 3\]",
        ),
        (
            linear(bias=torch.ones(2).bfloat16()),
            r"'bias' is bfloat16\[2\] where .*float32\[2\]; give cast=True",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name_and_nothing_changes(tensors, match, tmp_path):
    model = nn.Linear(3, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(pe.InvalidArgument, match=match):
        pe.load_pretrained(model, written(tmp_path, tensors))
    same(model.state_dict(), before)


def test_what_fits_is_loaded_if_asked_for(tmp_path):
    model = nn.Linear(3, 2)
    folder = written(tmp_path, {"weight": torch.ones(2, 3).bfloat16(), "more": torch.ones(1)})
    answer = pe.load_pretrained(model, folder, strict=False, cast=True)
    assert answer.missing_keys == ["bias"] and answer.unexpected_keys == ["more"]
    assert torch.equal(model.weight, torch.ones(2, 3))


def test_two_values_for_a_tied_parameter_are_refused(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    one = written(tmp_path, {"1.weight": torch.ones(2, 2)})
    pe.load_pretrained(model, one)
    assert (model[0].weight == 1).all()
    two = written(tmp_path, {"0.weight": torch.zeros(2, 2), "1.weight": torch.ones(2, 2)})
    with pytest.raises(pe.InvalidArgument, match="'0.weight' and '1.weight' have different values.*ties them"):
        pe.load_pretrained(model, two)


def test_experts_one_by_one_are_refused_with_the_way_to_write_them(tmp_path):
    made("mixtral", "cpu").save_pretrained(tmp_path)
    with pytest.raises(pe.InvalidArgument, match="the model has .*experts.*save_original_format=False"):
        pe.load_pretrained(made("mixtral", "cpu"), tmp_path)


def test_a_folder_without_safetensors_is_refused_with_what_to_do(tmp_path):
    model = nn.Linear(3, 2)
    with pytest.raises(pe.InvalidArgument, match="there is no such folder; .*snapshot_download"):
        pe.load_pretrained(model, tmp_path / "none")
    with pytest.raises(pe.InvalidArgument, match="neither model.safetensors nor"):
        pe.load_pretrained(model, tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(pe.InvalidArgument, match="a pickle .*save_pretrained"):
        pe.load_pretrained(model, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no such thing")
    with pytest.raises(pe.InvalidArgument, match="'model.safetensors' is damaged"):
        pe.load_pretrained(model, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"weight": "../other"}}')
    with pytest.raises(pe.InvalidArgument, match="is no index"):
        pe.load_pretrained(model, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"weight": "w", "bias": "w"}}')
    with pytest.raises(pe.InvalidArgument, match="names the file 'w', which is not there"):
        pe.load_pretrained(model, tmp_path)


def test_other_files_of_the_folder_stay_and_old_weights_go(tmp_path):
    for name in ("tokenizer.json", "pytorch_model.bin", "model-00001-of-00002.safetensors", "runs/log"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    pe.save_pretrained(nn.Linear(3, 2), tmp_path)
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert found == ["model.safetensors", "runs/log", "tokenizer.json"]
    assert (tmp_path / "runs/log").read_text() == "runs/log"


def test_a_folder_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch):
    model = nn.Linear(3, 2)
    pe.save_pretrained(model, tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    (tmp_path / "file").touch()
    for folder, size, match in (
        ("file", 1, "it is a file; give a folder"),
        ("new", 0, "max_shard_size is 0; give a number of bytes"),
    ):
        with pytest.raises(pe.InvalidArgument, match=match):
            pe.save_pretrained(model, tmp_path / folder, max_shard_size=size)

    def full(path, tensors):
        raise OSError("No space left on device")

    monkeypatch.setattr(saving, "write_file", full)
    with torch.no_grad():
        model.weight.zero_()
    with pytest.raises(pe.PipelineError, match="cannot be written: No space left"):
        pe.save_pretrained(model, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model"]


def test_without_safetensors_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for function in (pe.save_pretrained, pe.load_pretrained):
        with pytest.raises(pe.PipelineError, match="safetensors is needed.*pip install"):
            function(nn.Linear(3, 2), tmp_path)
