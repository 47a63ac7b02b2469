"""How can one trained MLP be split into experts whose sum equals it?"""

import contextlib

import torch

TARGET = "moe.upcycle:shards_of"
TESTS = ("tests/moe/test_upcycle.py",)
WHICH = "(step or same or shard or cop) and not SoftmaxRouter"
EQUATION = "arXiv 2410.07524 section 3; DeepSeekMoE section 3.1"
LEARN = "An MLP is a sum over its hidden features, so any split of the features splits the sum."
HINTS = (
    "down(silu(gate(x)) * up(x)): what does it sum over? Which rows and columns belong to one term?",
    "gate_up.weight (2 hidden, dim) holds the gate's rows, then up's. A shard takes the same rows of both, gate first: "
    "(shards, 2 width, dim). down.weight (dim, hidden) becomes (shards, dim, width).",
    "unflatten, transpose, flatten, or chunk, cat and stack",
)
EXPECTS = {
    "mlp": "a SwiGLU: mlp.gate_up.weight (2 hidden, dim), gate first, and mlp.down.weight (dim, hidden)",
    "num_shards": "an int that divides hidden, 1 or more; width = hidden / num_shards",
    "returns": "gate_up (shards, 2 width, dim), down (shards, dim, width), in the dtype of the weights",
}
MISTAKES = (
    (
        "gate_up = mlp.gate_up.weight.unflatten(0, (2, num_shards, -1))",
        "gate_up = mlp.gate_up.weight.unflatten(0, (num_shards, 2, -1)).transpose(0, 1)",
        "gate_up is split as a whole: some shards would hold only gate rows, others only up rows",
    ),
    (
        "down = mlp.down.weight.unflatten(1, (num_shards, -1))",
        "down = mlp.down.weight.unflatten(1, (-1, num_shards)).transpose(1, 2)",
        "the columns of down are strided: a shard needs those that match its gate and up rows",
    ),
    (
        "gate_up.transpose(0, 1).flatten(1, 2)",
        "gate_up.flip(0).transpose(0, 1).flatten(1, 2)",
        "up comes before gate: put the gate's rows first",
    ),
    (
        "down.transpose(0, 1)",
        "down.transpose(0, 1) / num_shards",
        "down is divided by the number of shards: the shards are summed, not averaged",
    ),
    (
        "down.transpose(0, 1)",
        "down.transpose(0, 1).flip(0)",
        "the shards of down are in a different order than those of gate_up",
    ),
    (
        "gate_up.transpose(0, 1).flatten(1, 2)",
        "gate_up.transpose(0, 1).transpose(1, 2).flatten(1, 2)",
        "gate and up rows are interleaved: all gate rows come first",
    ),
    (
        "gate_up.transpose(0, 1).flatten(1, 2)",
        "gate_up.transpose(0, 1).flatten(1, 2).bfloat16().to(gate_up.dtype)",
        "the weights are rounded to bf16: keep every bit",
    ),
    (
        "down.transpose(0, 1)",
        "down.transpose(0, 1).float()",
        "down is cast to fp32: keep the dtype of the weights",
    ),
    (
        "down.transpose(0, 1)",
        "down.detach().mul_(num_shards).transpose(0, 1)",
        "the weights of the MLP are changed in place: it must stay as it is",
    ),
    (
        "gate_up.transpose(0, 1).flatten(1, 2)",
        "gate_up.transpose(0, 1).flatten(1, 2).half().to(gate_up.dtype)",
        "the weights are rounded to fp16: keep every bit",
    ),
    (
        "down.transpose(0, 1)",
        "down.transpose(0, 1).squeeze(0)",
        "the axis of the shards is squeezed: with one shard it stays, of size 1",
    ),
)
RIGHT = (
    """
    gate, up = mlp.gate_up.weight.chunk(2)
    parts = [torch.cat(pair) for pair in zip(gate.chunk(num_shards), up.chunk(num_shards))]
    return torch.stack(parts), torch.stack(mlp.down.weight.chunk(num_shards, dim=1))
    """,
    """
    dim, hidden = mlp.down.weight.shape
    width = hidden // num_shards
    gate_up = mlp.gate_up.weight.view(2, num_shards, width, dim).permute(1, 0, 2, 3)
    down = mlp.down.weight.view(dim, num_shards, width).permute(1, 0, 2)
    return gate_up.reshape(num_shards, 2 * width, dim), down
    """,
    """
    hidden = mlp.down.in_features
    width = hidden // num_shards
    rows = torch.arange(hidden).view(num_shards, width)
    both = torch.cat((rows, rows + hidden), dim=1)
    return mlp.gate_up.weight[both], mlp.down.weight[:, rows].transpose(0, 1)
    """,
    """
    gate, up = mlp.gate_up.weight.unflatten(0, (2, -1))
    width = len(gate) // num_shards
    halves = [(gate[i : i + width], up[i : i + width]) for i in range(0, len(gate), width)]
    down = [mlp.down.weight[:, i : i + width] for i in range(0, len(gate), width)]
    return torch.stack([torch.cat(half) for half in halves]), torch.stack(down)
    """,
    """
    gate_up = torch.einsum("gswd->sgwd", mlp.gate_up.weight.unflatten(0, (2, num_shards, -1))).flatten(1, 2)
    return gate_up, torch.einsum("dsw->sdw", mlp.down.weight.unflatten(1, (num_shards, -1)))
    """,
    """
    rows = list(mlp.gate_up.weight)
    columns = list(mlp.down.weight.T)
    width = len(columns) // num_shards
    gate_up, down = [], []
    for shard in range(num_shards):
        mine = range(shard * width, (shard + 1) * width)
        gate_up.append(torch.stack([rows[i] for i in mine] + [rows[len(columns) + i] for i in mine]))
        down.append(torch.stack([columns[i] for i in mine], dim=1))
    return torch.stack(gate_up), torch.stack(down)
    """,
)


def probe(module, generator):
    """The shards, and the sum of their outputs."""
    mlp = module.SwiGLU(5, 12).double()
    with torch.no_grad():
        for weight in mlp.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    found = {}
    for shards in (3, 4):
        gate_up, down = module.shards_of(mlp, shards)
        found |= {f"gate_up, {shards} shards": gate_up, f"down, {shards} shards": down}
    gate_up_1, down_1 = module.shards_of(mlp, 1)
    found |= {"gate_up, 1 shard": gate_up_1, "down, 1 shard": down_1}
    x = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    with contextlib.suppress(Exception):  # the shards say what is wrong
        gates = [(part @ x.T).chunk(2) for part in gate_up]
        y = sum(d @ (torch.nn.functional.silu(gate) * up) for (gate, up), d in zip(gates, down))
        found["sum of the shards"] = y.detach()
    return found
