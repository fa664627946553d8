"""The algorithms that the kernels choose between: their names, how often each has run, and which ones are forced."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

from pyops import _load

VARIABLE = "PYOPS_ALGORITHM"

modules: list[ModuleType] = [_load.cpu_module, *([_load.cuda_module] if _load.cuda_module else [])]
_forced: dict[str, str] = {}


class Algorithm(NamedTuple):
    """An algorithm, and the file of the sources that it is in."""

    name: str
    file: str


def algorithms() -> dict[str, list[Algorithm]]:
    """The algorithms of each op and direction, in order of preference, first the CPU's and then the GPU's."""
    found: dict[str, list[Algorithm]] = {}
    for module in modules:
        for op, rows in module.algorithms().items():
            found.setdefault(op, []).extend(Algorithm(*row) for row in rows)
    return found


def counts() -> Counter[str]:
    """How often each algorithm has run in this process, by "op:name"; parts without alternatives are counted too."""
    return sum((Counter(module.algorithm_counts()) for module in modules), Counter())


def force(op: str, name: str | None) -> None:
    """Computes ``op`` by the algorithm ``name`` until further notice, or chooses again if ``name`` is None.

    Kernels that have no algorithm of that name go on choosing.
    """
    found = [module.force_algorithm(op, name) for module in modules]
    for module, has_it in zip(modules, found, strict=True):
        if any(found) and not has_it:
            module.force_algorithm(op, None)
    if not any(found):
        known = algorithms()
        if op not in known:
            raise ValueError(f"there is no op {op!r} whose algorithm is chosen, but there are {', '.join(known)}")
        names = ", ".join(dict.fromkeys(algorithm.name for algorithm in known[op]))
        raise ValueError(f"{op} has no algorithm {name!r}, but {names}")
    if name is None:
        _forced.pop(op, None)
    else:
        _forced[op] = name


@contextmanager
def forced(op: str, name: str) -> Iterator[None]:
    """Forces an algorithm while the context lasts."""
    before = _forced.get(op)
    force(op, name)
    try:
        yield
    finally:
        force(op, before)


def force_as_the_environment_says() -> None:
    """Reads the environment variable, such as ``conv2d.forward:batch_lanes,max_pool2d.forward:windows``."""
    for choice in filter(None, os.environ.get(VARIABLE, "").split(",")):
        op, _, name = choice.partition(":")
        try:
            force(op, name)
        except ValueError as error:
            raise ValueError(f"{VARIABLE}={os.environ[VARIABLE]}: {error}") from None


def run_by(call: Callable[[], object]) -> dict[str, list[Algorithm]]:
    """Calls ``call`` and returns which algorithm of each op it has used."""
    before = counts()
    call()
    ran = {name for name, runs in counts().items() if runs > before[name]}
    used = {op: [row for row in rows if f"{op}:{row.name}" in ran] for op, rows in algorithms().items()}
    return {op: rows for op, rows in used.items() if rows}


def supporting(op: str, call: Callable[[], object]) -> list[Algorithm]:
    """The algorithms of ``op`` that support the problem of ``call``, which is called once with each."""
    found = []
    for algorithm in algorithms()[op]:
        with forced(op, algorithm.name):
            try:
                call()
            except RuntimeError as error:
                if "is forced, but it does not support" not in str(error):
                    raise
            else:
                found.append(algorithm)
    return found


force_as_the_environment_says()
