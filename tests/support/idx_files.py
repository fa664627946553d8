"""Writes scikit-learn's digits as small data sets in MNIST's format."""

import gzip
import struct
from pathlib import Path

import numpy as np
import sklearn.datasets

Part = tuple[np.ndarray, np.ndarray]  # images [N, 28, 28] uint8, labels [N] uint8


def idx(array: np.ndarray) -> bytes:
    """An IDX file of unsigned bytes."""
    return struct.pack(f">I{array.ndim}I", 0x0800 | array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_mnist(directory: Path, compress: bool, train_count: int = 30, test_count: int = 12) -> tuple[Part, Part]:
    """Writes the four files, with 28x28 images like MNIST's, and returns their contents."""
    source = sklearn.datasets.load_digits()
    images = np.zeros((train_count + test_count, 28, 28), np.uint8)
    images[:, 2:26, 2:26] = (source.images[: len(images)] * 15.9).repeat(3, axis=1).repeat(3, axis=2)
    labels = source.target[: len(images)].astype(np.uint8)
    parts = (images[:train_count], labels[:train_count]), (images[train_count:], labels[train_count:])
    for name, part in zip(("train", "t10k"), parts, strict=True):
        for kind, array in zip(("images-idx3", "labels-idx1"), part, strict=True):
            path = directory / f"{name}-{kind}-ubyte{'.gz' if compress else ''}"
            path.write_bytes(gzip.compress(idx(array)) if compress else idx(array))
    return parts
