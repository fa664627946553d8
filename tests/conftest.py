"""Settings of the whole suite.

``pytest --slow`` adds the tests that need gigabytes or a minute; ``--hypothesis-profile=thorough`` draws many more
examples, other ones in every run; ``--hypothesis-profile=thin`` fewer; ``--every=7`` runs one test of seven.
"""

import pytest
import torch
from hypothesis import is_hypothesis_test, settings

from pyops import _load

COMMON = {"deadline": None, "database": None}
settings.register_profile("default", derandomize=True, max_examples=40, **COMMON)
settings.register_profile("thin", derandomize=True, max_examples=8, **COMMON)
settings.register_profile("thorough", derandomize=False, max_examples=500, **COMMON)
settings.load_profile("default")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")
    parser.addoption("--every", type=int, default=1, metavar="N", help="run each N-th test and all hypothesis tests")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: needs gigabytes of memory or a minute; only with --slow")


def pytest_collection_modifyitems(config, items):
    every = config.getoption("--every")
    items[:] = [item for i, item in enumerate(items) if i % every == 0 or is_hypothesis_test(item.obj)]
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow, needs --slow"))


def pytest_report_header():
    return f"pyops: CPU kernels {_load.cpu_capability}"


@pytest.fixture(autouse=True)
def same_start():
    """Every test draws the same random numbers and leaves the number of threads as it was."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
