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
# # 07 Balance: what if all tokens want the same expert?
#
# A router reinforces its own choices: an expert that is chosen is trained, becomes better, and is chosen
# again. Left alone, a few experts take nearly everything and the rest are memory that nobody uses; on many
# GPUs, all wait for the one that holds the favourite. The papers have three cures: a loss over the batch, a
# loss over each sequence, and a bias that no gradient touches. Here you compute each by hand, then train with
# each of them and with none.

# %%
import json
import os
import sys
import tempfile
from pathlib import Path

import torch

import lm
import moe

sys.path.append(str(Path(lm.__file__).parents[1]))  # the folder of experiments/
from experiments import balance as experiment
from experiments import common
from experiments.common import plt
from lm import data
from lm.run import read_metrics
from moe import balance

# %matplotlib inline
plt.rcParams["figure.dpi"] = 90
QUICK = "QUICK" in os.environ  # 40 steps instead of 200, a short held-out text
STEPS = 40 if QUICK else 200

# %% [markdown]
# ## 1. What a balance loss measures
#
# Let $f_i$ be the share of the $T$ tokens that expert $i$ of $N_r$ gets, scaled to be 1 when all experts get
# the same number, and $P_i$ its mean share of the affinities (V3 eq. 17-20):
#
# $$\mathcal{L}_\mathrm{Bal} = \alpha \sum_{i=1}^{N_r} f_i P_i, \qquad
# f_i = \frac{N_r}{K_r T} \sum_{t=1}^T \mathbb{1}(t \text{ goes to } i), \qquad
# P_i = \frac{1}{T} \sum_{t=1}^T \frac{s_{i,t}}{\sum_j s_{j,t}}$$
#
# V3 computes the sum for each sequence, the Switch Transformer (arXiv 2101.03961 eq. 4-6) for the whole
# batch. The package leaves $\alpha$ to the caller.
#
# **Predict.** Four experts, two per token. What is the sum when all four get the same number of tokens, with
# equal affinities? And when every token goes to experts 0 and 1, with no affinity to the others?


# %%
def routing(experts, scores):
    """A routing of one sequence with equal weights; experts (time, top_k), scores (time, experts)."""
    experts, scores = torch.tensor(experts), torch.tensor(scores)
    return moe.Routing(experts, torch.full(experts.shape, 0.5), scores, scores.logit())


even = routing([[0, 1], [2, 3]] * 4, [[0.5, 0.5, 0.5, 0.5]] * 8)
same = routing([[0, 1]] * 8, [[1.0, 1.0, 0.0, 0.0]] * 8)
value_even, value_same = balance.sequence_loss(even).item(), balance.sequence_loss(same).item()
print(f"even: {value_even:.3f}, all to the same two: {value_same:.3f}")
assert abs(value_even - 1) < 1e-6
assert abs(value_same - 2) < 1e-6  # experts / top_k, the worst

# %% [markdown]
# At balance the sum is 1, whatever the sizes; at worst it is $N_r / K_r$. Only $P$ carries a gradient, since
# $f$ is a count. The gradient pushes the affinities to busy experts down and, through the division, those to
# idle experts up.

# %%
scores = torch.full((8, 4), 0.5, requires_grad=True)
uneven = same._replace(scores=scores)
value = balance.sequence_loss(uneven)
value.backward()
push = -scores.grad.sum(0)
print(f"loss: {value.item():.3f}, push on each expert's affinity: {push.tolist()}")
assert (push[:2] < 0).all() and (push[2:] > 0).all()
assert abs(value.item() - 1) < 1e-6

# %% [markdown]
# Note the value: with equal affinities it is 1 although two experts have everything. The gradient knows
# better than the value, so watch the load itself. MaxVio is the load of the busiest expert above the mean,
# divided by the mean (arXiv 2408.15664): 0 when even, $N_r / K_r - 1$ at worst.
#
# ## 2. A bias update by hand
#
# V3 leaves the gradient to the language-modelling loss and moves a bias instead: after each step, $b_i$ of an
# overloaded expert goes down by $\gamma$, that of an underloaded one goes up by $\gamma$.
#
# **Predict.** The loads are 10, 2, 4, 0 and $\gamma = 0.001$. What is MaxVio? What are the four biases after
# one update from zero? And if the step is $\gamma$ times the gap to the mean load, divided by the mean?

