"""Pipeline-parallel training for PyTorch with a native scheduler."""

import importlib
from os import PathLike
from typing import TYPE_CHECKING, Any, NoReturn

from ._C import Plan, Skip

__version__ = "0.1.0"

__all__ = [
    "Costs",
    "DeadPipeline",
    "DeviceError",
    "FittedCosts",
    "GradientReduction",
    "GraphReport",
    "InvalidArgument",
    "InvalidSchedule",
    "LocalGroup",
    "MicrobatchOrder",
    "NonFiniteError",
    "PackChoice",
    "PeerError",
    "Pipeline",
    "PipelineError",
    "Placement",
    "Plan",
    "Policy",
    "ProcessGroupMember",
    "Profile",
    "ReductionError",
    "ReductionRecord",
    "ScheduleChoice",
    "Simulation",
    "Skip",
    "SlotChoice",
    "StageError",
    "StepTimeout",
    "TaskRecord",
    "Trace",
    "Verification",
    "WithLoss",
    "balanced_microbatches",
    "build_plan",
    "count_not",
    "export_dcp",
    "fit_costs",
    "import_dcp",
    "load_checkpoint",
    "load_pretrained",
    "microbatch_order",
    "newest_checkpoint",
    "pop",
    "rows",
    "save_checkpoint",
    "save_pretrained",
    "schedule_names",
    "simulate",
    "skips",
    "stash",
    "whole",
]

if TYPE_CHECKING:
    from .checkpoint.dcp import export_dcp, import_dcp
    from .checkpoint.files import load_checkpoint, save_checkpoint
    from .checkpoint.load_pretrained import load_pretrained
    from .checkpoint.newest import newest_checkpoint
    from .checkpoint.save_pretrained import save_pretrained
    from .errors import (
        DeadPipeline,
        DeviceError,
        InvalidArgument,
        InvalidSchedule,
        NonFiniteError,
        PeerError,
        PipelineError,
        ReductionError,
        StageError,
        StepTimeout,
    )
    from .microbatches.balance import balanced_microbatches
    from .microbatches.counting import count_not
    from .microbatches.rows import rows, whole
    from .model.skips import pop, skips, stash
    from .pipeline import Pipeline
    from .plan.build import build_plan, schedule_names
    from .plan.costs import Costs
    from .plan.fit import FittedCosts, fit_costs
    from .plan.measured_slots import SlotChoice
    from .plan.microbatch_order import MicrobatchOrder, microbatch_order
    from .plan.pack_choice import PackChoice
    from .plan.policy import Placement, Policy
    from .plan.profile import Profile
    from .plan.records import ReductionRecord, TaskRecord
    from .plan.schedule_choice import ScheduleChoice
    from .plan.simulation import Simulation, simulate
    from .reduction import GradientReduction, LocalGroup, ProcessGroupMember
    from .report.trace import Trace
    from .report.verification import Verification
    from .stages.stage import WithLoss
    from .step.graphs import GraphReport
else:
    # Module -> its names. It is imported when one of them is first used, and with it torch if it needs that.
    _NAMES = {
        "checkpoint.dcp": ("export_dcp", "import_dcp"),
        "checkpoint.files": ("load_checkpoint", "save_checkpoint"),
        "checkpoint.load_pretrained": ("load_pretrained",),
        "checkpoint.newest": ("newest_checkpoint",),
        "checkpoint.save_pretrained": ("save_pretrained",),
        "errors": (
            "DeadPipeline",
            "DeviceError",
            "InvalidArgument",
            "InvalidSchedule",
            "NonFiniteError",
            "PeerError",
            "PipelineError",
            "ReductionError",
            "StageError",
            "StepTimeout",
        ),
        "microbatches.balance": ("balanced_microbatches",),
        "microbatches.counting": ("count_not",),
        "microbatches.rows": ("rows", "whole"),
        "model.skips": ("pop", "skips", "stash"),
        "pipeline": ("Pipeline",),
        "plan.build": ("build_plan", "schedule_names"),
        "plan.costs": ("Costs",),
        "plan.fit": ("FittedCosts", "fit_costs"),
        "plan.measured_slots": ("SlotChoice",),
        "plan.microbatch_order": ("MicrobatchOrder", "microbatch_order"),
        "plan.pack_choice": ("PackChoice",),
        "plan.policy": ("Placement", "Policy"),
        "plan.profile": ("Profile",),
        "plan.records": ("ReductionRecord", "TaskRecord"),
        "plan.schedule_choice": ("ScheduleChoice",),
        "plan.simulation": ("Simulation", "simulate"),
        "reduction": ("GradientReduction", "LocalGroup", "ProcessGroupMember"),
        "report.trace": ("Trace",),
        "report.verification": ("Verification",),
        "stages.stage": ("WithLoss",),
        "step.graphs": ("GraphReport",),
    }
    _MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
    _SUBMODULES = ("packing", "partition", "pipelining", "transformers")  # public ones

    def __getattr__(name: str) -> Any:
        if name in _SUBMODULES:
            return importlib.import_module(f".{name}", __name__)
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, *_SUBMODULES})


def _draw(self: Plan, path: "str | PathLike[str]", costs: "Costs | None" = None) -> None:
    """Draws the plan's simulated timeline; the path ends in .png, .svg or .pdf.

    ``costs`` are pipeline_ext.Costs, by default F = 1 and B = 2 at every stage. Makes the folders that the path
    needs. Raises InvalidArgument for another suffix, InvalidSchedule for costs that do not fit, and
    PipelineError without matplotlib or if the file cannot be written.
    """
    from .report.timeline import draw_plan

    draw_plan(self, path, costs)


def _itself(self: Plan, memo: dict[int, Any] | None = None) -> Any:
    """A plan never changes."""
    return self


def _refuse_to_pickle(self: Plan, protocol: int = 0) -> NoReturn:
    from .errors import PipelineError

    raise PipelineError(
        "a Plan is not pickled; write its to_csv() to a file, which build_plan and Pipeline take as schedule="
    )


# The native core makes plans; Python draws them.
Plan.draw = _draw  # type: ignore[method-assign]
Plan.__copy__ = Plan.__deepcopy__ = _itself  # type: ignore[method-assign]
Plan.__reduce_ex__ = _refuse_to_pickle  # type: ignore[method-assign]
