"""What does not go together with a pipeline inside a Trainer, refused before anything trains."""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import Trainer, TrainingArguments

from ..errors import InvalidArgument

_OPTIONS = (
    "devices cuts balance kwargs_spec overlap reactive pack pack_forward wire wire_forward in_flight costs "
    "timeout trace"
).split()


def check_options(options: Mapping[str, Any]) -> None:
    """Raises InvalidArgument for arguments of Pipeline that the trainer decides itself."""
    for name in options:
        if name not in _OPTIONS:
            raise InvalidArgument(
                f"pipeline_options names {name!r}, which the trainer does not pass on to Pipeline; it passes "
                f"on {', '.join(_OPTIONS)}"
            )


def check_arguments(args: TrainingArguments, microbatches: int, many: bool) -> None:
    """Raises InvalidArgument for training arguments that do not go together with a pipeline.

    ``many``: whether several processes hold it.
    """
    for given, what, instead in _of_arguments(args, many):
        if given:
            raise InvalidArgument(f"PipelineTrainer and {what} do not go together; {instead}")
    if args.per_device_train_batch_size < microbatches:
        raise InvalidArgument(
            f"per_device_train_batch_size is {args.per_device_train_batch_size}, too few rows for "
            f"{microbatches} microbatches; it is the batch that all stages train on together, so give at least "
            f"{microbatches}, and fewer gradient_accumulation_steps"
        )


def _of_arguments(args: TrainingArguments, many: bool) -> Iterable[tuple[Any, str, str]]:
    layers = "compile the layers, as in model.model.layers[0].compile()"
    yield args.deepspeed, "deepspeed", "leave deepspeed= out: the stages share out the model"
    yield args.fsdp, "fsdp", "leave fsdp= out: the stages share out the model"
    yield args.torch_compile, "torch_compile", f"leave it out, and {layers}"
    yield getattr(args, "parallelism_config", None), "parallelism_config", "leave it out"
    yield args.auto_find_batch_size, "auto_find_batch_size", "give the batch size"
    half = args.fp16_full_eval or args.bf16_full_eval
    yield half, "fp16_full_eval or bf16_full_eval", "give bf16=True, which evaluation uses too"
    yield many and args.fp16, "fp16=True in many processes", "give bf16=True, which needs no gradient scaler"
    yield "lomo" in args.optim, f"optim={str(args.optim)!r}", "give an optimizer that steps after the backward"


def check_trainer(trainer: Trainer, base: type[Trainer], many: bool) -> None:
    """Raises InvalidArgument for a model or a subclass that does not go together with a pipeline."""
    for name in ("compute_loss", "training_step", "prediction_step"):
        if getattr(type(trainer), name) is not getattr(base, name):
            raise InvalidArgument(
                f"{type(trainer).__name__} has its own {name}, which a pipeline does not call; give "
                "compute_loss_func=, which is called with each microbatch's output and labels"
            )
    model = trainer.model
    if trainer.is_model_parallel:
        raise InvalidArgument(
            "the model was loaded onto several devices with device_map; load it without, and give "
            'pipeline_options={"devices": [...]}'
        )
    if (getattr(model, "tp_size", None) or 1) > 1 or trainer.is_distributed_loading_by_transformers:
        raise InvalidArgument("the model was loaded for tensor parallelism (tp_plan); load it without")
    if many and trainer.model_init is not None:
        raise InvalidArgument("model_init and many processes do not go together; give model=")
