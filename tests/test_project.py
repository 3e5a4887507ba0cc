"""The project's files agree with one another: version, commands, supported releases, names in CONTRIBUTING."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pipeline_ext as pe
from pipeline_ext.base import torch_release

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CI = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def test_the_version_is_the_installed_one_and_stands_in_the_changelog():
    assert importlib.metadata.version("pipeline_ext") == pe.__version__
    assert f"\n## [{pe.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_hooks_run_the_commands_of_make_lint():
    (recipe,) = re.findall(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    commands = recipe.replace("\t@$(BIN)/", ".venv/bin/").splitlines()
    hooks = re.findall(r"^ +entry: (.*)$", (ROOT / ".pre-commit-config.yaml").read_text(), re.M)
    assert len(hooks) == len(commands)
    for command, hook in zip(commands, hooks, strict=True):
        assert command.startswith(hook)  # files may follow


def test_ci_tests_the_oldest_and_the_newest_release_that_is_supported():
    oldest = PROJECT["requires-python"].removeprefix(">=")
    (torch,) = (line.removeprefix("torch>=") for line in PROJECT["dependencies"] if line.startswith("torch"))
    pythons = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if " :: 3." in line]
    tested = re.findall(r'python: "(.*?)", torch: "(.*?)"', CI)
    assert tested == [(oldest, f"torch=={torch}.*"), (pythons[-1], "torch")]
    wheels = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]["build"]
    assert wheels.split() == [f"cp{python.replace('.', '')}-manylinux_*" for python in pythons]


def test_the_oldest_and_the_newest_torch_that_are_accepted_are_tested_here():
    makefile = (ROOT / "Makefile").read_text()
    (versions,) = re.findall(r"^VERSIONS := (.*)$", makefile, re.M)
    releases = [tuple(map(int, version.split(".")[:2])) for version in versions.split()]
    assert releases == [torch_release.OLDEST, torch_release.NEWEST]
    assert f"torch>={versions.split('.0 ')[0]}" in PROJECT["dependencies"]
    (part,) = re.findall(r"^PART := ((?:.*\\\n)*.*)$", makefile, re.M)
    files = re.findall(r"\w+\.py", part)
    assert len(files) > 10 and all(list((ROOT / "tests").rglob(file)) for file in files)
    assert "make versions" in CI


def exists(name, sources):
    """Whether there is such a target, file or identifier; what is none of these is not looked for."""
    if name.startswith("make "):
        return f"\n{name.removeprefix('make ')}:" in (ROOT / "Makefile").read_text()
    if "/" in name:
        return any((ROOT / folder / name).exists() for folder in (".", "pipeline_ext")) or "NAME" in name
    if re.fullmatch(r"\w+\.(cpp|hpp|py)", name):
        return any(ROOT.glob(f"csrc/*/{name}")) or any(ROOT.glob(f"pipeline_ext/*/{name}"))
    identifier = re.fullmatch(r"(?:pe\.)?(\w+)(\(.*\))?", name)
    return identifier is None or re.search(rf"\b{identifier[1]}\b", sources) is not None


def test_what_contributing_names_exists():
    files = [path for folder in ("csrc", "pipeline_ext", "tests") for path in (ROOT / folder).rglob("*.*")]
    sources = "".join(path.read_text() for path in files if path.suffix in (".py", ".cpp", ".hpp"))
    names = set(re.findall(r"`([^`]+)`", CONTRIBUTING))
    assert len(names) > 50
    assert [name for name in sorted(names) if not exists(name, sources)] == []
