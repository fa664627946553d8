"""The definition of a fault."""

from typing import NamedTuple


class Fault(NamedTuple):
    """A text that occurs once in one of the files of csrc/cpu, and the text that replaces it."""

    name: str
    file: str
    old: str
    new: str
    op: str  # the op whose problems find the fault
    algorithm: str | None = None  # the algorithm that has it, as named in algorithms.h, or None for shared code
    capability: str | None = None  # the only instruction set that has this code, or None for all of them
