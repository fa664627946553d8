"""The console script ``pyops``: ``pyops train`` and ``pyops info``."""

import argparse
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from pyops import __version__, _algorithms, _load, functional
from pyops.data import DataError, load_digits, load_mnist
from pyops.lenet import LeNet, StockLeNet
from pyops.train import Epoch, accuracy, make_optimizer, train

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line ``argv`` (the process's own if None); bad arguments or data exit with status 2."""
    args = _parser().parse_args(argv)
    try:
        args.command(args)
    except DataError as error:
        args.parser.exit(2, f"{args.parser.prog}: error: {error}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pyops", description="Hand-written autograd ops for PyTorch, seen at work.")
    parser.add_argument("--version", action="version", version=f"pyops {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    description = "train LeNet on real handwritten digits with pyops' kernels"
    sub = commands.add_parser("train", help=description, description=description.capitalize() + ".")
    sub.set_defaults(command=_train, parser=sub)
    sub.add_argument(
        "--data",
        metavar="DIR",
        type=Path,
        help="MNIST in IDX files, gzipped or not (default: the 8x8 digits that scikit-learn carries)",
    )
    sub.add_argument("--compare", action="store_true", help="train the same network on stock torch layers as well")
    sub.add_argument("--plot", metavar="FILE.png", type=_png_file, help="draw loss and accuracy (needs matplotlib)")
    sub.add_argument("--save", metavar="FILE", type=_output_file, help="write the trained state_dict")
    sub.add_argument("--epochs", metavar="N", type=_positive_integer, default=20, help="default: %(default)s")
    sub.add_argument("--batch-size", metavar="N", type=_positive_integer, default=32, help="default: %(default)s")
    sub.add_argument(
        "--lr", type=_positive_number, help="initial learning rate (default: 0.003 for adam, 0.02 for sgd)"
    )
    sub.add_argument("--optimizer", choices=("sgd", "adam"), default="adam", help="default: %(default)s")
    sub.add_argument(
        "--seed",
        metavar="N",
        type=_seed,
        default=0,
        help="of the parameters, the order of the images and the choice of test digits (default: %(default)s)",
    )
    sub.add_argument("--threads", metavar="N", type=_positive_integer, help="default: torch's own choice")
    sub.add_argument("--kernel-size", type=int, choices=(5, 3), default=5, help="default: %(default)s")

    description = "print what pyops was built with and what it runs on"
    sub = commands.add_parser("info", help=description, description=description.capitalize() + ".")
    sub.set_defaults(command=_info, parser=sub)
    sub.add_argument(
        "--algorithm",
        nargs="+",
        metavar=("OP", "SHAPE"),
        help="instead tell by which algorithms an op computes tensors of these shapes, such as "
        "conv2d 64x1x32x32 6x1x5x5, linear 64x400 120x400 or max_pool2d 64x6x28x28",
    )
    call = sub.add_argument_group("the call of --algorithm")
    for option in ("kernel-size", "stride", "padding", "dilation"):
        call.add_argument(f"--{option}", metavar="N[,N]", type=_pair)
    call.add_argument("--groups", metavar="N", type=_positive_integer)
    call.add_argument("--dtype", choices=("float32", "float64", "bfloat16", "float16"), default="float32")
    call.add_argument("--channels-last", action="store_true")
    return parser


def _train(args: argparse.Namespace) -> None:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    digits = load_digits(args.seed) if args.data is None else load_mnist(args.data)
    networks = {"stock": StockLeNet, "pyops": LeNet} if args.compare else {"pyops": LeNet}
    models = {}
    for name, network in networks.items():
        torch.manual_seed(args.seed)  # so that both start from equal parameters
        models[name] = network(args.kernel_size)

    threads = torch.get_num_threads()
    print(
        f"LeNet {args.kernel_size}x{args.kernel_size}, {len(digits.train.labels)} training and "
        f"{len(digits.test.labels)} test images, {threads} thread{'s' * (threads > 1)}"
    )
    total = len(models) * args.epochs * len(digits.train.labels)
    with tqdm(total=total, unit=" images", leave=False) as bar:

        def on_batch(count: int, loss: float) -> None:
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            bar.update(count)

        runs = [
            train(
                model,
                make_optimizer(model, args.optimizer, args.lr),
                digits.train,
                epochs=args.epochs,
                batch_size=args.batch_size,
                seed=args.seed,
                on_batch=on_batch,
            )
            for model in models.values()
        ]
        bar.write(_header(models))
        history = []
        for epochs in zip(*runs, strict=True):  # the networks take turns, so that their times are comparable
            history.append(epochs)
            bar.write(_row(len(history), epochs))

    curves = dict(zip(models, zip(*history, strict=True), strict=True))
    for name, model in models.items():
        seconds = sum(epoch.seconds for epoch in curves[name])
        print(f"{name}: test accuracy {accuracy(model, digits.test):.2%}, trained in {seconds:.2f} s")
    if args.compare:
        difference = max(abs(stock.loss - ours.loss) for stock, ours in history)
        print(f"largest difference of the losses: {difference:.1e}")
    if args.save is not None:
        torch.save(models["pyops"].state_dict(), args.save)
    if args.plot is not None:
        _plot(args.plot, curves)


def _header(names: Mapping[str, object]) -> str:
    columns = [f"{name + ' loss':>12}  accuracy  seconds" for name in names]
    return "  ".join(["epoch", *columns, *(["loss difference"] if len(columns) == 2 else [])])


def _row(number: int, epochs: Sequence[Epoch]) -> str:
    columns = [f"{epoch.loss:12.6f}  {epoch.accuracy:8.2%}  {epoch.seconds:7.2f}" for epoch in epochs]
    if len(epochs) == 2:
        columns.append(f"{epochs[1].loss - epochs[0].loss:15.1e}")
    return "  ".join([f"{number:5d}", *columns])


def _plot(path: Path, curves: Mapping[str, Sequence[Epoch]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    for (name, epochs), style in zip(curves.items(), ("o-", "x--"), strict=False):
        numbers = range(1, len(epochs) + 1)
        loss_axes.plot(numbers, [epoch.loss for epoch in epochs], style, label=name)
        accuracy_axes.plot(numbers, [epoch.accuracy for epoch in epochs], style, label=name)
    loss_axes.set(ylabel="training loss", yscale="log")
    accuracy_axes.set(ylabel="training accuracy")
    for axes in (loss_axes, accuracy_axes):
        axes.set(xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    figure.savefig(path)


def _info(args: argparse.Namespace) -> None:
    if args.algorithm:
        return _explain(args)
    build = _load.build_info
    cuda = f"built with CUDA {build.cuda} for {', '.join(build.cuda_archs)}" if build.cuda else "not built"
    facts = {
        "pyops": f"{__version__}, built with torch {build.torch} by {build.compiler}",
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "CPU kernels": f"{_load.cpu_capability}, chosen from {', '.join(build.cpu_capabilities)}",
        "CPU of torch": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "CUDA": cuda,
    }
    for name, fact in facts.items():
        print(f"{name:<13} {fact}")


def _explain(args: argparse.Namespace) -> None:
    op, *shapes = args.algorithm
    options = {name: getattr(args, name) for name in ("kernel_size", "stride", "padding", "dilation", "groups")}
    options = {name: value for name, value in options.items() if value is not None}
    try:
        tensors = [torch.zeros(tuple(map(int, shape.split("x"))), dtype=getattr(torch, args.dtype)) for shape in shapes]
        if args.channels_last:
            tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
        function, most = {
            "conv2d": (functional.conv2d, 3),
            "linear": (functional.linear, 3),
            "max_pool2d": (functional.max_pool2d, 1),
        }[op]
        if len(shapes) > most:
            raise ValueError(
                f"{op} has at most {most} operand{'s' * (most > 1)}, got {len(shapes)}: {', '.join(shapes)}"
            )

        def call() -> None:
            output = function(*(tensor.requires_grad_() for tensor in tensors), **options)
            torch.autograd.grad(output, tensors, torch.zeros_like(output))

        used = _algorithms.run_by(call)
    except KeyError:
        args.parser.error(f"argument --algorithm: no op {op!r} (choose from conv2d, linear, max_pool2d)")
    except (RuntimeError, TypeError, ValueError) as error:
        args.parser.error(f"argument --algorithm: {error}")
    for name, rows in used.items():
        for row in rows:
            print(f"{name:24} {row.name:24} {row.file}")
        others = [row.name for row in _algorithms.supporting(name, call) if row not in rows]
        if others:
            print(f"{'':24} also: {', '.join(others)}")


def _pair(text: str) -> int | tuple[int, ...]:
    numbers = tuple(map(int, text.split(",")))
    return numbers[0] if len(numbers) == 1 else numbers


def _positive_integer(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def _positive_number(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0 and finite, got {text}")
    return number


def _seed(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2**63 - 1, got {text}")
    return number


def _output_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written")
    return path


def _png_file(text: str) -> Path:
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"the name must end in .png, got {text}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise argparse.ArgumentTypeError("matplotlib is not installed: run `pip install matplotlib`") from None
    return _output_file(text)
