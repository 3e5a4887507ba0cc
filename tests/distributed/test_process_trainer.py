"""PipelineTrainer in two processes, as torchrun starts them, trains as Trainer does in one."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[2] / "examples"))
import lora_trainer
from launcher import torchrun
from trainers import MODELS, assert_same_history, history, trainer
from transformers import Trainer

from pipeline_ext.transformers import PipelineTrainer


def as_torchrun_says():
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}


def total(prediction):
    return {"sum": float(abs(prediction.predictions).sum())}


OPTIONS = {
    "gradient_accumulation_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
    "compute_metrics": total,
}


def train(name, folder, resume):
    """Trains, and goes on from the first checkpoint; returns histories, and how much of the model is here."""
    as_torchrun_says()
    trained = trainer(PipelineTrainer, name, folder, **OPTIONS)
    trained.train()
    resumed = trainer(PipelineTrainer, name, folder, **OPTIONS)
    resumed.train(resume_from_checkpoint=resume or f"{folder}/checkpoint-2")
    resumed.save_model(f"{folder}/saved")
    with_workers = trainer(PipelineTrainer, name, folder, dataloader_num_workers=1).get_train_dataloader()
    assert with_workers.base_dataloader.worker_init_fn.keywords["rank"] == 0
    here = sum(p.numel() for p in trained.model.parameters() if not p.is_meta)
    return history(trained), history(resumed), here / sum(p.numel() for p in trained.model.parameters())


@pytest.mark.parametrize("name", ["gpt2", "lora"])
def test_losses_checkpoints_and_evaluation_are_those_of_trainer(name, tmp_path):
    plain = trainer(Trainer, name, tmp_path / "plain", **OPTIONS)
    plain.train()
    theirs = str(tmp_path / "plain" / "checkpoint-2") if name == "gpt2" else None
    (first, rest, part), (second, *_, other) = run(2, train, name, tmp_path / "two", theirs, timeout=200)
    assert first == second
    assert_same_history(first, history(plain))
    assert_same_history(rest[:-1], history(plain)[:-1])  # the last has the mean of the steps since it went on
    assert part < 0.8 and other < 0.8

    torch.manual_seed(0)
    again = MODELS[name]()
    if name == "gpt2":
        again = type(again).from_pretrained(tmp_path / "two" / "saved")
    else:
        again.load_adapter(tmp_path / "two" / "saved", "default")
    for key, value in plain.model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=1e-4, atol=1e-4, msg=key)


def test_the_example_in_the_processes_of_torchrun_trains_as_in_one(tmp_path):
    """Nothing tells Trainer of the processes but torchrun's own variables."""
    alone = lora_trainer.main(str(tmp_path / "alone"))
    two = torchrun(2, [lora_trainer.__file__, "two"], tmp_path)
    assert two.returncode == 0, two.stderr
    losses = [f"{entry['eval_loss']:.4g}" for entry in alone.state.log_history if "eval_loss" in entry]
    found = re.findall(r"'eval_loss': '([\d.]+)", two.stdout)
    assert [float(loss) for loss in found] == [float(loss) for loss in losses] and len(losses) > 3
    assert (tmp_path / "two" / "adapter_model.safetensors").exists()
