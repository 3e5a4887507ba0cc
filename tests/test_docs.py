"""README and docs say what is true: examples run, tables are the results', links lead somewhere."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import pipeline_ext as pe
from pipeline_ext.cli import main

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PLANNING = (ROOT / "docs" / "planner.md").read_text()
ERRORS = (ROOT / "docs" / "errors.md").read_text()
BEGINNING = re.search(r"```python\n(.*?)```", ERRORS, re.S)[1]
EXAMPLES = re.findall(r"## ([^\n]+)\n(?:(?!## ).)*?```python\n(.*?)```\n\n```text\n(.*?)```", ERRORS, re.S)


def test_every_error_has_an_example():
    assert len(EXAMPLES) == ERRORS.count("```text") == ERRORS.count("\n## ") - 1  # the last is torch's


@pytest.mark.parametrize("code, text", [e[1:] for e in EXAMPLES], ids=[e[0] for e in EXAMPLES])
def test_an_error_reads_as_the_docs_show_it(code, text):
    names: dict = {}
    exec(BEGINNING, names)
    with pytest.raises(pe.PipelineError) as raised:
        exec(code, names)
    said = f"{type(raised.value).__name__}: {raised.value}"
    assert said.split() == text.split()


def test_the_example_that_readme_opens_with_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    names = {
        "model": model,
        "loss_fn": nn.functional.mse_loss,
        "optimizer": torch.optim.SGD(model.parameters()),
        "batches": [(torch.randn(16, 4), torch.randn(16, 2))] * 2,
        "x": torch.randn(16, 4),
    }
    exec(re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1], names)
    assert names["out"].shape == (16, 2)
    assert (tmp_path / "timeline.png").stat().st_size > 0


def test_the_examples_of_the_scheduler_page_run(capsys):
    text = (ROOT / "docs" / "scheduler.md").read_text()
    room, policies = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(policies, {})
    assert capsys.readouterr().out.count("<Simulation: makespan") == 3
    names = {"pe": pe, "model": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "mesh": None}
    exec(room, names | {"loss_fn": nn.functional.mse_loss}, kept := {})
    assert kept["pipe"].plan.limits == [3, 1]


def test_the_scheduler_page_lists_every_schedule():
    text = (ROOT / "docs" / "scheduler.md").read_text()
    assert re.findall(r"^\| `([a-z0-9-]+)` \|", text, re.M) == pe.schedule_names()


def test_the_examples_of_packing_run(capsys):
    names = {
        "pe": pe,
        "torch": torch,
        "model": nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))),
        "loss_fn": nn.functional.mse_loss,
        "x": torch.randn(16, 4),
        "y": torch.randn(16, 4),
    }
    text = (ROOT / "docs" / "packing.md").read_text()
    for example in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(example, names)
    printed = capsys.readouterr().out
    assert "0 backward 2 " in printed
    assert "allow 4 in flight at each stage, or pack fewer" in printed
    assert [view.dtype for view in names["received"]] == [torch.bfloat16, torch.int64, torch.bfloat16]


def test_the_examples_of_planning_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {
        "pe": pe,
        "model": nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))),
        "loss_fn": nn.functional.mse_loss,
        "x": torch.randn(16, 4),
        "y": torch.randn(16, 4),
    }
    for example in re.findall(r"```python\n(.*?)```", PLANNING, re.S):
        exec(example, names)
    assert capsys.readouterr().out.count('schedule="auto": ') == 2  # as it chooses, and as the example prints
    assert names["costs"].weight_grad is not None
    assert (tmp_path / "timeline.png").stat().st_size > 0


def test_the_table_of_planning_is_what_the_command_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = re.search(r"    pipeline-ext (plan .*)", PLANNING)[1]
    assert main(command.split()) == 0
    printed = re.sub(r"[\u2500-\u257f]", " ", capsys.readouterr().out)  # box drawing
    shown = re.search(r"```text\n(.*?)```", PLANNING, re.S)[1]
    assert printed.split() == shown.split()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plans.html", "plans.png"]


def test_the_example_of_replicas_leaves_them_equal():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    names = {
        "torch": torch,
        "model": model,
        "loss_fn": nn.functional.mse_loss,
        "batches": [(torch.randn(16, 4), torch.randn(16, 2)) for _ in range(3)],
    }
    exec(re.search(r"```python\n(.*?)```", (ROOT / "docs/replicas.md").read_text(), re.S)[1], names)
    first, second = (list(replica.parameters()) for replica in names["models"])
    assert all(map(torch.equal, first, second))
    assert not torch.equal(first[0], model[0].weight)


def test_the_example_of_checkpoints_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = nn.Linear(2, 2)  # a plain model does as well
    optimizer = torch.optim.SGD(pipe.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    names = {"pe": pe, "pipe": pipe, "optimizer": optimizer, "scheduler": scheduler, "step": 7}
    text = (ROOT / "docs" / "checkpoints.md").read_text()
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], names)
    assert names["extra"]["step"] == 7


def test_the_tables_are_those_of_the_results():
    check = [sys.executable, "bench/tables.py", "--check"]
    result = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, f"run bench/tables.py {result.stderr}"


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS], ids=lambda page: page.name)
def test_links_and_named_files_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link
    for path in re.findall(r"`((?:csrc|pipeline_ext|tests|bench|docs|examples)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def test_the_layout_in_readme_names_every_folder():
    readme = (ROOT / "README.md").read_text()
    layout = textwrap.dedent(readme.partition("## Layout")[2].partition("Runtime dependencies")[0])
    named = set(re.findall(r"^([\w/]+)  ", layout, re.M))
    folders = {f"csrc/{f.name}" for f in (ROOT / "csrc").iterdir() if f.is_dir()}
    folders |= {"pipeline_ext", "tests", "bench", "docs", "examples"}
    folders |= {f"pipeline_ext/{f.parent.name}" for f in (ROOT / "pipeline_ext").glob("*/__init__.py")}
    assert named == folders
