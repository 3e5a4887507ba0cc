"""README and docs say what is true: examples run, figures are the results', links lead somewhere."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launcher import torchrun
from torch import nn

import pipeline_ext as pe
from pipeline_ext import packing, pipelining
from pipeline_ext.cli import main

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PROCESSES = ROOT / "docs" / "tutorials" / "many_processes.md"  # its script is for torchrun
BIG_MODELS = PROCESSES.with_name("big_models.md")  # so is its first
TUTORIALS = sorted(set(PROCESSES.parent.glob("*.md")) - {PROCESSES, BIG_MODELS})
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


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_runs_and_prints_what_it_shows(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    names: dict = {}
    try:
        for code, shown in re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", page.read_text(), re.S):
            exec(code, names)
            printed = capsys.readouterr().out
            assert not shown or shown.split() == printed.split()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.every), 4])
def test_the_script_for_many_processes_runs(size, tmp_path):
    (tmp_path / "train.py").write_text(re.search(r"```python\n(.*?)```", PROCESSES.read_text(), re.S)[1])
    result = torchrun(size, ["train.py"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"{size // 2} x 2 processes, loss 0." in result.stdout


def test_the_script_for_big_models_runs_and_transformers_reads_what_it_saves(tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="needs transformers, of the extra `test`")
    monkeypatch.chdir(tmp_path)
    script, after = re.findall(r"```python\n(.*?)```", BIG_MODELS.read_text(), re.S)
    (tmp_path / "big.py").write_text(script)
    result = torchrun(2, ["big.py"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"loss \d\.\d{3}\n", result.stdout)
    exec(after, names := {})
    assert not any(p.is_meta for p in names["model"].parameters())


def test_the_examples_of_the_scheduler_page_run():
    text = (ROOT / "docs" / "scheduler.md").read_text()
    slots, measured, room = re.findall(r"```python\n(.*?)```", text, re.S)
    names = {"pe": pe, "mesh": None, "loss_fn": nn.functional.mse_loss}
    four = {"model": nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))}
    exec(slots, names | four, kept := {})
    assert 4 < max(kept["pipe"].plan.limits) <= 8
    kept["pipe"].close()
    exec(measured, names | four, kept)
    for _ in range(2):
        kept["pipe"].step(torch.randn(16, 4), target=torch.randn(16, 4))
    assert 4 < max(kept["pipe"].slot_choice.room) <= 16
    exec(room, names | {"model": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))}, kept)
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
    threads = (ROOT / "docs" / "replicas.md").read_text().partition("## Threads of one process")[2]
    exec(re.search(r"```python\n(.*?)```", threads, re.S)[1], names)
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
    saves, goes_on = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(saves, names)
    assert names["extra"]["step"] == 7
    exec(goes_on, names | {"step": None}, found := {})
    assert found == {"path": Path("run/last"), "step": 7}


@pytest.mark.parametrize("script", ["bench/tables.py", "docs/rooms.py"])
def test_tables_and_pictures_are_current(script):
    result = subprocess.run([sys.executable, script, "--check"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, f"run {script}: {result.stderr}"


def test_the_picture_of_varying_times_is_what_the_readme_says(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    spec = importlib.util.spec_from_file_location("varying_times", ROOT / "docs" / "varying_times.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    static, reactive = script.median_batch()
    gain = f"{static.makespan / reactive.makespan:.2f} times as fast"
    assert gain in (ROOT / "README.md").read_text(), f"run docs/varying_times.py; its batch is now {gain}"
    drawn = {}
    monkeypatch.setattr(script, "save_picture", lambda path, panels, unit: drawn.update({path: panels}))
    picture = tmp_path / "a.png"
    monkeypatch.setattr(sys, "argv", ["varying_times.py", str(picture)])
    script.main()
    above, below = drawn[picture]
    assert (above.plan.reactive, below.plan.reactive) == (False, True)
    assert gain in below.title
    assert lasted(above) == lasted(below)  # the same times, whenever a task runs


def lasted(panel):
    """How long each task takes."""
    tasks = [task for task in panel.tasks if task.kind in ("F", "B")]
    return {(task.kind, task.stage, task.microbatch): pytest.approx(task.end - task.begin) for task in tasks}


def anchors(page):
    """Where links into a page may lead: its headings, as GitHub and the site name them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS], ids=lambda page: page.name)
def test_links_and_named_files_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    for path in re.findall(r"`((?:csrc|pipeline_ext|tests|bench|docs|examples)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def test_the_site_builds_without_a_warning(tmp_path):
    needed = ("sphinx", "furo", "myst_parser")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)} not installed; the extra 'docs' has it")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "--quiet", "docs", str(tmp_path)]
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for module, names in (("", pe.__all__), (".packing", packing.__all__)):
        pages = "".join(page.read_text() for page in (tmp_path / "api").glob("*.html"))
        missing = [name for name in names if f'id="pipeline_ext{module}.{name}"' not in pages]
        assert not missing, f"give these a place in docs/api: {missing}"


def test_the_reference_names_all_of_the_drop_in():
    text = (ROOT / "docs" / "api" / "pipelining.md").read_text()
    assert [name for name in pipelining.__all__ if name not in text and not name.startswith("_")] == []


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def test_readme_and_the_architecture_page_name_every_folder():
    readme = (ROOT / "README.md").read_text().partition("## Layout")[2]
    assert set(re.findall(r"^\| `(\w+)/` \|", readme, re.M)) == {
        "pipeline_ext", "csrc", "tests", "bench", "examples", "docs", "tools"
    }  # fmt: skip
    page = (ROOT / "docs" / "architecture.md").read_text()
    core = {f"csrc/{folder.name}" for folder in (ROOT / "csrc").iterdir() if folder.is_dir()}
    assert set(re.findall(r"^\| `(csrc/\w+)` \|", page, re.M)) == core
