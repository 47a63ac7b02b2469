"""Compare the results of an answer with the right ones, and say in words how they differ."""

from typing import Any

import torch

from .watch import MEMORY, PRECISION

# tolerances, relative to the largest value
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 4e-3, "float16": 1e-3}
# name -> tensor, None or the name of another type; MEMORY, PRECISION -> list; or "raised" -> the error, described
Outcome = dict[str, Any]


def compare(found: Outcome, right: Outcome) -> list[dict[str, Any]]:
    """One row for each result: its stage, whether it passed, and the difference in words."""
    rows = []
    for name, expected in right.items():
        if "raised" in found:
            noted = difference(found[name], expected) if name in (MEMORY, PRECISION) and name in found else ""
            says = noted or "not reached"
        elif name not in found:
            says = "is missing"
        else:
            says = difference(found[name], expected)
        stage = "gradients" if name.startswith("gradient") else "values"
        if says.startswith("its "):
            stage = "shapes, types"
        stage = name if name in (MEMORY, PRECISION) else stage
        rows.append({"name": name, "stage": stage, "passed": not says, "says": says})
    return rows


def difference(found: Any, expected: Any) -> str:
    """How a result differs from the right one, in words; empty if they agree."""
    if isinstance(expected, list):  # notes of watch.py
        return "; ".join(sorted(str(note) for note in set(found) - set(expected)))
    if found is None:
        return "" if expected is None else "no gradient reaches it: look for detach, no_grad or item"
    if not isinstance(found, torch.Tensor):
        return f"its type is {found}, expected a tensor"
    if expected is None:
        return "should have no gradient"
    if found.shape != expected.shape:
        return f"its shape is {tuple(found.shape)}, expected {tuple(expected.shape)}"
    if found.dtype != expected.dtype:
        return f"its dtype is {found.dtype}, expected {expected.dtype}".replace("torch.", "")
    if found.layout != expected.layout or found.device != expected.device:
        return f"its layout is {found.layout} on {found.device}, expected a dense tensor on {expected.device}"
    return "" if is_close(found, expected) else of_values(found, expected)


def of_values(found: torch.Tensor, expected: torch.Tensor) -> str:
    """How the values of two tensors of the same shape and dtype differ."""
    if found.dtype == torch.bool and found.numel() == 1:
        return f"is {bool(found)}, expected {bool(expected)}"
    if not found.is_floating_point():
        return f"differs in {int((found != expected).sum())} of {found.numel()} elements, {worst(found, expected)}"
    if not found.isfinite().all() and expected.isfinite().all():
        return f"is infinite or NaN in {int((~found.isfinite()).sum())} of {found.numel()} elements"
    if is_close(found, -expected):
        return "has the wrong sign"
    if not found.any():
        return "is zero everywhere"
    ratio = (found / expected)[(expected != 0) & expected.isfinite()].double()
    middle = float(ratio.median()) if len(ratio) else 1.0
    if abs(middle - 1) > 1e-3 and is_close(found, expected * middle):
        return f"is {middle:.4g} times what it should be"
    if found.ndim > 1 and found.shape[-1] == found.shape[-2] and is_close(found.transpose(-1, -2), expected):
        return "is transposed: its last two axes are swapped"
    if found.ndim and is_close(found.sort(-1).values, expected.sort(-1).values):
        return "has the right values in a different order along its last axis"
    near = digits(found, expected)
    for axis, name in enumerate(() if near else ("first axis", "second axis")[: max(0, found.ndim - 1)]):
        ours, theirs = expected.transpose(0, axis), found.transpose(0, axis)
        if len(ours) > 2 and (is_close(theirs[1:], ours[:-1]) or is_close(theirs[:-1], ours[1:])):
            return f"is shifted by one along its {name}"
        if len(ours) > 1 and is_close(theirs[0], ours[0]):
            return f"is correct only at index 0 of its {name}"
    wrong = f"differs in {int(mismatches(found, expected).sum())} of {found.numel()} elements"
    return f"{wrong}, {worst(found, expected)}{near}"


def worst(found: torch.Tensor, expected: torch.Tensor) -> str:
    """The element that differs most, with both values."""
    gap = (found.double() - expected.double()).abs().nan_to_num(posinf=0.0)
    gap = gap.where(mismatches(found, expected), -1.0)
    index = torch.unravel_index(gap.argmax(), gap.shape)
    where = ", ".join(str(int(number)) for number in index)
    mine, right = float(found[index]), float(expected[index])
    figures = 4 if abs(mine - right) > 1e-3 * abs(right) else 9
    return f"most at [{where}]: {mine:.{figures}g}, expected {right:.{figures}g}"


def digits(found: torch.Tensor, expected: torch.Tensor) -> str:
    """A remark if values are nearly right, as when a step runs in a lower precision."""
    finite = expected.isfinite()
    if (finite != found.isfinite()).any():
        return ""
    size = float(expected[finite].abs().max()) if finite.any() else 1.0
    gap = float((found.double() - expected.double())[finite].abs().max()) if finite.any() else 1.0
    for dtype, most in (("float32", 1e-6), ("float16 or bfloat16", 1e-2)):
        if gap < most * size:
            return f"; nearly right, as if a step ran in {dtype} or a small term such as eps were missing"
    return ""


def is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal up to the rounding of a different summation order."""
    return not mismatches(found, expected).any()


def mismatches(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Where two tensors of the same shape differ by more than the tolerance."""
    if not expected.is_floating_point():
        return found != expected
    most = TOLERANCE[str(expected.dtype).removeprefix("torch.")]
    finite = expected.isfinite()
    size = float(expected[finite].abs().max()) if finite.any() else 1.0
    return ~torch.isclose(found.double(), expected.double(), rtol=0, atol=most * size, equal_nan=True)


def same(one: Outcome, other: Outcome) -> bool:
    """Whether two outcomes agree."""
    if "raised" in one or "raised" in other:
        keys = ("type", "says")
        return all((one.get("raised") or {}).get(key) == (other.get("raised") or {}).get(key) for key in keys)
    return all(name in other and not difference(other[name], value) for name, value in one.items())
