"""Tokens are sorted by expert: which token is in which row, and how do the results get back?"""

import contextlib

import torch

TARGET = "moe.dispatch:sort"
TESTS = ("tests/moe/test_dispatch.py",)
BEGIN = "source ="
EQUATION = "GShard algorithm 1, by sorting"
LEARN = "A slot is one of a token's top-k choices: slot // top_k is its token, and the inverse of the sort brings results back."
HINTS = (
    "experts (tokens, top_k) was flattened to slots. Which token does slot j belong to? Where did the sort put it?",
    "order[i] is the i-th slot after sorting, rows[i] its row (padding rows are skipped). source (num_rows,): the "
    "token of each row, 0 in padding rows. target (tokens, top_k): the row of each slot.",
    "new_zeros, empty_like, index_copy_ (or assigning by index), //, view_as, Order",
)
EXPECTS = {
    "experts": "(tokens, top_k) int64, -1 for an empty slot; there may be no tokens",
    "num_experts, multiple": "ints; used above",
    "slots, order, rows, num_rows": "given above: (tokens x top_k,) each, and the number of rows with padding",
    "returns": "Order(sizes as given above, source (num_rows,) int64, target (tokens, top_k) int64)",
}
MISTAKES = (
    (
        "order // top_k",
        "order % top_k",
        "slot % top_k says which of the token's choices the slot is; the token is slot // top_k",
    ),
    (
        "order // top_k",
        "order % len(experts)",
        "slot % tokens: the slots of one token are adjacent, so its token is slot // top_k",
    ),
    (
        "order // top_k",
        "order",
        "source holds slots, not tokens: the token is slot // top_k",
    ),
    (
        "target = torch.empty_like(slots).index_copy_(0, order, rows)",
        "target = order",
        "target is the order itself: it must be the inverse, the row of each slot",
    ),
    (
        "target = torch.empty_like(slots).index_copy_(0, order, rows)",
        "target = rows",
        "target lists the rows in sorted order: put them back in the order of the slots",
    ),
    (
        "target = torch.empty_like(slots).index_copy_(0, order, rows)",
        "target = order.argsort()",
        "positions in the sorted order are used as rows: with padding they differ",
    ),
    (
        "slots.new_zeros(num_rows).index_copy_(0, rows, order // top_k)",
        "torch.nn.functional.pad(order // top_k, (0, num_rows - len(slots)))",
        "all padding is put at the end: each expert's block has its own",
    ),
    (
        "target.view_as(experts)",
        "target.view(top_k, -1).t()",
        "target is laid out choice by choice: slots lie token by token",
    ),
    (
        "target.view_as(experts)",
        "experts.copy_(target.view_as(experts))",
        "experts is overwritten: the caller still needs it",
    ),
    (
        "target.view_as(experts)",
        "target.view_as(experts).int()",
        "target is int32: indices are int64",
    ),
    (
        "order // top_k",
        "(order.bfloat16() / top_k).long()",
        "slots are divided in bf16, which cannot represent 257: use integer division",
    ),
    (
        "order // top_k",
        "order / top_k",
        "slots are divided with true division, which returns floats: use //",
    ),
    (
        "order // top_k",
        "(order.half() / top_k).long()",
        "slots are divided in fp16, which cannot represent 2049: use integer division",
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
    """
    source, target = [0] * num_rows, [0] * len(slots)
    for slot, row in zip(order.tolist(), rows.tolist()):
        source[row], target[slot] = slot // top_k, row
    source = torch.tensor(source, dtype=slots.dtype, device=slots.device)
    target = torch.tensor(target, dtype=slots.dtype, device=slots.device)
    return Order(sizes, source, target.view_as(experts))
    """,
    """
    at = (rows[:, None] == torch.arange(num_rows, device=slots.device)).long()  # (slots, rows)
    source = torch.einsum("sr,s->r", at, order // top_k)
    back = (order[:, None] == torch.arange(len(slots), device=slots.device)).long()
    target = torch.einsum("os,o->s", back, rows)
    return Order(sizes, source, target.view_as(experts))
    """,
    """
    tokens = torch.arange(len(experts), device=slots.device)[:, None].expand_as(experts).flatten()
    source = torch.zeros(num_rows, dtype=slots.dtype, device=slots.device).scatter(0, rows, tokens.index_select(0, order))
    target = torch.zeros_like(slots).index_put((order,), rows)
    return Order(sizes, source, target.reshape(-1, top_k))
    """,
)


def probe(module, generator):
    """Uneven loads, an expert without tokens, empty slots, with and without padding, many slots and none."""
    found = {}
    experts = torch.rand(11, 7, generator=generator).topk(3).indices
    experts = torch.where(experts == 4, 6, experts)
    experts[2, 1] = -1
    x = torch.randn(11, 5, generator=generator)
    for multiple in (1, 4):
        order = module.sort(experts, 7, multiple)
        name = "filled up" if multiple > 1 else "as they are"
        found |= {f"{part}, {name}": getattr(order, part) for part in ("sizes", "source", "target")}
        weights = torch.rand(11, 3, generator=generator)
        with contextlib.suppress(Exception):  # the source and the target say what is wrong
            rows = module.gather(x, order)
            back = module.scatter(rows * 2, order, weights)
            found |= {f"rows, {name}": rows, f"back, {name}": back}
    order = module.sort(torch.rand(1100, 7, generator=generator).topk(3).indices, 7)
    found |= {"source of 3300 slots": order.source, "target of 3300 slots": order.target}
    order = module.sort(experts[:0], 7)
    return found | {"source of no tokens": order.source, "target of no tokens": order.target}
