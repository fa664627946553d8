"""Settings of the whole suite.

``pytest --slow`` adds the tests that need gigabytes or a minute. ``--hypothesis-profile=thorough`` draws many more
examples, and different ones in every run; ``--hypothesis-profile=thin`` draws fewer. ``--every=7`` runs every seventh
test.

The tests of files marked ``every_device`` run on the CPU kernels, on the CUDA kernels emulated on the CPU, and on a GPU
if pyops was built with CUDA and there is one; ``--device=cpu`` selects one of these.
"""

from contextlib import nullcontext

import emulated
import pytest
import torch
from hypothesis import is_hypothesis_test, settings
from support_table import SupportTable

from pyops import _load

COMMON = {"deadline": None, "database": None}
settings.register_profile("default", derandomize=True, max_examples=40, **COMMON)
settings.register_profile("thin", derandomize=True, max_examples=8, **COMMON)
settings.register_profile("thorough", derandomize=False, max_examples=500, **COMMON)
settings.load_profile("default")


DEVICES = ["cpu"]
if emulated.AVAILABLE:
    DEVICES.append("emulated")
if _load.build_info.cuda and torch.cuda.is_available():
    DEVICES.append("cuda")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")
    parser.addoption(
        "--device", action="append", choices=DEVICES, help="run the tests of every device on this one only"
    )
    parser.addoption("--write-support-table", action="store_true", help="write the table of docs/composing.md")
    parser.addoption("--every", type=int, default=1, metavar="N", help="run each N-th test and all hypothesis tests")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: needs gigabytes of memory or a minute; only with --slow")
    config.addinivalue_line("markers", "every_device: the tests run on each device")
    config.addinivalue_line("markers", "not_emulated: too much to emulate")
    config.addinivalue_line("markers", "composes(feature): evidence for a line of the table of docs/composing.md")
    config.addinivalue_line("markers", "runs_last: after all others")
    config.pluginmanager.register(SupportTable(), "support_table")
    torch.backends.cudnn.allow_tf32 = False  # because the tests compare float32 with float64


def pytest_generate_tests(metafunc):
    """Gives tests that run on every device the device as their last parameter."""
    marks = {mark.name for mark in metafunc.definition.iter_markers()}
    if "every_device" in marks:
        chosen = metafunc.config.getoption("--device") or DEVICES
        excluded = {"emulated"} if "not_emulated" in marks else set()
        devices = [device for device in chosen if device not in excluded]
        metafunc.parametrize("device", devices, indirect=True)


def pytest_collection_modifyitems(config, items):
    every = config.getoption("--every")
    items[:] = [item for i, item in enumerate(items) if i % every == 0 or is_hypothesis_test(item.obj)]
    items.sort(key=lambda item: "runs_last" in item.keywords)
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow, needs --slow"))


def pytest_report_header():
    return f"pyops: CPU kernels {_load.cpu_capability}"


@pytest.fixture(autouse=True)
def device(request):
    """Sets the test's device. For torch, "emulated" is the CPU; new tensors are created there or on "cuda"."""
    name = getattr(request, "param", "cpu")
    with emulated.kernels() if name == "emulated" else torch.device("cuda") if name == "cuda" else nullcontext():
        yield name


@pytest.fixture(autouse=True)
def same_start():
    """Starts every test with the same random seed and restores the number of threads after it."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
