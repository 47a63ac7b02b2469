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
# # 04 Position: why must rotation stay out of the latent, and how does 4k become 128k?
#
# Attention alone does not know the order of tokens. Rotary embedding (RoPE) adds it by rotating queries and
# keys. But a rotated key can no longer be computed from the latent by one fixed matrix, so absorption is
# lost. DeepSeek's answer is to keep a few dimensions for position beside the latent. And because position is
# an angle there, a longer context becomes a matter of slower rotation.

# %%
import json
import math
import os
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch

import lm
from lm.parts import build_rope
from mla import Linear, MultiheadLatentAttention, RotaryEmbedding
from mla.rope import frequencies

sys.path.append(str(Path(lm.__file__).parents[1]))  # the folder of experiments/
from experiments import common, rope

matplotlib.use("agg")  # a script opens no window; a notebook shows its figures inline:
# %matplotlib inline
plt.rcParams.update({"figure.dpi": 90, "axes.spines.top": False, "axes.spines.right": False})
torch.manual_seed(0)
torch.set_grad_enabled(False)
QUICK = "QUICK" in os.environ  # no effect here: everything takes seconds

# %% [markdown]
# ## Predict
# V3 rotates 64 dimensions, that is 32 pairs; pair $i$ turns by $10000^{-2i/64}$ radians per token (RoFormer,
# arXiv 2104.09864, eq. 15). Write down before you run:
#
# 1. How many full turns does the fastest pair make in 4,096 tokens, and how many the slowest?
# 2. With every pair 40 times slower, how different do two neighbouring tokens look: as different as before,
#    or nearly the same?
# 3. Rotate a vector, then multiply by a matrix; or multiply, then rotate. Does the order matter?
#
# ## 1. A score depends on the distance alone
# Take one query and one key, and rotate both to every position from 0 to 255. All scores at the same distance
# are equal; scores at different distances are not.

# %%
plain = RotaryEmbedding(64, theta=10_000.0)
both = torch.randn(2, 1, 64, dtype=torch.float64).expand(2, 256, 64)  # one query, one key, at all positions
query, key = plain(both, torch.arange(256))
scores = query @ key.T
spread = max(float(scores.diagonal(-d).max() - scores.diagonal(-d).min()) for d in range(255))
print(f"scores differ by {spread:.0e} at most within a distance, by {scores.std():.1f} (std) over all")
assert spread < 1e-3 * scores.std()

# %% [markdown]
# (What remains within one distance comes from angles rounded to fp32.)
#
# ## 2. Why not rotate everything?
# Absorption needs $q^\top (W^{UK} c) = (W^{UK\top} q)^\top c$. If the key is rotated after it was expanded,
# $R_n W^{UK} c$, the rotation of its position stands between query and matrix. It could be moved out only if
# rotation and matrix commuted. Here is one head of a layer whose latent is as wide as a head, so that both
# orders exist:

# %%
layer = MultiheadLatentAttention(256, 4, 64, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64)
w_key = layer.split_kv_b()[0][0]  # (nope, latent) of the first head
latent = torch.randn(1, 1, 64)
off = {}
for position in (0, 1, 10, 100):
    at = torch.tensor([position])
    rotated_last, rotated_first = plain(latent @ w_key.T, at), plain(latent, at) @ w_key.T
    off[position] = float((rotated_first - rotated_last).norm() / rotated_last.norm())
    print(f"position {position:3}: the two orders differ by {off[position]:.0%} of the vector's length")
assert off[0] == 0 and off[1] > 0.1 and min(off[10], off[100]) > 0.8

# %% [markdown]
# At position 0 nothing rotates. From then on the order matters, and soon the two results are as far apart as
# unrelated vectors, which would differ by about 140 %. Does that break attention?
# [experiments/rope.py](../experiments/rope.py) has an MLA that rotates all dimensions, and measures how far
# its absorbed form is from its expanded one. Here it runs on freshly initialized models:

