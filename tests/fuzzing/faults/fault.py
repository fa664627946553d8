"""What a fault is."""

from typing import NamedTuple


class Fault(NamedTuple):
    """A text in one of the files of csrc/cpu, in which it occurs once, and what takes its place."""

    name: str
    file: str
    old: str
    new: str
    op: str  # the problems of this op find it
    algorithm: str | None = None  # the one that has it, by its name in algorithms.h; None: it is in what several share
    capability: str | None = None  # the only instruction set that has this code; None: every one has it
