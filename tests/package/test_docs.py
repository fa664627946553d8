"""The programs in README.md and docs/ run, and no link is broken."""

import re
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
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


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
