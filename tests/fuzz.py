"""Looks for problems that pyops gets wrong: draws them at random and compares with stock torch.

    python tests/fuzz.py                          # the ops, a minute on each instruction set
    python tests/fuzz.py --minutes 10 --op conv2d --capability avx2
    python tests/fuzz.py --op conv2d --algorithm conv2d.forward:batch_lanes
    python tests/fuzz.py --device emulated        # the CUDA kernels on the emulator
    python tests/fuzz.py --hostile                # nonsense: an exception of torch's types or a result, never a crash
    python tests/fuzz.py --networks               # small networks through convert, patch and the backend
    python tests/fuzz.py --transforms             # vmap, jvp, vjp, second derivatives, and shapes on meta
    python tests/fuzz.py --one 123456789          # one problem again, printed as a test

A problem depends on its seed alone. Whatever fails is printed with the command that runs it again. The campaign over
the ops also says how often each algorithm of the kernels ran, and fails if one of them never did.
"""

import argparse
import json
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "support"))

from fuzzing import campaign

KINDS = ("ops", "hostile", "networks", "transforms")
SEEDS_OF_A_RUN = 10**9  # large enough that runs with neighbouring seeds share no problem
ENOUGH_PROBLEMS = 20_000  # enough for every algorithm to be reached


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_mutually_exclusive_group()
    for kind in KINDS[1:]:
        kinds.add_argument(f"--{kind}", dest="kind", action="store_const", const=kind, default="ops")
    parser.add_argument("--minutes", type=float, default=1.0, help="for each instruction set (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of the run (default: drawn from the clock)")
    parser.add_argument("--one", type=int, metavar="SEED", help="run the problem of this seed and print it as a test")
    parser.add_argument("--op", help="draw problems of this op alone")
    parser.add_argument("--algorithm", metavar="OP:NAME", help="compute each problem by it that it supports")
    parser.add_argument("--capability", choices=("default", "avx2", "avx512"), help="default: each that can run")
    parser.add_argument("--device", choices=("cpu", "emulated"), default="cpu")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    parser.add_argument("--until-failure", action="store_true", help="end with the first problem that fails")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def replay(settings: campaign.Settings, seed: int) -> int:
    with ExitStack() as stack:
        campaign.on_device(settings, stack, seed)
        print(campaign.draw(settings, seed).as_test())
    wrong = campaign.run_one(settings, seed)
    print(wrong[0] if wrong else "this problem is solved correctly")
    return int(wrong is not None)


def report(settings: campaign.Settings, result: campaign.Result) -> bool:
    """Prints the results of a campaign and returns whether all is well."""
    print(f"{settings.name()}: {result.problems} problems, {len(result.failures)} failures", flush=True)
    for seed, wrong in sorted(result.failures.items())[:20]:
        print(f"\n  {settings.replay(seed)}\n    " + wrong.replace("\n", "\n    "))
    unreached: list[str] = []
    if settings.kind == "ops":
        unreached = [name for name, runs in result.algorithms.items() if runs == 0]
        for name, runs in sorted(result.algorithms.items()):
            print(f"  {name:55} {runs:10}")
    judged = result.problems >= ENOUGH_PROBLEMS and settings.op is None and settings.algorithm is None
    if unreached:
        print(f"  never reached{'' if judged else ' by so few problems'}: {', '.join(unreached)}")
    return not result.failures and result.problems > 0 and not (judged and unreached)


def main() -> int:
    arguments = parse()
    if arguments.worker:
        settings, *rest, place = json.loads(arguments.worker)
        campaign.work(campaign.Settings(**settings), *rest, Path(place))
        return 0
    seed = arguments.seed if arguments.seed is not None else time.time_ns() // 10**6 % 10**9
    settings = campaign.Settings(
        arguments.kind,
        seed * SEEDS_OF_A_RUN,
        arguments.minutes * 60,
        arguments.op,
        arguments.algorithm,
        device=arguments.device,
    )
    if arguments.one is not None:
        if arguments.capability:
            os.environ["ATEN_CPU_CAPABILITY"] = arguments.capability
        return replay(settings, arguments.one)
    each = [None]
    if arguments.device == "cpu" and arguments.kind == "ops":
        each = [arguments.capability] if arguments.capability else list(campaign.capabilities())
    print(f"seed {seed}", flush=True)
    well = True
    for capability in each:
        chosen = replace(settings, capability=capability)
        well &= report(chosen, campaign.run(chosen, arguments.jobs, arguments.until_failure))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
