"""Trains LeNet on handwritten digits with every batch shared out among processes, each with a copy of the parameters
(ddp) or with a share of them (fsdp):

    torchrun --nproc-per-node 2 docs/train_distributed.py ddp
"""

import argparse
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import pyops
from pyops.data import load_digits

BATCH_SIZE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description="Train LeNet in several processes, started by torchrun.")
    parser.add_argument("strategy", choices=("ddp", "fsdp"))
    parser.add_argument("--fused", action="store_true", help="LeNet's fused blocks")
    parser.add_argument("--steps", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--save", metavar="FILE", help="write the trained state_dict")
    args = parser.parse_args()

    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    torch.manual_seed(0)  # the same initial parameters everywhere
    net = pyops.LeNet(fused=args.fused).double()
    if args.strategy == "ddp":
        model = DistributedDataParallel(net)
    else:
        mesh = dist.init_device_mesh("cpu", (processes,))
        for layer in (*net.children(), net):
            fully_shard(layer, mesh=mesh)
        model = net
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    digits = load_digits(seed=0).train
    images, labels = digits.images.double(), digits.labels
    for step in range(args.steps):
        share = slice(BATCH_SIZE * step + rank, BATCH_SIZE * (step + 1), processes)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images[share]), labels[share])
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step}: loss {mean.item() / processes:.4f}")

    parameters = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if args.save and rank == 0:
        torch.save(parameters, args.save)
    # Gloo's threads may still need the interpreter's lock, to let go of a tensor. DistributedDataParallel waits for
    # them with that lock held when it is taken apart, for ever; and while the interpreter ends they make the process
    # abort. So once all processes are done, this one ends with nothing taken apart.
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
