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
# # 05 Absorption: why is decoding cheap?
#
# A latent cache is small, but attention is written in terms of keys and values. Recomputed from the latents
# at every step, they would cost more with every token; cached, they would fill the memory that the latent
# saved. Absorption does neither: it moves the two matrices to the query and the output, where there is one
# token instead of the whole past.

# %%
import os
import sys
from functools import partial
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch

import lm
from mla import MultiheadLatentAttention
from mla.attention import softmax_attention

sys.path.append(str(Path(lm.__file__).parents[1]))  # the folder of benchmarks/
from benchmarks.speed import in_turns

matplotlib.use("agg")  # a script opens no window; a notebook shows its figures inline:
# %matplotlib inline
plt.rcParams.update({"figure.dpi": 90, "axes.spines.top": False, "axes.spines.right": False})
torch.manual_seed(0)
torch.set_grad_enabled(False)
QUICK = "QUICK" in os.environ  # contexts up to 2,048 instead of 8,192, fewer rounds of timing

# %% [markdown]
# ## Predict
# The layer below has 16 heads of dimension 32, a latent of 128 and 16 RoPE dimensions: a quarter of V3's
# widths. It writes one token after 8,192 others. Write down before you run:
#
# 1. How much longer does a step take that recomputes all keys and values: about the same, 3 times, 10 times,
#    more?
# 2. Is a step with cached keys and values, as in MHA, faster or slower than the absorbed one?
# 3. A prompt of many tokens is read at once. Should that be absorbed, too?
#
# ## 1. Three ways to one answer

# %%
heads, rank, nope, rope, value_dim = 16, 128, 32, 16, 32
mla = MultiheadLatentAttention(512, heads, rank, nope, rope, value_dim)


def ways(new, past):
    """The attention of `new` tokens after `past` others: one callable for each form."""
    q_nope, q_rope = torch.randn(1, new, heads, nope), torch.randn(1, new, heads, rope)
    entries = torch.randn(1, past + new, rank + rope)  # the cache's
    latent, k_rope = entries.split([rank, rope], dim=-1)
    visible = None if new == 1 else torch.arange(past + new) <= torch.arange(past, past + new).unsqueeze(-1)
    k_nope, value = mla.kv_b(latent).unflatten(-1, (heads, -1)).split([nope, value_dim], dim=-1)
    key = torch.cat((k_nope, k_rope.unsqueeze(2).expand(-1, -1, heads, -1)), dim=-1)
    cached = (torch.cat((q_nope, q_rope), dim=-1), key, value.contiguous(), mla.scale, visible)
    return {
        "expanded": partial(mla.expanded, q_nope, q_rope, latent, k_rope, visible),
        "cached": partial(softmax_attention, *cached),
        "absorbed": partial(mla.absorbed, q_nope, q_rope, entries, visible),
    }


# %% [markdown]
# - **expanded**: the cache holds latents; each step computes every head's keys and values from them (V3,
#   arXiv 2412.19437, eq. 1 to 10).
# - **cached**: the cache holds those keys and values, as in MHA.
# - **absorbed**: the cache holds latents, and attention reads them directly (V2, arXiv 2405.04434, section
#   2.1.2).

# %%
answers = {name: call() for name, call in ways(new=5, past=300).items()}
for name, answer in answers.items():
    print(f"{name:10}{tuple(answer.shape)}, off by {(answer - answers['expanded']).abs().max():.0e}")
    assert torch.allclose(answer, answers["expanded"], atol=1e-5)
numbers = {"expanded": rank + rope, "cached": heads * (nope + rope + value_dim), "absorbed": rank + rope}
products = {"cached": heads * (nope + rope + value_dim), "absorbed": heads * (rank + rope + rank)}
print("numbers read per cached token:", numbers)
print("multiplications for one query with one key and value:", products)
assert round(numbers["cached"] / numbers["absorbed"], 1) == 8.9
assert products["absorbed"] / products["cached"] == 3.4

# %% [markdown]
# One answer, three prices. Compared with cached keys and values, the absorbed form multiplies 3.4 times as
# much per key, but reads 8.9 times fewer numbers.
#
# ## 2. Write one token
# The three are timed in turns, and the best time of each counts, so that a busy moment of the machine hurts
# none of them.

# %%
contexts, rounds = ((64, 256, 1024, 2048), 5) if QUICK else ((64, 256, 1024, 4096, 8192), 9)
decode = {}
for past in contexts:
    seconds = in_turns(ways(1, past - 1), rounds)
    decode[past] = {name: 1e3 * min(values) for name, values in seconds.items()}
    print(f"{past:5} tokens:", ", ".join(f"{name} {ms:.3f} ms" for name, ms in decode[past].items()))
