"""The problems that `python tests/fuzz.py` draws, one module for each kind of problem.

A module has ``draw(seed)``, which gives a problem that depends on the seed alone. A problem has ``check()``, which
raises an AssertionError if pyops is wrong, and ``as_test()``, the source text of a test that reproduces it.
"""
