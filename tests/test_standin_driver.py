"""The stand-in driver seen from Python: its log, scripted failures and counts."""

import shutil
from ctypes import byref, c_int, c_void_p

import pytest
from standin_driver import Call, StandIn

INVALID_CONTEXT, ILLEGAL_ADDRESS = 201, 700


@pytest.fixture(scope="module")
def library_of_its_own(standin_library, tmp_path_factory):
    """Not the one that the package has opened: nothing else is alive there."""
    return shutil.copy(standin_library, tmp_path_factory.mktemp("standin") / "libcuda-copy.so")


@pytest.fixture
def standin(library_of_its_own):
    driver = StandIn(library_of_its_own)
    driver.reset()
    return driver


@pytest.fixture
def context(standin):
    """The primary context of device 1, current; the log starts after that."""
    held = c_void_p()
    assert standin.call("cuDevicePrimaryCtxRetain", 7000, byref(held), 1) == 0
    assert standin.call("cuCtxPushCurrent", 4000, held) == 0
    standin.reset()
    yield held
    standin.reset()
    assert standin.call("cuCtxPopCurrent", 4000, None) == 0
    assert standin.call("cuDevicePrimaryCtxRelease", 11000, 1) == 0


def create_event(standin):
    event = c_void_p()
    return standin.call("cuEventCreate", 2000, byref(event), 2), event


def test_the_log_has_each_call_with_its_arguments_and_the_notes_between_them(standin, context):
    _, event = create_event(standin)
    standin.note("0F3 begins")
    standin.call("cuEventRecordWithFlags", 11010, event, None, 0)
    standin.call("cuEventDestroy", 4000, event)
    number = standin.number(event.value)
    assert standin.log() == [
        Call("cuEventCreate", {"event": number, "flags": 2}),
        Call("0F3 begins", {}),
        Call("cuEventRecordWithFlags", {"event": number, "stream": 0, "flags": 0}),
        Call("cuEventDestroy", {"event": number}),
    ]
    assert standin.calls() == 3
    standin.drain()


def test_one_call_fails_and_does_nothing(standin, context):
    standin.fail_at(1, ILLEGAL_ADDRESS)
    results = [create_event(standin) for _ in range(3)]
    assert [result for result, _ in results] == [0, ILLEGAL_ADDRESS, 0]
    assert standin.live()["event"] == 2
    assert standin.log()[1] == Call("cuEventCreate", {"event": 0, "flags": 2, "result": ILLEGAL_ADDRESS})
    for result, event in results:
        assert result or standin.call("cuEventDestroy", 4000, event) == 0
    assert standin.live()["event"] == 0


def test_a_device_that_has_faulted_fails_to_the_end_but_names_its_error(standin, context):
    _, event = create_event(standin)
    standin.fail_sticky(1, ILLEGAL_ADDRESS)
    assert create_event(standin)[0] == ILLEGAL_ADDRESS
    assert standin.call("cuEventDestroy", 4000, event) == ILLEGAL_ADDRESS
    text = c_void_p()
    assert standin.call("cuGetErrorName", 6000, ILLEGAL_ADDRESS, byref(text)) == 0
    assert standin.calls() == 3
    standin.reset()
    assert standin.call("cuEventDestroy", 4000, event) == 0


def test_what_is_alive_is_counted(standin, context):
    assert standin.live() == {"stream": 0, "event": 0, "graph": 0, "graph_exec": 0, "context": 1}
    stream = c_void_p()
    assert standin.call("cuStreamCreateWithPriority", 5050, byref(stream), 1, -5) == 0
    assert standin.live()["stream"] == 1
    number = standin.number(stream.value)
    arguments = {"stream": number, "flags": 1, "priority": -5}
    assert standin.log() == [Call("cuStreamCreateWithPriority", arguments)]
    assert standin.call("cuStreamDestroy", 4000, stream) == 0
    assert standin.live()["stream"] == 0


def test_a_call_that_needs_a_context_says_so_without_one(standin):
    assert create_event(standin)[0] == INVALID_CONTEXT


def test_only_the_pinned_version_of_a_function_is_handed_out(standin):
    with pytest.raises(AssertionError, match="hands out no cuEventCreate of version 2001"):
        standin.call("cuEventCreate", 2001)
    standin.hide("cuInit")
    with pytest.raises(AssertionError, match="hands out no cuInit"):
        standin.call("cuInit", 2000, 0)
    standin.reset()
    assert standin.call("cuInit", 2000, 0) == 0


@pytest.mark.parametrize("devices", [0, 1, 4])
def test_there_are_as_many_devices_as_asked_for(standin, devices):
    standin.reset(devices=devices)
    count = c_int(-1)
    assert standin.call("cuDeviceGetCount", 2000, byref(count)) == 0
    assert count.value == devices
