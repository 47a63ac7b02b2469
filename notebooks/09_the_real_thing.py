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
# # 09 The real thing: is this DeepSeek's model?
#
# What you took apart in these notebooks is small, and a small model may be wrong in ways that no loss shows.
# DeepSeek-V3 does not fit on your machine, but two questions can be settled without it. Does this package,
# given V3's sizes, have V3's parameters, to the last one? And does it compute what the field's reference,
# Hugging Face's transformers, computes from the same files?

# %%
import os
import sys
import tempfile
import warnings
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle
from safetensors.torch import load_file

import lm
import moe
from lm import checkpoint, count
from lm.hub import families, translate
from lm.report import info

warnings.filterwarnings("ignore", "IProgress not found")  # no progress bars here
try:
    import transformers
except ImportError:
    sys.exit("transformers is missing: .venv/bin/pip install -c constraints.txt -e '.[dev]'")

matplotlib.use("agg")  # a script opens no window; a notebook shows its figures inline:
# %matplotlib inline
plt.rcParams["figure.dpi"] = 90
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
QUICK = "QUICK" in os.environ  # 24 tokens instead of 200
LENGTH = 24 if QUICK else 200

# %% [markdown]
# ## 1. Counted
#
# The preset `deepseek-v3` has the sizes of V3's section 4.2. `lm.count` adds up its matrices by arithmetic.
# PyTorch can also build the whole model on the device `meta`, where a tensor has a shape and no memory.
#
# **Predict.** Of 61 layers, 58 have 256 routed experts with $3 \times 7168 \times 2048$ weights each.
# Multiply: what share of the 671 billion parameters is in them? A token goes to 8 of the 256: what share of
# the routed experts is that, and what share of the model?

# %%
config = lm.Config.preset("deepseek-v3").model
facts = info.summary(config, context=4096)["parameters"]
for part, number in facts["total_by_part"].items():
    print(f"{part:15}{number:16,}  a token uses {facts['active_by_part'][part]:14,}")
print(f"{'all':15}{facts['total']:16,}  a token uses {facts['active']:14,}")

# %%
with torch.device("meta"):
    large = lm.Transformer(config)
built = sum(tensor.numel() for tensor in checkpoint.model_tensors(large).values())
assert built == facts["total"] == count.total_parameters(config)
assert round(facts["total"] / 1e9) == 671  # as published, without the multi-token prediction module
assert round(facts["active_without_input_embedding"] / 1e9) == 37
assert facts["total_by_part"]["routed experts"] == 58 * 256 * 3 * 7168 * 2048
assert facts["total_by_part"]["routed experts"] > 0.97 * facts["total"]
assert facts["active"] < 0.06 * facts["total"]

# %% [markdown]
# More than 97 % of the model is routed experts, and a token uses one in 32 of them: less than 6 % of the
# model. The module that V3 also trains for multi-token prediction is not part of the 671 billion.
#
# ## 2. The same numbers
#
# A count can be right and the function wrong. So we let transformers build a small DeepSeek-V3 with random
# weights, with its selection bias far from zero, and save it as it saves any model. `lm.from_hf` reads the
# folder.
#
# **Predict.** Two programs, one set of weights, fp32: to how many digits do the logits agree? And to how many
# if ours ignores the selection bias?

