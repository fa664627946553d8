"""pyops in several processes (DistributedDataParallel, FSDP2, a DataLoader's workers, fork) and in Python threads."""

import concurrent.futures
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from twins import TWINS, lenets, training_pass

import pyops
from pyops.data import load_digits
from pyops.lenet import StockLeNet

ROOT = Path(__file__).parents[2]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs fork")

# ---- distributed training ----

STEPS, BATCH_SIZE = 4, 64


def trained_by_one_process() -> dict[str, torch.Tensor]:
    """The parameters that one process on stock torch gets from the training of docs/train_distributed.py."""
    torch.manual_seed(0)
    net = StockLeNet().double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    digits = load_digits(seed=0).train
    for step in range(STEPS):
        batch = slice(BATCH_SIZE * step, BATCH_SIZE * (step + 1))
        optimizer.zero_grad()
        F.cross_entropy(net(digits.images[batch].double()), digits.labels[batch]).backward()
        optimizer.step()
    return net.state_dict()


@pytest.mark.composes("`DistributedDataParallel` and FSDP2 train as one process")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize(
    ("strategy", "fused"), [(strategy, fused) for strategy in ("ddp", "fsdp") for fused in (False, True)]
)
def test_two_processes_train_as_one(strategy, fused, tmp_path):
    """Training LeNet on halves of each batch gives the parameters of one process that trains stock on whole batches."""
    file = tmp_path / "parameters.pt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--nproc-per-node", "2", f"--master-port={port}"]
    script = [ROOT / "docs" / "train_distributed.py", strategy, "--steps", str(STEPS), "--save", file]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    result = subprocess.run(
        [*command, *script, *(["--fused"] if fused else [])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("loss") == STEPS
    torch.testing.assert_close(torch.load(file), dict(trained_by_one_process()), rtol=1e-10, atol=1e-12)


# ---- forked processes ----


class Features(torch.utils.data.Dataset):
    """Features of images, computed on our kernels by the process that loads them."""

    def __init__(self):
        self.net, _ = lenets()
        self.images = torch.randn(12, 1, 32, 32, dtype=torch.float64)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        with torch.no_grad():
            return self.net(self.images[i])


@pytest.mark.composes("`DataLoader` workers, fork and spawn")
@linux
def test_workers_of_a_data_loader():
    """The workers are forked from a process whose threads have already run kernels."""
    data = Features()
    with torch.no_grad():
        expected = data.net(data.images)
    for epoch in torch.utils.data.DataLoader(data, batch_size=4, num_workers=2, multiprocessing_context="fork"), data:
        torch.testing.assert_close(torch.cat([each.reshape(-1, 10) for each in epoch]), expected)


FORK = """
import os, sys, torch, pyops
{setup}
x, w = torch.randn(64, 8, 32, 32, requires_grad=True), torch.randn(16, 8, 3, 3)
def run():
    y = pyops.functional.relu(pyops.functional.conv2d(x, w, padding=1))
    return torch.autograd.grad(y.sum(), x)[0]
expected = run()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(run(), expected) else 1)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
sys.exit(status or not torch.equal(run(), expected))
"""


@pytest.mark.composes("`DataLoader` workers, fork and spawn")
@linux
def test_fork_after_use():
    """The child computes the bits that the parent computed before, and so does the parent afterwards."""
    program = FORK.format(setup="torch.set_num_threads(1)")
    subprocess.run([sys.executable, "-P", "-c", program], check=True, timeout=120)


def in_child(queue, threads):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    net = pyops.LeNet()
    queue.put(training_pass(net, net, torch.randn(5, 1, 32, 32))[0].tolist())


@pytest.mark.composes("`DataLoader` workers, fork and spawn")
def test_spawned_processes():
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    children = [context.Process(target=in_child, args=(queue, threads)) for threads in (1, 2)]
    for child in children:
        child.start()
    results = [queue.get(timeout=120) for _ in children]
    for child in children:
        child.join()
    assert results[0] == results[1]


# ---- threads of Python ----


@pytest.mark.composes("calls from many Python threads")
def test_many_threads_at_once():
    """Eight threads at a time each train a network of their own; all get the bits that one thread alone gets."""
    torch.set_num_threads(2)
    nets = [lenets(fused=i % 2 == 1)[0] for i in range(8)]
    images = [torch.randn(i + 1, 1, 32, 32, dtype=torch.float64) for i in range(8)]
    expected = [training_pass(net, net, x) for net, x in zip(nets, images, strict=True)]
    expected = [[t.clone() for t in each] for each in expected]
    barrier = threading.Barrier(8)

    def work(i):
        barrier.wait()
        return [[t.clone() for t in training_pass(nets[i], nets[i], images[i])] for _ in range(5)]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for i, passes in enumerate(pool.map(work, range(8))):
            for result in passes:
                torch.testing.assert_close(result, expected[i], rtol=0, atol=0)


@pytest.mark.composes("calls from many Python threads")
def test_transforms_in_many_threads():
    """torch.func keeps its levels per thread."""
    twin = TWINS["conv2d_relu"]
    tensors = twin.tensors(torch.float64, 3)

    def work(_):
        return torch.func.vmap(torch.func.grad(lambda *t: twin.ours(*t).square().sum()))(*tensors)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, range(12)))
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.mark.composes("calls from many Python threads")
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_kernels_let_other_threads_run(grad):
    """While one thread computes, another one runs Python code: kernels release the interpreter's lock."""
    torch.set_num_threads(1)
    x, weight = torch.randn(24, 64, 56, 56, requires_grad=grad), torch.randn(64, 64, 3, 3)
    started, ended, steps = threading.Event(), threading.Event(), 0

    def count():
        nonlocal steps
        started.wait()
        while not ended.is_set():
            steps += 1
            time.sleep(0)  # hands the lock to a waiting thread

    counter = threading.Thread(target=count)
    counter.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # a thread keeps the lock until it releases it
    try:
        started.set()
        output = pyops.functional.conv2d(x, weight, padding=1)
        if grad:
            steps = 0
            output.backward(output)
        seen = steps
    finally:
        ended.set()
        sys.setswitchinterval(interval)
        counter.join()
    assert seen > 100
