"""pyops.data reads scikit-learn's digits and IDX files, and refuses bad files."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
from idx_files import idx, write_mnist

from pyops.data import DataError, load_digits, load_mnist, read_idx


def test_digits_are_scikit_learns_each_in_one_part():
    digits = load_digits()
    labels = torch.cat([digits.train.labels, digits.test.labels])
    assert labels.bincount().tolist() == np.bincount(sklearn.datasets.load_digits().target).tolist()
    images = torch.cat([digits.train.images, digits.test.images])
    assert images.shape == (1797, 1, 32, 32)
    assert len(images.flatten(1).unique(dim=0)) == 1797  # no image is in both parts
    assert len(digits.test.labels) == 359


def test_digits_show_what_the_label_says():
    source = sklearn.datasets.load_digits()
    by_image = {image.tobytes(): label for image, label in zip(source.images, source.target, strict=True)}
    train, _ = load_digits(seed=3)
    # Down-sampling an image that was up-sampled by a factor of 3.2 restores the 8x8 image except for the smoothing, so
    # the nearest source image is the one that it was made from.
    small = torch.nn.functional.interpolate(train.images[:200], (10, 10), mode="area")[:, 0, 1:-1, 1:-1].flatten(1)
    sources = torch.tensor(source.images, dtype=torch.float32).flatten(1)
    similarity = torch.corrcoef(torch.cat([small, sources]))[:200, 200:]
    nearest = source.images[similarity.argmax(1).numpy()]
    assert [by_image[image.tobytes()] for image in nearest] == train.labels[:200].tolist()


def test_digits_are_standardised_by_the_training_part():
    train, test = load_digits()
    assert train.images.dtype == test.images.dtype == torch.float32
    assert train.labels.dtype == test.labels.dtype == torch.int64
    assert train.images.mean().item() == pytest.approx(0, abs=1e-4)
    assert train.images.std().item() == pytest.approx(1, abs=1e-4)
    assert 0.9 < test.images.std().item() < 1.1
    assert train.images.min() == test.images.min()  # the value of blank paper


def test_the_seed_draws_the_parts():
    first, again, other = load_digits(1), load_digits(1), load_digits(2)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert first.test.labels.tolist() != other.test.labels.tolist()


@pytest.mark.parametrize("compress", [False, True])
def test_idx_round_trip(tmp_path, compress):
    array = np.random.default_rng(0).integers(0, 256, (3, 5, 7)).astype(np.uint8)
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(idx(array)) if compress else idx(array))
    tensor = read_idx(path, dims=3)
    assert tensor.dtype == torch.uint8
    assert tensor.tolist() == array.tolist()


@pytest.mark.parametrize("compress", [False, True])
def test_mnist_is_resized_and_standardised(tmp_path, compress):
    train, test = write_mnist(tmp_path, compress)
    digits = load_mnist(tmp_path)
    assert digits.train.labels.tolist() == train[1].tolist()
    assert digits.test.labels.tolist() == test[1].tolist()
    resized = [
        torch.nn.functional.interpolate(torch.tensor(images[:, None]).float(), (32, 32), mode="bilinear")
        for images, _ in (train, test)
    ]
    std, mean = torch.std_mean(resized[0])
    torch.testing.assert_close(digits.train.images, (resized[0] - mean) / std)
    torch.testing.assert_close(digits.test.images, (resized[1] - mean) / std)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


IMAGES, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
DAMAGES = {
    "missing": (IMAGES, Path.unlink, "there is no train-images-idx3-ubyte or train-images-idx3-ubyte.gz in "),
    "truncated": (IMAGES, truncate, "is corrupt: its header promises 23520 bytes of data, it holds 23510"),
    "empty": (LABELS, lambda path: path.write_bytes(b""), "is not an IDX file of unsigned bytes in 1 dimension"),
    "text": (LABELS, lambda path: path.write_text("<html>404</html>"), "is not an IDX file"),
    "other dimensions": (LABELS, lambda path: path.write_bytes(idx(np.zeros((3, 3)))), "is not an IDX file"),
    "floats": (IMAGES, lambda path: path.write_bytes(struct.pack(">I3I", 0x0D03, 1, 1, 1) + b"1234"), "not an IDX"),
    "truncated gzip": (LABELS, lambda path: path.write_bytes(gzip.compress(idx(np.zeros(20)))[:-9]), "cannot be read"),
    "corrupt gzip": (
        LABELS,
        lambda path: path.write_bytes(b"".join([gzip.compress(idx(np.zeros(20)))[:12], b"\xff" * 9])),
        "cannot be read",
    ),
    "a folder": (LABELS, lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
    "other count": (LABELS, lambda path: path.write_bytes(idx(np.zeros(7))), "holds 12 images, but "),
    "label above 9": (LABELS, lambda path: path.write_bytes(idx(np.full(12, 11))), "holds the label 11, above 9"),
    "no images": (
        IMAGES,
        lambda path: (
            path.write_bytes(idx(np.zeros((0, 28, 28)))),
            path.with_name("train-labels-idx1-ubyte").write_bytes(idx(np.zeros(0))),
        ),
        "holds no pixels",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_named_in_one_sentence(tmp_path, damage):
    write_mnist(tmp_path, compress=False)
    name, inflict, message = DAMAGES[damage]
    inflict(tmp_path / name)
    with pytest.raises(DataError) as info:
        load_mnist(tmp_path)
    assert message in str(info.value)
    assert str(tmp_path) in str(info.value)
    assert "\n" not in str(info.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"in .*nowhere"):
        load_mnist(tmp_path / "nowhere")
