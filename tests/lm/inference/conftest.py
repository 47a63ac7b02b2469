"""Models with random weights: one of each kind of attention, and the MLA one alone."""

import pytest

from tests.lm.inference.kinds import KINDS


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS.keys())
def model(request, tiny, make_model):
    return make_model(tiny(**request.param).model, std=0.3).float()


@pytest.fixture(scope="module")
def mla(tiny, make_model):
    return make_model(tiny(**KINDS["mla"]).model, std=0.3).float()
