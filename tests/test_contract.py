"""What programs may build on: the classes of errors, and what is never done with what comes from elsewhere."""

import ast
import re
from pathlib import Path

import pytest

import pipeline_ext as pe

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "pipeline_ext").rglob("*.py"))
ROW = re.compile(r"^\| `(\w+)` \| (?:`(\w+)`)? *\| (.+) \|$", re.M)

RUNS_CODE = {"eval", "exec", "__import__"}
UNPICKLES = {
    "all_gather_object", "broadcast_object_list", "gather_object", "recv_object_list", "scatter_object_list",
    "send_object_list",
}  # fmt: skip
LISTENS = {"asyncio", "http", "multiprocessing", "socketserver", "xmlrpc"}
DECODES = {"dill", "cloudpickle", "joblib", "marshal", "pickle", "shelve"}


def errors():
    found = [getattr(pe, name) for name in pe.__all__]
    return {e.__name__: e for e in found if isinstance(e, type) and issubclass(e, BaseException)}


def test_every_error_is_one_of_the_package_and_the_page_tells_when():
    page = (ROOT / "docs" / "contract.md").read_text().partition("## Which error when")[2]
    told = {name: also for name, also, _ in ROW.findall(page)}
    assert told.keys() == errors().keys()
    for name, error in errors().items():
        assert issubclass(error, pe.PipelineError)
        of_python = [base.__name__ for base in error.__mro__ if base.__module__ == "builtins"]
        assert of_python[0] == (told[name] or "Exception"), name


def name_of(function):
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def findings(text):
    """What in a module could run code that it was sent, or listen."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            for name in names:
                if isinstance(node, ast.Import) or node.level == 0:
                    top = name.partition(".")[0]
                    from_socket = top == "socket" and isinstance(node, ast.ImportFrom)
                    if top in LISTENS | DECODES or from_socket:
                        yield f"import {top}"
        elif isinstance(node, ast.Attribute) and name_of(node.value) == "socket" and node.attr != "gethostname":
            yield f"socket.{node.attr}"
        elif isinstance(node, ast.Call):
            called = name_of(node.func)
            if isinstance(node.func, ast.Name) and called in RUNS_CODE:
                yield called
            if called in UNPICKLES:
                yield called
            owner = name_of(node.func.value) if isinstance(node.func, ast.Attribute) else ""
            if called == "load" and owner == "torch":
                safe = [k for k in node.keywords if k.arg == "weights_only" and ast.unparse(k.value) == "True"]
                if not safe:
                    yield "torch.load"
            if owner == "pickle":
                yield f"pickle.{called}"


# torch.load raises an error of that module.
KNOWN = {"lm/checkpoint.py": ["import pickle"]}


def test_nothing_that_is_read_or_received_is_unpickled_or_run_and_nothing_listens():
    for path in SOURCES:
        known = KNOWN.get(str(path.relative_to(ROOT / "pipeline_ext")), [])
        assert list(findings(path.read_text())) == known, path
    for path in (ROOT / "csrc").rglob("*.?pp"):
        assert not re.search(r"\b(listen|bind|accept)\(.*\b(fd|sock)", path.read_text()), path


@pytest.mark.parametrize(
    "text, found",
    [
        ("import pickle\npickle.loads(x)", ["import pickle", "pickle.loads"]),
        ("from socket import create_server", ["import socket"]),
        ("import socket\nsocket.create_server(x)", ["socket.create_server"]),
        ("import http.server", ["import http"]),
        ("dist.all_gather_object(a, b)", ["all_gather_object"]),
        ("torch.load(path)", ["torch.load"]),
        ("torch.load(path, weights_only=False)", ["torch.load"]),
        ("torch.load(path, weights_only=True)", []),
        ("eval(text)", ["eval"]),
        ("pipe.eval(x)", []),
    ],
)
def test_the_check_sees_what_it_looks_for(text, found):
    assert list(findings(text)) == found
