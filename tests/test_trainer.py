"""PipelineTrainer trains as Trainer does: losses, norms, rates, evaluation, checkpoints."""

import pytest
import torch
from trainers import Tagger, assert_same_history, history, trainer
from transformers import Trainer

import pipeline_ext as pe
from pipeline_ext.transformers import PipelineTrainer


def both(name, tmp_path, **options):
    """The histories of PipelineTrainer and Trainer."""
    found = []
    pipeline = {key: options.pop(key) for key in ("microbatches", "num_stages") if key in options}
    for cls in (PipelineTrainer, Trainer):
        trained = trainer(
            cls, name, tmp_path / cls.__name__, **options, **(pipeline if cls is PipelineTrainer else {})
        )
        trained.train()
        found.append(history(trained))
    return found


def total(prediction):
    return {"sum": float(abs(prediction.predictions).sum())}


@pytest.mark.parametrize("name", ["gpt2", "llama", "lora", "tagger"])
def test_losses_norms_and_evaluation_are_those_of_trainer(name, tmp_path):
    options = {"gradient_accumulation_steps": 2, "eval_strategy": "epoch", "compute_metrics": total}
    ours, theirs = both(name, tmp_path, **options)
    assert_same_history(ours, theirs)
    assert sum("eval_sum" in entry for entry in ours) == 2


def test_uneven_microbatches_are_weighed_too(tmp_path):
    for name in ("llama", "tagger"):
        assert_same_history(*both(name, tmp_path, microbatches=3, num_train_epochs=1, max_steps=2))


def test_label_smoothing_is_that_of_trainer(tmp_path):
    assert_same_history(*both("llama", tmp_path, label_smoothing_factor=0.1, eval_strategy="epoch"))


def mean_loss(outputs, labels, num_items_in_batch=None):
    """Does not divide by the items."""
    return torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())


def test_a_loss_function_gets_each_microbatch(tmp_path):
    assert_same_history(*both("llama", tmp_path, compute_loss_func=mean_loss, eval_strategy="epoch"))


def test_mixed_precision_trains_in_bf16(tmp_path):
    ours, theirs = both("llama", tmp_path, bf16=True, num_train_epochs=1)
    assert_same_history(ours, theirs, rel=2e-2)
    assert ours != both("llama", tmp_path, num_train_epochs=1)[0]


def test_activation_checkpointing_and_another_schedule(tmp_path):
    ours = trainer(
        PipelineTrainer, "llama", tmp_path, gradient_checkpointing=True, pipeline_options={"pack": 2}
    )
    ours.train()
    theirs = trainer(Trainer, "llama", tmp_path)
    theirs.train()
    assert_same_history(history(ours), history(theirs))


@pytest.mark.parametrize("name, first", [("gpt2", Trainer), ("lora", PipelineTrainer)])
def test_a_training_continues_where_a_checkpoint_ends(name, first, tmp_path):
    whole = trainer(PipelineTrainer, name, tmp_path / "whole")
    whole.train()
    trainer(first, name, tmp_path / "parts", save_strategy="steps", save_steps=2).train()
    rest = trainer(PipelineTrainer, name, tmp_path / "parts")
    rest.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert_same_history(history(rest)[-5:-1], history(whole)[-5:-1])
    torch.testing.assert_close(rest.model.state_dict(), whole.model.state_dict(), rtol=1e-4, atol=1e-4)


def test_the_model_can_be_used_and_saved_after_training(tmp_path):
    trained = trainer(PipelineTrainer, "llama", tmp_path, num_train_epochs=1)
    before = trained.evaluate()["eval_loss"]
    trained.train()
    assert trained.evaluate()["eval_loss"] < before
    assert trained.predict(trained.eval_dataset).predictions.shape == (6, 10, 64)
    trained.save_model()
    again = type(trained.model).from_pretrained(tmp_path)
    ids = torch.randint(64, (1, 3))
    assert torch.equal(again.generate(ids, max_length=9), trained.model.generate(ids, max_length=9))


@pytest.mark.parametrize(
    "options, said",
    [
        ({"torch_compile": True}, "compile the layers"),
        ({"auto_find_batch_size": True}, "give the batch size"),
        ({"bf16_full_eval": True}, "give bf16=True"),
        ({"optim": "lomo"}, "steps after the backward"),
        ({"per_device_train_batch_size": 2}, "give at least 4"),
        ({"pipeline_options": {"loss_fn": mean_loss}}, "devices, cuts"),
    ],
)
def test_what_does_not_go_together_is_refused_before_training(options, said, tmp_path):
    with pytest.raises(pe.InvalidArgument, match=said):
        trainer(PipelineTrainer, "gpt2", tmp_path, **options)


def test_a_trainer_with_its_own_loss_is_refused_and_a_loss_function_is_the_way(tmp_path):
    class Own(PipelineTrainer):
        def compute_loss(self, model, inputs, **options):
            return mean_loss(model(**inputs), inputs["labels"])

    with pytest.raises(pe.InvalidArgument, match="Own has its own compute_loss.*give compute_loss_func="):
        trainer(Own, "gpt2", tmp_path)
    trainer(PipelineTrainer, "gpt2", tmp_path, compute_loss_func=mean_loss).train()


class Spread(Tagger):
    """Its loss is no mean over rows or labels."""

    def forward(self, input_ids, labels=None, **kwargs):
        output = super().forward(input_ids)
        output.loss = 1.0 * output.logits.std()  # Trainer writes to it
        return output


def test_a_loss_that_does_not_follow_from_its_parts_is_refused(tmp_path):
    with pytest.raises(pe.PipelineError, match="no mean of its microbatches' losses.*or microbatches=1"):
        trainer(PipelineTrainer, Spread(), tmp_path).train()
    histories = []
    for cls, options in ((PipelineTrainer, {"microbatches": 1}), (Trainer, {})):
        torch.manual_seed(0)
        trained = trainer(cls, Spread(), tmp_path, num_train_epochs=1, **options)
        trained.train()
        histories.append(history(trained))
    assert_same_history(*histories)
