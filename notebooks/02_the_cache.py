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
# # 02 The cache: why does a long chat fill the memory?
#
# A model that writes a token attends to all tokens before it, through their keys and values. Computing those
# again at every step would cost more with every token, so they are cached: in every layer, for every token of
# every open chat. On a server this cache, often more than the arithmetic, limits how many people can talk to
# the model at once.

# %%
import os
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch

import lm
from lm import count
from lm.report import info
from mla import GroupedQueryAttention, MultiheadLatentAttention

sys.path.append(str(Path(lm.__file__).parents[1]))  # the folder of experiments/
from experiments.cache import bytes_per_token

matplotlib.use("agg")  # a script opens no window; a notebook shows its figures inline:
# %matplotlib inline
plt.rcParams.update({"figure.dpi": 90, "axes.spines.top": False, "axes.spines.right": False})
torch.manual_seed(0)
QUICK = "QUICK" in os.environ  # caches of 256 tokens instead of 1,024

# %% [markdown]
# ## Predict
# DeepSeek-V3 has 61 layers, each with 128 heads of dimension 128. A number takes two bytes (bf16). Write down
# before you run:
#
# 1. If each head kept its own keys and values (MHA), how many bytes would one token take, over all layers?
# 2. How many chats of 32,768 tokens would then fit on a GPU with 80 GB that holds nothing else?
# 3. And how many with what DeepSeek-V3 really caches, 576 numbers per token and layer?
#
# ## 1. Four attentions, four caches
# With $n_h$ heads of dimension $d_h$, one layer caches for each token (V2, arXiv 2405.04434, table 1):
#
# | MHA | GQA, $n_g$ groups | MQA | MLA |
# | --- | --- | --- | --- |
# | $2 n_h d_h$ | $2 n_g d_h$ | $2 d_h$ | $d_c + d_h^R$ |
#
# Here are all four with V3's heads. The model around them is narrow, 64 dimensions: the size of the cache
# does not depend on it.

