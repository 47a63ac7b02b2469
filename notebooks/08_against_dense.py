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
# # 08 Against dense: does it train faster with fewer parameters?
#
# "DeepSeek trains faster with fewer parameters" was in every newspaper. Fewer than what, and faster by which
# clock? The sentence is true or false depending on what one counts: parameters stored or parameters in use,
# steps, floating-point operations or seconds. Here you count all of them, train one pair of models yourself,
# and read the rest off trainings with three seeds.

# %%
import json
import os
import sys
import tempfile
from pathlib import Path

import lm

sys.path.append(str(Path(lm.__file__).parents[1]))  # the folder of experiments/
from experiments import common, faster
from experiments.common import plt
from lm import count, data

# %matplotlib inline
plt.rcParams["figure.dpi"] = 90
QUICK = "QUICK" in os.environ  # 30 steps instead of 600, a short held-out text
STEPS = 30 if QUICK else 600

# %% [markdown]
# ## 1. What is counted
#
# A token uses $K_r$ routed experts and the shared one: a feed-forward layer as wide as these together. A
# dense model of that width does the same work per token; `faster.dense` builds it. A second rival is dense
# and has as many parameters as the MoE stores.
#
# Training costs 6 operations for each weight in a matrix product, 2 forward and 4 backward, plus attention
# over the earlier tokens: `lm.count.training_flops_per_token` adds this up.
#
# **Predict.** The MoE stores eight times the parameters of its dense rival. How many times the operations
# does it need per token?

# %%
moe = lm.Config.preset("mini")
whole = (moe.model.moe.num_experts + moe.model.moe.num_shared_experts) * moe.model.moe.hidden_dim
configs = {
    "MoE": moe,
    "dense": faster.dense(moe, faster.active_width(moe)),
    "dense, as many parameters": faster.dense(moe, whole),
}
flops = {}
print(f"{'':26}parameters   in use  FLOPs per token")
for name, config in configs.items():
    sizes = common.sizes(config.model)
    flops[name] = count.training_flops_per_token(config.model, config.train.context)
    print(f"{name:26}{sizes['parameters']:10,}{sizes['active']:9,}{flops[name]:17,}")

# %%
total, active = (
    {name: function(config.model) for name, config in configs.items()}
    for function in (count.total_parameters, count.active_parameters)
)
assert total["MoE"] > 8 * total["dense"]
assert active["MoE"] < 1.1 * active["dense"] and flops["MoE"] < 1.1 * flops["dense"]
assert active["MoE"] - active["dense"] == count.parameters_by_part(moe.model)["routers"]
assert abs(total["MoE"] / total["dense, as many parameters"] - 1) < 0.02

# %% [markdown]
# Eight times the parameters for less than a tenth more work, and that tenth is the router's. So "fewer
# parameters" means parameters *in use*. Against a dense model of as many parameters, the MoE uses less than a
# seventh of them; against one of equal work it has many more, and they must all be in memory.
#
# ## 2. One seed, live
#
# Both models see the same text in the same order. The time of a step is the fastest of several, with the two
# models taking turns, so that a busy machine slows both.
#
# **Predict.** After 600 steps, which loss is lower, and by how many nats per byte? And how many times as long
# does a step of the MoE take?

# %%
scratch = tempfile.TemporaryDirectory()
folder = Path(scratch.name)
pair = {name: configs[name] for name in ("MoE", "dense")}
if QUICK:
    (folder / "short.txt").write_bytes((data.CORPUS / "validation.txt").read_bytes()[:40_000])
    short = {"validation": str(folder / "short.txt")}
    pair = {name: common.changed(config, data=short) for name, config in pair.items()}

# %%
seconds = common.step_seconds(pair, rounds=2 if QUICK else 10)
live = {
    name: common.trained(common.with_steps(config, STEPS, seed=0), folder, None)
    for name, config in pair.items()
}
for name, row in live.items():
    print(f"{name:6} {row['held_out_loss']:.3f} nats per byte after {row['flops']:.2e} FLOPs")
print(f"on this machine a step of the MoE takes {seconds['MoE'] / seconds['dense']:.2f} times as long")
if not QUICK:
    assert live["MoE"]["held_out_loss"] < live["dense"]["held_out_loss"]

# %% [markdown]
# Step for step the MoE is ahead after 600 steps. But its step may take longer than its operation count
# suggests: many small products, sorting and gathering take time without being counted. Whether it is ahead
# *by the clock* depends on which gap is larger.
#
# ## 3. Three seeds, five budgets
#
# `lm experiment faster` trained each model for several step budgets, each with its own warm-up and decay of
# the learning rate, with three seeds. Seconds are steps times the fastest step on the machine that ran it.
# Read the ratio off horizontally: where does the MoE's curve reach the loss that the dense model *ends* with,
# and what share of the dense model's FLOPs, or seconds, has it used by then?
#
# **Predict.** The share of FLOPs and the share of seconds, with a 95 % confidence interval for each.

