"""The speed and accuracy that the CUDA kernels aim for, relative to stock torch, and whether bench/gpu_times.py's
results meet these aims."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

# The largest and the root mean square error may be this many times stock's. Differences of a few ulps of float32 do not
# count as errors, because any order of summation may happen to be more accurate (the tests of the CPU allow as much).
ALLOWED_ERROR = 1.5
NO_ERROR = 4 * 2.0**-23


@dataclass(frozen=True)
class Result:
    """The times and errors of a case by stock and by pyops."""

    name: str
    dtype: str
    seconds: dict[str, float]  # for each of gpu_times.WAYS that did not fail
    errors: dict[str, tuple[float, float]]  # for "stock" and "pyops": the largest and the root mean square error
    failed: dict[str, str]  # the message for each of gpu_times.WAYS that failed

    def ratio(self, way: str, ours: str) -> float:
        """How many times as fast as `way` of stock `ours` is; NaN if either failed."""
        both = self.seconds.get(way), self.seconds.get(ours)
        return both[0] / both[1] if all(both) else math.nan


class Aim(NamedTuple):
    """pyops should be `ratio` times as fast as stock run as `way`, in all cases whose name and dtype match."""

    what: str
    cases: str
    dtype: str
    ratio: float
    way: str = "stock"


AIMS = (
    Aim("training step of LeNet, batch 1 to 1024", r"LeNet training step, batch (1|64|1024)$", "", 3),
    Aim("training step of LeNet, batch 65536", r"LeNet training step, batch 65536$", "", 2),
    Aim("forward of LeNet, fused, batch 64", r"LeNet forward, batch 64$", "", 5),
    Aim("max_pool2d backward", r"^max_pool2d .*backward$", "", 1.8),
    Aim("linear against cuBLAS", r"^linear 4096x4096 by 4096x4096, forward$", "float32", 1.3),
    Aim("linear on tensor cores against cuBLAS", r"^linear 4096x4096 by 4096x4096, forward$", "bfloat16", 0.5),
    Aim("3x3 on tensor cores against cuDNN", r"^conv2d 64x64x56x56 by .*forward$", "bfloat16", 0.5, "stock, tuned"),
)


@dataclass(frozen=True)
class Verdict:
    aim: str
    case: str
    dtype: str
    wanted: str
    found: str
    passed: bool


def judge(results: Sequence[Result]) -> list[Verdict]:
    """A verdict for each aim and each of its cases, and one for the error of each case. A failed run has not passed."""
    judged = []
    for aim in AIMS:
        for result in results:
            if re.search(aim.cases, result.name) and aim.dtype in result.dtype:
                ratio = result.ratio(aim.way, "pyops")
                found = "not measured" if math.isnan(ratio) else f"{ratio:.2f}"
                judged.append(
                    Verdict(aim.what, result.name, result.dtype, f"{aim.ratio} x {aim.way}", found, ratio >= aim.ratio)
                )
    for result in results:
        if {"stock", "pyops"} <= result.errors.keys():
            pairs = list(zip(result.errors["stock"], result.errors["pyops"], strict=True))
            passed = all(ours <= max(ALLOWED_ERROR * stock, NO_ERROR) for stock, ours in pairs)
            found = " and ".join(f"{ours:.1e} ({stock:.1e})" for stock, ours in pairs)
        elif "error" in result.failed:
            passed, found = False, result.failed["error"]
        else:
            continue
        wanted = f"{ALLOWED_ERROR} x stock's"
        judged.append(Verdict("largest and rms error", result.name, result.dtype, wanted, found, passed))
    return judged


def verdicts(judged: Sequence[Verdict]) -> str:
    """A Markdown table of all verdicts on speed, and of the errors that are too large."""
    lines = ["| aim | case | dtype | wanted | found | |", "|---|---|---|--:|--:|---|"]
    for v in judged:
        if "error" not in v.aim or not v.passed:
            cells = (v.aim, v.case, v.dtype, v.wanted, v.found, "PASS" if v.passed else "FAIL")
            lines.append("| " + " | ".join(cells) + " |")
    errors = [v for v in judged if "error" in v.aim]
    lines += [
        "",
        f"Errors against float64 of at most {ALLOWED_ERROR} times stock's: {sum(v.passed for v in errors)} of ",
    ]
    lines[-1] += f"{len(errors)} cases."
    return "\n".join(lines)
