"""The build, and the parts of it that `import pyops` loads. Each test runs an interpreter of its own."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from pyops import _build_info

ROOT = Path(__file__).parents[2]
X86 = "AVX2" in _build_info.cpu_capabilities


def python(*args, cwd, **env):
    env = {k: v for k, v in os.environ.items() if k != "ATEN_CPU_CAPABILITY"} | {k: str(v) for k, v in env.items()}
    return subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True)


def output_of(program, cwd, **env):
    result = python("-c", program, cwd=cwd, **env)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture
def source_tree(tmp_path):
    """A copy of roughly what is under version control, without binaries or leftovers of builds."""
    ignore = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "*.egg-info", "*.so", "_build_info.py", ".*_cache"
    )
    return shutil.copytree(ROOT, tmp_path / "pyops-source", ignore=ignore)


LOADED = "import sys, pyops; print(*sorted(m for m in sys.modules if m.startswith('pyops._cpu')))"


@pytest.mark.skipif(not X86, reason="x86 instruction sets")
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_environment_selects_the_kernels(capability, tmp_path):
    assert output_of(LOADED, tmp_path, ATEN_CPU_CAPABILITY=capability) == f"pyops._cpu_{capability}"


def test_kernels_are_those_of_torchs_own_instruction_set(tmp_path):
    program = "import torch; torch.backends.cpu.get_cpu_capability = lambda: {!r}; " + LOADED
    for capability in _build_info.cpu_capabilities[:2]:
        assert output_of(program.format(capability), tmp_path) == f"pyops._cpu_{capability.lower()}"
    for unknown in ("SVE256", "VSX", "AVX1024"):
        assert output_of(program.format(unknown), tmp_path) == "pyops._cpu_default"


@pytest.mark.parametrize("capability", [c.lower() for c in _build_info.cpu_capabilities[:2]])
def test_kernels_use_torchs_threads(capability, tmp_path):
    """An at::parallel_for compiled without -fopenmp is silently serial; a second OpenMP runtime oversubscribes."""
    program = """
import os, re, torch, pyops
torch.set_num_threads(3)
before = len(os.listdir("/proc/self/task"))
torch.ops.pyops.relu(torch.randn(3_000_000))
threads = len(os.listdir("/proc/self/task")) - before
runtimes = set(re.findall(r"/\\S*lib[gi]?omp\\S*", open("/proc/self/maps").read()))
print(threads, len(runtimes))
"""
    assert output_of(program, tmp_path, ATEN_CPU_CAPABILITY=capability) == "2 1"


def test_another_torch_is_refused_before_any_binary_is_loaded(tmp_path):
    program = """
import sys, torch
torch.__version__ = "2.99.0+other"
try:
    import pyops
except ImportError as error:
    print(error)
print([m for m in sys.modules if m in ("pyops._C", "pyops._cpu_default", "pyops._cpu_avx2", "pyops._cpu_avx512")])
"""
    message, loaded = output_of(program, tmp_path).splitlines()
    assert torch.__version__ in message and "2.99.0+other" in message and "pip install" in message
    assert loaded == "[]"


def test_unbuilt_source_tree_says_so(source_tree):
    # An editable install would find the files that are missing here in its own tree.
    program = "import sys; sys.meta_path = [f for f in sys.meta_path if '__editable__' not in repr(f)]; import pyops"
    result = python("-c", program, cwd=source_tree)
    assert "ImportError: this is the source tree of pyops, which is not built" in result.stderr.splitlines()[-1]


def test_build_without_compiler_says_so(source_tree):
    result = python("setup.py", "-q", "build_ext", cwd=source_tree, CXX="no-such-compiler -O1")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: building pyops needs a C++ compiler")


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a build with CUDA")
def test_build_says_why_it_is_without_cuda(source_tree):
    """The build says so in one line, before anything else can fail."""
    command = ("setup.py", "-q", "build_ext")
    said = python(*command, cwd=source_tree, CXX="no-such-compiler").stdout.splitlines()
    assert f"pyops: without CUDA kernels, for torch {torch.__version__} is a build without CUDA" in said
    said = python(*command, cwd=source_tree, CXX="no-such-compiler", PYOPS_CUDA="0").stdout.splitlines()
    assert "pyops: without CUDA kernels, for PYOPS_CUDA=0" in said
    result = python(*command, cwd=source_tree, PYOPS_CUDA="1")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: PYOPS_CUDA=1 asks for CUDA, but torch")


@pytest.fixture
def old_torch(tmp_path):
    """A folder for PYTHONPATH with a torch that pyops does not build with, which hides the installed one."""
    (tmp_path / "site" / "torch-1.0.dist-info").mkdir(parents=True)
    (tmp_path / "site" / "torch-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch\nVersion: 1.0\n"
    )
    return tmp_path / "site"


def test_build_without_fitting_torch_says_so(source_tree, old_torch):
    result = python("setup.py", "-q", "build_ext", cwd=source_tree, PYTHONPATH=old_torch)
    assert result.returncode == 1
    assert "error: building pyops needs torch<2.15,>=2.11, but found 1.0" in result.stderr.splitlines()[-1]


def test_build_asks_for_a_torch_only_if_none_fits(source_tree, old_torch):
    program = "from setuptools import build_meta; print(build_meta.get_requires_for_build_wheel())"
    assert output_of(program, source_tree).splitlines()[-1] == "[]"
    assert output_of(program, source_tree, PYTHONPATH=old_torch).splitlines()[-1] == "['torch<2.15,>=2.11']"


def test_sdist_has_every_source(source_tree):
    result = python("setup.py", "-q", "sdist", cwd=source_tree)
    assert result.returncode == 0, result.stderr
    (archive,) = (source_tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as contents:
        packed = {Path(*Path(name).parts[1:]) for name in contents.getnames()}
    sources = {
        path.relative_to(source_tree)
        for folder in ("csrc", "cuda", "pyops", "tests", "bench", "docs")
        for path in (source_tree / folder).rglob("*.*")
        if "__pycache__" not in path.parts and not any(part.startswith(".") for part in path.parts)
    }
    assert sources <= packed
    assert {Path(name) for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", ".ci/run")} <= packed
