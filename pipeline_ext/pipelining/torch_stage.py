"""A stage of torch.distributed.pipelining as a stage of this engine."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.pipelining.stage import _PipelineStageBase
from torch.nn.parallel import DistributedDataParallel

from ..base.tensors import describe, detach, differentiable
from ..stages import boundary
from ..stages.abandoned import this_thread
from ..stages.split_backward import find_input_gradients, run_backward
from ..stages.stage import Stage, _InFlight
from ..stages.step import Step
from ..stages.wrapped import layers_of, reduce_ddp
from .links import link_of


class Losses(Protocol):
    """Where the last stage's losses come from."""

    def compute(self, stage: _PipelineStageBase, m: int, output: Any) -> None:
        """Computes that of microbatch ``m``, where there is one to compute."""

    def of(self, stage: _PipelineStageBase, m: int) -> Tensor | None:
        """That of microbatch ``m``; None but for the last stage."""


class TorchStage(Stage):
    """Runs the module of a torch stage, whose own methods and buffers for messages it does without.

    The tasks consist of parts that a custom function can call one by one: ``compute``, ``send_value``,
    ``differentiate``, ``send_gradients``, ``finish``.

    Attributes:
        torch_stage: the stage of torch's.
    """

    def __init__(self, stage: _PipelineStageBase, losses: Losses) -> None:
        super().__init__(stage.stage_index, stage.submod, is_last=stage.is_last)
        self.torch_stage = stage
        self._link = link_of(stage)
        self._losses = losses

    def begin(self, step: Step) -> None:
        super().begin(step)
        self._forget()

    def end(self) -> None:
        super().end()
        self._forget()

    def _forget(self) -> None:
        self._came: dict[int, Any] = {}  # by microbatch: what crossed the boundary before
        self._grads: dict[int, list[Tensor | None]] = {}  # for the stage before
        self._delayed: dict[int, Callable[[], None]] = {}  # what dw_builder has made of an I
        self._finished = 0

    # -- tasks

    def forward(self, m: int) -> None:
        step = self._step
        output = self.compute(m, *step.inputs[m])
        if self.torch_stage.is_last:
            with step.context.forward():
                self._losses.compute(self.torch_stage, m, output)
        else:
            self.send_value(m, output)

    def backward(self, m: int) -> None:
        self.differentiate(m, self._losses.of(self.torch_stage, m))
        self.send_gradients(m, self.take_gradients(m))
        self.finish(m)

    def input_gradient(self, m: int) -> None:
        self.differentiate_inputs(m, self._losses.of(self.torch_stage, m))
        self.send_gradients(m, self.take_gradients(m))

    def weight_gradient(self, m: int) -> None:
        self.thread = this_thread()
        self._step.context.apply()
        if m in self._delayed:
            self._delayed.pop(m)()
        elif m in self._weight_grads:
            self._weight_grads.pop(m).add()
        self.thread = None
        self.finish(m)

    # -- their parts

    def compute(self, m: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Runs the module and returns what it returned. ``args`` are the first stage's."""
        step = self._step
        step.context.apply()
        try:
            with step.context.forward():
                if self.index == 0:
                    came = None
                    (args, kwargs), received = self._entrance.receive((args, kwargs), own=True)
                else:
                    value = step.exchange.receive_value(self.index, m, self._meshes)
                    came, received = self._entrance.receive(value)
                output = self._call(came, args, kwargs)
            boundary.check_aliases(received)
        except Exception:
            self._entrance.failed()
            raise
        self._in_flight[m] = _InFlight(received, [], [], [], [])
        if not self.torch_stage.is_last:
            self._came[m] = came
        elif step.keep_outputs:
            step.outputs[m] = detach(output)
        return output

    def send_value(self, m: int, output: Any) -> None:
        """Sends what ``compute`` returned on to the next stage."""
        value = self._link.value(output, self._came.pop(m))
        sent = differentiable(value)
        self._meshes.learn(sent)
        self._in_flight[m].sent.extend(sent)
        self._step.exchange.send_value(self.index, m, value)

    def differentiate(self, m: int, loss: Tensor | None) -> None:
        """Runs the whole backward. ``loss`` is the last stage's."""
        outputs, grads, received = self._begin(m, loss)
        if outputs:
            run_backward(outputs, grads)
        if self.torch_stage.dw_builder is not None:
            self.torch_stage.dw_builder()()
        self._end(m, received)

    def differentiate_inputs(self, m: int, loss: Tensor | None) -> None:
        """Runs what leads to the inputs, or all but what ``dw_builder`` delays."""
        outputs, grads, received = self._begin(m, loss)
        step = self._step
        if self.torch_stage.dw_builder is not None:
            if outputs:
                run_backward(outputs, grads)
            self._delayed[m] = self.torch_stage.dw_builder()
        elif outputs:
            self._weight_grads[m] = find_input_gradients(
                outputs,
                grads,
                [tensor.leaf for tensor in received],
                weights=self.parameters,
                check=lambda: self._check_current(step),
            )
        self._end(m, received)

    def take_gradients(self, m: int) -> list[Tensor | None]:
        """Those of what came from the stage before, tensor by tensor, as the backward found them."""
        return self._grads.pop(m)

    def send_gradients(self, m: int, gradients: list[Tensor | None]) -> None:
        """Sends them there; of the first stage they are the inputs'."""
        if self.index == 0:
            self._step.input_grads[m] = gradients
        else:
            self._step.exchange.send_gradients(self.index, m, gradients)

    def finish(self, m: int) -> None:
        """Microbatch ``m`` needs nothing any more. After the last of the step DDP reduces the gradients."""
        self.release(m)
        self._finished += 1
        if self._finished == len(self._step.inputs):
            for module in layers_of(DistributedDataParallel, self):
                reduce_ddp(module)

    def release(self, m: int) -> None:
        """What has come for microbatch ``m`` is needed no more."""
        self._step.exchange.release(self.index, m)

    def _begin(self, m: int, loss: Tensor | None) -> tuple:
        self.thread = this_thread()
        self._step.context.apply()
        if loss is not None:
            self._in_flight[m].losses.append(loss.reshape(()))  # of one element
        outputs, grads, in_flight = self._begin_backward(self._step, m)
        return outputs, grads, in_flight.received

    def _end(self, m: int, received: list[boundary.Received]) -> None:
        self._entrance.returned(received)
        self._grads[m] = [tensor.gradient() for tensor in received]
        self.thread = None

    def _evaluate(self, step: Step, m: int) -> None:
        with torch.no_grad():
            self.forward(m)

    def _call(self, came: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.index > 0:
            args, kwargs = self._link.arguments(came, kwargs)
        try:
            return self.torch_stage.forward_maybe_with_nosync(*args, **kwargs)
        except Exception as error:
            error.add_note(f"stage {self.index} was given {describe((args, kwargs))}")
            raise
