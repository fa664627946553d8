"""The problems that `python tests/fuzz.py` draws, one module for each kind of problem.

A module has a function ``draw(seed)``, which returns a problem that depends on the seed alone. A problem has methods
``check()``, which raises an AssertionError if pyops is wrong, and ``as_test()``, which returns the source text of a
test that reproduces it.
"""
