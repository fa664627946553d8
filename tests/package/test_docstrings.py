"""The examples in the docstrings run and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import pyops

MODULES = ["pyops", *(m.name for m in pkgutil.walk_packages(pyops.__path__, "pyops.") if "._" not in m.name)]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", ["pyops", "pyops.autograd", "pyops.functional", "pyops.nn", "pyops.testing"])
def test_every_public_function_and_class_has_an_example(name):
    module = importlib.import_module(name)
    public = {each: getattr(module, each) for each in module.__all__}
    without = [each for each, thing in public.items() if callable(thing) and ">>> " not in (thing.__doc__ or "")]
    assert without == []