# %%
results = Path(faster.__file__).parent / "results" / "faster.json"
found = json.loads(results.read_text("utf-8"))
trainings = found["trainings"]
shares = {key: faster.ratios(trainings, "MoE", "dense", key) for key in faster.KEYS}
said = {}
for key, values in shares.items():
    low, high = common.interval(values)
    mean = common.mean(values)
    said[key] = f"{mean:.2f} ({low:.2f} to {high:.2f})"
    print(f"{faster.KEYS[key]:7} by seed {[round(x, 2) for x in values]}, mean {said[key]}: x {1 / mean:.1f}")
    assert high < 1  # faster: the whole interval lies below 1
assert common.mean(shares["flops"]) < common.mean(shares["seconds"])
assert faster.summary(trainings) == found["summary"]  # the figures of docs/claims.md
print(found["answer"][1])

# %% [markdown]
# The MoE is faster by both measures, by less in seconds than in FLOPs, and the interval is wide: three seeds
# know the direction, not the factor. Quote the interval with the number.
#
# ## 4. Where it is not true
#
# **Predict.** The dense model ends after 2,400 steps. Had you stopped both early, at 300, which would have
# been faster in seconds? Does a model of twice the width change that?

# %%
pairs = {32: ("MoE", "dense"), 64: ("MoE, dim 64", "dense, dim 64")}
frontier = {key: faster.frontier(trainings, pairs, key) for key in faster.KEYS}
for width, by_steps in frontier["seconds"].items():
    line = ", ".join(f"{steps:,}: {value['mean']:.2f}" for steps, value in by_steps.items())
    print(f"width {width}, share of the dense model's seconds by its number of steps: {line}")
    means = [value["mean"] for value in by_steps.values()]
    assert means[0] > 1 > means[-1] and means == sorted(means, reverse=True)

# %%
steps = 300
many = [row for row in trainings if row["steps"] == steps]
more = common.paired(many, "MoE", "dense, as many parameters")
low, high = common.interval(more)
print(f"{steps} steps: MoE above the dense model of as many parameters by {low:.3f} to {high:.3f}")
assert low < 0 < high
peaks = {name: found["models"][name]["peak_megabytes"] for name in configs}
print("peak memory of a step, MB:", peaks)
assert peaks["dense"] < peaks["MoE"] < peaks["dense, as many parameters"]

# %% [markdown]
# The MoE is *behind* in seconds when training is short, at both widths: its lead does not yet pay for its
# longer steps. It also needs more memory than a dense model of equal work. And step for step, three seeds
# cannot distinguish it from a dense model of as many parameters: experts save work, not training text. All of
# this was measured on toy models on two cores; [docs/claims.md](../docs/claims.md) also lists which of the
# papers' rankings did not hold here.

# %%
losses = common.by_model(trainings)


def draw_curves(axis, key):
    """Loss over FLOPs or seconds: each seed as a point, their mean as a line."""
    for number, name in enumerate(configs):
        at = [values[0] for values in common.by_model(trainings, key)[name].values()]
        for x, values in zip(at, losses[name].values()):
            axis.plot([x] * len(values), values, ".", color=f"C{number}", ms=4)
        means = [common.mean(values) for values in losses[name].values()]
        axis.plot(at, means, color=f"C{number}")
        away = {"xytext": (6, -3) if len(at) > 1 else (-40, 26), "textcoords": "offset points"}
        axis.annotate(name.replace("as ", "as\n"), (at[-1], means[-1]), **away, color=f"C{number}")
    common.log_axis(axis)
    axis.set_xlim(right=axis.get_xlim()[1] * 2)
    axis.set_ylabel("held-out loss (nats per byte)")
    common.tidy(axis)


# %%
def draw_share(axis, key):
    """An arrow from where the dense model ends to where the MoE has the same loss."""
    goal = common.mean(common.last(trainings)["dense"])
    end = max(row[key] for row in trainings if row["model"] == "dense")
    start = end * common.mean(shares[key])
    axis.annotate("", (start, goal), (end, goal), arrowprops={"arrowstyle": "->", "lw": 1.5})
    words = f"to the dense model's final loss:\n{said[key]} of its {faster.KEYS[key]}"
    axis.text(0.02, 0.04, words, transform=axis.transAxes)


figure, axes = plt.subplots(1, 3, figsize=(14.5, 4.2))
for axis, (key, label) in zip(axes, faster.KEYS.items()):
    draw_curves(axis, key)
    draw_share(axis, key)
    axis.set_xlabel(f"{label} of training" + (", 2 cores" if key == "seconds" else ""))
for number, row in enumerate(live.values()):
    axes[0].plot(row["flops"], row["held_out_loss"], "o", mfc="none", ms=10, color=f"C{number}")
axes[0].text(0.98, 0.95, "circles: the live runs", transform=axes[0].transAxes, ha="right")
faster.draw_frontier(axes[2], frontier)
axes[2].text(150, 0.3, "below 1 the MoE\nneeds less")
common.tidy(axes[2])
figure.tight_layout()

# %% [markdown]
# **Your turn.** `lm exercise start flops`: count the work of a model yourself
# ([exercises/15_flops.py](../exercises/15_flops.py)).
#
# **Further reading.** DeepSeekMoE (arXiv 2401.06066) section 4.2 and table 1, with
# [lm/count.py](../lm/count.py) and [experiments/faster.py](../experiments/faster.py).
