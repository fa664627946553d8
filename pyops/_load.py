"""Loads the compiled part of pyops, after checking that it was built with the torch that is running."""

import importlib

import torch

try:
    from pyops import _build_info as build_info
except ImportError:
    raise ImportError(
        "this is the source tree of pyops, which is not built: run `pip install .` and start Python in another "
        "folder (`pytest` rather than `python -m pytest`), or work in place after `pip install -e .`"
    ) from None

if torch.__version__ != build_info.torch:
    raise ImportError(
        f"pyops was built with torch {build_info.torch}, but torch {torch.__version__} is installed now: "
        "rebuild it, with `pip install --force-reinstall --no-deps .` in the source tree of pyops"
    )

from pyops import _C

# ATen's name for the instruction set that it uses; the environment variable ATEN_CPU_CAPABILITY selects a lower one.
cpu_capability = torch.backends.cpu.get_cpu_capability()
if cpu_capability not in build_info.cpu_capabilities:
    cpu_capability = "DEFAULT"
cpu_module = importlib.import_module(f"pyops._cpu_{cpu_capability.lower()}")
_C.set_cpu_kernels(cpu_module.kernels)
cuda_module = importlib.import_module("pyops._cuda") if build_info.cuda else None
if cuda_module:
    _C.set_cuda_kernels(cuda_module.kernels)