# %%
attentions = {
    "MHA": GroupedQueryAttention(64, num_heads=128, num_kv_heads=128, head_dim=128),
    "GQA, 8 groups": GroupedQueryAttention(64, num_heads=128, num_kv_heads=8, head_dim=128),
    "MQA": GroupedQueryAttention(64, num_heads=128, num_kv_heads=1, head_dim=128),
    "MLA": MultiheadLatentAttention(64, 128, 512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
}
numbers = {}
for name, attention in attentions.items():
    cache = attention.new_cache(batch=1, max_length=100)
    numbers[name] = cache.nbytes // cache.entries.itemsize // 100
    print(f"{name:14}{numbers[name]:>7,} numbers per token")
assert numbers == {"MHA": 32_768, "GQA, 8 groups": 2_048, "MQA": 256, "MLA": 576}
assert numbers["MLA"] / numbers["MQA"] == 2.25

# %% [markdown]
# MLA caches 576 numbers where MHA caches 32,768: as many as GQA would with 2.25 groups. MQA caches fewer, but
# all its heads share one key and one value. In MLA each head still has its own, computed from a vector that
# all heads share: notebook 03 shows how.
#
# ## 2. Fill them
# A sequence of random vectors is read in chunks. The cache grows by the same amount with each chunk, and the
# output equals the output without a cache: attention needs nothing of the past but its cache entries.

# %%
length, step = (256, 64) if QUICK else (1024, 128)
x = torch.randn(1, length, 64)
filled = {name: [] for name in attentions}
with torch.inference_mode():
    for name, attention in attentions.items():
        cache, parts = attention.new_cache(1, length), []
        for piece in x.split(step, dim=1):
            parts.append(attention(piece, cache))
            filled[name].append(cache.filled.nbytes)
        assert torch.allclose(torch.cat(parts, dim=1), attention(x), atol=1e-5)
for name, sizes in filled.items():
    assert sizes == [(turn + 1) * step * numbers[name] * 4 for turn in range(length // step)]
    print(f"{name:14}{sizes[-1] / 2**20:>8.2f} MiB after {length:,} tokens, fp32, one layer")

# %% [markdown]
# ## 3. Models as they were published
# Each model is built with its published sizes on the device `meta`, without memory for weights; the caches of
# all its layers are created and their bytes counted. `lm.count` gets the same number by arithmetic.

# %%
names = ["llama-3.1-405b", "llama-3.1-70b", "qwen3-235b-a22b", "deepseek-v2", "deepseek-v3", "kimi-k2"]
sizes = {}
for name in names:
    config = lm.Config.preset(name)
    with torch.device("meta"):
        live = bytes_per_token(config)  # in fp32
    assert live == count.cache_bytes_per_token(config.model, "fp32")
    sizes[name] = count.cache_bytes_per_token(config.model, "bf16")
    print(f"{name:16}{config.model.attention.kind:>5}{sizes[name]:>10,} bytes per token in bf16")
assert sizes["deepseek-v3"] == 61 * 576 * 2 == 70_272
assert sizes["llama-3.1-405b"] == 126 * 2 * 8 * 128 * 2 == 516_096
assert round(sizes["llama-3.1-405b"] / sizes["deepseek-v3"], 1) == 7.3

# %% [markdown]
# DeepSeek-V3 caches 70,272 bytes per token, Llama 3.1 405B 516,096: 7.3 times as many, although it uses GQA.
# And what would V3 cache if it had a different attention with the same number of heads?

# %%
for name, size in info.cache_bytes(lm.Config.preset("deepseek-v3").model, "bf16").items():
    if name.startswith(("MHA", "GQA", "MQA")):
        sizes[f"deepseek-v3 with {name}"] = size
chat, gpu = 32_768, 80e9
fit = {name: int(gpu // (size * chat)) for name, size in sizes.items()}
for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
    print(f"{name:38}{2**30 // size:>9,} tokens in 1 GiB{fit[name]:>5} chats of {chat:,} tokens in 80 GB")
assert sizes["deepseek-v3 with MHA"] == 3_997_696
assert fit["deepseek-v3 with MHA"] == 0 and fit["deepseek-v3"] == 34 and fit["llama-3.1-405b"] == 4

# %% [markdown]
# With MHA a token of V3 would take 4 MB. Not one such chat would fit on the GPU; with MLA, 34 do. (Real
# servers need memory for the weights too, and spread both over many GPUs.)
#
# ## 4. The picture
# Left: the caches of one layer as they fill. Right: the models. The scales are logarithmic.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(2, 3), layout="constrained")
colours = {"MHA": "tab:orange", "GQA, 8 groups": "tab:green", "MQA": "0.5", "MLA": "tab:blue"}
tokens = range(step, length + 1, step)
for name, values in filled.items():
    left.plot(tokens, [value / 2**20 for value in values], "o-", ms=3, color=colours[name])
    left.text(1.1 * length, values[-1] / 2**20, name, color=colours[name], va="center")
left.set(xscale="log", yscale="log", xlabel="tokens read", ylabel="MiB in one layer, fp32")
left.set_xticks([step, length // 2, length], [step, length // 2, length], minor=False)
left.set_xlim(0.9 * step, 3 * length)
left.minorticks_off()
order = sorted(sizes, key=sizes.get)
of_mla = {name for name in names if lm.Config.preset(name).model.attention.kind == "mla"}
for row, name in enumerate(order):
    colour = "tab:blue" if name in of_mla else "tab:orange"
    right.plot(sizes[name], row, "o", color=colour)
    right.text(1.25 * sizes[name], row, f"{sizes[name]:,}   {fit[name]} chats", va="center", fontsize=9)
right.set_yticks(range(len(order)), order)
right.set(xscale="log", xlabel="bytes of cache per token, bf16 (MLA in blue)", xlim=(2e4, 6e7))
right.set_title("bytes per token, and chats of 32,768 tokens in 80 GB", fontsize=10)
for axis in (left, right):
    axis.grid(alpha=0.3)

# %% [markdown]
# **Your turn.** `lm exercise start cache`: the method that appends new entries after those each batch row
# already holds ([exercises/12_cache.py](../exercises/12_cache.py)).
#
# **Further reading.** DeepSeek-V2 (arXiv 2405.04434) section 2.1.4 and table 1, with
# [mla/cache.py](../mla/cache.py). Does MLA cost quality? [experiments/cache.py](../experiments/cache.py)
# trains all four with the same number of parameters.