# %%
error, kept = {}, {}
for name, kind in rope.KINDS.items():
    widths = {"kind": kind, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16}
    config = common.changed(lm.Config.preset("mini"), attention=widths)
    model = lm.Transformer(config.model)
    model.initialize(torch.Generator().manual_seed(0))
    error[name] = rope.absorbed_is_off(model, config)["absorbed_is_off"]
    kept = rope.numbers_kept(config)
    print(f"{name:22}absorbed is off by {error[name]:.0e}; {kept[name]} numbers to cache")
few, none, every = rope.KINDS
assert error[few] < 1e-5 and error[none] < 1e-5 and error[every] > 0.01
assert kept[every] == 176 and kept[few] == 32

# %% [markdown]
# With all dimensions rotated, the absorbed form computes something else, and the cache must hold every head's
# rotated key and its value: 176 numbers instead of 32. Are a few rotated dimensions enough? The same
# experiment trained all three, over three seeds:

# %%
results = Path(lm.__file__).parents[1] / "experiments" / "results" / "rope.json"
trainings = json.loads(results.read_text("utf-8"))["trainings"]
loss = {name: common.mean(common.last(trainings)[name]) for name in rope.KINDS}
print("\n".join(f"{name:22}held-out loss {value:.3f}" for name, value in loss.items()))
assert loss[none] - loss[few] > 0.2 and abs(loss[few] - loss[every]) < 0.05

# %% [markdown]
# Without position the model is far worse. With 16 of 48 dimensions rotated it matches the one with all 48. In
# V3, 64 of 192 rotate, and one rotated key serves all heads: equations 3 and 8 (arXiv 2412.19437), `rotate`
# in the code.
#
# ## 3. From 4k to 128k
# V3 was trained on 4,096 tokens, and then briefly on 32k and 128k, with its rotation slowed for a context 40
# times as long (section 4.3). Slowed how? YaRN (arXiv 2309.00071, section 3.2) asks of each pair how many
# turns it makes in 4,096 tokens.

# %%
v3 = lm.Config.preset("deepseek-v3").model
assert (v3.attention.qk_rope_head_dim, v3.attention.qk_nope_head_dim) == (64, 128)
longer = build_rope(64, v3.rope)
yarn = longer.scaling
print(yarn, f"softmax scale x {longer.softmax_factor:.4f}", sep="\n")
turn = {
    name: frequencies(64, 10_000.0, scaling, torch.device("cpu")).double()
    for name, scaling in {"plain": None, "YaRN": yarn, "linear": Linear(40.0)}.items()
}
assert abs(longer.softmax_factor - (0.1 * math.log(40) + 1) ** 2) < 1e-9
turns = turn["plain"] * 4096 / (2 * torch.pi)
share = turn["YaRN"] / turn["plain"]
print(f"turns in 4,096 tokens: {turns[0]:.0f} (fastest) to {turns[-1]:.3f} (slowest)")
assert 651 < turns[0] < 653 and turns[-1] < 0.1

# %%
as_before, slowed = share > 0.999, share < 1 / 39.9
print(f"{int(as_before.sum())} pairs turn as before, {int(slowed.sum())} turn 40 times slower, 12 between")
assert as_before.sum() == 11 and slowed.sum() == 9
assert turns[as_before].min() > yarn.beta_fast and turns[slowed].max() < yarn.beta_slow
end = {name: rate * 163_840 for name, rate in turn.items()}  # angles at the end of the longer context
assert (end["YaRN"][slowed] <= turn["plain"][slowed] * 4096 * 1.00001).all()
assert (end["plain"][slowed] > turn["plain"][slowed] * 4096 * 39).all()

# %% [markdown]
# Pairs that make more than 32 turns in 4,096 tokens have gone through every angle in training; they stay as
# they are. Pairs that make less than one turn have not: at position 163,840 they would reach angles 40 times
# as large as any seen in training. Slowed down, they end where they ended in training. Between the two lies a
# ramp. "Linear" (arXiv 2306.15595) slows all pairs, the fast ones too.
#
# ## 4. What happens to neighbours?
# Here is the score of a vector with itself at a given distance, averaged over pairs: $\frac{1}{32} \sum_i
# \cos(d\,\omega_i)$.

