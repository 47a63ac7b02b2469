# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 03 The latent: how do 576 numbers replace 32,768?
#
# Multi-head attention caches a key and a value for every head. Multi-head latent attention caches one short
# vector, the latent, from which every head's keys and values can be computed, and 64 numbers that carry the
# position. This is no compression after the fact: the model is trained with this bottleneck, and the
# expansion can even be skipped.

# %%
import json
import os
from functools import partial
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle

import lm
from mla import GroupedQueryAttention, MultiheadLatentAttention

matplotlib.use("agg")  # a script opens no window; a notebook shows its figures inline:
# %matplotlib inline
plt.rcParams.update({"figure.dpi": 90, "axes.spines.top": False, "axes.spines.right": False})
torch.manual_seed(0)
torch.set_grad_enabled(False)
QUICK = "QUICK" in os.environ  # 64 tokens instead of 256

# %% [markdown]
# ## Predict
# V3's attention reads 7,168 numbers per token. Its latent has 512; its keys and values together have 128
# heads x (128 + 128). Write down before you run:
#
# 1. How many weights would map 7,168 numbers straight to 32,768? How many does the way through the latent
#    take?
# 2. Expanded and absorbed attention give the same output up to rounding. How large is the difference in fp32,
#    and in fp64?
# 3. A sequence of 768 tokens: how many of its 768 rows of keys and values are linearly independent, in MHA
#    and in MLA?
#
# ## 1. The matrices
# DeepSeek-V3's own layer, built without memory (`meta`): $c^{KV}_t = W^{DKV} h_t$ (eq. 1), then keys $k^C_t =
# W^{UK} c^{KV}_t$ (eq. 2) and values $v^C_t = W^{UV} c^{KV}_t$ (eq. 5), and beside them the rotated key
# $k^R_t = \mathrm{RoPE}(W^{KR} h_t)$ (eq. 3), which all heads share.

# %%
v3 = lm.Config.preset("deepseek-v3").model
with torch.device("meta"):
    large = lm.Transformer(v3).blocks[0].attention
shapes = {name: tuple(part.weight.shape) for name, part in large.named_children() if hasattr(part, "weight")}
for name, shape in shapes.items():
    print(f"{name:8}{'x'.join(map(str, shape)):>14}")
straight = 32_768 * 7_168
through = large.kv_a.weight.numel() + large.kv_b.weight.numel()
print(f"keys and values: {straight:,} weights direct, {through:,} ({through / straight:.1%}) via the latent")
assert shapes["kv_a"] == (576, 7168) and shapes["kv_b"] == (32_768, 512)
assert through / straight < 0.09

# %% [markdown]
# The bottleneck also has less than a tenth of the weights.
#
# ## 2. Compress, cache, expand
# Here is a layer small enough to run: V3's heads, latent and RoPE dimensions, on a model of width 512.

