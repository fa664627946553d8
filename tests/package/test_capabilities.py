"""The kernels of each lower instruction set pass the tests of the kernels, in an interpreter of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyops import _build_info

OPS = Path(__file__).parents[1] / "ops"
FILES = [f"test_{op}.py" for op in ("relu", "linear", "conv2d", "max_pool2d")]
LOWER = [capability.lower() for capability in _build_info.cpu_capabilities if capability != "AVX512"]


@pytest.mark.skipif("AVX2" not in _build_info.cpu_capabilities, reason="x86 instruction sets")
@pytest.mark.parametrize("capability", LOWER)
def test_kernels_of(capability):
    """Runs a selection of the tests with few examples each. ``ATEN_CPU_CAPABILITY=avx2 pytest`` runs all of them."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--every=7", "--hypothesis-profile=thin"]
    command += ["--device=cpu"]
    result = subprocess.run([*command, *FILES], cwd=OPS, env=environment, capture_output=True, text=True)
    assert f"pyops: CPU kernels {capability.upper()}" in result.stdout, result.stdout + result.stderr
    assert result.returncode == 0, result.stdout
