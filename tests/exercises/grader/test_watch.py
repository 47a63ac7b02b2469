"""Calls are watched for changed arguments, shared memory and narrow arithmetic."""

import types

import pytest
import torch

from exercises.grader.watch import MEMORY, PRECISION, backward, watch


class Holder:
    def __init__(self):
        self.kept = torch.zeros(3)

    def method(self, x, y=None):
        return self.body(x, y)


def notes_of(body, *arguments):
    module = types.SimpleNamespace(Holder=type("Holder", (Holder,), {"method": Holder.method, "body": body}))
    notes = watch(module, "Holder.method")
    module.Holder().method(*arguments)
    return notes


X = torch.tensor([1.0, float("nan"), 3.0])


@pytest.mark.parametrize(
    "body, said",
    [
        (lambda self, x, y: x + 1, None),
        (lambda self, x, y: x.clone().mul_(2), None),
        (lambda self, x, y: x.mul_(2), "x is changed in place"),
        (lambda self, x, y: x.nan_to_num_() * 1, "x is changed in place"),
        (lambda self, x, y: y[1].zero_() + 1, "y is changed in place"),
        (lambda self, x, y: self.kept.add_(1) + 1, "self.kept is changed in place"),
        (lambda self, x, y: x, "the result shares memory with x"),
        (lambda self, x, y: (1, [x[1:].view(2, 1)]), "the result shares memory with x"),
        (lambda self, x, y: {"a": y[0].T}, "the result shares memory with y"),
        (lambda self, x, y: setattr(self, "kept", x.detach()), "self.kept shares memory with x"),
        (lambda self, x, y: setattr(self, "parts", [x[:1]]), "self.parts shares memory with x"),
        (lambda self, x, y: setattr(self, "kept", x.clone()), None),
    ],
)
def test_changed_and_shared_memory_is_noted(body, said):
    notes = notes_of(body, X.clone(), (torch.ones(2, 2), torch.ones(2)))
    assert any(note.startswith(said) for note in notes[MEMORY]) if said else not notes[MEMORY]
    assert not notes[PRECISION]


@pytest.mark.parametrize(
    "body, said",
    [
        (lambda self, x, y: x.softmax(-1), "softmax runs in bfloat16"),
        (lambda self, x, y: x.half().softmax(-1), "softmax runs in float16"),
        (lambda self, x, y: x.float().softmax(-1, dtype=torch.bfloat16), "softmax runs in bfloat16"),
        (lambda self, x, y: x.softmax(-1, dtype=torch.float32), None),
        (lambda self, x, y: x.float().softmax(-1).to(x.dtype) @ x, None),
        (lambda self, x, y: x.exp() / x.exp().sum(), "exp runs in bfloat16"),
        (lambda self, x, y: x.clone().exp_(), "exp runs in bfloat16"),
        (lambda self, x, y: x.cos(), "cos runs in bfloat16"),
        (lambda self, x, y: x.square().mean(-1), "mean runs in bfloat16"),
        (lambda self, x, y: (x * x + x).sum(), None),
    ],
)
def test_delicate_operations_in_a_narrow_dtype_are_noted(body, said):
    assert notes_of(body, torch.ones(5, dtype=torch.bfloat16))[PRECISION] >= ({said} if said else set())
    if said is None:
        assert not notes_of(body, torch.ones(5, dtype=torch.bfloat16))[PRECISION]


def test_backward_of_a_detached_loss_leaves_the_gradients_none():
    x = torch.ones(3, requires_grad=True)
    backward((x.detach() * 2).sum())
    assert x.grad is None
    backward((x * 2).sum())
    assert x.grad.tolist() == [2, 2, 2]