# %%
ways = {"plain": plain, "YaRN": longer, "linear": RotaryEmbedding(64, 10_000.0, scaling=Linear(40.0))}
distance = torch.arange(164_000)
score = {name: way.cos_sin(distance)[0].mean(-1) for name, way in ways.items()}
for d in (1, 4, 16, 40):
    print(f"distance {d:3}:", *(f"{name} {values[d]:.4f}" for name, values in score.items()))
assert (score["YaRN"] - score["plain"])[:17].abs().max() < 0.01
assert torch.allclose(score["linear"][0:4000:40], score["plain"][:100], atol=1e-4)
assert score["linear"][1] > 0.999

# %% [markdown]
# Linear interpolation makes a neighbour look like the token itself: what was one step is now a fortieth of a
# step. With YaRN the scores up to 16 tokens away stay within 0.01 of what they were. V3 also multiplies the
# softmax scale of all scores by $(0.1 \ln 40 + 1)^2 = 1.87$.
#
# The picture shows on the left how often each pair turns, and on the right the score (averaged over
# neighbouring distances). YaRN's fast pairs turn as in the plain embedding; its slow ones get no further than
# in training.

# %%
edges = torch.logspace(0, 5.2, 60).long().unique()
means = {}  # over the distances from one edge to the next
for name, values in score.items():
    means[name] = values.double().cumsum(0)[edges - 1].diff() / edges.diff()
assert torch.allclose(means["plain"][:5].float(), score["plain"][1:6], atol=1e-5)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
pairs = range(32)
around = 2 * torch.pi
left.plot(pairs, end["plain"] / around, "o-", ms=3, color="0.6")
left.plot(pairs, turn["plain"] * 4096 / around, "o-", ms=3, color="tab:orange")
left.plot(pairs, end["YaRN"] / around, "o-", ms=5, color="tab:blue")
left.text(31.5, 300, "plain, 163,840 tokens", ha="right", color="0.4")
left.text(0, 1.3, "plain, 4,096 tokens:\nseen in training", color="tab:orange")
left.text(7, 7e3, "YaRN, 163,840 tokens", color="tab:blue")
for turns_of, name in ((yarn.beta_fast, "32 turns"), (yarn.beta_slow, "1 turn")):
    left.axhline(turns_of, color="0.5", lw=0.8, ls="--")
    left.text(31.5, 1.1 * turns_of, name, ha="right", fontsize=8, color="0.4")
left.axvspan(10, 23, color="tab:blue", alpha=0.08)
left.text(16.5, 0.06, "ramp", ha="center", color="tab:blue")
left.set(yscale="log", xlabel="pair of dimensions, fast to slow", ylabel="full turns over the context")
for name, colour in (("plain", "tab:orange"), ("linear", "tab:green"), ("YaRN", "tab:blue")):
    right.plot(edges[:-1], means[name], "o-", ms=3, color=colour)
right.text(100, 0.9, "linear", color="tab:green")
right.text(9000, 0.4, "YaRN", color="tab:blue")
right.text(25, 0.35, "plain", color="tab:orange")
right.axvline(4096, color="0.5", lw=0.8, ls="--")
right.text(4500, 0.9, "longest context\nin training", fontsize=8, color="0.4")
right.set(xscale="log", xlabel="distance (tokens)", ylabel="score of a vector with itself")
right.grid(alpha=0.3)

# %% [markdown]
# **Your turn.** `lm exercise start yarn`: which pairs are slowed, and by how much
# ([exercises/13_yarn.py](../exercises/13_yarn.py)).
#
# **Further reading.** DeepSeek-V2 (arXiv 2405.04434) section 2.1.3, DeepSeek-V3 (arXiv 2412.19437) section
# 4.3, YaRN (arXiv 2309.00071) section 3, with [mla/rope.py](../mla/rope.py).
