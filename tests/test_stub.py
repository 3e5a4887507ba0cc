"""The native core's type stubs: every name the bindings define, and nothing else."""

import ast
import inspect
import types
from pathlib import Path

import pipeline_ext
from pipeline_ext import _C

IMPRECISE = ("object", "dict")  # what pybind11 writes where the binding itself makes the value


def of_function(node):
    """(parameters without types, type of the result) of a function's definition."""
    for part in ast.walk(node.args):
        if isinstance(part, ast.arg):
            part.annotation = None
    return ast.unparse(node.args), ast.unparse(node.returns)


def of_docstring(text):
    """The same, from the first line of what pybind11 writes about a function."""
    signature = text.partition("\n")[0].replace("pipeline_ext._C.", "")
    return of_function(ast.parse(f"def {signature}: ...").body[0])


def in_stub():
    """Name -> (parameters, type), from the stub."""
    found = {}

    def visit(body, prefix=""):
        for node in body:
            if isinstance(node, ast.ClassDef):
                found[node.name] = ("class", None)
                visit(node.body, f"{node.name}.")
            elif isinstance(node, ast.AnnAssign):
                found[prefix + node.target.id] = ("value", ast.unparse(node.annotation))
            elif isinstance(node, ast.FunctionDef):
                parameters, result = of_function(node)
                is_property = "property" in map(ast.unparse, node.decorator_list)
                found[prefix + node.name] = ("property" if is_property else parameters, result)

    visit(ast.parse(Path(pipeline_ext.__file__).with_name("_C.pyi").read_text()).body)
    return found


def in_module():
    """Name -> (parameters, type), from the compiled module."""
    found = {}

    def visit(owner, prefix=""):
        for name, value in vars(owner).items():
            if isinstance(value, type):
                found[name] = ("class", None)
                visit(value, f"{name}.")
            elif isinstance(value, property):
                found[prefix + name] = ("property", of_docstring(f"get{value.fget.__doc__}")[1])
            elif callable(value) and (value.__doc__ or "").startswith(f"{name}("):
                found[prefix + name] = of_docstring(value.__doc__)
            elif inspect.isfunction(value):  # a method that Python gave the class
                method = ast.parse(f"def {name}{inspect.signature(value)}: ...").body[0]
                method.args.args[0].arg = "self"
                found[prefix + name] = of_function(method)
            elif isinstance(owner, types.ModuleType) and not name.startswith("__"):
                found[name] = ("value", type(value).__name__)

    visit(_C)
    return found


def test_the_stub_has_the_names_and_parameters_of_the_module():
    stub, module = in_stub(), in_module()
    assert {name: what for name, (what, _) in stub.items()} == {
        name: what for name, (what, _) in module.items()
    }


def test_the_stub_has_the_types_of_the_module():
    stub, module = in_stub(), in_module()
    precise = {name: type_ for name, (_, type_) in module.items() if type_ not in IMPRECISE}
    assert {name: stub[name][1] for name in precise} == precise
