"""A Trainer whose model is a pipeline."""

import contextlib
import functools
import os
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer import OPTIMIZER_NAME
from transformers.trainer_pt_utils import find_batch_size

from ..calls.program import parts_taken
from ..errors import PipelineError
from ..pipeline import Pipeline
from ..plan.build import ScheduleLike
from ..processes.gather import from_one, wait_for_all
from .gathering import whole_optimizer, whole_state
from .refusals import check_arguments, check_options, check_trainer
from .weighing import differ, fitting, rules, sizes

Items = Tensor | int | float | None  # ``num_items_in_batch``, if that is counted


class _Call(NamedTuple):
    """What the model gets for a batch or a microbatch, and what its loss is made of beside the output.

    Attributes:
        labels: None if the model computes its loss itself.
    """

    arguments: dict[str, Any]
    labels: Any
    items: Items


class _Share(NamedTuple):
    """The target of a microbatch.

    Attributes:
        weight: its share of the batch's loss; 0 for rows that only fill up a short batch.
    """

    labels: Any
    items: Items
    weight: float


class PipelineTrainer(Trainer):
    """``transformers.Trainer`` that trains its model as a pipeline.

    In one process, or under torchrun: all processes of the job then form one pipeline, get the same batches,
    and keep only their stages of the model. Process 0 logs and saves. Checkpoints are whole and those of
    Trainer: either continues the other's. Example::

        trainer = PipelineTrainer(model, args, train_dataset=data, num_stages=2, microbatches=4)
        trainer.train()

    Args:
        num_stages, microbatches, schedule: as for ``Pipeline``. A batch of ``per_device_train_batch_size`` rows
            goes through all stages, and is cut into ``microbatches``.
        pipeline_options: more keyword arguments of ``Pipeline``, as ``{"devices": [...], "pack": 2}``.
        args, kwargs: those of ``Trainer``. ``compute_loss_func`` is called with each microbatch's output.

    Raises:
        InvalidArgument: for arguments of ``Trainer`` that do not go together with a pipeline, by name.

    Attributes:
        pipe: the ``Pipeline``; None before the first batch.
    """

    def __init__(
        self,
        *args: Any,
        num_stages: int,
        microbatches: int,
        schedule: ScheduleLike = "1f1b",
        pipeline_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        options = dict(pipeline_options or {})
        check_options(options)
        self.pipe: Pipeline | None = None
        self._microbatches = microbatches
        self._options = {
            "num_stages": num_stages,
            "microbatches": microbatches,
            "schedule": schedule,
            **options,
        }
        self._cut_model: nn.Module | None = None
        self._rule: str | None = None  # by which microbatches add up, once a batch has shown it
        super().__init__(*args, **kwargs)
        check_trainer(self, PipelineTrainer, self._many)

    def create_accelerator_and_postprocess(self) -> None:
        """All processes train on the same batches, so Accelerate and Trainer must see only one.

        Each keeps its number, by which only process 0 logs and saves. The state is Accelerate's one of this
        process, so a plain Trainer with the same ``args`` sees one process too.
        """
        state = self.args.distributed_state
        if dist.is_torchelastic_launched() and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if state.device.type == "cuda" else "gloo")
        self._many = dist.is_initialized() and dist.get_world_size() > 1
        check_arguments(self.args, self._microbatches, self._many)
        self.args._n_gpu = min(self.args.n_gpu, 1)  # no DataParallel
        state.distributed_type, state.num_processes = DistributedType.NO, 1
        if self._many:
            # On a machine without GPUs Accelerate knows of other processes only with use_cpu=True.
            state.process_index = dist.get_rank()
            state.local_process_index = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
        super().create_accelerator_and_postprocess()
        self.accelerator.dataloader_config.dispatch_batches = False
        self.accelerator.device_placement = False  # Pipeline places stages
        self.accelerator.clip_grad_norm_ = self._clip

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Pipeline places stages."""

    # -- the pipeline

    def _pipeline(self, batch: Any = None) -> Pipeline:
        """The pipeline of the model, cut by a batch of the training data, or this one if there are none."""
        if self.pipe is None or self._cut_model is not self.model:
            if self.train_dataset is not None:
                batch = self._first_batch()
            assert self.model is not None
            batch = self._prepare_inputs(batch)
            items = self._get_num_items_in_batch([batch], self.args.device)
            scaler = getattr(self.accelerator, "scaler", None)
            self._cut_model = self.model
            self.pipe = Pipeline(
                self.model,
                sample=self._call(batch, items, self._count(batch)).arguments,
                loss_fn=self._loss_of_share,
                loss_reduction="sum",
                mesh=dist.group.WORLD if self._many else None,
                scaler=scaler,
                **self._options,
            )
        return self.pipe

    def _first_batch(self) -> Any:
        loader = self.get_train_dataloader()
        with _random_state_kept():
            return next(iter(getattr(loader, "base_dataloader", loader)))

    def get_train_dataloader(self) -> DataLoader:
        """Trainer's, with the random numbers of process 0 in the workers of all."""
        loader = super().get_train_dataloader()
        plain = getattr(loader, "base_dataloader", loader)
        if self._many and isinstance(plain.worker_init_fn, functools.partial):
            plain.worker_init_fn = functools.partial(plain.worker_init_fn, rank=0)
        return loader

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Cuts the model first, so that parameters of other processes are not kept in memory."""
        self._pipeline()
        return super().create_optimizer(*args, **kwargs)

    def _clip(self, parameters: Any, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """In place of Accelerate's: over the stages of all processes."""
        self.accelerator.unscale_gradients()
        assert self.pipe is not None
        return self.pipe.clip_grad_norm_(max_norm, norm_type)

    # -- losses

    def _count(self, batch: Any) -> int:
        """The microbatches that a batch fills."""
        return min(find_batch_size(batch) or 1, self._microbatches)

    def _call(self, batch: Any, items: Items, count: int) -> _Call:
        """What the model and the loss function get for each of ``count`` parts of a batch.

        A loss that is divided by the items of one of M equal parts is M times its part of the batch's. Means
        that the model adds to it, as a mixture of experts does, then enter as means.
        """
        arguments = dict(batch)
        own_loss = self.compute_loss_func is not None or self.label_smoother is not None
        labels = arguments.pop("labels", None) if own_loss else None
        items = None if items is None else items / count
        if self.model_accepts_loss_kwargs and items is not None:
            arguments["num_items_in_batch"] = items
        return _Call(arguments, labels, items)

    def _loss(self, output: Any, labels: Any, items: Items) -> Tensor:
        """The loss as ``compute_loss`` of Trainer finds it."""
        if self.compute_loss_func is not None:
            return self.compute_loss_func(output, labels, num_items_in_batch=items)
        if labels is not None:
            model: Any = self.model  # or that inside peft's
            model = model.get_base_model() if hasattr(model, "get_base_model") else model
            shifts = type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
            assert self.label_smoother is not None
            return self.label_smoother(output, labels, shift_labels=shifts, num_items_in_batch=items)
        if isinstance(output, dict) and output.get("loss") is None:
            raise PipelineError(
                f"the model returned {', '.join(output)} and no loss; give labels in the data, or "
                "compute_loss_func="
            )
        return output["loss"] if isinstance(output, dict) else output[0]

    def _loss_of_share(self, output: Any, share: _Share) -> Tensor:
        if share.weight == 0:  # a mean over no labels is not a number
            floating = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
            return torch.stack([t.nan_to_num().float().sum() for t in floating]).sum() * 0
        return self._loss(output, share.labels, share.items) * share.weight

    def _weights(self, batch: Any, items: Items) -> list[float]:
        """By microbatch, its share of the batch's loss."""
        count, labels = self._count(batch), batch.get("labels")
        rows = find_batch_size(batch) or 1
        candidates = rules(labels, rows, count, divided=items is not None)
        if self._rule is None and count > 1 and (labels is None or differ(candidates)):
            call = self._call(batch, items, count)
            losses = [self._measured(part) for part in self._cut(call, rows, count)]
            self._rule = fitting(candidates, losses, self._measured(self._call(batch, items, 1)))
        return candidates.get(self._rule or "rows", candidates["rows"])

    def _cut(self, call: _Call, rows: int, count: int) -> list[_Call]:
        cutter = self._pipeline()._stepper.cutter
        parts = cutter.cut_inputs(cutter.given_inputs((), call.arguments, None, None, [count]), count).parts
        labels = [None] * count if call.labels is None else call.labels.split(sizes(rows, count))
        return [_Call(arguments, of_part, call.items) for (_, arguments), of_part in zip(parts, labels)]

    def _measured(self, call: _Call) -> float:
        """The loss of a batch, or of a part of one, without gradients."""
        output = self._pipeline().eval(kwarg_mbs=[call.arguments])
        return self._from_last(lambda: float(self._loss(output, call.labels, call.items)))

    def _from_last(self, value: Callable[[], Any]) -> Any:
        """``value()`` of the process that has the last stage, in all processes."""
        if not self._many:
            return value()
        last = self._pipeline().plan.rank_of_stage[-1]
        return from_one(value() if dist.get_rank() == last else None, last)

    # -- steps

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Items = None
    ) -> Tensor:
        """A batch forward and backward through all stages; returns its loss."""
        model.train()
        optimizer: Any = self.optimizer
        if callable(getattr(optimizer, "train", None)):
            optimizer.train()
        batch = self._prepare_inputs(inputs)
        pipe = self._pipeline(batch)
        weights = self._weights(batch, num_items_in_batch)
        call = self._call(batch, num_items_in_batch, len(weights))
        if not self._scaled(num_items_in_batch):
            weights = [weight / self.current_gradient_accumulation_steps for weight in weights]
        rows, missing = find_batch_size(batch) or 1, self._microbatches - len(weights)
        of_each = [None] * len(weights) if call.labels is None else call.labels.split(sizes(rows, len(weights)))
        shares = [_Share(labels, call.items, weight) for labels, weight in zip(of_each, weights)]
        shares += [_Share(shares[0].labels, call.items, 0.0)] * missing
        arguments = _filled_up(call.arguments, rows, missing) if missing else call.arguments
        loss = pipe.step(**arguments, target_mbs=shares)
        assert isinstance(loss, Tensor)
        return loss.to(self.args.device)

    def _scaled(self, items: Items) -> bool:
        """Whether losses are divided by what a whole accumulation has; as ``training_step`` of Trainer says."""
        said: bool | None = getattr(self, "loss_is_scaled_for_ga", None)
        if said is not None:
            return said
        return (self.model_accepts_loss_kwargs and items is not None) or self.compute_loss_func is not None

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """A batch forward; returns loss, predictions and labels."""

        def run(**batch: Any) -> Any:
            return self._evaluated(batch, None, not prediction_loss_only)[1]

        in_place: Any = run  # of the model
        in_place.keeps_outputs = not prediction_loss_only
        return super().prediction_step(in_place, inputs, prediction_loss_only, ignore_keys)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Items = None,
    ) -> Any:
        """The loss of a batch without gradients; ``model`` is what ``prediction_step`` made of it."""
        weights = self._weights(inputs, num_items_in_batch)
        loss, outputs = self._evaluated(inputs, num_items_in_batch, model.keeps_outputs, weights)
        return (loss, outputs) if return_outputs else loss

    def _evaluated(
        self, batch: Any, items: Items, keeps_outputs: bool, weights: list[float] | None = None
    ) -> tuple[Tensor | None, Any]:
        """The loss, if there are ``weights`` of microbatches, and the outputs, or nothing in their place."""
        pipe, count = self._pipeline(batch), self._count(batch)
        call = self._call(batch, items, count)
        outputs = pipe.eval(**call.arguments)

        def found() -> tuple[Tensor | None, Any]:
            loss = None
            if weights is not None and (self.compute_loss_func is not None or call.labels is not None):
                loss = self._loss(outputs, call.labels, items)
            elif weights is not None:
                of_each = outputs if isinstance(outputs, list) else [outputs]
                losses = torch.cat([self._loss(output, None, None).reshape(-1) for output in of_each])
                loss = torch.stack([loss * w for loss, w in zip(losses, weights) if w]).sum()
            if keeps_outputs and isinstance(outputs, list):
                raise PipelineError(
                    "the outputs of the microbatches cannot be joined: their shapes differ, or they hold a "
                    "cache; give prediction_loss_only=True or use_cache=False to TrainingArguments"
                )
            # A dict in place of a class of transformers: classes are not sent.
            plain = dict(outputs) if self._many and isinstance(outputs, dict) else outputs
            kept = (loss, plain if keeps_outputs else {})
            return pytree.tree_map_only(Tensor, Tensor.cpu, kept) if self._many else kept

        return pytree.tree_map_only(Tensor, lambda t: t.to(self.args.device), self._from_last(found))

    # -- checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the whole model; all processes call it together."""
        super().save_model(output_dir, _internal_call)
        self._wait()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self._many and self.pipe is not None:
            state_dict = whole_state(self.pipe)
        super()._save(output_dir, state_dict)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        self._wait()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._many:
            assert self.optimizer is not None
            state = whole_optimizer(self.optimizer)
            if self.args.should_save:
                torch.save(state, os.path.join(output_dir, OPTIMIZER_NAME))

    def _load_best_model(self) -> None:
        """Each process takes what it holds; peft asks the model for its names."""
        with parts_taken():
            super()._load_best_model()

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with parts_taken():
            super()._load_from_checkpoint(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        """Of process 0: all draw the same numbers."""
        if self.args.should_save:
            super()._save_rng_state(output_dir)

    def _wait(self) -> None:
        """Until process 0 has written."""
        if self._many:
            wait_for_all()


def _filled_up(arguments: dict[str, Any], rows: int, missing: int) -> dict[str, Any]:
    """The arguments of a short batch with its first row once more for each microbatch that is missing."""

    def more(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != rows:
            return tensor
        return torch.cat([tensor, *[tensor[:1]] * missing])

    return pytree.tree_map_only(Tensor, more, arguments)


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(of_numpy)
