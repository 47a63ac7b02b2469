"""What the tests of experiments share."""

import argparse
import importlib

import pytest

from tests.helpers import ROOT


@pytest.fixture
def experiments(monkeypatch):
    """The function name -> module experiments.NAME, as `lm experiment NAME` finds it."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"experiments.{name}")


@pytest.fixture
def experiment(request, experiments):
    """For test_NAME.py the module experiments.NAME."""
    return experiments(request.module.__name__.rpartition("test_")[2])


@pytest.fixture
def mini(experiments):
    """What experiments' models start from at full size."""
    return experiments("common").base(argparse.Namespace(quick=False))
