"""Tokens are sorted by expert: which token is in which row, and how do results find home?"""

import torch

TARGET = "moe.dispatch:sort"
TESTS = ("tests/moe/test_dispatch.py",)
BEGIN = "source ="
EQUATION = "GShard algorithm 1, by sorting"
LEARN = (
    "A slot is one of a token's choices: slot // top_k is its token, and the inverse of the order leads home."
)
HINTS = (
    "experts (tokens, top_k) was flattened to slots. Which token owns slot j? Where did the sort put slot j?",
    "order[i] is the slot that comes i-th, rows[i] the row that it lies in (with filling, rows are skipped). source "
    "(num_rows,): for each row its token, 0 in rows that only fill up. target (tokens, top_k): for each slot its row.",
    "new_zeros, empty_like, index_copy_ (or assigning by index), //, view_as, Order",
)
MISTAKES = (
    (
        "order // top_k",
        "order % top_k",
        "slot % top_k is which of its choices a slot is; the token is slot // top_k",
    ),
    (
        "order // top_k",
        "order % len(experts)",
        "slot % tokens: the slots of one token lie side by side, so its token is slot // top_k",
    ),
    (
        "order // top_k",
        "order",
        "rows hold slots, not tokens: slot // top_k is the token",
    ),
    (
        "target = torch.empty_like(slots).index_copy_(0, order, rows)",
        "target = order",
        "target is the order itself: what is asked for is its inverse, the row of each slot",
    ),
    (
        "target = torch.empty_like(slots).index_copy_(0, order, rows)",
        "target = rows",
        "the rows are in the order of the sort, and belong to other slots: put them back in the slots' order",
    ),
    (
        "target = torch.empty_like(slots).index_copy_(0, order, rows)",
        "target = order.argsort()",
        "the places in the order are taken for rows: with filling, or an expert without tokens, they differ",
    ),
    (
        "slots.new_zeros(num_rows).index_copy_(0, rows, order // top_k)",
        "torch.nn.functional.pad(order // top_k, (0, num_rows - len(slots)))",
        "the filling is taken to be at the end: each expert's block has its own",
    ),
    (
        "target.view_as(experts)",
        "target.view(top_k, -1).t()",
        "target is laid out by choice first: slots lie token by token",
    ),
)
RIGHT = (
    """
    source = torch.zeros(num_rows, dtype=slots.dtype, device=slots.device)
    source[rows] = torch.div(order, top_k, rounding_mode="floor")
    target = torch.zeros_like(slots)
    target[order] = rows
    return Order(sizes, source, target.reshape(experts.shape))
    """,
    """
    tokens = torch.arange(len(experts), device=experts.device).repeat_interleave(top_k)
    source = slots.new_zeros(num_rows).scatter_(0, rows, tokens[order])
    target = rows[order.argsort()]
    return Order(sizes, source, target.unflatten(0, experts.shape))
    """,
    """
    target = torch.empty_like(slots).scatter_(0, order, rows)
    source = slots.new_zeros(num_rows)
    source[target] = torch.arange(len(slots), device=slots.device) // top_k
    return Order(sizes=sizes, source=source, target=target.view(-1, top_k))
    """,
)


def probe(module, generator):
    """Uneven loads, an expert without tokens, empty slots, with and without filling."""
    found = {}
    experts = torch.rand(11, 7, generator=generator).topk(3).indices
    experts = torch.where(experts == 4, 6, experts)
    experts[2, 1] = -1
    x = torch.randn(11, 5, generator=generator)
    for multiple in (1, 4):
        order = module.sort(experts, 7, multiple)
        rows = module.gather(x, order)
        back = module.scatter(rows * 2, order, torch.rand(11, 3, generator=generator))
        name = "filled up" if multiple > 1 else "as they are"
        found |= {f"source, {name}": order.source, f"target, {name}": order.target}
        found |= {f"rows, {name}": rows, f"back, {name}": back}
    return found
