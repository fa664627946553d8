"""Builds pyops against the torch that the user has.

`pyops._C` holds the tensor side. The CPU kernels are built once per instruction set as `pyops._cpu_*`, of which
pyops/_load.py loads one. The CUDA kernels are built as `pyops._cuda` if torch is a build with CUDA and there is a
toolkit. Everything else is in pyproject.toml.

These environment variables have an effect: CXX, MAX_JOBS (the number of compilers that run at a time), PYOPS_CUDA=1
(the build fails if CUDA is missing) or 0 (CUDA is never used), CUDA_HOME, TORCH_CUDA_ARCH_LIST, PYOPS_WERROR=1 (a
warning fails the build), PYOPS_SANITIZE=1 (tests/sanitize.py sets it).
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from glob import glob
from importlib import metadata
from pathlib import Path

import setuptools
from packaging.requirements import Requirement  # comes with setuptools
from setuptools.errors import PlatformError

PROJECT = tomllib.loads(Path("pyproject.toml").read_text())["project"]
TORCH = next(r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "torch")


def torch_version() -> str | None:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


# pip's build isolation hides the user's site-packages, but the interpreter is the user's and knows where they are.
# They are appended, so that they provide torch and nothing that the isolated environment has itself.
if torch_version() is None:
    sys.path += {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}


def toolkit_of_nvcc() -> str | None:
    """The folder of the CUDA toolkit whose nvcc is on PATH. That nvcc may be a script outside of the toolkit."""
    if shutil.which("nvcc") is None:
        return None
    said = subprocess.run(["nvcc", "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    folders = [line.partition("#$ TOP=")[2] for line in said.splitlines() if line.startswith("#$ TOP=")]
    return str(Path(folders[0]).resolve()) if folders else None


# torch would take the folder above that of nvcc, which is wrong if nvcc is such a script.
if not {"CUDA_HOME", "CUDA_PATH"} & os.environ.keys() and (toolkit := toolkit_of_nvcc()):
    os.environ["CUDA_HOME"] = toolkit
os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")  # binaries for Ampere and Hopper, PTX for later GPUs

# Without a suitable torch, the commands that only need metadata still work.
torch_fits = torch_version() is not None and TORCH.specifier.contains(torch_version(), prereleases=True)
if torch_fits:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, get_cxx_compiler, include_paths, library_paths
else:
    from setuptools.command.build_ext import build_ext as BuildExtension

# The instruction sets that ATen guarantees for each of its capabilities, with ATen's names and compiler flags.
CPU_CAPABILITIES = {"DEFAULT": []}
if platform.machine() == "x86_64":
    CPU_CAPABILITIES["AVX2"] = ["-mavx2", "-mfma", "-mf16c"]
    CPU_CAPABILITIES["AVX512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
    # gcc's own headers cause false alarms (gcc bug 105593).
    CPU_CAPABILITIES["AVX512"] += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]

SANITIZE = os.environ.get("PYOPS_SANITIZE") == "1"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def extension(name: str, sources: list[str], flags: list[str]) -> setuptools.Extension:
    return setuptools.Extension(
        f"pyops.{name}",
        sources=sorted(sources),
        depends=glob("csrc/**/*.h", recursive=True) + glob("cuda/**/*.h", recursive=True),
        extra_compile_args=flags,
        language="c++",
    )


EXTENSIONS = [extension("_C", glob("csrc/*.cpp") + glob("csrc/autograd/*.cpp"), ["-O2"])]
for capability, flags in CPU_CAPABILITIES.items():
    macros = [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    sources = glob("csrc/cpu/**/*.cpp", recursive=True)
    EXTENSIONS.append(extension(f"_cpu_{capability.lower()}", sources, ["-O3", *macros, *flags]))


def reason_against_cuda() -> str | None:
    """Why the CUDA kernels are not built, or None if they are."""
    if os.environ.get("PYOPS_CUDA") == "0":
        return "PYOPS_CUDA=0"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if CUDA_HOME is None or not Path(CUDA_HOME, "bin", "nvcc").exists():
        return "there is no CUDA toolkit: put nvcc on PATH or set CUDA_HOME"
    return None


if torch_fits and reason_against_cuda() is None:
    EXTENSIONS.append(extension("_cuda", ["cuda/module.cpp", *glob("cuda/**/*.cu", recursive=True)], ["-O2"]))


class build_ext(BuildExtension):
    def run(self) -> None:
        if not torch_fits:
            found = torch_version() or "none"
            raise PlatformError(
                f"building pyops needs {TORCH}, but found {found}; without --no-build-isolation pip gets it"
            )
        reason = reason_against_cuda()
        if reason and os.environ.get("PYOPS_CUDA") == "1":
            raise PlatformError(f"PYOPS_CUDA=1 asks for CUDA, but {reason}")
        self.cuda = None if reason else torch.version.cuda
        print(f"pyops: with CUDA {self.cuda} kernels" if self.cuda else f"pyops: without CUDA kernels, for {reason}")
        compiler = shlex.split(get_cxx_compiler())
        if shutil.which(compiler[0]) is None:
            raise PlatformError(
                f"building pyops needs a C++ compiler, but found no {compiler[0]}; install g++ or set CXX"
            )
        # Objects are kept from build to build, in a folder for each torch: ninja does not notice changes of system
        # headers, such as torch's.
        self.build_temp = f"build/{sys.implementation.cache_tag}-torch-{torch.__version__}{'-sanitized' * SANITIZE}"
        super().run()
        self.write_build_info(compiler)

    def build_extension(self, ext: setuptools.Extension) -> None:
        # OpenMP is enabled for the compiler only, because at::parallel_for is serial without it. The runtime must be
        # the one that torch ships, so the linker is not given one.
        ext.extra_compile_args[:0] = ["-fopenmp", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra"]
        ext.extra_compile_args += [flag for path in include_paths() for flag in ("-isystem", path)]
        if os.environ.get("PYOPS_WERROR") == "1":
            ext.extra_compile_args.append("-Werror")
        if SANITIZE:
            ext.extra_compile_args += [*SANITIZERS, "-fno-omit-frame-pointer", "-O2", "-g1"]
            ext.extra_link_args += SANITIZERS
        ext.library_dirs = library_paths()
        ext.libraries = ["c10", "torch_cpu", "torch_python"]
        if any(source.endswith(".cu") for source in ext.sources):
            self.add_cuda(ext)
        # The capabilities share their sources, so each extension needs a folder of its own for the objects.
        build_temp = self.build_temp
        self.build_temp = f"{build_temp}/{ext.name}"
        super().build_extension(ext)
        self.build_temp = build_temp

    @staticmethod
    def add_cuda(ext: setuptools.Extension) -> None:
        # Warnings of the compilers for the GPU are errors too; ptxas warns of registers that are spilled to memory.
        strict = ["-Werror", "all-warnings", "-Xptxas", "-v,-warn-spills,-Werror"]
        strict = strict if os.environ.get("PYOPS_WERROR") == "1" else []
        host = "-fvisibility=hidden,-Wall,-Wextra" + ",-Werror" * bool(strict)
        toolkit = ["-isystem", f"{CUDA_HOME}/include"]
        ext.extra_compile_args = {
            "cxx": [*ext.extra_compile_args, *toolkit],
            "nvcc": ["-O3", *strict, "-Xcompiler", host],
        }
        ext.library_dirs = library_paths("cuda")
        ext.libraries += ["c10_cuda", "cudart"]

    def write_build_info(self, compiler: list[str]) -> None:
        info = {
            "version": PROJECT["version"],
            "torch": str(torch.__version__),
            "compiler": subprocess.check_output([*compiler, "--version"], text=True).splitlines()[0],
            "cpu_capabilities": list(CPU_CAPABILITIES),
            "cuda": self.cuda,
            "cuda_archs": os.environ["TORCH_CUDA_ARCH_LIST"].replace(";", " ").split() if self.cuda else [],
        }
        lines = ["# Written by setup.py: what this build of pyops is.", *(f"{k} = {v!r}" for k, v in info.items())]
        Path(self.get_ext_fullpath("pyops._C")).with_name("_build_info.py").write_text("\n".join(lines) + "\n")


setuptools.setup(
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": build_ext},
    setup_requires=[] if torch_fits else [str(TORCH)],  # pip installs it for the build; the user gets the same
)
