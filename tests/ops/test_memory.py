"""No op reads or writes memory outside of its operands and results, and none needs more memory than necessary."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import pyops

PROGRAMS = Path(__file__).parents[1] / "programs"
COMPILER = os.environ.get("CXX", "c++")
CHECKING_ALLOCATOR = "libc_malloc_debug.so.0"  # part of glibc


def run(program: list[str]) -> subprocess.CompletedProcess:
    checking = {"LD_PRELOAD": CHECKING_ALLOCATOR, "GLIBC_TUNABLES": "glibc.malloc.check=3"}
    return subprocess.run([sys.executable, *program], env=os.environ | checking, capture_output=True, text=True)


def test_nothing_around_the_tensors_is_touched():
    result = run([str(PROGRAMS / "memory.py")])
    assert result.stdout.strip() == "unharmed", f"exit status {result.returncode}\n{result.stderr}"


def test_the_checking_allocator_notices():
    """It notices one byte too many when the memory is freed; otherwise the test above would prove little."""
    program = "import ctypes, torch; t = torch.empty(9); ctypes.memset(t.data_ptr(), 1, 37); del t; print('unnoticed')"
    result = run(["-c", program])
    if "cannot be preloaded" in result.stderr:
        pytest.skip(f"no {CHECKING_ALLOCATOR} here")
    assert result.returncode != 0 and "unnoticed" not in result.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="takes the place of glibc's functions")
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler")
def test_kernels_allocate_nothing_after_the_first_calls(tmp_path):
    """10,000 calls of shapes that were seen before, in any order, allocate nothing, and nothing leaks."""
    library = tmp_path / "allocations.so"
    subprocess.run([COMPILER, "-O1", "-shared", "-fPIC", PROGRAMS / "allocations.cpp", "-o", library], check=True)
    program = [sys.executable, PROGRAMS / "allocations.py"]
    counting = os.environ | {"LD_PRELOAD": str(library)}
    result = subprocess.run(program, env=counting, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    assert measured["first"] > 0, "the counter does not count"
    assert measured["later"] == 0
    assert measured["growth"] < 8 << 20, "resident bytes"  # 1 KB per call would be 10 MB


def peak_of_training(network: str) -> int:
    """The peak memory of training LeNet on batches of 1024, in kilobytes on top of what the program has before.

    The C library is told to return large blocks to the system when they are freed, so that only live memory counts. The
    peak comes from /proc, because getrusage's begins with the peak of the program that started this one.
    """
    program = f"""
import re, torch, pyops
from pyops.lenet import StockLeNet
torch.set_num_threads(1)
net, images, digits = {network}, torch.randn(1024, 1, 32, 32), torch.randint(10, (1024,))
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

def step(batch):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(net(images[:batch]), digits[:batch]).backward()
    optimizer.step()

step(1)
before = peak()
for _ in range(3):
    step(1024)
print(peak() - before)
"""
    command, at_once = [sys.executable, "-P", "-c", program], os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    return int(subprocess.run(command, env=at_once, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_training_needs_less_memory_than_stock():
    stock, layers, fused = map(peak_of_training, ("StockLeNet()", "pyops.LeNet()", "pyops.LeNet(fused=True)"))
    assert layers < 0.95 * stock
    assert fused < 0.6 * stock


def bytes_saved_for_backward(*layers: torch.nn.Module) -> int:
    """The bytes of all storages that are kept from forward to backward."""
    storages = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # kept alive, so that no other storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        torch.nn.Sequential(*layers)(torch.randn(1024, 1, 32, 32))
    return sum(storage.nbytes() for storage in storages.values())


def test_less_is_saved_for_backward_than_by_stock():
    """The convolutional part of LeNet saves less than stock's."""

    def layers(nn):
        return [nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]

    block = partial(pyops.nn.ConvReLUMaxPool2d, pool_kernel_size=2)
    stock = bytes_saved_for_backward(*layers(torch.nn))
    assert bytes_saved_for_backward(*layers(pyops.nn)) < 0.24 * stock  # a byte per window, a bit per ReLU
    assert bytes_saved_for_backward(block(1, 6, 5), block(6, 16, 5)) < 0.23 * stock  # no output of a ReLU
