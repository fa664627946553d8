"""The table in docs/composing.md equals the one that this run of the tests makes."""

import pytest
from support_table import column, committed, write


def test_columns():
    assert [column(each) for each in ("relu_in_place-True", "F.conv2d same", "layers-itself")] == [
        "relu",
        "conv2d",
        "networks",
    ]
    assert column("conv2d_relu_max_pool2d-grad") == "conv2d_relu_max_pool2d"
    assert column("LinearReLU") == "linear_relu"


@pytest.mark.runs_last
def test_the_table_is_that_of_this_run(request):
    """This test runs after all others."""
    config = request.config
    table = config.pluginmanager.get_plugin("support_table").markdown()
    if config.getoption("--write-support-table"):
        write(table)
    elif not all_tests_run(config):
        pytest.skip("not all tests ran")
    assert table == committed()


def all_tests_run(config) -> bool:
    chosen = config.option.keyword or config.option.markexpr or config.option.lf or config.getoption("--every") > 1
    return config.args_source is pytest.Config.ArgsSource.TESTPATHS and not chosen