last = decode[contexts[-1]]
times = {name: round(ms / last["absorbed"], 1) for name, ms in last.items()}
print(f"on this machine, at {contexts[-1]:,} tokens, relative to the absorbed form: {times}")
if not QUICK:
    assert last["expanded"] > 3 * last["absorbed"]

# %% [markdown]
# Expanding again at every step is hopeless: for one new token it multiplies the whole past by $W^{UK}$ and
# $W^{UV}$. The cached form reads more, the absorbed form multiplies more. At a short context everything fits
# in the processor's own caches, and reading is cheap; at a long one the small cache pays off. Where the lines
# cross depends on the machine; look at yours.
#
# ## 3. Read many at once
# Now the past has 1,024 tokens, and the number of new tokens grows, as when a prompt comes in. Expanding
# costs the same whether one token or five hundred look at the keys; the extra cost of absorption is paid for
# each of them.

# %%
several = (1, 4, 16, 64, 256) if QUICK else (1, 4, 16, 32, 64, 128, 256, 512)
prefill = {}
for new in several:
    calls = ways(new, 1024)
    del calls["cached"]
    prefill[new] = {name: 1e3 * min(values) for name, values in in_turns(calls, rounds).items()}
    print(f"{new:4} new tokens:", ", ".join(f"{name} {ms:.2f} ms" for name, ms in prefill[new].items()))
if not QUICK:
    assert prefill[1]["absorbed"] < prefill[1]["expanded"]
    assert prefill[several[-1]]["expanded"] < prefill[several[-1]]["absorbed"]

# %% [markdown]
# So both forms are needed: absorbed to write, expanded to read a prompt. The layer counts multiplications and
# decides at each call, in `absorbed_is_cheaper`. Where is the crossover, here and in V3?

# %%
with torch.device("meta"):
    large = lm.Transformer(lm.Config.preset("deepseek-v3").model).blocks[0].attention
border = {
    name: max(new for new in range(1, 400) if layer.absorbed_is_cheaper(new, past + new))
    for name, layer, past in (("this layer", mla, 1024), ("DeepSeek-V3", large, 100_000))
}
print("absorbed needs fewer multiplications up to this many new tokens:", border)
assert border == {"this layer": 41, "DeepSeek-V3": 170}

# %% [markdown]
# ## 4. Is the output the same?
# The layer itself, with its cache: a prompt of 300 tokens at once (expanded), then 20 tokens one by one
# (absorbed). We compare with all 320 at once without a cache.

# %%
x = torch.randn(1, 320, 512)
cache = mla.new_cache(batch=1, max_length=320)
parts = [mla(x[:, :300], cache), *(mla(x[:, at : at + 1], cache) for at in range(300, 320))]
difference = float((torch.cat(parts, dim=1) - mla(x)).abs().max())
print(f"largest difference {difference:.0e}; {cache.filled.shape[-1]} numbers cached per token")
assert not mla.absorbed_is_cheaper(300, 300) and mla.absorbed_is_cheaper(1, 301)
assert difference < 1e-5

# %% [markdown]
# ## 5. The picture

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
right.axvline(border["this layer"], color="0.5", lw=0.8, ls="--")
right.text(1.1 * border["this layer"], 0.8, "equal number of\nmultiplications", fontsize=8)
colours = {"expanded": "tab:red", "cached": "tab:orange", "absorbed": "tab:blue"}
panels = (
    (left, decode, "writing (decode)", "tokens of context (one new token)"),
    (right, prefill, "reading a prompt (prefill)", "new tokens (1,024 of context)"),
)
for axis, found, title, label in panels:
    for name, colour in colours.items():
        if name in last and name in found[max(found)]:
            axis.plot(list(found), [row[name] for row in found.values()], "o-", ms=4, color=colour)
            axis.text(1.15 * max(found), found[max(found)][name], name, va="center", color=colour)
    axis.set_title(title, fontsize=10)
    axis.set(xscale="log", yscale="log", xlabel=label, ylabel="ms for one layer, on this machine")
    axis.set_xlim(right=4 * max(found))
    axis.set_xticks(list(found), [f"{x:,}" for x in found])
    axis.minorticks_off()
    axis.grid(alpha=0.3)

# %% [markdown]
# **Your turn.** `lm exercise start absorb`: write the absorbed form yourself
# ([exercises/11_absorb.py](../exercises/11_absorb.py)).
#
# **Further reading.** DeepSeek-V2 (arXiv 2405.04434) section 2.1.2, DeepSeek-V3 (arXiv 2412.19437) equations
# 9 and 10, with `absorbed` and `absorbed_is_cheaper` in [mla/attention.py](../mla/attention.py).
