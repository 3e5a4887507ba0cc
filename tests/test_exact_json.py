"""Values go through JSON and come back as they were, or are refused by name."""

import collections
import enum
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipeline_ext import InvalidArgument
from pipeline_ext.base import exact_json
from pipeline_ext.processes.values import decode, encode

keys = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers()
values = st.recursive(
    keys,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(keys | st.tuples(keys), inner)
        | st.dictionaries(st.text(), inner).map(collections.OrderedDict)
        | st.sets(keys)
        | st.frozensets(keys)
    ),
    max_leaves=8,
)


def there_and_back(value):
    return exact_json.decode(decode(encode(exact_json.encode(value, "value"))))


@given(values)
def test_a_value_comes_back_with_its_types(value):
    assert shown(there_and_back(value)) == shown(value)


def shown(value):
    """A text that tells all apart that differs: 0.0 from -0.0, 1 from True; and equals itself with a nan."""
    if isinstance(value, dict):
        return f"{type(value)}: {[(shown(key), shown(item)) for key, item in value.items()]}"
    if isinstance(value, set | frozenset):
        return f"{type(value)}: {sorted(map(shown, value))}"
    if isinstance(value, list | tuple):
        return f"{type(value)}: {list(map(shown, value))}"
    return repr(value)


def test_types_of_torch_and_counters_come_back():
    for value in (torch.Size([2, 3]), torch.bfloat16, torch.device("cuda", 1), collections.Counter({3: 1})):
        found = there_and_back(value)
        assert found == value and type(found) is type(value)
    assert math.isnan(there_and_back([math.nan])[0])


def test_tensors_go_by_the_names_that_they_are_given():
    kept = {}

    def put(tensor):
        kept[f"t{len(kept)}"] = tensor
        return f"t{len(kept) - 1}"

    value = {"a": (torch.ones(2), [nn.Parameter(torch.zeros(1))])}
    encoded = json.loads(json.dumps(exact_json.encode(value, "value", put)))
    found = exact_json.decode(encoded, kept.__getitem__)
    assert found["a"][0] is kept["t0"] is value["a"][0] and found["a"][1][0] is kept["t1"]


class Colour(enum.IntEnum):
    RED = 1


class Point(tuple):
    pass


def cycle():
    found = []
    found.append(found)
    return found


@pytest.mark.parametrize(
    "value, said",
    [
        (
            {"a": [nn.Linear(1, 1)]},
            r"value\['a'\]\[0\].* is a torch.nn.modules.linear.Linear.*give tensors, numbers",
        ),
        (Colour.RED, "is a .*Colour"),
        (Point((1,)), "is a .*Point"),
        (1 << 10_000, "is an int of 10001 bits"),
        (torch.qint8, "torch.qint8, a type of tensors"),
        (torch.ones(1), "is a torch.Tensor"),
        (cycle(), "holds itself"),
    ],
)
def test_what_would_not_come_back_is_refused_by_name(value, said):
    with pytest.raises(InvalidArgument, match=said):
        exact_json.encode(value, "value")


@pytest.mark.parametrize(
    "encoded",
    [
        {"module": "os"},
        {},
        {"tuple": [], "list": []},
        {"tuple": 3},
        {"dict": [[1]]},
        {"dict": [[[], 1]]},
        {"set": [[]]},
        {"float": "1"},
        {"bytes": "%"},
        {"dtype": "Tensor"},
        {"device": "nowhere"},
        {"size": ["a"]},
        {"complex": ["1", 2, 3]},
        {"tensor": "t0"},
    ],
)
def test_what_was_never_written_is_refused(encoded):
    with pytest.raises(ValueError):
        exact_json.decode(encoded)
