"""Keeping experts busy: balance losses, the loss-free bias update, and how uneven the load is.

Losses come without their coefficient. Each is 1 at perfect balance (z_loss: its own value), differentiable
in the scores, and 0 with gradient 0 where there is no token. `mask` (same leading axes as the routing, True
for a real token) keeps padding out, whatever it holds. Losses count the experts actually chosen, so with the
selection bias (the papers do not say which; V3 eq. 18 writes the top-k of the plain scores), and before
anything was dropped for want of room: what is left after that looks even where it is not.
"""

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from .router import Routing, described


def sequence_loss(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """Sequence-wise balance loss (V3 eq. 17-20; V2's expert-level loss, eq. 23-25), mean over sequences.

    routing (batch, time, ...) -> (); without a batch axis (time, ...) it is one sequence

    Sequences of which nothing is left under the mask do not count.
    """
    load, share, real = load_and_share(routing, mask)
    return mean_over_sequences((load * share).sum(-1), real)  # V3 eq. 17; autocast would round an einsum


def switch_loss(
    routing: Routing, mask: Tensor | None = None, tokens_per_expert: Tensor | None = None
) -> Tensor:
    """Load-balancing loss over the whole batch (Switch Transformer eq. 4-6), for any top_k.

    routing (..., ...) -> ()

    Args:
        tokens_per_expert: (experts,), to take the load from where this routing is a part of a global batch
            (arXiv 2501.11873): the whole's counts. The mean over equal parts is then the whole's loss.
    """
    one = undropped(routing).map(lambda part: rearrange(part, "... last -> (...) last"))
    load, share, real = load_and_share(one, real_tokens(routing, mask).flatten())
    if tokens_per_expert is not None:
        check_counts(tokens_per_expert, share.shape[-1:])
        load = relative_load(tokens_per_expert.to(share))
    return mean_over_sequences((load * share).sum(-1), real)  # Switch Transformer eq. 4


def z_loss(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of the squared log-sum-exp of the logits, which keeps them small (ST-MoE eq. 5).

    routing (..., ...) -> ()
    """
    real = real_tokens(routing, mask)
    logits = routing.logits.where(real.unsqueeze(-1), 0)  # before the log: its gradient at inf and NaN is NaN
    values = logits.logsumexp(-1).square()  # (...)
    return mean_over_tokens(values, real)


def device_loss(routing: Routing, num_devices: int, mask: Tensor | None = None) -> Tensor:
    """Device-level balance loss (V2 eq. 26-28): experts in order on num_devices equal devices.

    routing (batch, time, ...) -> ()
    """
    check_devices(routing, num_devices)
    load, share, real = load_and_share(routing, mask)
    by_device = "batch (devices experts) -> batch devices"
    device_load = reduce(load, by_device, "mean", devices=num_devices)  # V2 eq. 27
    device_share = reduce(share, by_device, "sum", devices=num_devices)  # V2 eq. 28
    return mean_over_sequences((device_load * device_share).sum(-1), real)  # V2 eq. 26


def communication_loss(
    routing: Routing, num_devices: int, top_devices: int, mask: Tensor | None = None
) -> Tensor:
    """Communication balance loss (V2 eq. 29-31): every device receives as many tokens as every other.

    routing (batch, time, ...) -> ()

    Args:
        top_devices: the most devices a token is sent to (M in the paper). The loss is 1 at balance where
            every token uses all of them.
    """
    num_experts = check_devices(routing, num_devices)
    if not 1 <= top_devices <= num_devices:
        raise ValueError(f"top_devices={top_devices} must lie in 1..{num_devices}, the number of devices")
    _, share, real = load_and_share(routing, mask)
    sent = sent_to(as_sequences(undropped(routing).experts), num_experts, num_devices)
    sent = sent * real.unsqueeze(-1)  # (batch, time, devices)
    sent = sent.sum(1).to(share.dtype)  # (batch, devices)
    load = sent * num_devices / (top_devices * real.sum(1, keepdim=True)).clamp(min=1)  # V2 eq. 30
    by_device = "batch (devices experts) -> batch devices"
    device_share = reduce(share, by_device, "sum", devices=num_devices)  # V2 eq. 31
    return mean_over_sequences((load * device_share).sum(-1), real)  # V2 eq. 29


def tokens_per_expert(routing: Routing, mask: Tensor | None = None, dropped: bool = False) -> Tensor:
    """How many slots each expert got; a token counts once for each of its experts, an empty slot for none.

    routing (..., ...) -> (experts,) int64

    Args:
        dropped: count the slots that were dropped, too (`moe.capacity`): what was asked of each expert.
    """
    routing = undropped(routing) if dropped else routing
    return count_indices(slots_from_1(routing, mask), routing.scores.shape[-1] + 1)[1:]


def max_violation(tokens_per_expert: Tensor) -> Tensor:
    """MaxVio: how far the busiest expert is above the mean, in means (arXiv 2408.15664 section 4.1).

    tokens_per_expert (..., experts) -> (...); 0 is perfect balance, num_experts / top_k - 1 the worst

    Counts of one batch give MaxVio_batch, the sum of many batches' counts MaxVio_global: batches that are
    each uneven in another way are even together.
    """
    return violations(tokens_per_expert.double()).amax(-1)


@torch.no_grad()
def update_bias_(
    router: nn.Module,
    tokens_per_expert: Tensor,
    rate: float,
    centred: bool = False,
    proportional: bool = False,
) -> None:
    """One step of loss-free balancing: busy experts' bias down by rate, idle ones' up (V3 section 2.1.2).

    Call it once an optimizer step with the counts of the whole batch, all accumulation steps and processes.

    Args:
        tokens_per_expert: (experts,), of this router.
        rate: the step of the bias, 0.001 in V3 (gamma).
        centred: subtract the mean step, so that the biases' sum stays put; the choices are the same.
        proportional: rate times how far the load is from the mean, and not its sign alone (arXiv 2408.15664
            section 4.3). Counted in means, as MaxVio, so that a rate suits any batch size; the sum stays put.
    """
    bias = selection_bias(router)
    if bias is None:
        raise ValueError(f"{type(router).__name__} has no selection bias to update; SigmoidRouter has")
    check_counts(tokens_per_expert, bias.shape)
    if not 0 <= rate < float("inf"):
        raise ValueError(f"rate={rate} must be finite and at least 0")
    step = -violations(tokens_per_expert.to(bias.device, torch.float64))  # towards the mean ...
    if not proportional:
        step = step.sign()  # ... by a fixed step however far
    if centred:
        step = step - step.mean()
    bias.add_(step.to(bias.dtype), alpha=rate)


def selection_bias(router: nn.Module) -> Tensor | None:
    """A router's bias for `update_bias_`; None where it has none, or one that a gradient trains."""
    bias = described(router).bias
    return None if isinstance(bias, nn.Parameter) else bias


def load_and_share(routing: Routing, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """f and P of the balance losses, by sequence, and which tokens are real.

    -> load (batch, experts), 1 when even; share (batch, experts), sums to 1; real (batch, time)
    """
    num_experts = routing.scores.shape[-1]
    routing = undropped(routing)
    experts, scores = as_sequences(routing.experts), as_sequences(routing.scores)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    real = as_sequences(real_tokens(routing, mask).unsqueeze(-1)).squeeze(-1)
    scores = scores.where(real.unsqueeze(-1), 0)  # before the division: its gradient at NaN is NaN
    chosen = one_hot(experts, num_experts).sum(2) * real.unsqueeze(-1)  # (batch, time, experts)
    count = chosen.sum(1).to(scores.dtype)  # (batch, experts); no gradient: only the share carries one
    load = relative_load(count)
    normalized = scores / (scores.sum(-1, keepdim=True) + 1e-20)  # V3 eq. 19
    total = real.sum(-1, keepdim=True).clamp(min=1)
    share = normalized.sum(1) / total  # V3 eq. 20
    return load, share, real


def relative_load(count: Tensor) -> Tensor:
    """count (..., experts) -> the same in means, 1 when even; 0 where there is no token"""
    return count * count.shape[-1] / count.sum(-1, keepdim=True).clamp(min=1)  # V3 eq. 18; the sum is K T


def violations(tokens_per_expert: Tensor) -> Tensor:
    """(..., experts) -> the same: each load less the mean, in means; 0 where there is no token"""
    mean = tokens_per_expert.mean(-1, keepdim=True)
    return (tokens_per_expert - mean) / mean.where(mean > 0, 1)


def mean_over_sequences(values: Tensor, real: Tensor) -> Tensor:
    """values (batch,), real (batch, time) -> (), over the sequences that have a token"""
    present = real.any(-1)
    return values.where(present, 0).sum() / present.sum().clamp(min=1)


def mean_over_tokens(values: Tensor, real: Tensor) -> Tensor:
    """values (...), real (...) -> (), 0 where there is no token"""
    return values.where(real, 0).sum() / real.sum().clamp(min=1)


def undropped(routing: Routing) -> Routing:
    """The routing before `moe.capacity` dropped some of the experts, where it did."""
    return routing if routing.asked is None else routing._replace(experts=routing.asked, asked=None)


def real_tokens(routing: Routing, mask: Tensor | None) -> Tensor:
    """The mask, checked, or all True -> (...) bool"""
    shape = routing.experts.shape[:-1]
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=routing.experts.device)
    if mask.dtype != torch.bool or mask.shape != shape:
        found, wanted = f"{mask.dtype} {tuple(mask.shape)}", f"torch.bool {tuple(shape)}"
        raise ValueError(f"mask is {found}; expected {wanted}, True for a real token")
    return mask


def slots_from_1(routing: Routing, mask: Tensor | None) -> Tensor:
    """(..., top_k) int64: each slot's expert, counted from 1; 0 for a slot that is empty or of padding"""
    return routing.experts.where(real_tokens(routing, mask).unsqueeze(-1), -1) + 1


def count_indices(indices: Tensor, size: int) -> Tensor:
    """indices (...) int64 -> (size,) int64, how often each of 0..size - 1 is there"""
    indices = indices.flatten()
    return indices.new_zeros(size).scatter_add_(0, indices, torch.ones_like(indices))


def as_sequences(values: Tensor) -> Tensor:
    """(..., time, last) -> (batch, time, last); one sequence where there is no batch axis."""
    return values.flatten(0, -3) if values.ndim > 2 else values.reshape(1, -1, values.shape[-1])


def one_hot(indices: Tensor, size: int) -> Tensor:
    """indices (...) -> (..., size) int64; all 0 for an empty slot, -1"""
    return nn.functional.one_hot(indices + 1, size + 1)[..., 1:]


def check_counts(tokens_per_expert: Tensor, shape: torch.Size) -> None:
    """Raise ValueError unless there is a count for each expert."""
    if tokens_per_expert.shape != shape:
        found = tuple(tokens_per_expert.shape)
        raise ValueError(f"tokens_per_expert has shape {found}; the router expects {tuple(shape)}")


def sent_to(experts: Tensor, num_experts: int, num_devices: int) -> Tensor:
    """To which devices each token goes: experts (..., top_k) -> (..., devices) int64, 1 or 0"""
    devices = experts.div(num_experts // num_devices, rounding_mode="floor")  # (..., top_k); -1 stays
    return one_hot(devices, num_devices).amax(-2)


def check_devices(routing: Routing, num_devices: int) -> int:
    """Raise ValueError unless the experts fit evenly on the devices -> num_experts"""
    num_experts = routing.scores.shape[-1]
    if num_devices < 1 or num_experts % num_devices:
        raise ValueError(f"num_devices={num_devices} does not divide the {num_experts} experts")
    return num_experts