# %%
of_model = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
of_heads = {"num_attention_heads": 4, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
of_latents = {"q_lora_rank": 24, "kv_lora_rank": 16, "num_key_value_heads": 4}
of_experts = {"n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 32}
of_groups = {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "initializer_range": 0.1}
no_special_tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
sizes = of_model | of_heads | of_latents | of_experts | of_groups | no_special_tokens
torch.manual_seed(0)
theirs = transformers.AutoModelForCausalLM.from_config(transformers.DeepseekV3Config(**sizes)).eval()
for name, buffer in theirs.named_buffers():
    if name.endswith("e_score_correction_bias"):
        buffer.uniform_(-1.0, 0.0)


# %%
scratch = tempfile.TemporaryDirectory()
published, written = Path(scratch.name) / "published", Path(scratch.name) / "written"
theirs.save_pretrained(published)
ours = lm.from_hf(published)
print(f"{count.total_parameters(ours.config):,} parameters in", sorted(p.name for p in published.iterdir()))

# %%
tokens = torch.randint(256, (1, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def difference(model):
    """The largest difference from transformers' logits at each position, over the largest logit."""
    wanted = theirs(tokens).logits
    return ((model(tokens).logits - wanted).abs().amax(-1) / wanted.abs().max())[0]


right = difference(ours)
without_bias = lm.from_hf(published)
for router in without_bias.routers():
    router.bias.zero_()
wrong = difference(without_bias)
print(f"largest difference: {right.max():.1e}, without the bias {wrong.max():.1e}")
assert right.max() < 1e-5
assert wrong.max() > 1e-2

# %%
greedy = lm.generate(lm.from_hf(published), tokens[:, :12], max_new_tokens=12, temperature=0)
wanted = theirs.generate(tokens[:, :12], max_new_tokens=12, do_sample=False)
print(greedy[0, 12:].tolist())
assert torch.equal(greedy, wanted)

# %% [markdown]
# The logits agree to the last digits of fp32; what remains is that the two programs add in a different order.
# Greedy decoding gives the same text. Without the bias, the logits differ already in the first digit, so the
# comparison can fail. The test suite does this for every architecture and every option
# ([docs/checkpoints.md](../docs/checkpoints.md)).
#
# ## 3. And back
#
# `lm.to_hf` writes our model in their layout.
#
# **Predict.** Our model stores the gate and up projections of all experts of a layer in one tensor; theirs
# stores each projection of each expert separately. After reading and writing, does any bit differ?

# %%
lm.to_hf(ours, written)
again = transformers.AutoModelForCausalLM.from_pretrained(written)
first, second = theirs.state_dict(), again.state_dict()
assert first.keys() == second.keys()
assert all(torch.equal(first[name], second[name]) for name in first)
files = [load_file(folder / "model.safetensors") for folder in (published, written)]
assert files[0].keys() == files[1].keys()
assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
print(f"{len(first)} tensors in memory, {len(files[0])} in the file: all equal")

# %% [markdown]
# Not one bit. The whole translation is a table of names, [families.py](../lm/hub/families.py). Here it is for
# a layer with experts, with the papers' symbols:

# %%
symbols = {name.ours: name.symbol for name in families.BLOCK}
for ours_name, tensor in checkpoint.model_tensors(ours).items():
    if ours_name.startswith("blocks.1."):
        short = ours_name.removeprefix("blocks.1.")
        symbol = symbols.get(short, symbols.get(short.removesuffix(".weight"), ""))
        parts = [name for name, _ in translate.parts_of(ours_name, tensor, "deepseek_v3")]
        assert all(part in files[0] for part in parts)
        more = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
        print(f"{short:28}{symbol:16}{parts[0].removeprefix('model.layers.1.')}{more}")

# %% [markdown]
# ## 4. Drawn to scale
#
# All parameters are drawn as areas. The routed experts are 256 cells in 8 groups; a cell is one expert index
# in all 58 layers. A router of V3's size decides, for a random token, which cells are lit.

# %%
router = moe.SigmoidRouter(7168, num_experts=256, top_k=8, num_groups=8, top_groups=4)
chosen = set(router(torch.randn(7168)).experts.tolist())
assert len(chosen) == 8 and len({expert // 32 for expert in chosen}) <= 4
by_part = facts["total_by_part"]
rest = facts["total"] - by_part["routed experts"]
lit = rest + by_part["routed experts"] * len(chosen) // 256
assert lit == facts["active"]
routed_width = 1.8 * by_part["routed experts"] / facts["total"]  # of a rectangle 1.8 wide and 1 high


# %%
def draw_experts(axis):
    """8 groups of 32 cells, 4 groups per row, the chosen cells lit."""
    w, h = routed_width / 32, 1 / 8
    for expert in range(256):
        group, place = divmod(expert, 32)
        column, row = 8 * (group % 4) + place % 8, 4 * (group // 4) + place // 8
        colour = info.COLOURS["routed experts"] if expert in chosen else "#e8e8e8"
        axis.add_patch(Rectangle((column * w, row * h), w, h, fc=colour, ec="white"))
    for line in (8, 16, 24):
        axis.plot([line * w] * 2, [0, 1], color="black", lw=0.8)
    axis.plot([0, routed_width], [4 * h] * 2, color="black", lw=0.8)
    size = info.short(by_part["routed experts"], "kMBT")
    axis.text(0, 1.03, f"256 routed experts in 8 groups: {size} in 58 layers; 8 are lit", va="top")


def draw_rest(axis):
    """What every token uses, stacked in one column, labelled at the side without overlap."""
    bottom, label = 0.0, -0.09
    for part in sorted(set(by_part) - {"routed experts", "norms"}, key=by_part.get, reverse=True):
        height = by_part[part] / rest
        corner = (routed_width, bottom)
        axis.add_patch(Rectangle(corner, 1.8 - routed_width, height, fc=info.COLOURS[part], ec="white"))
        middle = bottom + height / 2
        label = max(middle, label + 0.09)
        words = f"{part} {info.short(by_part[part], 'kMBT')}"
        arrow = {"arrowstyle": "-", "lw": 0.6, "relpos": (0, 0.5)}
        axis.annotate(words, (1.8, middle), (1.87, label), va="center", arrowprops=arrow)
        bottom += height


# %%
def draw_difference(axis):
    """The difference from transformers' logits at each position."""
    for values, words, colour in ((wrong, "selection bias ignored", "C3"), (right, "ours", "C0")):
        axis.semilogy(values.clamp(min=1e-9), color=colour)
        axis.text(LENGTH / 2, values.max() * 1.6, words, color=colour, ha="center")
    axis.axhline(torch.finfo(torch.float32).eps, color="black", lw=0.8)
    axis.text(0, 1e-7, "epsilon of fp32", va="top")
    axis.set_ylim(2e-8, 3)
    axis.spines[["top", "right"]].set_visible(False)


# %%
figure, axes = plt.subplots(1, 2, figsize=(14, 4.6), width_ratios=(2.3, 1))
draw_experts(axes[0])
draw_rest(axes[0])
axes[0].set_xlim(0, 2.25)
axes[0].set_ylim(1.1, 0)
axes[0].axis("off")
title = f"DeepSeek-V3: {facts['total'] / 1e9:.0f} B parameters; lit, what a token uses: {lit / 1e9:.1f} B"
axes[0].set_title(f"{title}, {lit / facts['total']:.1%}", loc="left", fontsize=11)
draw_difference(axes[1])
axes[1].set_xlabel("position")
axes[1].set_ylabel("difference from transformers' logits,\nrelative to the largest logit")
axes[1].set_title("A small V3, random weights", loc="left", fontsize=11)
figure.tight_layout()

# %% [markdown]
# The count includes the whole embedding table, although a token reads only one row of it.
#
# **Your turn.** `lm exercise start gate-scale` ([exercises/14_gate_scale.py](../exercises/14_gate_scale.py)):
# V3's factor 2.5 on the routed experts makes their sum as large as one expert's output. Where does such a
# factor come from?
#
# **Further reading.** DeepSeek-V3 (arXiv 2412.19437) sections 2.1 and 4.2, with
# [lm/model.py](../lm/model.py), [lm/hub/hf.py](../lm/hub/hf.py) and [docs/names.md](../docs/names.md).