# %%
mla = MultiheadLatentAttention(512, 128, 512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
time = 64 if QUICK else 256
x = torch.randn(1, time, 512)
cache = mla.new_cache(batch=1, max_length=time)
y = mla(x, cache)
latent, k_rope = mla.compress(x)
kv = mla.kv_b(latent)
print(f"cached {tuple(cache.filled.shape)}, expanded {tuple(kv.shape)}: {kv.shape[-1] / 576:.1f} x larger")
assert cache.filled.shape == (1, time, 576) and kv.shape == (1, time, 32_768)
assert torch.equal(cache.filled[..., :512], latent)
assert torch.allclose(latent.square().mean(dim=-1), torch.ones(1, time), atol=1e-4)  # normed

# %% [markdown]
# The cache holds the normed latent and, in its last 64 numbers, the RoPE key after rotation. The angle is
# zero at position 0 and grows from there:

# %%
rotated = cache.filled[..., 512:]
changes = (rotated - k_rope).norm(dim=-1)[0]
print(f"RoPE key changed by {changes[0]:.1e} at position 0, by {changes[1]:.2f} at position 1")
assert changes[0] == 0 and changes[1] > 0.1
assert torch.allclose(rotated.norm(dim=-1), k_rope.norm(dim=-1), rtol=1e-5)

# %% [markdown]
# ## 3. Expanded equals absorbed
# $q^\top (W^{UK} c) = (W^{UK\top} q)^\top c$: the matrix can move to the query, and likewise $W^{UV}$ to the
# output, so that attention reads the 576 numbers directly. `expanded` and `absorbed` are the two forms. How
# far apart are they at each position, relative to the size of the output?

# %%
off = {}
for dtype in (torch.float32, torch.float64):
    layer, inputs = mla.to(dtype), x.to(dtype)
    q_nope, q_rope = layer.query(inputs)
    latent, k_rope = layer.compress(inputs)
    q_rope, k_rope = layer.rotate(q_rope, k_rope, torch.arange(time))
    expanded = layer.expanded(q_nope, q_rope, latent, k_rope, None)
    absorbed = layer.absorbed(q_nope, q_rope, torch.cat((latent, k_rope), dim=-1), None)
    norm = partial(torch.linalg.vector_norm, dim=(2, 3))
    off[dtype] = (norm(absorbed - expanded) / norm(expanded))[0]
    print(f"{dtype}: at most {off[dtype].max():.1e}, machine epsilon is {torch.finfo(dtype).eps:.1e}")
assert off[torch.float32].max() < 1e-5 and off[torch.float64].max() < 1e-14

# %% [markdown]
# The difference is rounding error and nothing else: in fp64 it shrinks as the machine epsilon does.
#
# ## 4. What the latent can hold
# Keys and values computed from 512 numbers span at most 512 dimensions, however many tokens there are. MHA's
# have no such limit. To see it, stack the keys and values of all heads into one row for each of 768 tokens,
# and look at the singular values of that matrix; 16 heads are enough.

# %%
tokens = torch.randn(1, 768, 1024)
mha = GroupedQueryAttention(1024, num_heads=16, num_kv_heads=16, head_dim=128)
small = MultiheadLatentAttention(1024, 16, 512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
rows = {
    "MHA": torch.cat((mha.k(tokens), mha.v(tokens)), dim=-1)[0],
    "MLA": small.kv_b(small.compress(tokens)[0])[0],
}
values = {name: torch.linalg.svdvals(matrix.double()) for name, matrix in rows.items()}
rank = {name: int((value > 1e-5 * value[0]).sum()) for name, value in values.items()}
print("rank:", rank)
assert rows["MHA"].shape == rows["MLA"].shape == (768, 4096)
assert rank == {"MHA": 768, "MLA": 512}

# %% [markdown]
# MLA's 768 rows of 4,096 numbers are combinations of 512. The bet is that a trained model needs no more. One
# test: convert a trained GQA to MLA with a smaller cache, and see what is lost.
# [experiments/convert.py](../experiments/convert.py) measured that over three seeds, on a model trained on
# Shakespeare; we read its results here.

# %%
results = Path(lm.__file__).parents[1] / "experiments" / "results" / "convert.json"
trainings = json.loads(results.read_text("utf-8"))["trainings"]
for name in ("MLA, exact", "MLA, half the cache"):
    found = [row for row in trainings if row["model"] == name]
    lost = sum(row["after"] - row["before"] for row in found) / len(found)
    size = found[0]["cache_bytes_per_token"]
    print(f"{name}: {size:,} bytes per token, loss changes by {lost:+.4f} nats per byte ({len(found)} seeds)")
    assert lost < 0.01
assert size == 1024  # GQA's: 2048

# %% [markdown]
# At full rank nothing is lost; with half the cache, a few thousandths of a nat. Keys and values of a trained
# model lie close to a smaller space. DeepSeek trains in that space from the start.
#
# ## 5. The picture
# V3's matrices drawn to scale, inputs along, outputs down: blue is what V3 has, grey what MHA would need for
# keys and values. Orange is what one token leaves in the cache. On the right is the error of section 3.

# %%
blue, orange, grey = "tab:blue", "tab:orange", "0.6"
blocks = (  # left, top, (outputs, inputs), label, its centre relative to left and top, colour
    (0, 0, (32_768, 7168), "$W^K$, $W^V$\n7,168 to\n32,768\n235 M", (3584, 16_000), grey),
    (8000, 0, (32_768, 600), "32,768\ncached", (2600, 16_000), orange),
    (14_500, 0, shapes["kv_a"], "$W^{DKV}$, $W^{KR}$\n7,168 to 576\n4.1 M", (3584, 3200), blue),
    (22_300, 0, (576, 600), "576\ncached", (-1200, 8000), orange),
    (23_700, 0, shapes["kv_b"], "$W^{UK}$, $W^{UV}$\n512 to 32,768\n16.8 M", (-3800, 20_000), blue),
    (27_500, 0, shapes["q_a"], "$W^{DQ}$\n7,168 to 1,536\n11.0 M", (3584, 4100), blue),
    (35_500, 0, shapes["q_b"], "$W^{UQ}$, $W^{QR}$\n1,536 to 24,576\n37.7 M", (5600, 12_000), blue),
    (27_500, 25_600, shapes["out"], "$W^O$, 16,384 to 7,168, 117.4 M", (8192, 3584), blue),
)
titles = ((0, "keys, values: MHA"), (14_500, "MLA"), (27_500, "queries, output: V3"))

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 5), width_ratios=(3, 2), layout="constrained")
for x, y, (height, width), label, (along, down), colour in blocks:
    left.add_patch(Rectangle((x, y), width, height, facecolor=colour, alpha=0.6, lw=0))
    left.text(x + along, y + down, label, ha="center", va="center", fontsize=9)
left.annotate("", (22_600, 700), (21_400, 6600), arrowprops={"arrowstyle": "->", "color": orange})
for x, title in titles:
    left.text(x, -800, title, fontweight="bold")
left.set(xlim=(-300, 44_500), ylim=(33_000, -2500), aspect="equal")
left.axis("off")
for dtype, colour in ((torch.float32, "tab:red"), (torch.float64, "tab:green")):
    right.plot(off[dtype], ".", ms=3, color=colour)
    name = str(dtype).removeprefix("torch.")
    right.text(time / 2, 4 * off[dtype].max(), name, ha="center", color=colour)
    eps = torch.finfo(dtype).eps
    right.axhline(eps, color=colour, lw=0.8, ls="--")
    right.text(time, eps / 4, f"epsilon of {name}", ha="right", fontsize=8, color=colour)
right.set(yscale="log", ylim=(1e-17, 1e-4), xlabel="position", ylabel="|absorbed - expanded| / |expanded|")
right.grid(alpha=0.3)

# %% [markdown]
# **Your turn.** `lm exercise start compress`: one projection, split in two, and one norm
# ([exercises/08_compress.py](../exercises/08_compress.py)).
#
# **Further reading.** DeepSeek-V3 (arXiv 2412.19437) section 2.1.1, equations 1 to 11, with
# [mla/attention.py](../mla/attention.py).
