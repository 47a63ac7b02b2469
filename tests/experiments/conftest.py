"""Fixtures of the experiments' tests."""

import argparse
import importlib

import pytest

from tests.helpers import ROOT


@pytest.fixture
def experiments(monkeypatch):
    """A function name -> module experiments.NAME, found as `lm experiment NAME` does."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"experiments.{name}")


@pytest.fixture
def experiment(request, experiments):
    """The module experiments.NAME in test_NAME.py."""
    return experiments(request.module.__name__.rpartition("test_")[2])


@pytest.fixture
def mini(experiments):
    """The config that the experiments change, at full size."""
    return experiments("common").base(argparse.Namespace(quick=False))
