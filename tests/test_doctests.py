"""The examples in docstrings are right."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from types import ModuleType

import pytest
import tscfile_cli
import tscfile_kernels
from conftest import ROOT

import tscfile


def module_names() -> list[str]:
    names = []
    for package in (tscfile, tscfile_kernels, tscfile_cli):
        found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        names += [package.__name__, *(module.name for module in found)]
    return names


def load(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing.startswith("tscfile"):
            raise
        # Only engines and devices are optional.
        pytest.skip(f"{missing} is not installed")


@pytest.mark.parametrize("name", module_names())
def test_examples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # They name samples as seen from the root.
    monkeypatch.chdir(ROOT)
    failed, _ = doctest.testmod(load(name), optionflags=doctest.ELLIPSIS)
    assert failed == 0


def test_there_are_examples() -> None:
    found = doctest.DocTestFinder().find(tscfile)
    assert any(test.examples for test in found)
