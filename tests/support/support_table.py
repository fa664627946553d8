"""Makes the table of docs/composing.md, which says what pyops composes with, from the outcomes of the tests.

A test marked ``composes("a feature")`` counts for the line of that feature. Its column is that of the op named in the
ids of its parameters; otherwise the columns are those named in the mark, or the column of networks. A cell says "yes"
if all of its tests passed. ``pytest --write-support-table`` runs all tests and writes the table; at the end of every
other run of all tests, test_support_table.py compares the table with the file.
"""

from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "composing.md"
BEGIN, END = "<!-- made by pytest --write-support-table -->\n", "<!-- end -->\n"
OPS = ("relu", "linear", "conv2d", "max_pool2d", "linear_relu", "conv2d_relu", "conv2d_relu_max_pool2d")
LAYERS = ("ReLU", "Linear", "Conv2d", "MaxPool2d", "LinearReLU", "ConvReLU2d", "ConvReLUMaxPool2d")
NETWORKS = "networks"
COLUMNS = (*OPS, NETWORKS)


def column(test_id: str) -> str:
    """The op that a parametrized test is about: the one with the longest name that occurs in its id."""
    names = dict(zip(OPS + LAYERS, OPS * 2, strict=True))
    found = [name for name in names if name in test_id]
    return names[max(found, key=len)] if found else NETWORKS


class SupportTable:
    """A pytest plugin that records the outcomes of the marked tests."""

    def __init__(self) -> None:
        self.outcomes: dict[str, dict[str, set[str]]] = {}  # by feature and column
        self.tests: dict[str, dict[str, list[str]]] = {}  # by feature and file

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.when == "call" or not report.passed:  # setup and teardown count only if they fail
            for mark in item.iter_markers("composes"):
                feature, *columns = mark.args
                test_id = item.callspec.id if hasattr(item, "callspec") else ""
                self._note(feature, columns or [column(test_id)], item, report.outcome)
        return report

    def _note(self, feature, columns, item, outcome) -> None:
        for name in columns:
            self.outcomes.setdefault(feature, {}).setdefault(name, set()).add(outcome)
        tests = self.tests.setdefault(feature, {}).setdefault(item.path.name, [])
        if item.originalname not in tests:
            tests.append(item.originalname)

    def markdown(self) -> str:
        lines = [f"| | {' | '.join(COLUMNS)} | tests |", f"|---|{':-:|' * len(COLUMNS)}---|"]
        for feature, outcomes in self.outcomes.items():
            cells = []
            for name in COLUMNS:
                seen = outcomes.get(name, set()) - {"skipped"}
                cells.append("failed" if "failed" in seen else "yes" if seen else "")
            files = self.tests[feature].items()
            tests = [f"`{file}`: {', '.join(f'`{name}`' for name in names)}" for file, names in files]
            lines.append(f"| {feature} | {' | '.join(cells)} | {'; '.join(tests)} |")
        return "\n".join(lines) + "\n"


def committed() -> str:
    return PAGE.read_text().partition(BEGIN)[2].partition(END)[0]


def write(table: str) -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table + END + rest.partition(END)[2])