# %%
loads = torch.tensor([10, 2, 4, 0])
print("MaxVio:", float(balance.max_violation(loads)))
assert balance.max_violation(loads) == 1.5  # (10 - 4) / 4
biases = {}
for kind in ("sign", "proportional"):
    router = moe.SigmoidRouter(dim=8, num_experts=4, top_k=2)
    balance.update_bias_(router, loads, rate=0.001, proportional=kind == "proportional")
    biases[kind] = [round(1000 * bias, 3) for bias in router.bias.tolist()]
print("biases / 0.001:", biases)
assert biases == {"sign": [-1, 1, 0, 1], "proportional": [-1.5, 0.5, 0, 1]}

# %% [markdown]
# Does it work? Take tokens that lean to one side, a router of eight experts that never learns, and 300
# updates.

# %%
generator = torch.Generator().manual_seed(0)
lean = 1.5 * torch.randn(16, generator=generator)
tokens = torch.randn(4096, 16, generator=generator) + lean
router = moe.SigmoidRouter(dim=16, num_experts=8, top_k=2)
with torch.no_grad():
    router.weight.copy_(torch.randn(8, 16, generator=generator) / 4)
    violations = []
    for _ in range(300):
        load = balance.tokens_per_expert(router(tokens))
        violations.append(float(balance.max_violation(load)))
        balance.update_bias_(router, load, rate=0.002)
print(f"MaxVio {violations[0]:.2f} before, {violations[-1]:.2f} after 300 updates")
assert violations[0] > 1 and max(violations[-20:]) < 0.1

# %% [markdown]
# The busiest expert had more than three times its share, and ends within a tenth of it. No weight of the
# router changed, and no affinity: only which experts are chosen.
#
# ## 3. Four trainings
#
# We train the preset `mini` (63 experts, 3 per byte, two layers) four times with the same seed and text; only
# the method differs. At worst MaxVio is $63 / 3 - 1 = 20$.
#
# **Predict.** Where does MaxVio of the worse layer end without any method? And how long does each cure take
# to bring it below 5: which is first, which is last?

# %%
names = ("none", "Switch loss, 0.01", "sequence loss, 0.01", "bias, by sign")
scratch = tempfile.TemporaryDirectory()
folder = Path(scratch.name)
base = common.changed(lm.Config.preset("mini"), train={"log_every": 2})
if QUICK:
    (folder / "short.txt").write_bytes((data.CORPUS / "validation.txt").read_bytes()[:40_000])
    base = common.changed(base, data={"validation": str(folder / "short.txt")})

# %%
rows, curves = {}, {}
for name in names:
    method = common.changed(base, train=experiment.OFF | experiment.METHODS[name])
    config = common.with_steps(method, STEPS, seed=0)
    rows[name] = common.trained(config, folder, experiment.load)
    curves[name] = read_metrics(folder / common.key(config))

# %%
late = {name: max(row["batch_max_violation"]) for name, row in rows.items()}  # of the last quarter
below = {}  # the first step with MaxVio below 5 in both layers
for name, curve in curves.items():
    below[name] = next((row["step"] for row in curve if max(row["max_violations"]) < 5), None)
print(f"{'':22}MaxVio  below 5 at step  dead experts  held-out loss")
for name, row in rows.items():
    dead, held_out = row["dead_experts"], row["held_out_loss"]
    print(f"{name:22}{late[name]:6.2f}{below[name] or 'never':>17}{dead:14}{held_out:15.3f}")
assert late["none"] > 10 and below["none"] is None
assert all(late[name] < late["none"] / 2 and below[name] for name in names[1:])
if not QUICK:
    assert all(rows[name]["dead_experts"] < rows["none"]["dead_experts"] for name in names[1:])

