import os
import shutil
import signal
import sysconfig
from pathlib import Path

# GNU OpenMP, which torch loads, reads it once: its threads sleep while they wait, and other tests can run.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import settings
from standin_driver import StandIn, build_standin

# Without a GPU triton's kernels run in its interpreter, which has to be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Settings that fit a test's own cost are in the test; these are for those that name none.
settings.register_profile("few", max_examples=25, deadline=None, print_blob=True)
settings.register_profile("all", max_examples=100, deadline=None, print_blob=True)


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="all repetitions, of which a few run by default")


def pytest_configure(config):
    settings.load_profile("all" if config.getoption("--all") else "few")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--all"):
        repeated = [item for item in items if item.get_closest_marker("every")]
        config.hook.pytest_deselected(items=repeated)
        items[:] = [item for item in items if item not in set(repeated)]


@pytest.fixture(autouse=True)
def _deterministic():
    """Each test starts from one seed and leaves the process's settings as it found them."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def repeats(request):
    """How often a test repeats a step, in which a race shows as a difference."""
    return 20 if request.config.getoption("--all") else 4


@pytest.fixture
def short_searches(monkeypatch):
    """``"zb-auto"`` takes milliseconds."""
    from pipeline_ext.plan import zero_bubble

    monkeypatch.setattr(zero_bubble, "WORK", 100_000)


@pytest.fixture(scope="session")
def standin_library():
    """The path of the software GPU's driver, built once; where torch runs on it, of the one that torch has."""
    if torch.cuda.is_available():
        return Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "lib", "libcuda.so.1")
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to build a stand-in driver")
    return build_standin()


@pytest.fixture
def standin(standin_library, monkeypatch):
    """The stand-in driver, reset, as the one that the package opens if it has not opened one yet."""
    monkeypatch.setenv("PIPELINE_EXT_LIBCUDA", str(standin_library))
    driver = StandIn(standin_library)
    driver.reset(torch.cuda.device_count() or 2)
    return driver


@pytest.fixture
def gpus(standin, monkeypatch):
    """Two GPUs' doubles."""
    from device_double import install

    return install(monkeypatch, standin)
