"""What the tests of experiments share."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def experiment(request, monkeypatch):
    """For test_NAME.py the module experiments.NAME, as `python -m experiments.NAME` finds it."""
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module(f"experiments.{request.module.__name__.rpartition('test_')[2]}")
