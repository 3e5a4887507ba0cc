"""A stage that runs the model's own forward and computes its share of the calls."""

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import PipelineError
from ..stages.drawing import AROUND, Calls
from .hooks import run_hooks
from .message import Message, sources_of_calls
from .program import INPUTS, CallOfUnit, Effect, Program
from .routing import Call, running
from .values import Leaf, copied, is_look, look_of, read_look, stand_in


class _Stop(BaseException):
    """The forward has come to the first call of the next stage. No ``except Exception`` of a model takes it."""


class CallStage(nn.Module):
    """The calls ``begin`` to ``end`` of a program.

    The first stage takes the model's arguments; each other one a tuple, the ``Message`` of the stage before.
    The last returns the model's output. Its children are the units that it calls.
    """

    program: Program
    turns: contextlib.AbstractContextManager[Any]  # with other stages, if they cannot run at the same time

    def __init__(self, program: Program, begin: int, end: int) -> None:
        super().__init__()
        self.__dict__["program"] = program  # no child: it has the whole model
        self.__dict__["turns"] = program.turns if program.exclusive else contextlib.nullcontext()
        self.begin, self.end = begin, end
        self.is_last = end == len(program.calls)
        self.received = sources_of_calls(program.live_at(begin))
        # Of what calls leave: what is passed on, and whether code around units writes to it.
        passed = [] if self.is_last else sources_of_calls(program.live_at(end))
        self.sent = {source: source in program.written for source in passed}
        self._drops = frozenset() if self.is_last else program.dropped_at(end)
        self._lacks = begin > 0 and bool(program.dropped_at(begin))  # arguments: looks may stand in their place
        self._writes = any(source.call == INPUTS for source in program.written)
        calls = [*program.calls[begin:end], *([program.output] if self.is_last else [])]
        # Names with dots, which add_module refuses, give parameters the names of the unsplit model.
        for call in program.calls[begin:end]:
            self._modules[call.name] = call.unit
        inside = set(self.modules())
        for owner in dict.fromkeys(held.owner for held in program.parameters_of(calls)):
            if owner not in inside:
                self._modules[program.name_of(owner)] = program.holder(owner)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.begin == 0:
            arguments = self.program.arranged((args, kwargs))
            message = Message((), None, {}, self.program.leaves_of(arguments), arguments)
        else:
            message = Message.read(args[0], self.received)
        with self.turns:
            return self._run(message)

    def _run(self, message: Message) -> Any:
        run = _StageRun(self, message)
        args, kwargs = self._given(run, message)
        try:
            with run.random, running(run):
                output = self.program.model(*args, **kwargs)
        except _Stop:
            return run.message(self._left(message.leaves), message.arguments).write(self.sent)
        return run.finish(output)

    def _given(self, run: "_StageRun", message: Message) -> Any:
        """The arguments of the model's forward."""
        arguments = message.arguments
        if message.leaves is not None and self.begin > 0:
            opened = [run.opened(leaf) for leaf in message.leaves] if self._lacks else message.leaves
            arguments = self.program.arguments_of(opened)
        # Copies if the model's code writes to them: the next stage gets them as given.
        return copied(arguments) if self._writes else arguments

    def _left(self, leaves: list[Any] | None) -> list[Any] | None:
        """The leaves of the arguments that later stages need; looks of the others."""
        if not self._drops or leaves is None:
            return leaves
        return [
            look_of(leaf) if part in self._drops and isinstance(leaf, Tensor) else leaf
            for part, leaf in enumerate(leaves)
        ]


