"""Load balancing: balance losses, the loss-free bias update, and load metrics.

Losses are returned without their coefficient. Each is 1 at perfect balance (except z_loss), differentiable
in the scores, and 0 with gradient 0 if there are no tokens. `mask` (same leading axes as the routing, True
for a real token) excludes padding, whatever its values. Losses count the experts actually chosen, that is,
with the selection bias (the papers do not say; V3 eq. 18 writes the top-k of the plain scores), and before
any slots are dropped: after dropping, an uneven load looks even.
"""

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from .router import Routing, described


def sequence_loss(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """Sequence-wise balance loss (V3 eq. 17-20; V2's expert-level loss, eq. 23-25), mean over sequences.

    routing (batch, time, ...) -> (); without a batch axis (time, ...) it is one sequence

    Fully masked sequences do not count.
    """
    load, share, real = load_and_share(routing, mask)
    return mean_over_sequences((load * share).sum(-1), real)  # V3 eq. 17; autocast would round an einsum


def switch_loss(
    routing: Routing, mask: Tensor | None = None, tokens_per_expert: Tensor | None = None
) -> Tensor:
    """Load-balancing loss over the whole batch (Switch Transformer eq. 4-6), for any top_k.

    routing (..., ...) -> ()

    Args:
        tokens_per_expert: (experts,) counts of the global batch, if this routing is only a part of it
            (arXiv 2501.11873). The mean over equal parts is then the loss of the global batch.
    """
    one = undropped(routing).map(lambda part: rearrange(part, "... last -> (...) last"))
    load, share, real = load_and_share(one, real_tokens(routing, mask).flatten())
    if tokens_per_expert is not None:
        check_counts(tokens_per_expert, share.shape[-1:])
        load = relative_load(tokens_per_expert.to(share))
    return mean_over_sequences((load * share).sum(-1), real)  # Switch Transformer eq. 4


def z_loss(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of the squared log-sum-exp of the logits, to keep them small (ST-MoE eq. 5).

    routing (..., ...) -> ()
    """
    real = real_tokens(routing, mask)
    logits = routing.logits.where(real.unsqueeze(-1), 0)  # before the log: its gradient at inf and NaN is NaN
    values = logits.logsumexp(-1).square()  # (...)
    return mean_over_tokens(values, real)


def device_loss(routing: Routing, num_devices: int, mask: Tensor | None = None) -> Tensor:
    """Device-level balance loss (V2 eq. 26-28), with the experts in order on num_devices equal devices.

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
    """Communication balance loss (V2 eq. 29-31), which balances the number of tokens sent to each device.

    routing (batch, time, ...) -> ()

    Args:
        top_devices: the maximum number of devices a token is sent to (M in the paper). The loss is 1 at
            balance if every token uses all M.
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
    """Expert load: the number of slots of each expert. Empty slots do not count.

    routing (..., ...) -> (experts,) int64

    Args:
        dropped: also count the slots that `moe.capacity` dropped.
    """
    routing = undropped(routing) if dropped else routing
    return count_indices(slots_from_1(routing, mask), routing.scores.shape[-1] + 1)[1:]


def max_violation(tokens_per_expert: Tensor) -> Tensor:
    """MaxVio: the highest expert load's excess over the mean, relative to the mean (arXiv 2408.15664 4.1).

    tokens_per_expert (..., experts) -> (...); 0 is perfect balance, num_experts / top_k - 1 the worst

    Counts of one batch give MaxVio_batch, counts summed over many batches MaxVio_global, which is lower where
    the batches' imbalances cancel.
    """
    return violations(tokens_per_expert).amax(-1)


@torch.no_grad()
def update_bias_(
    router: nn.Module,
    tokens_per_expert: Tensor,
    rate: float,
    centred: bool = False,
    proportional: bool = False,
) -> None:
    """Loss-free balancing: lower overloaded experts' bias by rate, raise the others' (V3 section 2.1.2).

    Call it once per optimizer step with the counts of the whole batch: all accumulation steps and processes.

    Args:
        tokens_per_expert: (experts,), of this router.
        rate: the step of the bias, 0.001 in V3 (gamma).
        centred: subtract the mean step, so that the biases' sum stays constant; the choices are the same.
        proportional: step by rate times the load's deviation from the mean, not only its sign (arXiv
            2408.15664 section 4.3). The deviation is relative to the mean, as in MaxVio, so that one rate
            suits any batch size. The biases' sum stays constant.
    """
    bias = selection_bias(router)
    if bias is None:
        raise ValueError(f"{type(router).__name__} has no selection bias to update; SigmoidRouter has one")
    check_counts(tokens_per_expert, bias.shape)
    if not 0 <= rate < float("inf"):
        raise ValueError(f"rate={rate} must be finite and at least 0")
    step = -violations(tokens_per_expert.to(bias.device), bias.dtype)  # towards the mean ...
    if not proportional:
        step = step.sign()  # ... by a fixed step, however far
    if centred:
        step = step - step.mean()
    bias.add_(step.to(bias.dtype), alpha=rate)


def selection_bias(router: nn.Module) -> Tensor | None:
    """The router's bias for `update_bias_`; None if it has none, or one trained by gradients."""
    bias = described(router).bias
    return None if isinstance(bias, nn.Parameter) else bias


def load_and_share(routing: Routing, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """f and P of the balance losses for each sequence, and which tokens are real.

    -> load (batch, experts), 1 when even; share (batch, experts), sums to 1; real (batch, time)
    """
    num_experts = routing.scores.shape[-1]
    routing = undropped(routing)
    experts, scores = as_sequences(routing.experts), as_sequences(routing.scores)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    real = as_sequences(real_tokens(routing, mask).unsqueeze(-1)).squeeze(-1)
    scores = scores.where(real.unsqueeze(-1), 0)  # before the division: its gradient at NaN is NaN
    chosen = one_hot(experts, num_experts).sum(2) * real.unsqueeze(-1)  # (batch, time, experts)
    count = chosen.sum(1).to(scores.dtype)  # (batch, experts); no gradient: it flows through the share only
    load = relative_load(count)
    normalized = scores / (scores.sum(-1, keepdim=True) + 1e-20)  # V3 eq. 19
    total = real.sum(-1, keepdim=True).clamp(min=1)
    share = normalized.sum(1) / total  # V3 eq. 20
    return load, share, real


def relative_load(count: Tensor) -> Tensor:
    """count (..., experts) -> count / mean count, 1 when even; 0 if all counts are 0"""
    return count * count.shape[-1] / count.sum(-1, keepdim=True).clamp(min=1)  # V3 eq. 18; the sum is K T


def violations(tokens_per_expert: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(..., experts) -> (..., experts), (load - mean load) / mean load; 0 if all loads are 0

    dtype: of the result, unless fp32 or the loads' own dtype is wider.
    """
    exact = torch.float32 if tokens_per_expert.is_floating_point() else torch.int64
    load = tokens_per_expert.to(torch.promote_types(tokens_per_expert.dtype, exact))
    total = load.sum(-1, keepdim=True)
    # of counts, the difference is exact, and 0 at the mean, without float64: MPS has none
    excess = load * load.shape[-1] - total
    wide = torch.promote_types(load.dtype, torch.promote_types(dtype, torch.float32))
    return excess.to(wide) / total.where(total > 0, 1).to(wide)


def mean_over_sequences(values: Tensor, real: Tensor) -> Tensor:
    """values (batch,), real (batch, time) -> (), over the sequences with a real token"""
    present = real.any(-1)
    return values.where(present, 0).sum() / present.sum().clamp(min=1)


def mean_over_tokens(values: Tensor, real: Tensor) -> Tensor:
    """values (...), real (...) -> (), over the real tokens; 0 if there are none"""
    return values.where(real, 0).sum() / real.sum().clamp(min=1)


def undropped(routing: Routing) -> Routing:
    """The routing as it was before `moe.capacity` dropped slots; unchanged if none were."""
    return routing if routing.asked is None else routing._replace(experts=routing.asked, asked=None)


def real_tokens(routing: Routing, mask: Tensor | None) -> Tensor:
    """The checked mask; all True without one -> (...) bool"""
    shape = routing.experts.shape[:-1]
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=routing.experts.device)
    if mask.dtype != torch.bool or mask.shape != shape:
        found, wanted = f"{mask.dtype} {tuple(mask.shape)}", f"torch.bool {tuple(shape)}"
        raise ValueError(f"mask is {found}; expected {wanted}, True for a real token")
    return mask


def slots_from_1(routing: Routing, mask: Tensor | None) -> Tensor:
    """(..., top_k) int64: each slot's expert + 1; 0 for an empty slot and for padding"""
    return routing.experts.where(real_tokens(routing, mask).unsqueeze(-1), -1) + 1


def count_indices(indices: Tensor, size: int) -> Tensor:
    """indices (...) int64 -> (size,) int64, how often each of 0..size - 1 occurs"""
    indices = indices.flatten()
    return indices.new_zeros(size).scatter_add_(0, indices, torch.ones_like(indices))


def as_sequences(values: Tensor) -> Tensor:
    """(..., time, last) -> (batch, time, last); without a batch axis, one sequence."""
    return values.flatten(0, -3) if values.ndim > 2 else values.reshape(1, -1, values.shape[-1])


def one_hot(indices: Tensor, size: int) -> Tensor:
    """indices (...) -> (..., size) int64; all 0 for an empty slot, -1"""
    return (indices.unsqueeze(-1) == torch.arange(size, device=indices.device)).long()


def check_counts(tokens_per_expert: Tensor, shape: torch.Size) -> None:
    """Raise ValueError unless there is one count per expert."""
    if tokens_per_expert.shape != shape:
        found = tuple(tokens_per_expert.shape)
        raise ValueError(f"tokens_per_expert has shape {found}; the router expects {tuple(shape)}")


def sent_to(experts: Tensor, num_experts: int, num_devices: int) -> Tensor:
    """The devices each token is sent to: experts (..., top_k) -> (..., devices) int64, 1 or 0"""
    devices = experts.div(num_experts // num_devices, rounding_mode="floor")  # (..., top_k); -1 stays
    return one_hot(devices, num_devices).amax(-2)


def check_devices(routing: Routing, num_devices: int) -> int:
    """Raise ValueError unless num_devices divides the experts -> num_experts"""
    num_experts = routing.scores.shape[-1]
    if num_devices < 1 or num_experts % num_devices:
        raise ValueError(f"num_devices={num_devices} does not divide the {num_experts} experts")
    return num_experts
