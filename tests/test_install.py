"""What pip makes of the project: a source archive and a wheel, each of which trains where it is installed."""

import email
import fcntl
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

# Looked up without importlib: to look for pip there makes setuptools step back from distutils for good.
installed = {distribution.name for distribution in importlib.metadata.distributions()}
missing = sorted({"pip", "pybind11", "setuptools"} - installed)
missing += [] if shutil.which("g++") else ["g++"]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")

ROOT = Path(__file__).parent.parent
NOT_COPIED = (".git", ".venv", "build", "dist", "runs", "*.egg-info")
NOT_PACKED = (".so", ".pyc")
TINY = "--steps 3 --batch 4 --context 8 --width 8 --heads 1 --layers 2 --microbatches 2".split()


def run(*command, cwd, **variables):
    """Runs a command without this checkout on Python's path; returns what it printed."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables
    ran = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def source_files(*folders):
    """Names of the checkout's files in some folders, without what is compiled."""
    files = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {f.relative_to(ROOT).as_posix() for f in files if f.suffix not in NOT_PACKED}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder that all pytest processes of this run share."""
    base = tmp_path_factory.getbasetemp()
    workshop = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "workshop"
    workshop.mkdir(exist_ok=True)
    return workshop


@pytest.fixture(scope="module")
def pip(workshop):
    """Calls pip on an archive, offline.

    The calls share a cache, which pip uses where the package's name is given: the first compiles the
    source archive, the others take that wheel.
    """

    def call(command, archive, *options, python=sys.executable, **variables):
        run(
            *(sys.executable, "-m", "pip", "--python", python, "--cache-dir", workshop / "cache"),
            *(command, f"pipeline_ext @ {archive.as_uri()}", *options),
            *("--no-index", "--no-deps", "--no-build-isolation"),
            cwd=workshop,
            **variables,
        )

    return call


@pytest.fixture(scope="module")
def archives(workshop, pip):
    """The source archive and the wheel of it, which the first process to ask makes."""
    with (workshop / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not list(workshop.glob("*.whl")):
            checkout = workshop / "checkout"
            ignore = shutil.ignore_patterns(*NOT_COPIED)
            shutil.copytree(ROOT, checkout, ignore=ignore, dirs_exist_ok=True)
            build = f"from setuptools.build_meta import build_sdist; print(build_sdist({str(workshop)!r}))"
            run(sys.executable, "-c", build, cwd=checkout)
            (sdist,) = workshop.glob("*.tar.gz")
            # Packaging is tested here, not speed: of several -O the last counts.
            compiler = workshop / "compiler"
            compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
            compiler.chmod(0o755)
            pip("wheel", sdist, "--wheel-dir", workshop, CC=str(compiler), CXX=str(compiler))
    return {"sdist": next(workshop.glob("*.tar.gz")), "wheel": next(workshop.glob("*.whl"))}


@pytest.fixture
def environment(tmp_path):
    """A new environment that borrows this one's libraries, but not its pipeline_ext.

    A folder named in a .pth file is put on the path; the .pth files in it, by which an editable install
    is found, are not read.
    """
    venv.create(tmp_path / "environment", symlinks=True)
    (site,) = tmp_path.glob("environment/lib/python*/site-packages")
    libraries = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "borrowed.pth").write_text("\n".join(libraries))
    return tmp_path / "environment"


def test_the_source_archive_holds_headers_and_tests_and_nothing_compiled(archives):
    with tarfile.open(archives["sdist"]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert source_files("csrc", "pipeline_ext", "tests", "bench", "docs", "examples", ".github") <= held
    assert {"LICENSE", "Makefile", "README.md", "CONTRIBUTING.md", "pyproject.toml", "setup.py"} <= held
    assert not [name for name in held if Path(name).suffix in NOT_PACKED]


def test_the_wheel_holds_the_package_its_types_and_the_compiled_core(archives):
    with zipfile.ZipFile(archives["wheel"]) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        about = email.message_from_bytes(archive.read(metadata))
    (core,) = (name for name in held if Path(name).suffix == ".so")
    assert core.startswith("pipeline_ext/_C.")
    assert {"pipeline_ext/py.typed", "pipeline_ext/_C.pyi"} <= held
    assert held - {core} == source_files("pipeline_ext")
    needed = [line for line in about.get_all("Requires-Dist") if "extra ==" not in line]
    assert [line.partition(">")[0] for line in needed] == ["torch", "rich"]
    assert about["License-Expression"] == "BSD-3-Clause" and about["License-File"] == "LICENSE"


@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_what_is_installed_trains_outside_the_checkout(kind, environment, tmp_path, pip, archives):
    bin = environment / "bin"
    without_compiler = {"PATH": str(bin)}
    building = {} if kind == "sdist" else without_compiler
    pip("install", archives[kind], "--ignore-installed", python=bin / "python", **building)
    where = run(bin / "python", "-c", "from pipeline_ext import _C; print(_C.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(environment)
    (tmp_path / "text").write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 100)
    run(
        *(bin / "pipeline-ext", "train", *TINY, "--data", "text", "--out", "run", "--json", "s.json"),
        cwd=tmp_path,
        **without_compiler,
    )
    assert json.loads((tmp_path / "s.json").read_text())["steps"] == 3
