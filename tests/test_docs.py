"""The programs in README.md and docs/ run, and the tests that their table names are there."""

import ast
import re
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = [
    pytest.param(program, id=f"{page.stem}-{i}")
    for page in PAGES
    for i, program in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs(program, tmp_path):
    file = tmp_path / "program.py"  # torch.compile reads the source
    file.write_text(program)
    torch._dynamo.reset()
    runpy.run_path(str(file), run_name="__main__")


def test_the_table_names_tests_that_are_there():
    rows = re.findall(r"^\| .*\| (.*test_.*) \|$", (ROOT / "docs" / "composing.md").read_text(), re.M)
    assert len(rows) > 20
    for row in rows:
        for cell in row.split("; "):
            file, *tests = re.findall(r"`(test_\w+(?:\.py)?)`", cell)
            tree = ast.parse((ROOT / "tests" / file).read_text())
            functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert tests and set(tests) <= functions, cell


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
