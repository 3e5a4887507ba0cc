"""What an import of the package, and each command, imports: slow modules only where they are used."""

import subprocess
import sys
import warnings

import pytest
import torch

import pipeline_ext as pe
from pipeline_ext.base import torch_release

SLOW = (
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "triton",
    "matplotlib",
    "rich",
)


def run(code: str, *arguments: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported_by(statements: str) -> set[str]:
    """The modules that statements import, those of torch itself apart."""
    code = f"import sys, torch; before = set(sys.modules); {statements}; print(*(set(sys.modules) - before))"
    return set(run(code).split())


@pytest.mark.parametrize("statements", ["import pipeline_ext", "from pipeline_ext import Pipeline"])
def test_slow_modules_wait_until_they_are_needed(statements: str) -> None:
    found = imported_by(statements)
    assert "pipeline_ext" in found
    assert not found & set(SLOW)


def test_the_package_alone_imports_its_native_core_and_no_more() -> None:
    ours = {name for name in imported_by("import pipeline_ext") if name.startswith("pipeline_ext")}
    assert ours == {"pipeline_ext", "pipeline_ext._C", "pipeline_ext.errors"}


WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; "


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plan", "--help"], ["plan", "--ranks", "4", "--microbatches", "8"]]
)
def test_a_command_that_needs_no_torch_runs_without(arguments: list[str]) -> None:
    printed = run(
        WITHOUT_TORCH + "import runpy; runpy.run_module('pipeline_ext', run_name='__main__')", *arguments
    )
    assert "pipeline-ext" in printed or "makespan" in printed


def test_plans_are_made_and_simulated_without_torch() -> None:
    code = """
import pipeline_ext as pe
plan = pe.build_plan("1f1b", num_stages=4, microbatches=8)
print(pe.simulate(plan, pe.Costs(latency=0.5)).makespan)
"""
    expected = pe.simulate(pe.build_plan("1f1b", num_stages=4, microbatches=8), pe.Costs(latency=0.5)).makespan
    assert float(run(WITHOUT_TORCH + code)) == expected


def test_the_native_core_can_be_imported_first() -> None:
    run("from pipeline_ext import _C; _C.make_plan('1f1b', 2, 2, 2)")
    run("import pipeline_ext._C as core; assert issubclass(core.Plan, object)")


def test_every_public_name_is_there() -> None:
    names = run("import pipeline_ext as pe; print(*dir(pe))").split()
    assert set(pe.__all__) <= set(names)
    assert all(getattr(pe, name).__name__ == name for name in pe.__all__)
    with pytest.raises(AttributeError, match="'pipeline_ext' has no attribute 'Pipelines'"):
        pe.Pipelines  # noqa: B018


def test_public_modules_are_attributes() -> None:
    run("import pipeline_ext as pe; pe.partition.cut; pe.packing.Layout; pe.pipelining.PipelineStage")


def with_torch(version: str, statements: str) -> str:
    """What a new interpreter writes to stderr where torch says that it is this version."""
    code = f"import torch; torch.__version__ = {version!r}; {statements}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300
    )
    return done.stderr


BOTH = "import pipeline_ext.pipelining; from pipeline_ext import Pipeline"


def test_a_torch_newer_than_those_tested_is_named_in_one_warning() -> None:
    said = with_torch("2.99.0.dev20991231+cpu", BOTH)
    assert said.count("UserWarning") == 1
    assert "this is torch 2.99.0.dev20991231+cpu; pipeline_ext is tested with torch 2.11 to 2.14" in said


def test_a_torch_older_than_those_tested_is_refused() -> None:
    said = with_torch("2.10.1", "from pipeline_ext import Pipeline")
    assert "ImportError: pipeline_ext needs torch 2.11 or newer; this is torch 2.10.1" in said


@pytest.mark.parametrize("version", [torch.__version__, "2.11.0", "2.14.1+cu130", "built here"])
def test_a_torch_that_is_tested_or_has_no_number_is_taken_as_it_is(version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch_release.check.__wrapped__(version)
