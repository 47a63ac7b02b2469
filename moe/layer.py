"""The Mixture-of-Experts layer: a router, the experts it chooses from, and a shared expert."""

from torch import Tensor, nn

from .router import Routing, described


class MoE(nn.Module):
    """DeepSeekMoE layer without the residual: weighted sum of the chosen experts + shared expert (V3 eq. 12).

    x (..., dim) -> y (..., dim), routing

    Args:
        router: a `Router`, or any module x -> Routing. If `forward` takes `tokens`, it gets the token ids.
        experts: `Experts`, or any module (x, routing) -> y.
        shared: the shared experts as one MLP, run on every token with weight 1, outside
            routed_scaling_factor; or None.
    """

    def __init__(self, router: nn.Module, experts: nn.Module, shared: nn.Module | None = None):
        super().__init__()
        about = described(router)
        for name in ("dim", "num_experts"):
            ours, theirs = getattr(about, name), getattr(experts, name, None)
            if ours is not None and theirs is not None and ours != theirs:
                raise ValueError(f"router with {name}={ours}, experts with {name}={theirs}: they must agree")
        self.router = router
        self.experts = experts
        self.shared = shared
        self.needs_tokens = about.needs_tokens

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, Routing]:
        """tokens (...) int64: the token ids of x, for a router that needs them."""
        routing = self.router(x, tokens=tokens) if self.needs_tokens else self.router(x)
        if not isinstance(routing, Routing):
            raise ValueError(
                f"{type(self.router).__name__} returned a {type(routing).__name__}, not a moe.Routing"
            )
        y = self.experts(x, routing)
        if self.shared is not None:
            y = y + self.shared(x)  # V3 eq. 12; same input as the router, never scaled
        return y, routing
