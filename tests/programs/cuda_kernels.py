"""Checks a build with CUDA, whether or not there is a GPU. .ci/run runs this program where pytest is not installed."""

import torch

import pyops
from pyops import _build_info

assert _build_info.cuda == torch.version.cuda, "pyops was built without CUDA, or with another one"
assert _build_info.cuda_archs, "no architectures are recorded"
assert pyops.functional.relu(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]

# Every op is registered for CUDA tensors too.
for schema in torch._C._jit_get_all_schemas():
    if schema.name.startswith("pyops::"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(schema.name, "CUDA"), schema.name
if torch.cuda.is_available():
    assert pyops.functional.relu(torch.tensor([-1.0, 2.0], device="cuda")).tolist() == [0.0, 2.0]
print("a build with CUDA", _build_info.cuda, "for", *_build_info.cuda_archs)