class _StageRun:
    """One forward of a stage.

    Attributes:
        random: the streams from which it draws.
    """

    def __init__(self, stage: CallStage, message: Message) -> None:
        self._stage = stage
        self._program = stage.program
        self.random = Calls()
        self._live = message.live.copy()
        self._looks = list(message.looks)
        self._plain = {} if message.plain is None else message.plain.copy()
        self._number = 0
        self._position = 0  # in the looks
        self._trains = torch.is_grad_enabled()
        # By look: making one costs more than all else that is done for a call that is not run.
        self._stand_ins: dict[str, Tensor] = {}
        self._stand_for: dict[int, list[str]] = {}  # by the id of a stand-in: the units in whose results it is
        self._inner: list[tuple[nn.Module, Any]] = []  # what inner modules with hooks returned
        self._device = next((t.device for t in self._live.values()), torch.device("cpu"))

    def opened(self, value: str) -> Any:
        return stand_in(read_look(value), self._device) if is_look(value) else value

    def call(self, unit: nn.Module, compute: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
        random = self.random
        if random.number != AROUND:  # inside a unit
            value = compute(*args, **kwargs)
            if unit in self._program.collected:
                self._inner.append((unit, value))
            return value
        if unit not in self._program.units:
            return compute(*args, **kwargs)
        number = self._number
        self._number += 1
        calls = self._program.calls
        if number >= len(calls) or calls[number].unit is not unit:
            raise PipelineError(_other_call(self._program, number, unit))
        if number < self._stage.begin:
            return self._skip(number, calls[number], args, kwargs)
        if number == self._stage.end:
            raise _Stop
        random.number = number
        try:
            value = compute(*args, **kwargs)
        finally:
            random.number = AROUND
        self._take(number, calls[number], value, args, kwargs)
        return value

    def _take(self, number: int, call: CallOfUnit, value: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Keeps what a call has left for later stages."""
        if self._stage.is_last:
            return
        if call.is_one_tensor and isinstance(value, Tensor):
            self._keep(number, 0, value)
            return
        leaves, spec = pytree.tree_flatten(value)
        if spec != call.spec:
            raise PipelineError(
                f"{call.name} returned another structure than with the sample: {spec} in place of {call.spec}; "
                "give a sample of the same kind as the batches"
            )
        self._keep_all(number, 0, call.leaves, leaves, call.name)
        for effect in call.effects:
            left = self._left_by(effect, args, kwargs)
            leaves = pytree.tree_leaves(left)
            if len(leaves) != len(effect.leaves):
                raise PipelineError(f"{call.name} left other values in its {effect.kind} than with the sample")
            self._keep_all(number, effect.first, effect.leaves, leaves, call.name)
        self._inner = []

    def _left_by(self, effect: Effect, args: tuple, kwargs: dict[str, Any]) -> Any:
        if effect.kind == "attribute":
            return getattr(effect.module, effect.place)
        if effect.kind == "entry":
            value: Any = (args, kwargs)
            for key in effect.place:
                value = value[key]
            return value
        of_module = [value for module, value in self._inner if module is effect.module]
        return of_module[effect.place] if effect.place < len(of_module) else None

    def _keep_all(
        self, number: int, first: int, expected: Sequence[Leaf], leaves: Sequence[Any], name: str
    ) -> None:
        for part, (leaf, value) in enumerate(zip(expected, leaves), first):
            if leaf.kind == "tensor" and isinstance(value, Tensor):
                self._keep(number, part, value)
            elif leaf.kind == "tensor" or isinstance(value, Tensor):
                raise PipelineError(f"{name} returned another structure than with the sample")
            elif leaf.kind == "plain" and value != leaf.value:
                self._plain[number, part] = value

    def _keep(self, number: int, part: int, tensor: Tensor) -> None:
        is_written = self._stage.sent.get((number, part))
        if is_written is not None:
            self._live[number, part] = tensor.clone() if is_written else tensor
        self._looks.append(look_of(tensor))

    def _skip(self, number: int, call: CallOfUnit, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What the code around units gets for a call of an earlier stage."""
        if self._trains and not torch.is_grad_enabled():
            self._refuse_without_grad(call)
        if call.is_one_tensor:
            result = self._tensor(call, number, 0)
        else:
            leaves = self._leaves(call, number, 0, call.leaves, args, kwargs)
            assert call.spec is not None
            result = leaves[0] if call.spec.is_leaf() else pytree.tree_unflatten(leaves, call.spec)
        for effect in call.effects:
            value = pytree.tree_unflatten(
                self._leaves(call, number, effect.first, effect.leaves, args, kwargs), effect.spec
            )
            if effect.kind == "attribute":
                setattr(effect.module, effect.place, value)
            elif effect.kind == "entry":
                *path, key = effect.place
                container: Any = (args, kwargs)
                for step in path:
                    container = container[step]
                if isinstance(container, list) and key == len(container):
                    container.append(value)
                else:
                    container[key] = value
            else:
                assert effect.module is not None
                run_hooks(effect.module, (), {}, value)
        if call.unit._forward_hooks or call.unit._forward_pre_hooks:
            run_hooks(call.unit, args, kwargs, result)
        return result

    def _leaves(
        self,
        call: CallOfUnit,
        number: int,
        first: int,
        expected: Sequence[Leaf],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> list[Any]:
        found: list[Any] = []
        for part, leaf in enumerate(expected, first):
            if leaf.kind == "tensor":
                found.append(self._tensor(call, number, part))
            elif leaf.kind == "plain":
                found.append(self._plain.get((number, part), leaf.value))
            elif leaf.kind == "argument":
                found.append(pytree.tree_leaves((args, kwargs))[leaf.value])
            else:
                found.append(leaf.value)
        return found

    def _tensor(self, call: CallOfUnit, number: int, part: int) -> Tensor:
        """A tensor that an earlier stage's call has left; a stand-in if it was not sent."""
        look = self._looks[self._position]
        self._position += 1
        received = self._live.get((number, part))
        if received is None:
            received = self._stand_ins.get(look)
            if received is None:
                received = self._stand_ins[look] = stand_in(read_look(look), self._device)
                self._stand_for[id(received)] = []
            self._stand_for[id(received)].append(call.name)
        return received.clone() if (number, part) in self._program.written else received

    def _refuse_without_grad(self, call: CallOfUnit) -> None:
        """Under torch.no_grad the value has no gradient anyway, unless a checkpoint computes it again later."""
        frame = sys._getframe()
        while frame is not None:
            if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
                raise PipelineError(
                    f"{call.name} is called inside a reentrant activation checkpoint, whose backward would "
                    "compute it in every later stage; give use_reentrant=False to the checkpoint"
                )
            frame = frame.f_back  # type: ignore[assignment]

    def message(self, leaves: list[Any] | None, arguments: Any) -> Message:
        """What later stages get."""
        return Message(tuple(self._looks), self._plain or None, self._live, leaves, arguments)

    def finish(self, output: Any) -> Any:
        """The model's output, when all calls are done."""
        calls = self._program.calls
        if self._number < len(calls):
            raise PipelineError(
                f"the forward has ended without call {self._number} of the sample's, of "
                f"{calls[self._number].name}; {_SAME}"
            )
        for leaf in pytree.tree_leaves(output) if self._stand_ins else ():
            if id(leaf) in self._stand_for:
                names = " or ".join(dict.fromkeys(self._stand_for[id(leaf)]))
                raise PipelineError(
                    f"the output holds what {names} returned, which with the sample it "
                    "did not, so it was not sent on; ask for the same outputs in the sample"
                )
        if self._stage.begin == 0 or not self._program.partial:
            return output
        return pytree.tree_map(lambda leaf: self._program.partial.get(type(leaf), leaf), output)


_SAME = (
    "each microbatch must make the calls of the sample in their order: give a sample that takes the same way "
    "through the model, or put code that depends on data inside a unit"
)


def _other_call(program: Program, number: int, unit: nn.Module) -> str:
    calls = program.calls
    given = f"{program.units.get(unit, type(unit).__name__)} is called"
    if number >= len(calls):
        return f"{given} after the {len(calls)} calls that the sample made; {_SAME}"
    return f"{given} where the sample called {calls[number].name} (call {number}); {_SAME}"
