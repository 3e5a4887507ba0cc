"""``pipeline-ext doctor``: what is installed, what works here, and how to get the rest."""

import argparse
import copy
import json
from collections import Counter
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from ..pipeline import Pipeline
from .machine import Machine, describe, first_line

_WIDTH = 100


@dataclass(frozen=True)
class Capability:
    """A feature of the engine. ``note`` says how it is available here, or why not and what to do."""

    name: str
    available: bool
    note: str


def set_up(parser: argparse.ArgumentParser) -> None:
    """Describes the command and adds its options."""
    parser.description = (
        "Shows versions, devices and settings, and which features of the engine work here. Runs a "
        "tiny training step on the CPU. Exit status 0 if that works, 1 if not."
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    machine = describe()
    failure = self_test()
    capabilities = capabilities_of(machine, failure)
    if options.json:
        report = {
            "machine": asdict(machine),
            "capabilities": [asdict(capability) for capability in capabilities],
            "self_test_failure": failure,
        }
        print(json.dumps(report, indent=2))
    else:
        _show(machine, capabilities, failure)
    return 0 if failure is None else 1


def self_test() -> str | None:
    """Trains one step with two stages and four microbatches; returns what went wrong, or None."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    plain = copy.deepcopy(model)
    x, y = torch.randn(8, 4), torch.randn(8, 2)
    for a, b in zip(x.tensor_split(4), y.tensor_split(4)):
        (F.mse_loss(plain(a), b) * (len(a) / len(x))).backward()
    try:
        with Pipeline(
            model, num_stages=2, microbatches=4, loss_fn=F.mse_loss, devices=["cpu", "cpu"], timeout=60
        ) as pipe:
            pipe.step(x, target=y)
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    wrong = [
        name
        for (name, parameter), expected in zip(model.named_parameters(), plain.parameters())
        if parameter.grad is None or expected.grad is None or not torch.equal(parameter.grad, expected.grad)
    ]
    return f"gradients differ from plain autograd: {', '.join(wrong)}" if wrong else None


def capabilities_of(machine: Machine, failure: str | None) -> list[Capability]:
    """What the engine can do on a machine, given the ``failure`` of the training step."""
    plot, triton = machine.libraries["matplotlib"], machine.libraries["triton"]
    return [
        Capability(
            "CPU ranks",
            failure is None,
            f"{machine.cores}, one per core, with torch.set_num_threads(1)"
            if failure is None
            else "the self-test failed; report it with the output of `pipeline-ext doctor --json`",
        ),
        Capability(
            "GPU ranks",
            machine.gpu_problem is None,
            machine.gpu_problem or f"{_gpus(machine)}; tested on a software GPU, not yet run on an NVIDIA GPU",
        ),
        Capability(
            "pictures",
            plot.problem is None,
            f"matplotlib {plot.version}"
            if plot.problem is None
            else f"matplotlib {plot.problem}; pip install 'pipeline_ext[plot]'",
        ),
        Capability(
            "packing on a GPU",
            triton.problem is None and bool(machine.gpus),
            _packing_on_a_gpu(machine),
        ),
        Capability(
            "many processes",
            machine.process_problem is None,
            machine.process_problem or _many_processes(machine),
        ),
    ]


def _packing_on_a_gpu(machine: Machine) -> str:
    triton = machine.libraries["triton"]
    if triton.problem is not None:
        return f"triton {triton.problem}; pip install 'pipeline_ext[gpu]'"
    if not machine.gpus:
        return f"torch sees no CUDA device; the CPU packs natively (triton {triton.version} is there)"
    return f"triton {triton.version}"


def _many_processes(machine: Machine) -> str:
    on_gpus = "; over NCCL with a GPU each, not yet run" if "nccl" in machine.process_backends else ""
    return f"over gloo, one rank each, started by torchrun{on_gpus}"


def _show(machine: Machine, capabilities: list[Capability], failure: str | None) -> None:
    console = Console(highlight=False, markup=False)
    console.width = min(console.width, _WIDTH) if console.is_terminal else _WIDTH
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in _facts(machine):
        table.add_row(*row)
    table.add_row()
    for capability in capabilities:
        word, style = ("available", "green") if capability.available else ("not available", "yellow")
        table.add_row(capability.name, Text.assemble((word, style), f": {capability.note}"))
    passed = Text("gradients equal plain autograd", "green")
    table.add_row("self-test", passed if failure is None else Text(failure, "red"))
    console.print(table)


def _facts(machine: Machine) -> list[tuple[str, str]]:
    versions = [
        f"pipeline_ext {machine.pipeline_ext or 'runs from its sources, not installed'}",
        f"Python {machine.python}",
        f"torch {machine.torch} "
        + (f"(CUDA {machine.torch_cuda} build)" if machine.torch_cuda else "(CPU build)"),
        *(f"{name} {found.version or found.problem}" for name, found in machine.libraries.items()),
    ]
    driver = machine.cuda_driver
    return [
        ("versions", ", ".join(versions)),
        ("native core", f"{machine.core}, built by {machine.compiler}"),
        (
            "CPU",
            f"{machine.processor}, {machine.cores} cores usable; "
            f"torch's intra-op threads: {machine.intra_op_threads}",
        ),
        ("GPU", _gpus(machine) or "none that torch sees"),
        ("CUDA driver", driver.problem or f"{machine.cuda_library}, for CUDA up to {driver.version}"),
        ("malloc", _malloc(machine)),
    ]


def _gpus(machine: Machine) -> str:
    gpus = Counter(f"{gpu.name}, {gpu.gib:.0f} GiB" for gpu in machine.gpus)
    return "; ".join(f"{n} x {gpu}" for gpu, n in gpus.items())


def _malloc(machine: Machine) -> str:
    if machine.keeps_freed_memory:
        return "keeps freed memory; pipelines set it so"
    if machine.malloc_variables:
        return f"left as your environment sets it: {', '.join(machine.malloc_variables)}"
    return "left as it is: it is not glibc's"
