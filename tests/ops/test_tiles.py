"""Products of bfloat16 on a tile unit.

On every machine the kernel on the model of the unit has the bits of an independent reference. Where the AVX-512 kernels
run, the ops run on the model too, and where there is AMX, it has the bits of the model.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiles
import torch
from tiles import Product, Run

from pyops import _load

PROGRAM = Path(__file__).parents[1] / "programs" / "tile_results.py"
HAS_AVX512 = _load.cpu_capability == "AVX512"
CPU_INFO = Path("/proc/cpuinfo")
HAS_AMX = HAS_AVX512 and CPU_INFO.exists() and "amx_bf16" in CPU_INFO.read_text()
needs_avx512 = pytest.mark.skipif(not HAS_AVX512, reason="only the AVX-512 kernels multiply tiles")
needs_amx = pytest.mark.skipif(not HAS_AMX, reason="this CPU has no AMX")
needs_compiler = pytest.mark.skipif(
    shutil.which(tiles.COMPILER[0]) is None, reason=f"no C++ compiler {tiles.COMPILER[0]}"
)

NAN = 0x7FC0
TINY = [0x0000, 0x8000, 0x0001, 0x807F, 0x0080, 0x8080, 0x0101, 0x8101, 0x2003, 0xA003, 0x1FFF, 0x9FFF, 0x3F81, 0xBF81]
VALUES = {  # the share of special values among normally distributed ones, and these values as bits
    "normal": (0.0, [0]),
    "tiny": (1.0, TINY),  # products and sums of which many are denormal numbers
    "huge": (0.01, [0x7F7F, 0xFF7F, 0x7F80, 0xFF80, NAN]),
}

# How the steps of A and B and the rows of A lie, in pairs: (steps, offsets) of `n` steps and `m` rows.
A_LAYOUTS = {
    "matrix": lambda n, m, random: (np.arange(n), np.arange(m) * (n + 3)),
    "evicting matrix": lambda n, m, random: (np.arange(n), np.arange(m) * 512),
    "one row": lambda n, m, random: (np.arange(n), np.zeros(m, int)),
    "backward": lambda n, m, random: (np.arange(n), np.arange(m)[::-1] * 40),
    "rows anywhere": lambda n, m, random: (np.arange(n), random.permutation(m) * (n + 1)),
    "taps": lambda n, m, random: (np.arange(n) // 12 * 100 + np.arange(n) % 12, np.arange(m) * 24),
    "columns": lambda n, m, random: (np.arange(n) * (m + 5), np.arange(m)),
    "panels": lambda n, m, random: (np.arange(n) * 12, np.arange(m) // 12 * 12 * n + np.arange(m) % 12),
    "anywhere": lambda n, m, random: (random.permutation(3 * n)[:n], random.permutation(m) * 3 * n),
}
B_LAYOUTS = {
    "matrix": lambda n, v, lanes, random: (np.arange(n) * lanes * v, np.arange(v) * lanes),
    "panels": lambda n, v, lanes, random: (np.arange(n) * lanes, np.arange(v) * n * lanes),
    "backward": lambda n, v, lanes, random: (np.arange(n)[::-1] * lanes * v, np.arange(v)[::-1] * lanes),
    "overlapping": lambda n, v, lanes, random: (np.arange(n) // 5 * 30 + np.arange(n) % 5, random.permutation(v) * 7),
    "anywhere": lambda n, v, lanes, random: (random.permutation(2 * n)[:n] * lanes * v, np.arange(v) * lanes),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return tiles.Library(tmp_path_factory.mktemp("tiles"))


def pairs(random, shape, values: str) -> np.ndarray:
    """Pairs of random numbers of bfloat16, as bits."""
    share, special = VALUES[values]
    normal = torch.from_numpy(random.standard_normal((*shape, 2))).bfloat16().view(torch.int16).numpy().view(np.uint16)
    return np.where(random.random(normal.shape) < share, random.choice(special, normal.shape), normal)


def memory(values: np.ndarray, addresses: np.ndarray) -> np.ndarray:
    """Memory with NaN everywhere but at the addresses."""
    numbers = np.full((addresses.max(initial=-1) + 1, 2), NAN, np.uint16)
    numbers[addresses] = values
    return numbers


def draw(random, width, a_layout, b_layout, rows, kc, vectors, *, values="normal", **options) -> Product:
    """A product with random values: run i has rows[i] rows and kc[i] steps, and vectors are `width` lanes wide."""
    runs, a_offsets, first = [], [], 0
    b_offsets = B_LAYOUTS[b_layout](max(*kc, 1), vectors, width, random)[1]
    for m, n in zip(rows, kc, strict=True):
        steps, offsets = A_LAYOUTS[a_layout](max(n, 1), m, random)
        b_steps = B_LAYOUTS[b_layout](max(*kc, 1), vectors, width, random)[0]
        runs.append(Run(m, steps[:n], b_steps[:n]))
        a_offsets.append(first + offsets)
        first += steps.max(initial=0) + offsets.max(initial=0) + 1
    a_offsets = np.concatenate(a_offsets)
    row_runs = np.repeat(np.arange(len(runs)), rows)
    read = [a_offsets[row_runs == i][:, None] + run.a_steps for i, run in enumerate(runs)]
    a_addresses = np.unique(np.concatenate([part.ravel() for part in read]).astype(int))
    columns = (b_offsets[:, None] + np.arange(width)).ravel()
    b_addresses = np.unique(np.concatenate([(columns[:, None] + run.b_steps).ravel() for run in runs]).astype(int))
    m = sum(rows)
    return Product(
        runs,
        memory(pairs(random, a_addresses.shape, values), a_addresses),
        a_offsets,
        memory(pairs(random, b_addresses.shape, values), b_addresses),
        b_offsets,
        random.standard_normal(m * (vectors * width + 2)).astype(np.float32),
        random.permutation(m) * (vectors * width + 2),
        random.permutation(vectors) * width,
        **options,
    )


def epilogue(random, lanes, rows, vectors) -> dict:
    """Random options for what becomes of the sums."""
    options = {"accumulate": random.random() < 0.5, "last": random.random() < 0.7, "relu": random.random() < 0.5}
    if random.random() < 0.5:
        options["lanes"] = random.integers(1, lanes + 1, vectors)
    bias = random.choice(["row_bias", "column_bias", "none"])
    if bias != "none":
        size = rows if bias == "row_bias" else vectors * lanes
        options[bias] = random.standard_normal(size).astype(np.float32)
    if random.random() < 0.5:
        options["rounded"] = random.integers(0, 2**16, rows * vectors * lanes).astype(np.uint16)
        options["rounded_rows"] = random.permutation(rows) * vectors * lanes
        options["rounded_vectors"] = random.permutation(vectors) * lanes
    return options


def assert_same_bits(library, x: Product) -> None:
    names = ("C", "the rounded C")
    for name, ours, expected in zip(names, library.multiply(x), tiles.multiply(x, library.lanes), strict=True):
        if expected is None:
            continue
        floats = ours if ours.dtype == np.float32 else (ours.astype(np.uint32) << 16).view(np.float32)
        others = expected if ours.dtype == np.float32 else (expected.astype(np.uint32) << 16).view(np.float32)
        same = (floats.view(np.uint32) == others.view(np.uint32)) | (np.isnan(floats) & np.isnan(others))
        where = np.flatnonzero(~same)
        assert same.all(), f"{name}: {len(where)} of {same.size} differ, {floats[where[:4]]} for {others[where[:4]]}"


@needs_compiler
@pytest.mark.parametrize("b_layout", B_LAYOUTS)
@pytest.mark.parametrize("a_layout", A_LAYOUTS)
def test_layouts(library, a_layout, b_layout):
    """Each layout of the operands, with tails of rows and of steps."""
    random = np.random.default_rng(0)
    for rows, kc, vectors in [([1], [5], 1), ([16], [16], 2), ([37], [50], 3), ([70], [33], 1), ([20, 3], [48, 17], 5)]:
        assert_same_bits(library, draw(random, library.lanes, a_layout, b_layout, rows, kc, vectors))


@needs_compiler
@pytest.mark.parametrize("seed", range(60))
def test_random_products(library, seed):
    """Several runs, any sizes, any epilogue and values of each kind."""
    random = np.random.default_rng(seed)
    run_count = random.choice([1, 1, 2, 3])
    rows = [int(random.choice([random.integers(0, 71), random.integers(1, 5)])) for _ in range(run_count)]
    kc = [int(random.choice([random.integers(0, 145), random.integers(1, 40)])) for _ in range(run_count)]
    vectors = int(random.integers(1, 10))
    rows[0] = max(rows[0], 1)
    x = draw(
        random,
        library.lanes,
        random.choice(list(A_LAYOUTS)),
        random.choice(list(B_LAYOUTS)),
        rows,
        kc,
        vectors,
        values=random.choice(list(VALUES)),
        **epilogue(random, library.lanes, sum(rows), vectors),
    )
    assert_same_bits(library, x)


@needs_compiler
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_that_are_denormal(library, sign):
    """The second piece is a normal number minus one, which is a denormal number: it adds nothing to the first piece."""
    smallest = 2.0**-126
    a = np.zeros((2 * tiles.PIECE, 2), np.float32)
    a[0, 0], a[tiles.PIECE] = sign * 1.5 * smallest, (sign * 1.25 * smallest, -sign * smallest)
    ones = np.full((2 * tiles.PIECE * library.lanes, 2), 0x3F80, np.uint16)
    steps, zero = np.arange(2 * tiles.PIECE), np.zeros(1, int)
    run = Run(1, steps, steps * library.lanes)
    x = Product([run], tiles.bfloat16_bits(a), zero, ones, zero, np.ones(library.lanes, np.float32), zero, zero)
    assert_same_bits(library, x)
    assert (library.multiply(x)[0] == sign * np.float32(1.5 * smallest)).all()


@needs_compiler
def test_more_vectors_than_are_staged_at_a_time(library):
    random = np.random.default_rng(1)
    for b_layout in ("matrix", "anywhere"):
        options = {"last": True, "lanes": random.integers(1, library.lanes + 1, 131)}
        options["column_bias"] = random.standard_normal(131 * library.lanes).astype(np.float32)
        assert_same_bits(library, draw(random, library.lanes, "matrix", b_layout, [5, 18], [20, 7], 131, **options))


@needs_compiler
def test_rounding(library):
    """Ties go to even, denormal numbers become zeros and a NaN stays one."""
    bits = {
        0x3F808000: 0x3F80, 0x3F818000: 0x3F82, 0x3F808001: 0x3F81, 0x7F7FFFFF: 0x7F80, 0xFF800000: 0xFF80,
        0x007FFFFF: 0x0000, 0x80000001: 0x8000, 0x00800000: 0x0080, 0x7FC00001: 0x7FC0, 0x7F800001: 0x7FC0,
    }  # fmt: skip
    # ctypes makes a double of a float, and so makes a signalling NaN quiet, as the rounding would.
    for value, expected in bits.items():
        assert library.rounded(np.uint32(value).view(np.float32)) == expected, hex(value)


def test_the_reference_rounds_once():
    """A product plus a sum is rounded as in exact arithmetic, where float64 alone would round twice."""
    one = np.array([1.0], np.float32)
    tiny = np.array([2.0**-60], np.float32)
    for sign in (1, -1):
        c = np.array([1 + 2.0**-23], np.float32)
        half = np.array([2.0**-24], np.float32)
        exact = tiles.multiply_add(half, one, c)  # a tie, to even
        assert exact == np.float32(1 + 2.0**-22)
        almost = tiles.multiply_add(one * sign, tiny, np.array([1.5], np.float32))
        assert almost == np.float32(1.5)
    just_below = tiles.multiply_add(np.array([1 + 2.0**-7], np.float32), np.array([2.0**-100], np.float32), one)
    assert just_below == one


def run(unit: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYOPS_TILES": unit}
    command = [sys.executable, "-P", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@needs_avx512
def test_ops_on_the_model(tmp_path):
    """linear and conv2d are as accurate as always, whatever the batch and the number of threads."""
    result = run("model", PROGRAM, tmp_path / "results.pt")
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads(result.stdout)["checked"] > 0


@needs_amx
def test_amx_gives_the_bits_of_the_model(tmp_path):
    results = {}
    for unit in ("amx", "model"):
        result = run(unit, PROGRAM, tmp_path / unit)
        assert result.returncode == 0, result.stdout + result.stderr
        results[unit] = torch.load(tmp_path / unit)
    assert results["amx"].keys() == results["model"].keys()
    for name, actual in results["amx"].items():
        expected = results["model"][name]
        assert torch.equal(actual.isnan(), expected.isnan()), name
        same = (actual.view(torch.int16) == expected.view(torch.int16)) | actual.isnan()
        assert same.all(), f"{name}: {int((~same).sum())} of {same.numel()} elements differ"


def test_an_unknown_unit():
    result = run("tpu", "-c", "import pyops")
    assert "ValueError: PYOPS_TILES=tpu: the values are amx, model and off" in result.stderr


@pytest.mark.skipif(HAS_AMX, reason="this CPU has AMX")
def test_a_unit_that_is_missing():
    result = run("amx", "-c", "import pyops")
    assert "ValueError: PYOPS_TILES=amx: " in result.stderr
    assert run("off", "-c", "import pyops").returncode == 0
