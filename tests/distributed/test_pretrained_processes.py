"""Models of which no process has the whole: made on the meta device, loaded, trained, saved."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import Failed, outcomes, run
from torch import nn

import pipeline_ext as pe

pytest.importorskip("transformers", reason="needs transformers, of the extra `test`")
pytest.importorskip("safetensors", reason="needs safetensors, of the extra `test`")

sys.path.append(str(Path(__file__).parents[1]))
from tiny_models import auto_class, batch, made

NAMES = ("llama-tied", "gpt2", "t5", "mixtral", "vit")


def quiet():
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "input keyword .'labels'.")  # of a ViT: one for each row


def pipeline(model, name):
    return pe.Pipeline(model, 2, 2, sample=batch(name), mesh=dist.group.WORLD)


def of_both(value):
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def plain_step(model, name):
    rows = batch(name)
    losses = []
    for m in range(2):
        loss = model(**{key: value[2 * m : 2 * m + 2] for key, value in rows.items()}).loss / 2
        loss.backward()
        losses.append(loss.item())
    torch.optim.SGD(model.parameters(), 0.1).step()
    return sum(losses)


def trains_from_a_folder(name, device, folder):
    """What is asserted here holds in each process."""
    whole = made(name, "cpu", seed=7)
    model = made(name, device, seed=dist.get_rank() if device == "meta" else 0)
    with pipeline(model, name) as pipe:
        states = of_both(pipe.state_dict())
        assert {key for state in states for key in state} == set(whole.state_dict())
        assert all(len(state) < len(whole.state_dict()) for state in states)
        tied = set(states[0]) & set(states[1])
        assert all(torch.equal(states[0][key], states[1][key]) for key in tied)  # from different seeds
        assert not any(value.is_meta for value in pipe.state_dict().values())
        whole.load_state_dict({key: value for state in states for key, value in state.items()}, strict=True)
        buffers = dict(whole.named_buffers())
        around = {key: value for key, value in model.named_buffers() if not value.is_meta}
        assert all(torch.equal(value, buffers[key]) for key, value in around.items())

        source = made(name, "cpu", seed=7)
        if dist.get_rank() == 0:
            source.save_pretrained(f"{folder}/source", save_original_format=False)
        dist.barrier()
        assert pe.load_pretrained(pipe, f"{folder}/source") == ([], [])
        loss = pipe.step(**batch(name))
        torch.optim.SGD(pipe.parameters(), 0.1).step()
        assert loss.item() == pytest.approx(plain_step(source, name), rel=1e-5)
        pe.save_pretrained(pipe, f"{folder}/saved", max_shard_size=4000)
        for use in (
            lambda: model(**batch(name)),
            lambda: model.save_pretrained(f"{folder}/no"),
            model.state_dict,
        ):
            with pytest.raises(
                pe.PipelineError, match=r"in another process.*pipe, folder|own part.*pipe, folder"
            ):
                use()
        if hasattr(model, "generate"):
            with pytest.raises(pe.PipelineError, match="in another process.*call eval"):
                model.generate(batch(name)["input_ids"])
    back, info = auto_class(name).from_pretrained(f"{folder}/saved", output_loading_info=True)
    assert not any(info.values()), info
    for (key, ours), theirs in zip(back.state_dict().items(), source.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7, msg=key)


def all_train_from_folders(folder):
    quiet()
    for name in NAMES:
        trains_from_a_folder(name, "meta", f"{folder}/{name}")
    trains_from_a_folder("t5", "cpu", f"{folder}/cpu")
    return True


def test_each_process_makes_loads_trains_and_saves_its_own_stage(tmp_path):
    for name in (*NAMES, "cpu"):
        (tmp_path / name).mkdir()
    assert run(2, all_train_from_folders, str(tmp_path), timeout=300.0) == [True, True]


# -- a plain model, whose head is its embedding


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(4))
        self.unused = nn.Linear(2, 2)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return F.linear(x, self.embed.weight)


IDS = torch.arange(16) % 12


def of_plain(mesh=None):
    with torch.device("meta"):
        model = Plain()
    return pe.Pipeline(model, 2, 2, loss_fn=F.cross_entropy, sample=IDS, mesh=mesh or dist.group.WORLD)


def plain_with_replicas(folder):
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))
    torch.manual_seed(dist.get_rank())
    with of_plain(mesh) as pipe:
        mine = dict(pipe.state_dict())
        pe.save_pretrained(pipe, folder)
        with torch.no_grad():
            for parameter in pipe.parameters():
                parameter.zero_()
        pe.load_pretrained(pipe, folder)
        pipe.step(IDS, target=IDS)
        return {name: (value, pipe.state_dict()[name]) for name, value in mine.items()}


def test_replicas_and_ties_by_code_around_layers(tmp_path):
    found = run(4, plain_with_replicas, str(tmp_path / "folder"))
    assert [list(state) for state in found[:2]] == [list(state) for state in found[2:]]
    assert set(found[0]) | set(found[1]) == set(Plain().state_dict())
    assert "embed.weight" in found[0] and "embed.weight" in found[1] and "unused.weight" not in found[1]
    model = Plain()
    pe.load_pretrained(model, tmp_path / "folder")
    for state in found:
        for name, (_, after) in state.items():
            if "running" not in name and "tracked" not in name:
                assert torch.equal(after, model.state_dict()[name]), name


def list_of_stages(folder):
    """Tied, and named as in nn.Sequential."""
    with torch.device("meta"):
        stages = [nn.Linear(4, 4), nn.Linear(4, 4)]
        stages[1].weight = stages[0].weight
    with pe.Pipeline(stages, microbatches=2, loss_fn=F.mse_loss, mesh=dist.group.WORLD) as pipe:
        pe.save_pretrained(pipe, folder, max_shard_size=1)
        before = {name: value.clone() for name, value in pipe.state_dict().items()}
        with torch.no_grad():
            for parameter in pipe.parameters():
                parameter.zero_()
        pe.load_pretrained(pipe, folder)
        return all(torch.equal(value, before[name]) for name, value in pipe.state_dict().items())


def test_a_list_of_stages_with_a_tied_weight(tmp_path):
    assert run(2, list_of_stages, str(tmp_path / "folder")) == [True, True]
    index = json.loads((tmp_path / "folder" / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == ["0.bias", "0.weight", "1.bias"]


# -- errors


def loads_a_wrong_shape(folder):
    with of_plain() as pipe:
        pe.load_pretrained(pipe, folder)


def test_what_one_process_refuses_all_refuse_by_name(tmp_path):
    from safetensors.torch import save_file

    state = Plain().state_dict() | {"blocks.3.0.bias": torch.zeros(3)}  # of the second process
    save_file(dict(state), tmp_path / "model.safetensors")
    for outcome in outcomes(2, loads_a_wrong_shape, str(tmp_path)):
        assert isinstance(outcome, Failed) and outcome.kind is pe.InvalidArgument
        assert r"'blocks.3.0.bias' is float32[3] where the model's" in outcome.message


def fails_to_write(folder):
    def full(path, tensors):
        raise OSError("No space left on device")

    from pipeline_ext.checkpoint import save_pretrained

    save_pretrained.write_file = full
    with of_plain() as pipe:
        pe.save_pretrained(pipe, folder)


def test_what_the_writing_process_cannot_do_all_report(tmp_path):
    for outcome in outcomes(2, fails_to_write, str(tmp_path / "folder")):
        assert isinstance(outcome, Failed) and outcome.kind is pe.PipelineError
        assert "cannot be written: No space left" in outcome.message
    assert not list(tmp_path.iterdir())
