"""A stage of torch.distributed.pipelining as a stage of this engine."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining.stage import _PipelineStageBase
from torch.nn.parallel import DistributedDataParallel

from ..base.tensors import describe, detach, differentiable
from ..stages import boundary
from ..stages.abandoned import this_thread
from ..stages.split_backward import find_input_gradients, run_backward
from ..stages.stage import InFlight, Stage
from ..stages.step import Step
from ..stages.wrapped import layers_of, reduce_ddp
from .dataflow import dataflow_of
from .losses import Losses
from .torch_step import TorchStep


class TorchStage(Stage):
    """Runs the module of a torch stage; does not use that stage's own methods and message buffers.

    Each task is a sequence of calls that a custom function can make one by one: ``compute``, ``send_value``,
    ``differentiate`` or ``differentiate_inputs``, ``take_gradients``, ``send_gradients``, ``finish``.

    Attributes:
        torch_stage: the torch stage.
    """

    def __init__(self, stage: _PipelineStageBase, losses: Losses) -> None:
        super().__init__(stage.stage_index, stage.submod, is_last=stage.is_last)
        self.torch_stage = stage
        self._dataflow = dataflow_of(stage)
        self._losses = losses

    def begin(self, step: Step) -> None:
        super().begin(step)
        self._forget()

    def end(self) -> None:
        super().end()
        self._forget()

    def _forget(self) -> None:
        self._received: dict[int, Any] = {}  # by microbatch: what crossed the previous boundary
        self._grads: dict[int, list[Tensor | None]] = {}  # for the previous stage
        self._delayed: dict[
            int, Callable[[], None]
        ] = {}  # the weight gradients that dw_builder returned at `I`
        self._finished = 0

    def forward(self, m: int) -> None:
        step = self._current_step()
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
        self._current_step().context.apply()
        if m in self._delayed:
            self._delayed.pop(m)()
        elif m in self._weight_grads:
            self._weight_grads.pop(m).add()
        self.thread = None
        self.finish(m)

    def compute(self, m: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Runs the module and returns its output. ``args`` are used by the first stage only."""
        step = self._current_step()
        step.context.apply()
        value = None
        try:
            with step.context.forward():
                if self.index == 0:
                    (args, kwargs), received = self._entrance.receive((args, kwargs), own=True)
                else:
                    value = step.exchange.receive_value(self.index, m, self._meshes)
                    value, received = self._entrance.receive(value)
                output = self._call(value, args, kwargs)
            boundary.check_aliases(received)
        except Exception:
            self._entrance.failed()
            raise
        self._in_flight[m] = InFlight(received, [], [], [], [])
        if not self.torch_stage.is_last:
            self._received[m] = value
        elif step.keep_outputs:
            step.outputs[m] = detach(output)
        return output

    def send_value(self, m: int, output: Any) -> None:
        """Sends the output that ``compute`` returned to the next stage."""
        value = self._dataflow.sent(output, self._received.pop(m))
        sent = differentiable(value)
        self._meshes.learn(sent)
        self._in_flight[m].sent.extend(sent)
        self._current_step().exchange.send_value(self.index, m, value)

    def differentiate(self, m: int, loss: Tensor | None) -> None:
        """Runs the full backward. ``loss`` is used by the last stage only."""
        outputs, grads, received = self._start_backward(m, loss)
        if outputs:
            run_backward(outputs, grads)
        if self.torch_stage.dw_builder is not None:
            self.torch_stage.dw_builder()()
        self._end_backward(m, received)

    def differentiate_inputs(self, m: int, loss: Tensor | None) -> None:
        """Runs the input gradients, or with a ``dw_builder`` all that it does not delay."""
        outputs, grads, received = self._start_backward(m, loss)
        if self.torch_stage.dw_builder is not None:
            if outputs:
                run_backward(outputs, grads)
            self._delayed[m] = self.torch_stage.dw_builder()
        elif outputs:
            self._weight_grads[m] = find_input_gradients(outputs, grads, [t.leaf for t in received])
        self._end_backward(m, received)

    def take_gradients(self, m: int) -> list[Tensor | None]:
        """The gradients of what the previous stage sent, tensor by tensor; once only."""
        return self._grads.pop(m)

    def send_gradients(self, m: int, gradients: list[Tensor | None]) -> None:
        """Sends the gradients to the previous stage; those of the first stage are the inputs'."""
        step = self._current_step()
        if self.index == 0:
            step.input_grads[m] = gradients
        else:
            step.exchange.send_gradients(self.index, m, gradients)

    def finish(self, m: int) -> None:
        """Ends the backward of microbatch ``m``. After the last one of a step DDP reduces the gradients."""
        self.release(m)
        self._finished += 1
        if self._finished == len(self._current_step().inputs):
            for module in layers_of(DistributedDataParallel, self):
                reduce_ddp(module)

    def release(self, m: int) -> None:
        """Frees what this stage received for microbatch ``m``."""
        self._current_step().exchange.release(self.index, m)

    def _current_step(self) -> TorchStep:
        assert isinstance(self._step, TorchStep)
        return self._step

    def _start_backward(
        self, m: int, loss: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor], list[boundary.Received]]:
        """Where autograd starts, with which gradients, and the tensors whose gradients it finds."""
        self.thread = this_thread()
        step = self._current_step()
        step.context.apply()
        if loss is not None:
            # It may have one dimension, of size 1.
            self._in_flight[m].losses.append((loss.reshape(()), step.weight(m)))
        outputs, grads, in_flight = self._begin_backward(step, m)
        return outputs, grads, in_flight.received

    def _end_backward(self, m: int, received: list[boundary.Received]) -> None:
        self._entrance.returned(received)
        self._grads[m] = [tensor.gradient() for tensor in received]
        self.thread = None

    def _evaluate(self, step: Step, m: int) -> None:
        with torch.no_grad():
            self.forward(m)

    def _call(self, value: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.index > 0:
            args, kwargs = self._dataflow.arguments(value, kwargs)
        try:
            return self.torch_stage.forward_maybe_with_nosync(*args, **kwargs)
        except Exception as error:
            error.add_note(f"stage {self.index} was given {describe((args, kwargs))}")
            raise
