"""The same numbers at every run: one thread, one seed, no stored hypothesis examples."""

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def same_seed():
    torch.manual_seed(0)