# %% [markdown]
# Without a method, MaxVio of the worse layer ends above half of its maximum, and more experts than with any
# method receive no token of the whole held-out text. Each cure brings MaxVio below 5 in both layers. What it
# costs in loss cannot be read off such a short training with one seed.
#
# ## 4. The full experiment: what does balance cost?
#
# `lm experiment balance` trained 600 steps with three seeds, with these and other methods. Here MaxVio is
# measured over the whole held-out text, and differences in loss are paired by seed.
#
# **Predict.** Is the loss with the bias below that with the Switch loss? Can three seeds tell?

# %%
results = Path(experiment.__file__).parent / "results" / "balance.json"
found = json.loads(results.read_text("utf-8"))
worst = common.last(found["trainings"], "max_violation")
loss = common.last(found["trainings"])
chosen = (*names, "bias, by sign, centred", "bias, proportional", "V2's three losses", "z-loss, 0.001")
for name in chosen:
    print(f"{name:24}MaxVio {common.shown(worst[name], 2):16} loss {common.shown(loss[name], 4)}")
assert max(worst["bias, proportional"]) < min(worst["bias, by sign"]) < max(worst["bias, by sign"])
assert max(worst["bias, by sign"]) < min(worst["none"])
assert common.mean(worst["bias, by sign"]) < common.mean(worst["Switch loss, 0.01"]) < min(worst["none"])
assert common.mean(worst["z-loss, 0.001"]) > common.mean(worst["none"])


# %%
def difference(one, other):
    """How far the loss of one is above the other's: the 95 % interval of the mean (Student's t)."""
    each = common.paired(found["trainings"], one, other)
    low, high = common.interval(each)
    print(f"{one} - {other}: {[round(x, 3) for x in each]}, mean between {low:.3f} and {high:.3f}")
    return low, high


low, high = difference("none", "bias, by sign")
assert low > 0 and min(common.paired(found["trainings"], "none", "bias, by sign")) > 0
low, high = difference("Switch loss, 0.01", "bias, by sign")
assert low < 0 < high

# %% [markdown]
# The bias costs nothing here: its loss is below that without a method for every seed. Does it also beat the
# Switch loss, as V3 and arXiv 2408.15664 report? Three seeds cannot tell: the interval of the difference
# contains zero. The fixed-size step wanders around balance; the step proportional to the gap comes to rest.
# The z-loss keeps logits small, and is no cure for imbalance.


# %%
def draw_live(axis):
    """MaxVio over the steps of the live runs, each line labelled at its end."""
    ends = {}
    for number, (name, curve) in enumerate(curves.items()):
        worse = [max(row["max_violations"]) for row in curve]
        axis.plot([row["step"] for row in curve], worse, color=f"C{number}", lw=1.3)
        ends[name] = common.mean(worse[-5:])
    height = 0.0
    for name in sorted(ends, key=ends.get):
        height = max(ends[name], 1.35 * height)  # labels do not overlap
        axis.text(STEPS * 1.02, height, name, color=f"C{names.index(name)}", va="center")
    axis.set_yscale("log")
    axis.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axis.set_xlim(0, STEPS * 1.65)
    axis.set_xticks(range(0, STEPS + 1, STEPS // 4))
    common.tidy(axis)


# %%
figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), width_ratios=(1.5, 1, 1))
draw_live(axes[0])
axes[0].set_title("live runs, one seed", loc="left", fontsize=10)
axes[0].set_xlabel("training steps")
axes[0].set_ylabel("MaxVio of a batch, worse layer")
common.points(axes[1], {name: worst[name] for name in chosen}, "MaxVio of the held-out text")
axes[1].set_xscale("log")
axes[1].set_title("600 steps, three seeds,\nmean ± standard error", loc="left", fontsize=10)
common.points(axes[2], {name: loss[name] for name in chosen}, "held-out loss (nats per byte)")
axes[2].set_yticklabels([])
figure.tight_layout()

# %% [markdown]
# **Your turn.** `lm exercise start bias-update`: write the update yourself
# ([exercises/06_bias_update.py](../exercises/06_bias_update.py)). With the sign reversed, busy experts get
# busier.
#
# **Further reading.** DeepSeek-V3 (arXiv 2412.19437) section 2.1.2, and Wang et al. (arXiv 2408.15664)
# sections 3 and 4, with [moe/balance.py](../moe/balance.py).
