"""The training loop behind ``pyops train``."""

import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pyops.data import Split

__all__ = ["Epoch", "accuracy", "make_optimizer", "train"]

_LEARNING_RATE = {"sgd": 0.02, "adam": 0.003}
_TEST_BATCH_SIZE = 512


class Epoch(NamedTuple):
    """The results of one pass over the training images."""

    loss: float  # mean cross-entropy over the images, each computed before its batch's step
    accuracy: float  # fraction of the images classified correctly, likewise
    seconds: float


def make_optimizer(model: torch.nn.Module, name: str, lr: float | None = None) -> torch.optim.Optimizer:
    """``"sgd"`` (with momentum 0.9) or ``"adam"`` for the model's parameters; without ``lr`` it is 0.02 or 0.003."""
    lr = _LEARNING_RATE[name] if lr is None else lr
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return torch.optim.Adam(model.parameters(), lr=lr)


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Split,
    *,
    epochs: int,
    batch_size: int,
    seed: int = 0,
    on_batch: Callable[[int, float], object] = lambda count, loss: None,
) -> Iterator[Epoch]:
    """Train a classifier with cross-entropy, one epoch each time the iterator is advanced.

    The learning rate falls from the optimizer's to 0 along half a cosine (Loshchilov and Hutter, "SGDR", 2017).
    Because this is an iterator, two trainings can take turns (``zip(train(a, ...), train(b, ...))``), so their times
    are comparable even on a machine that runs other programs.

    Args:
        model: maps images ``[n, 1, 32, 32]`` to scores ``[n, classes]``.
        optimizer: updates the model's parameters.
        data: the training images; the last batch of an epoch may be smaller than the others.
        epochs: passes over the data.
        batch_size: images per step.
        seed: determines the order of the images.
        on_batch: called after each step with the number of images and their mean loss.

    Yields:
        the loss, accuracy and time of each epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(data.labels)
    steps = epochs * math.ceil(count / batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        model.train()
        started = time.perf_counter()
        loss_sum, correct = 0.0, 0
        for batch in torch.randperm(count, generator=generator).split(batch_size):
            images, labels = data.images[batch], data.labels[batch]
            optimizer.zero_grad()
            scores = model(images)
            loss = torch.nn.functional.cross_entropy(scores, labels)
            loss.backward()
            optimizer.step()
            schedule.step()
            batch_loss = loss.item()
            loss_sum += batch_loss * len(batch)
            correct += _correct(scores, labels)
            on_batch(len(batch), batch_loss)
        yield Epoch(loss_sum / count, correct / count, time.perf_counter() - started)


@torch.no_grad()
def accuracy(model: torch.nn.Module, data: Split) -> float:
    """The fraction of ``data`` that ``model`` classifies correctly in evaluation mode."""
    model.eval()
    batches = zip(data.images.split(_TEST_BATCH_SIZE), data.labels.split(_TEST_BATCH_SIZE), strict=True)
    return sum(_correct(model(images), labels) for images, labels in batches) / len(data.labels)


def _correct(scores: Tensor, labels: Tensor) -> int:
    return int((scores.argmax(1) == labels).sum())
