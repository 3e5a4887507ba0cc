"""``train --preset``, --device and --autocast: what a run is given by the machine, and by the user."""

import argparse
import json

import pytest
import torch

from pipeline_ext import InvalidArgument
from pipeline_ext.cli import main
from pipeline_ext.cli.options import Options, add_arguments, read_options
from pipeline_ext.cli.presets import PRESETS
from pipeline_ext.lm import checkpoint
from pipeline_ext.lm.gpt import count_parameters, gpt

SMALL = "--steps 4 --batch 8 --context 16 --width 16 --layers 2 --heads 2 --microbatches 4".split()


def options(*args):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return read_options(parser.parse_args(args))[0]


@pytest.fixture(params=[0, 2], ids=["no GPU", "two GPUs"])
def gpus(request, monkeypatch):
    """How many GPUs torch sees."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    # Built for CUDA, an optimizer would look at the current stream of a GPU.
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return request.param


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 400)
    return str(path)


def train(text, out, *args):
    assert main(["train", *SMALL, "--data", text, "--out", str(out), *args]) == 0
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").open()]


def test_with_no_option_the_machine_decides(gpus):
    assert options() == (Options(preset="gpu-small", **PRESETS["gpu-small"]) if gpus else Options())


def test_the_cpu_of_a_machine_with_gpus_is_a_cpu(gpus):
    assert options("--device", "cpu") == Options(device="cpu")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_only_changes_defaults(name, gpus):
    found = options("--preset", name, "--layers", "3", "--autocast", "none", "--no-overlap")
    assert (found.layers, found.autocast, found.overlap) == (3, "none", False)
    expected = {"layers": 3, "autocast": "none"}
    for key, value in PRESETS[name].items():
        assert getattr(found, key) == expected.get(key, value)


def test_the_largest_preset_fills_an_h200_and_leaves_room():
    largest = Options(**PRESETS["h200"])
    with torch.device("meta"):
        model = gpt(context=largest.context, width=largest.width, layers=largest.layers, heads=largest.heads)
    blocks = 12 * largest.width**2 * largest.layers
    tokens = largest.batch // largest.microbatches * largest.context
    kept = 40 * largest.width * tokens * largest.layers + 2 * blocks  # of a microbatch
    most = 16 * count_parameters(model) + 2 * kept
    assert 0.6 < most / (139 * 2**30) < 0.8


def test_where_and_how_to_run_is_told_to_the_pipeline_only_if_given(gpus):
    assert options().engine() == options("--device", "auto").engine() == {}
    found = options("--device", "cpu", "--overlap", "--schedule", "interleaved-1f1b", "--stages", "4")
    assert found.engine() == {"devices": ["cpu", "cpu"], "overlap": True}
    if gpus:
        assert options("--device", "cuda").engine() == {}
        found = options("--device", "cuda:1", "--graphs", "--no-overlap")
        assert found.engine() == {"devices": ["cuda:1"] * 2, "overlap": False, "graphs": True}


def test_a_gpu_that_is_not_there_is_told(gpus):
    for number in (2, 10**30):
        with pytest.raises(InvalidArgument, match=f"--device is cuda:{number} and torch sees {gpus} GPUs"):
            options("--device", f"cuda:{number}")


def test_autocast_computes_in_bfloat16_and_learns(tmp_path, text, capsys):
    exact = train(text, tmp_path / "exact")
    coarse = train(text, tmp_path / "coarse", "--autocast", "bfloat16")
    assert "bfloat16 autocast" in capsys.readouterr().out
    assert coarse != exact
    assert coarse == pytest.approx(exact, rel=0.01)
    states = checkpoint.read(tmp_path / "coarse" / "checkpoint.pt").model.values()
    assert {state.dtype for state in states} == {torch.float32}


def test_a_resumed_run_keeps_its_own_whatever_the_machine(tmp_path, text, gpus, capsys):
    train(text, tmp_path / "run", "--preset", "cpu", "--device", "cpu", "--autocast", "bfloat16")
    where = ["--resume", str(tmp_path / "run")]
    found = options(*where, "--steps", "8")
    assert (found.preset, found.device, found.autocast, found.width) == ("cpu", "cpu", "bfloat16", 16)
    with pytest.raises(InvalidArgument, match="--preset is cpu in the checkpoint and h200 here"):
        options(*where, "--steps", "8", "--preset", "h200")


def test_a_run_of_before_there_were_presets_can_be_resumed(tmp_path, text, gpus):
    out = tmp_path / "run"
    train(text, out, "--device", "cpu", "--preset", "cpu")
    saved = checkpoint.read(out / "checkpoint.pt")
    for name in ("preset", "device", "graphs", "autocast"):
        del saved.options[name]
    checkpoint.write(out / "checkpoint.pt", saved)
    found = options("--resume", str(out), "--steps", "8")
    assert (found.preset, found.device, found.graphs, found.autocast) == ("cpu", "auto", False, "none")
