"""The console script: what it prints, writes and exits with."""

import re
import shutil
import subprocess
import sys

import pytest
import torch
from idx_files import write_mnist

import pyops
from pyops.cli import main
from pyops.data import load_digits, load_mnist
from pyops.lenet import StockLeNet
from pyops.train import accuracy

TRAIN = ["train", "--threads=1"]  # two threads of this small network wait for each other on a busy machine


def rows(text: str) -> list[list[str]]:
    """The table's rows, without its header."""
    return [line.split() for line in text.splitlines() if re.match(r" +\d+ ", line)]


def final_accuracy(text: str, name: str) -> float:
    return float(re.search(rf"^{name}: test accuracy ([\d.]+)%", text, re.MULTILINE)[1])


@pytest.mark.parametrize(("kernel_size", "arguments"), [(5, []), (3, ["--kernel-size=3"])])
def test_training_reaches_97_percent_and_saves_what_it_trained(tmp_path, capsys, kernel_size, arguments):
    file = tmp_path / "lenet.pt"
    main([*TRAIN, *arguments, f"--save={file}"])
    out, err = capsys.readouterr()
    table = rows(out)
    assert [row[0] for row in table] == [str(epoch) for epoch in range(1, 21)]
    losses = [float(row[1]) for row in table]
    assert losses[-1] < 0.01 < 0.1 < losses[0]
    assert float(table[-1][2].rstrip("%")) > 99.5
    reported = final_accuracy(out, "pyops")
    assert reported >= 97
    assert "images/s" in err  # the progress bar

    stock = StockLeNet(kernel_size)
    stock.load_state_dict(torch.load(file, weights_only=True))
    assert accuracy(stock, load_digits().test) * 100 == pytest.approx(reported, abs=0.3)


def test_compare_shows_two_curves_that_agree(tmp_path, capsys):
    file = tmp_path / "curves.png"
    main([*TRAIN, "--compare", "--epochs=3", "--optimizer=sgd", "--seed=5", f"--plot={file}"])
    out = capsys.readouterr().out
    assert "1438 training and 359 test images, 1 thread\n" in out
    assert torch.get_num_threads() == 1
    table = rows(out)
    assert len(table) == 3
    for _, stock_loss, stock_accuracy, _, loss, ours_accuracy, _, difference in table:
        assert float(loss) == pytest.approx(float(stock_loss), rel=1e-3)
        assert float(ours_accuracy.rstrip("%")) == pytest.approx(float(stock_accuracy.rstrip("%")), abs=0.3)
        assert float(difference) == pytest.approx(float(loss) - float(stock_loss), rel=0.1, abs=1.1e-6)
    assert float(table[-1][4]) < float(table[0][4])
    largest = float(re.search(r"largest difference of the losses: (\S+)", out)[1])
    assert largest == pytest.approx(max(abs(float(row[7])) for row in table), rel=0.1)
    assert final_accuracy(out, "pyops") == pytest.approx(final_accuracy(out, "stock"), abs=1)
    assert len(re.findall(r"trained in \d+\.\d\d s", out)) == 2
    assert file.read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_trains_the_same_network(tmp_path):
    for name in ("first", "again", "other"):
        main([*TRAIN, "--epochs=1", f"--seed={int(name == 'other')}", f"--save={tmp_path / name}"])
    first, again, other = (torch.load(tmp_path / name) for name in ("first", "again", "other"))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_trains_on_idx_files(tmp_path, capsys):
    write_mnist(tmp_path, compress=True, train_count=300, test_count=100)
    main([*TRAIN, f"--data={tmp_path}", "--epochs=8", "--batch-size=10", f"--save={tmp_path / 'net'}"])
    out = capsys.readouterr().out
    assert "300 training and 100 test images" in out
    assert final_accuracy(out, "pyops") > 80
    net = pyops.LeNet()
    net.load_state_dict(torch.load(tmp_path / "net"))
    assert accuracy(net, load_mnist(tmp_path).test) * 100 == pytest.approx(final_accuracy(out, "pyops"), abs=0.01)


def exit_of(capsys, *arguments: str) -> str:
    """Checks that the command exits with status 2, and returns what it writes to stderr."""
    with pytest.raises(SystemExit) as info:
        main(arguments)
    out, err = capsys.readouterr()
    assert info.value.code == 2
    assert out == ""
    return err


