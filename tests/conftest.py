"""Settings of the whole suite.

``pytest --slow`` adds the tests that need gigabytes or a minute; ``--hypothesis-profile=thorough`` draws many more
examples, other ones in every run; ``--hypothesis-profile=thin`` fewer; ``--every=7`` runs one test of seven.

The tests of files marked ``every_device`` run on the CPU kernels, on the CUDA kernels emulated on the CPU, and on a GPU
if pyops was built for it and there is one; ``--device=cpu`` chooses.
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
    torch.backends.cudnn.allow_tf32 = False  # the tests hold float32 against float64


def pytest_generate_tests(metafunc):
    """Tests of every device get it as their last parameter."""
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
    """The test's device: "emulated" is the CPU, as far as torch can see, and new tensors are on it or on "cuda"."""
    name = getattr(request, "param", "cpu")
    with emulated.kernels() if name == "emulated" else torch.device("cuda") if name == "cuda" else nullcontext():
        yield name


@pytest.fixture(autouse=True)
def same_start():
    """Every test draws the same random numbers and leaves the number of threads as it was."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
