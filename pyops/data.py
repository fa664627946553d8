"""Handwritten digits as LeNet takes them: standardised float32 images of 32x32 pixels.

There are two sources: the 1,797 real 8x8 digits that scikit-learn carries (nothing has to be downloaded), and MNIST's
IDX files in a directory that the user names.
"""

import gzip
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["DataError", "Digits", "Split", "load_digits", "load_mnist", "read_idx"]

_SIDE = 32
_TEST_FRACTION = 0.2
_IDX_UNSIGNED_BYTE = 0x08
_GZIP_MAGIC = b"\x1f\x8b"


class DataError(Exception):
    """The data is missing or corrupt; the message is one sentence for the user."""


class Split(NamedTuple):
    """Images and what they show."""

    images: Tensor  # [N, 1, 32, 32] float32
    labels: Tensor  # [N] int64, 0..9


class Digits(NamedTuple):
    """A data set, split into training and test images."""

    train: Split
    test: Split


def load_digits(seed: int = 0) -> Digits:
    """scikit-learn's 8x8 digits with a margin, up-sampled to 32x32; ``seed`` draws the fifth that becomes the test set.

    >>> digits = load_digits()
    >>> digits.train.images.shape, digits.test.labels.shape
    (torch.Size([1438, 1, 32, 32]), torch.Size([359]))
    """
    from sklearn.datasets import load_digits as load  # here because the import is slow

    bunch = load()
    # The strokes touch the border, where LeNet's convolutions see them with at most half of their taps. A margin of one
    # pixel, as MNIST's images have it, raises the test accuracy by half a point.
    images = torch.nn.functional.pad(torch.from_numpy(bunch.images), (1, 1, 1, 1))
    labels = torch.from_numpy(bunch.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test_count = int(_TEST_FRACTION * len(labels))
    test, train = order[:test_count], order[test_count:]
    return _digits(images[train], labels[train], images[test], labels[test])


def load_mnist(directory: str | Path) -> Digits:
    """MNIST, or any data set in its format, from the four IDX files in ``directory``, resized to 32x32.

    The files are ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, ``t10k-images-idx3-ubyte`` and
    ``t10k-labels-idx1-ubyte``, each uncompressed or gzipped with the suffix ``.gz``.

    Raises:
        DataError: a file is missing or unreadable, is no IDX file, is cut short, holds a label above 9, or the numbers
            of labels and images differ.
    """
    directory = Path(directory)
    return _digits(*_read_pair(directory, "train"), *_read_pair(directory, "t10k"))


def read_idx(path: Path, dims: int) -> Tensor:
    """The unsigned bytes of an IDX file, gzipped or not, as a uint8 tensor of ``dims`` dimensions.

    The file consists of two zero bytes, the type (8: unsigned byte), the number of dimensions, each size as a
    big-endian 32-bit number, and the elements in row-major order.

    Raises:
        DataError: the file cannot be read or does not have this format.
    """
    try:
        content = path.read_bytes()
        if content.startswith(_GZIP_MAGIC):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    header_size = 4 + 4 * dims
    if len(content) < header_size or content[:4] != bytes((0, 0, _IDX_UNSIGNED_BYTE, dims)):
        raise DataError(f"{path} is not an IDX file of unsigned bytes in {dims} dimension{'s' * (dims > 1)}")
    sizes = np.frombuffer(content, ">u4", count=dims, offset=4).tolist()
    if len(content) - header_size != math.prod(sizes):
        raise DataError(
            f"{path} is corrupt: its header promises {math.prod(sizes)} bytes of data, "
            f"it holds {len(content) - header_size}"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header_size).reshape(sizes).copy())


def _read_pair(directory: Path, part: str) -> tuple[Tensor, Tensor]:
    images = read_idx(image_path := _find(directory, f"{part}-images-idx3-ubyte"), dims=3)
    labels = read_idx(label_path := _find(directory, f"{part}-labels-idx1-ubyte"), dims=1)
    if len(images) != len(labels):
        raise DataError(f"{image_path} holds {len(images)} images, but {label_path} holds {len(labels)} labels")
    if images.numel() == 0:
        raise DataError(f"{image_path} holds no pixels: its shape is {tuple(images.shape)}")
    if labels.max() > 9:
        raise DataError(f"{label_path} holds the label {labels.max()}, above 9")
    return images, labels


def _find(directory: Path, name: str) -> Path:
    for path in (directory / name, directory / f"{name}.gz"):
        if path.exists():
            return path
    raise DataError(f"there is no {name} or {name}.gz in {directory}")


def _digits(train_images: Tensor, train_labels: Tensor, test_images: Tensor, test_labels: Tensor) -> Digits:
    train, test = _resize(train_images), _resize(test_images)
    std, mean = torch.std_mean(train)
    train.sub_(mean).div_(std)
    test.sub_(mean).div_(std)
    return Digits(Split(train, train_labels.long()), Split(test, test_labels.long()))


def _resize(images: Tensor) -> Tensor:
    """Resizes ``[N, H, W]`` of any dtype to ``[N, 1, 32, 32]`` float32."""
    return torch.nn.functional.interpolate(images.float().unsqueeze(1), (_SIDE, _SIDE), mode="bilinear")
