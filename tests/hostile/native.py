"""Every entry point of the native core, called through its binding with arguments at random.

The entry points are what ``_C`` has; their parameters are in their docstrings, and each parameter's values are
drawn by the method of ``Draw`` of that name. An entry point or a parameter that is new fails by its name.
"""

import ast
import random
import types
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import pipeline_ext as pe
from pipeline_ext import _C

from .children import Subject
from .values import csv, exactly, junk, one_of, real, rows, schedule_name, sizes, some, whole

# Of the package; or of pybind11, for a value of another type.
ALLOWED = (pe.PipelineError, TypeError, ValueError, IndexError)
_ALSO = {
    "HostExecutor.run": (RuntimeError,),  # it is closed, or made for another plan
    "StreamExecutor": (RuntimeError,),  # it is closed
    "MessageTemplate": (AttributeError,),  # parts and tensors are asked for their attributes
    "ModelState": (AttributeError, RuntimeError),  # torch's, for a gradient of another shape
    "NativePacker": (AttributeError,),
}
# Parameters that have the name of others, of another type.
_NAMESAKES = {
    ("lay_out", "plan"): "_StreamPlan",
    ("run", "program"): "a_program",
    ("deliver", "microbatches"): "in_flight",
}
_ADDRESSES = ("StreamExecutor.copy",)  # what it is given is memory, which nothing can check


def subjects() -> list[Subject]:
    """A subject for each entry point."""
    return [_subject(name, call) for name, call in entry_points().items() if name not in _ADDRESSES]


def entry_points() -> dict[str, Callable[["Draw"], Any]]:
    """Name -> what calls it once, with arguments that are drawn."""
    found: dict[str, Callable[[Draw], Any]] = {}
    for name, value in vars(_C).items():
        if isinstance(value, type):
            found[name] = lambda draw, of=value: _construct(draw, of)
            for member, what in vars(value).items():
                if isinstance(what, property):
                    found[f"{name}.{member}"] = lambda draw, of=name, member=member: getattr(
                        draw.an(of), member
                    )
                elif callable(what) and (
                    not member.startswith("_") or member in ("__len__", "__str__", "__repr__")
                ):
                    found[f"{name}.{member}"] = lambda draw, of=name, member=member: _method(draw, of, member)
        elif isinstance(value, types.BuiltinFunctionType):
            found[name] = lambda draw, of=value: _call(draw, of, _parameters(of))
    return found


def _subject(name: str, call: Callable[["Draw"], Any]) -> Subject:
    owner = name.partition(".")[0]
    return Subject(name, lambda r: call(Draw(r)), ALLOWED + _ALSO.get(name, ()) + _ALSO.get(owner, ()))


def _parameters(function: Any) -> tuple[list[str], list[str]]:
    """The names of the parameters that may be given by position, and of the others."""
    signature = function.__doc__.partition("\n")[0].replace("pipeline_ext._C.", "")
    (definition,) = ast.parse(f"def {signature}: ...").body
    assert isinstance(definition, ast.FunctionDef)
    names = [a.arg for a in definition.args.args if a.arg not in ("self", "arg0")]
    return names, [a.arg for a in definition.args.kwonlyargs]


def _call(draw: "Draw", function: Any, parameters: tuple[list[str], list[str]]) -> Any:
    by_position, by_name = parameters
    spoilt = draw.r.choice((*by_position, *by_name)) if draw.r.random() < 0.2 and by_position else None

    def value(name: str) -> Any:
        return (
            junk(draw.r) if name == spoilt else getattr(draw, _NAMESAKES.get((function.__name__, name), name))()
        )

    return function(*map(value, by_position), **{name: value(name) for name in by_name})


def _construct(draw: "Draw", of: type) -> Any:
    if "__init__" not in vars(of) or not (of.__init__.__doc__ or "").startswith("__init__(self"):
        return of()
    return _call(draw, of, _parameters(of.__init__))


def _method(draw: "Draw", of: str, member: str) -> Any:
    owner = draw.an(of)
    method = getattr(owner, member)
    if member == "draw":  # of Plan, in Python: it draws a picture
        return method(draw.path(), draw.r.choice((None, pe.Costs(), junk(draw.r))))
    if member.startswith("__"):
        return method()
    draw.owner = owner
    return _call(draw, method, _parameters(method))