def test_missing_data_is_one_sentence(tmp_path, capsys):
    assert exit_of(capsys, "train", "--data", str(tmp_path)) == (
        f"pyops train: error: there is no train-images-idx3-ubyte or train-images-idx3-ubyte.gz in {tmp_path}\n"
    )


def test_corrupt_data_is_one_sentence(tmp_path, capsys):
    write_mnist(tmp_path, compress=True)
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:100])
    err = exit_of(capsys, "train", "--data", str(tmp_path))
    assert err.startswith(f"pyops train: error: {file} cannot be read: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs=0"], "argument --epochs: must be at least 1, got 0"),
        (["--batch-size=x"], "argument --batch-size: invalid _positive_integer value: 'x'"),
        (["--lr=0"], "argument --lr: must be above 0 and finite, got 0"),
        (["--lr=inf"], "argument --lr: must be above 0 and finite, got inf"),
        (["--seed=-1"], "argument --seed: must be from 0 to 2**63 - 1, got -1"),
        (["--threads=-2"], "argument --threads: must be at least 1, got -2"),
        (["--kernel-size=4"], "argument --kernel-size: invalid choice: 4"),
        (["--optimizer=lbfgs"], "argument --optimizer: invalid choice: 'lbfgs'"),
        (["--save=no/such/folder/file"], "argument --save: no/such/folder/file cannot be written"),
        (["--plot=curves.txt"], "argument --plot: the name must end in .png, got curves.txt"),
        (["--plot=no/such/folder/x.png"], "argument --plot: no/such/folder/x.png cannot be written"),
    ],
)
def test_wrong_arguments(capsys, arguments, message):
    assert message in exit_of(capsys, "train", *arguments)


def test_plot_without_matplotlib_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    err = exit_of(capsys, "train", f"--plot={tmp_path / 'x.png'}")
    assert "matplotlib is not installed: run `pip install matplotlib`" in err


def test_info_on_algorithms(capsys):
    main(["info", "--algorithm", "conv2d", "64x1x32x32", "6x1x5x5", "--padding=2,1"])
    out = capsys.readouterr().out
    assert re.search(r"^conv2d.forward +(\w+) +csrc/cpu/conv2d/\1.cpp\n +also: .*implicit_gemm_channels", out, re.M)
    assert re.search(r"^conv2d.weight_gradient ", out, re.M)
    main(["info", "--algorithm", "max_pool2d", "2x64x8x8", "--kernel-size=2", "--channels-last", "--dtype=bfloat16"])
    out = capsys.readouterr().out
    assert re.search(r"^max_pool2d.forward +channels +csrc/cpu/max_pool2d/channels.h$", out, re.M)
    assert re.search(r"^max_pool2d.backward +channel_tiles .*\n +also: channel_gather, scatter$", out, re.M)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["conv3d", "1x1"], "no op 'conv3d'"),
        (["conv2d", "1x3x8x8", "4x2x3x3"], "expected input.* to have 2 channels|channels"),
        (["linear", "8x5", "3x5", "--stride=2"], "stride"),
        (["linear", "8xfive"], "invalid literal"),
        (["max_pool2d", "2x2x8x8", "2"], "has at most 1 operand, got 2: 2x2x8x8, 2"),
    ],
)
def test_info_on_an_impossible_call(capsys, arguments, message):
    with pytest.raises(SystemExit) as info:
        main(["info", "--algorithm", *arguments])
    assert info.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_info(capsys):
    main(["info"])
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert facts["pyops"].startswith(f"{pyops.__version__}, built with torch {torch.__version__}")
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == str(torch.get_num_threads())
    chosen, built = facts["CPU kernels"].split(", chosen from ")
    assert chosen in built.split(", ")
    assert facts["CUDA"] == "not built" or facts["CUDA"].startswith("built with CUDA ")


def test_the_console_script_is_installed():
    script = shutil.which("pyops", path=str(sys.prefix) + "/bin")
    assert script is not None
    result = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"pyops {pyops.__version__}\n"
    assert subprocess.run([script], capture_output=True).returncode == 2