class Draw:
    """Draws the values of parameters. What belongs together mostly fits: times are of the plan, and so on."""

    def __init__(self, r: random.Random) -> None:
        self.r = r
        self.owner: Any = None
        self._plan: _C.Plan | None = None
        self._name = one_of(r, _C.schedule_names())
        self._sizes = sizes(r, self._name)
        self._tensors: list[torch.Tensor] = []

    def an(self, of: str) -> Any:
        """An object of that class."""
        return getattr(self, f"_{of}")()

    # Plans.

    def plan(self) -> _C.Plan:
        if self._plan is None or self.r.random() < 0.1:
            self._plan = self._Plan()
        return self._plan

    def _Plan(self) -> _C.Plan:
        how = {"overlap": self.flag(), "reactive": self.flag()}
        try:
            if self.r.random() < 0.3:
                return _C.plan_of_cells(rows(self.r), **how)
            if self.r.random() < 0.2:
                return _C.make_forward_plan([self.r.randrange(3) for _ in range(self.r.randint(1, 5))], 3, 4)
        except pe.InvalidSchedule:
            pass
        name = one_of(self.r, _C.schedule_names())
        return _C.make_plan(name, *sizes(self.r, name), self.r.randint(1, 8), **how)

    def task(self) -> int:
        return whole(self.r, 40)

    stage = rank = source = target = op = stream = to_device = source_device = task

    def flag(self) -> bool:
        return self.r.random() < 0.5

    apart = follows = overlap = reactive = by_events = span = record = capturing = accumulate = flag

    def schedule(self) -> str:
        return self._name if self.r.random() < 0.8 else schedule_name(self.r)

    def placement(self) -> str:
        return (
            _C.layout_of(self._name) if self.r.random() < 0.8 else one_of(self.r, ("linear", "v", "", "circle"))
        )

    def num_stages(self) -> int:
        return self._sizes[0] if self.r.random() < 0.8 else whole(self.r)

    def num_ranks(self) -> int:
        return self._sizes[1] if self.r.random() < 0.8 else whole(self.r)

    def microbatches(self) -> int:
        return whole(self.r, 8)

    def packs(self) -> list[int]:
        return [] if self.r.random() < 0.6 else exactly(self.r, self._sizes[0] - 1, lambda r: whole(r, 4))

    packs_forward = packs

    def in_flight(self) -> list[int]:
        return [] if self.r.random() < 0.6 else exactly(self.r, self._sizes[0], lambda r: whole(r, 6))

    room = in_flight

    def limits(self) -> list[int]:
        return exactly(self.r, self._sizes[0], lambda r: r.randint(1, 6) if r.random() < 0.97 else whole(r))

    def preference(self) -> list[str]:
        return one_of(
            self.r,
            (
                ["B", "F"],
                ["F", "B"],
                ["I", "F", "W"],
                ["W", "I", "F"],
                ["F"],
                [],
                ["F", "F", "B"],
                ["UNSHARD", "F"],
                ["x"],
            ),
        )

    def pack(self) -> int:
        return whole(self.r, 4)

    pack_forward = pack

    def skips(self) -> list[Any]:
        if self.r.random() < 0.6:
            return []
        small = [self.r.randrange(5) for _ in range(2)]
        return some(
            self.r, lambda r: _C.Skip(*sorted(small), pack=r.randint(1, 3), pack_forward=r.randint(-1, 3)), 3
        )

    def _Skip(self) -> _C.Skip:
        return _C.Skip(0, 2)

    def cells(self) -> list[list[str]]:
        return rows(self.r)

    def templates(self) -> list[list[list[str]]]:
        return some(self.r, rows, 2)

    def text(self) -> str:
        return csv(self.r)

    def rank_of_stage(self) -> list[int]:
        return [
            self.r.randrange(self._sizes[1]) if self.r.random() < 0.95 else whole(self.r)
            for _ in range(self._sizes[0])
        ]

    # Costs and times.

    def costs(self) -> _C.CostsByStage:
        stages, ranks = self._sizes if self._plan is None else (self._plan.num_stages, self._plan.num_ranks)
        if self.r.random() < 0.5:
            return pe.Costs(latency=self.r.random()).by_stage(stages, ranks)
        listed = {
            name: exactly(self.r, stages - (name in ("latency", "overhead", "transfer")), real)
            for name in (
                "forward",
                "backward",
                "input_grad",
                "weight_grad",
                "latency",
                "overhead",
                "transfer",
                "taken",
            )
        }
        return _C.CostsByStage(
            **listed,
            contention=one_of(self.r, (1.0, 1.5, real(self.r))),
            pair=one_of(self.r, (1.0, 0.7, real(self.r))),
            freed_by_input_grad=[] if self.r.random() < 0.5 else exactly(self.r, stages, real),
            memory_limit=[] if self.r.random() < 0.5 else exactly(self.r, ranks, real),
            **dict(zip(("microbatch", "microbatch_shape"), self._factors(stages))),
        )

    def _factors(self, stages: int) -> tuple[list[float], tuple[int, int, int]]:
        """Factors of microbatches and the shape that they have, or nearly."""
        if self.r.random() < 0.5:
            return [], (0, 0, 0)
        microbatches = self.r.randint(1, 8) if self._plan is None else self._plan.num_microbatches
        shape = one_of(self.r, (1, stages)), microbatches, one_of(self.r, (1, 4))
        return exactly(self.r, shape[0] * shape[1] * shape[2], real), shape

    def microbatch(self) -> list[float]:
        return some(self.r, real)

    def microbatch_shape(self) -> tuple[int, ...]:
        return one_of(self.r, ((0, 0, 0), (1, whole(self.r), 1), (whole(self.r), whole(self.r), whole(self.r))))

    def simulations(self) -> int:
        return one_of(self.r, (-1, 0, 1, 30, 200))

    _CostsByStage = costs

    def forward(self) -> list[float]:
        return some(self.r, real)

    backward = input_grad = weight_grad = latency = overhead = transfer = taken = freed_by_input_grad = forward
    memory_limit = forward

    def contention(self) -> float:
        return real(self.r)

    pair = cv = scale = seconds = contention

    def memory(self) -> _C.Memory | None:
        return None if self.r.random() < 0.6 else self._Memory()

    def _Memory(self) -> _C.Memory:
        return self.costs().memory(self._sizes[0])

    def seed(self) -> int:
        return whole(self.r)

    def work(self) -> int:
        return one_of(self.r, (-1, 0, 1, 100, 3000))

    def threads(self) -> int:
        return one_of(self.r, (-1, 0, 1, 2, 3))

    def times(self) -> _C.SimulatedTimes:
        return self._SimulatedTimes()

    def _SimulatedTimes(self) -> _C.SimulatedTimes:
        plan = self.plan()
        return _C.simulate(plan, pe.Costs().by_stage(plan.num_stages, plan.num_ranks), self.flag(), self.flag())

    # Execution.

    def bodies(self) -> dict[Any, Any]:
        def body(microbatch: int) -> None:
            if self.r.random() < 0.05:
                raise ValueError("a body's own")

        keys = [(stage, kind) for stage in range(self.plan().num_stages) for kind in "FBIW"]
        found: dict[Any, Any] = dict.fromkeys(keys, body)
        if self.r.random() < 0.3:
            found[one_of(self.r, ((99, "F"), (-1, "F"), (0, "X"), "F", (0,), (0, "W")))] = one_of(
                self.r, (body, None)
            )
        return found

    def program(self) -> _C.Program:
        return self._Program()

    def _Program(self) -> _C.Program:
        plan = self.plan()
        return _C.Program(plan, {(stage, "F"): lambda m: None for stage in range(plan.num_stages)})

    def a_program(self) -> Any:
        return self._LaidProgram() if isinstance(self.owner, _C.StreamExecutor) else self._Program()

    def thread_names(self) -> list[str]:
        if self.r.random() < 0.1:
            return ["worker"] * one_of(self.r, (2000, 10**6))
        return exactly(self.r, self.plan().num_workers, lambda r: one_of(r, ("w", "", "x" * 40, "é" * 9, "\0")))

    def timeout(self) -> float:
        return one_of(self.r, (0.0, 0.02, 0.05, 0.05, -1.0, float("nan")))

    limit = timeout

    def error(self) -> Any:
        return one_of(self.r, (ValueError("stop"), KeyboardInterrupt(), 1, None, ValueError))

    def _HostExecutor(self) -> _C.HostExecutor:
        plan = self.plan()
        if self.r.random() < 0.4:
            follows = not plan.overlap and self.flag()
            executor = _C.HostExecutor(["w"] * (1 + plan.overlap), self.r.randrange(5), follows)
            for _ in range(self.r.randrange(3)):
                executor.deliver(self.r.randrange(50), self.r.randrange(5), [self.r.randrange(5)])
                executor.decide(self.r.randrange(50))
        else:
            executor = _C.HostExecutor(["w"] * plan.num_workers)
        if self.r.random() < 0.1:
            executor.close()
        return executor

    def _StepResult(self) -> _C.StepResult:
        plan = self.plan()
        program = _C.Program(plan, self.bodies() if self.r.random() < 0.3 else {})
        return _C.HostExecutor(["w"] * plan.num_workers).run(program, timeout=5.0, record=self.flag())

    # Streams.

    def device_of_rank(self) -> list[int]:
        return exactly(self.r, self.plan().num_ranks, lambda r: r.choice((0, 0, 0, 1, 1, -1, 2**31 - 1)))

    def _StreamPlan(self) -> _C.StreamPlan:
        plan = self.plan()
        by_stage = pe.Costs().by_stage(plan.num_stages, plan.num_ranks)
        rank = None if self.r.random() < 0.6 or plan.skips else self.r.randrange(plan.num_ranks)
        devices = [self.r.randrange(2) for _ in range(plan.num_ranks)]
        return _C.StreamPlan(plan, by_stage, _C.simulate(plan, by_stage), devices, rank)

    def _StreamExecutor(self) -> _C.StreamExecutor:
        return _C.StreamExecutor([0, 1] if self.r.random() < 0.9 else [whole(self.r, 3)])

    def _LaidProgram(self) -> _C.LaidProgram:
        executor = self.owner if isinstance(self.owner, _C.StreamExecutor) else self._StreamExecutor()
        laid = self._StreamPlan()
        return executor.lay_out(_C.Program(self._plan, {}), laid)

    def _DeviceStepResult(self) -> _C.DeviceStepResult:
        executor = self.owner = self._StreamExecutor()
        return executor.run(self._LaidProgram(), callers=[0] * len(executor.devices), record=True)

    def _DeviceTimes(self) -> _C.DeviceTimes:
        times = self._DeviceStepResult().times
        assert times is not None
        return times

    def callers(self) -> list[int]:
        return [0] * self.r.choice((0, 1, 2, 2, 2, 3))

    def caller(self) -> int:
        return 0

    def device(self) -> int:
        return whole(self.r, 2)

    # Tensors.

    def tensor(self) -> torch.Tensor:
        dtype = one_of(
            self.r, (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
        )
        made = torch.zeros([self.r.randint(0, 5) for _ in range(self.r.randint(0, 3))], dtype=dtype)
        if made.dim() > 1 and self.flag():
            made = made.transpose(0, 1)
        if made.dim() and self.r.random() < 0.1:
            made = made.new_zeros(1).expand(one_of(self.r, (3, 2**40, 2**61)))
        return made.requires_grad_() if made.is_floating_point() and self.r.random() < 0.2 else made

    def tensors(self) -> list[Any]:
        if not self._tensors or self.r.random() < 0.1:
            self._tensors = some(self.r, lambda r: self.tensor() if r.random() < 0.97 else junk(r), 4)
        if isinstance(self.owner, _C.NativePacker) or self.r.random() < 0.5:
            return self._tensors
        return [
            (t.dtype, [*t.shape], self.r.choice((0, 64, 128, 4096, -64, 2**62)), 0)
            for t in self._tensors
            if isinstance(t, torch.Tensor)
        ]

    def requires_grad(self) -> list[bool]:
        return [isinstance(t, torch.Tensor) and t.requires_grad for t in self._tensors]

    def layout(self) -> Any:
        self._tensors = some(self.r, lambda r: self.tensor(), 4)
        at, slots = 0, []
        for tensor in self._tensors:
            wire = torch.bfloat16 if tensor.is_floating_point() and self.flag() else tensor.dtype
            slots.append(SimpleNamespace(offset=at, dtype=tensor.dtype, wire=wire, shape=tuple(tensor.shape)))
            at += -(-tensor.numel() * wire.itemsize // 64) * 64
        if slots and self.r.random() < 0.4:
            spoilt = one_of(self.r, slots)
            name = one_of(self.r, ("offset", "dtype", "wire", "shape"))
            setattr(
                spoilt,
                name,
                one_of(self.r, (-64, 64, 2**62, 2**63 - 64, (2**62, 4), (-1, -1), torch.int8, None)),
            )
        return SimpleNamespace(slots=slots, nbytes=at if self.r.random() < 0.8 else whole(self.r))

    def _NativePacker(self) -> _C.NativePacker:
        layout = self.layout()
        return _C.NativePacker(layout, self._tensors)

    def buffer(self) -> Any:
        size = self.r.choice((0, 1, 64, 1000, 1 << 16, 1 << 16))
        made = torch.zeros(size, dtype=torch.uint8 if self.r.random() < 0.9 else torch.float32)
        return made if self.r.random() < 0.9 else made[1::2]

    def scales(self) -> Any:
        return None if self.flag() else torch.ones(len(self._tensors) + self.r.choice((0, 0, 0, 1)))

    amax = scales

    def nonfinite(self) -> Any:
        return None if self.flag() else torch.zeros(self.r.choice((1, 1, 1, 0, 2)), dtype=torch.int32)

    def parts(self) -> list[Any]:
        count = len(self._tensors)
        numbers = [(i, i if self.r.random() < 0.95 else whole(self.r, 3)) for i in range(count)]
        return [SimpleNamespace(rest=[None] * (count + 1), numbers=numbers)] * self.r.choice((0, 1, 1, 1, 1, 2))

    def alignment(self) -> int:
        return self.r.choice((1, 64, 64, 64, 0, -1, 2**63 - 1))

    def _MessageTemplate(self) -> _C.MessageTemplate:
        self._tensors = some(self.r, lambda r: self.tensor(), 3)
        at, tensors = 0, []
        for tensor in self._tensors:
            tensors.append((tensor.dtype, [*tensor.shape], at, tensor.data_ptr() % 64))
            at += -(-tensor.numel() * tensor.itemsize // 64) * 64 if tensor.numel() < 2**30 else 64
        parts = SimpleNamespace(rest=[None] * (len(tensors) + 1), numbers=[(i, i) for i in range(len(tensors))])
        return _C.MessageTemplate(tensors, self.requires_grad(), [parts], 64)

    def results(self) -> Any:
        return [one_of(self.r, ([*self._tensors, None], (*self._tensors, None), self._tensors, [None], 3))]

    def roots(self) -> Any:
        return some(self.r, lambda r: nn.Linear(2, 2) if r.random() < 0.8 else junk(r), 3)

    def _ModelState(self) -> _C.ModelState:
        state = _C.ModelState([nn.Linear(2, 2), nn.BatchNorm1d(2)])
        if self.flag():
            state.read()
        return state

    def gradients(self) -> list[Any]:
        return exactly(self.r, 4, lambda r: one_of(r, (None, torch.zeros(2), torch.zeros(2, 2), 3)))

    def training(self) -> Any:
        return self.roots()

    def _Turn(self) -> _C.Turn:
        return _C.Turn()

    def other(self) -> _C.Turn:
        return _C.Turn()

    def what(self) -> str:
        return one_of(self.r, ("", "step was called", "\0", "é" * 1000))

    def _Taking(self) -> _C.Taking:
        return self._Turn().take(self.what())

    def _EvaluationMode(self) -> _C.EvaluationMode:
        return _C.EvaluationMode([nn.Linear(2, 2)])

    def path(self) -> str:
        return one_of(self.r, ("", "\0", "x.txt", "no/where.png", "/dev/full.png"))
