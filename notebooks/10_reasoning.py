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
# # 10 Reasoning: can right and wrong alone teach a model to think?
#
# DeepSeek-R1-Zero was never shown how to reason during reinforcement learning. It wrote answers, a program
# said right or wrong, and its answers grew longer and better. Here you repeat that with half a million
# parameters: train a base model on sums, let rewards alone improve it, and measure what they added.

# %%
import contextlib
import io
import itertools
import os
import sys
import tempfile
from pathlib import Path

import torch

import lm
import lm.train
import rl.train
from lm.run import read_metrics

sys.path.append(str(Path(lm.__file__).parents[1]))  # the folder of experiments/
from experiments import common
from experiments.common import plt
from lm.inference.engine import Engine
from rl import objectives, scaling, tasks
from rl.config import ReasonConfig
from rl.rollout import Sampling, judge, sample

# %matplotlib inline
plt.rcParams.update({"figure.dpi": 90, "axes.spines.top": False, "axes.spines.right": False})
torch.set_num_threads(1)
QUICK = "QUICK" in os.environ  # a base of 60 steps, RL of 2: everything runs, nothing is learnt

# %% [markdown]
# ## 1. A problem, its form and its reward
#
# A problem is a chain of sums, in 20 bytes. A completion may write running totals between `<think>` and
# `</think>`, two digits each, and then gives the answer. The reward is 1 if the answer is exact *and* the
# completion has this form, else 0.
#
# **Predict.** Which of these six completions of 7-6+3+5+6+1-9 get the reward?

# %%
problem = tasks.Problem(f"{'7-6+3+5+6+1-9':19}=", "7", level=7)
attempts = {
    "<think>010409151607</think>7": 1.0,
    "<think>010409151607</think>8": 0.0,
    "<think>0104091516": 0.0,  # never closes
    "7": 0.0,  # right, but without the form
    "<think></think>7": 1.0,  # in form, without a thought
    "<think>999999</think>7": 1.0,  # nobody reads the thought
}
for completion, expected in attempts.items():
    reward, right, in_form = tasks.score(problem, completion)
    print(f"{completion:30} reward {reward:.0f}  right {right!s:5}  in form {in_form}")
    assert reward == expected

# %% [markdown]
# The reward says nothing about the thought: not whether it is true, nor how long it should be.
#
# ## 2. The base model
#
# Its text mixes styles: 45 % of the answers come directly, some after every total, some after every second or
# third, a few thoughts never close. A tenth of all problems is held out. Training takes some minutes.

# %%
short = {"steps": 60, "sample_every": 60, "eval_every": 60} if QUICK else {}
config = common.changed(lm.Config.preset("reason"), train={"dtype": "float32", **short})
scratch = tempfile.TemporaryDirectory()  # deleted at the end
folder = Path(scratch.name)
with contextlib.redirect_stdout(io.StringIO()):
    assert lm.train.train(config, folder / "base") == 0
base = lm.load(folder / "base")
seconds = read_metrics(folder / "base")[-1]["seconds"]
print(f"{lm.count.total_parameters(config.model):,} parameters, {seconds / 60:.1f} minutes")

# %% [markdown]
# Now it attempts held-out problems, 8 times each. We sort the completions by style: *direct* without a
# thought, *short* with some of the totals, *long* with all of them.
#
# **Predict.** It has seen direct answers most often, and nearly all of them were right. Which style is right
# most often on new problems, and how many times as often as a direct answer?

# %%
problems = tasks.problems("sums", seed=1, count=16 if QUICK else 200, held_out=True)
STYLES = ("direct", "short", "long", "never closes")


def style(problem, completion):
    """How much of the work a completion writes down."""
    thought, closed, _ = completion.removeprefix(tasks.OPEN).partition(tasks.CLOSE)
    if not completion.startswith(tasks.OPEN) or (closed and not thought):
        return "direct"
    if not closed:
        return "never closes"
    return "long" if len(thought) >= 2 * (problem.level - 1) else "short"


# %%
def by_style(rollout):
    """Each style's share of the completions, and the share of right answers in it."""
    size = rollout.rewards.shape[1]
    styles = [style(rollout.problems[row // size], text) for row, text in enumerate(rollout.completions)]
    found = {}
    for name in STYLES:
        right = [good for good, one in zip(rollout.right.flatten().tolist(), styles) if one == name]
        found[name] = (len(right) / len(styles), sum(right) / max(1, len(right)))
        print(f"{name:13}{found[name][0]:5.0%} of the completions, {found[name][1]:5.1%} right")
    return found


# %%
first = sample(Engine(base, max_batch=256), problems, 0, Sampling(8))
before = by_style(first)
strong = not QUICK and before["long"][1] > 0.35  # else some checks below are left out
print(f"reward {first.rewards.mean():.3f}, length {first.lengths.float().mean():.1f} tokens, {strong=}")
if not QUICK:
    assert before["long"][1] > 1.5 * before["direct"][1] and before["long"][1] > 2 * before["short"][1]
    assert before["direct"][0] > 0.25 and first.rewards.mean() < 0.3

# %% [markdown]
# Thinking in small steps pays, but the model does not know it: it writes in the proportions of its text. A
# short thought does not help, because one step then has to do the work of several.
#
# Rewards can only strengthen what already happens. A base whose long style is right less than a third of the
# time learns little in sixty steps. Other machines round differently, and some seeds give such a base; the
# checks under `strong` are then left out.
#
# ## 3. GRPO by hand
#
# A group is 8 completions of one problem. Each is judged against its own group, so no value model is needed
# (DeepSeekMath, arXiv 2402.03300, section 4.1.2):
#
# $$\hat A_i = \frac{r_i - \mathrm{mean}(r)}{\mathrm{std}(r)}, \qquad
# \mathcal{J} = \frac1G \sum_i \frac1{|o_i|} \sum_t \min\left(\rho_{i,t} \hat A_i,\;
# \mathrm{clip}(\rho_{i,t}, 1-\varepsilon, 1+\varepsilon)\, \hat A_i\right), \qquad
# \rho_{i,t} = \frac{\pi(o_{i,t})}{\pi_\mathrm{old}(o_{i,t})}$$
#
# **Predict.** If 2 of 8 are right, what are the two advantages? The model has not moved yet, so every
# $\rho = 1$: what is $\mathcal{J}$? And which tokens get a gradient: those of the prompt, of the thought, of
# the answer, the end?

# %%
place = int((first.rewards.sum(-1) - 2).abs().argmin())  # a group with 2 right completions
group = first.groups(place, place + 1)
rewards = group.rewards[0]
by_hand = (rewards - rewards.mean()) / (rewards.std() + objectives.STD_EPS)
advantages = objectives.advantages(group.rewards)
print(group.problems[0].prompt)
for reward, advantage, text in zip(rewards, advantages, group.completions):
    print(f"reward {reward:.0f}  advantage {advantage:+.2f}  {text.partition(tasks.END)[0]}")
assert torch.allclose(advantages, by_hand) and abs(advantages.sum()) < 1e-5
assert (objectives.advantages(torch.ones(1, 8)) == 0).all()  # all right, or all wrong: nothing to learn

# %%
judged = judge(base, group)  # the forward pass of training
judged.log_probs.retain_grad()
loss = objectives.grpo(judged.log_probs, group.old, advantages, group.mask)
loss.backward()
push = -judged.log_probs.grad  # how the update wants to change each log-probability
expected = advantages[:, None] / (8 * group.lengths[0][:, None]) * group.mask
print(f"objective {-loss.item():.6f}; {int((push != 0).sum())} of {push.numel()} places have a gradient")
assert abs(loss.item()) < 1e-5 and torch.allclose(push, expected, atol=1e-6)
assert (push[~group.mask] == 0).all()
base.zero_grad()

# %%
figure, axis = plt.subplots(figsize=(12, 2.6))
first_column = tasks.WIDTH - 4  # the last bytes of the prompt
used = int(group.mask.any(0).nonzero().max()) + 1
shown, largest = push[:, first_column:used], 2 * float(push.abs().max()) or 1.0
axis.imshow(shown, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
for row, column in torch.cartesian_prod(torch.arange(8), torch.arange(shown.shape[1])).tolist():
    token = chr(group.tokens[row, first_column + column + 1])  # place t judges token t + 1
    text = {tasks.END: "end", "\0": ""}.get(token, token)
    axis.text(column, row, text, ha="center", va="center", family="monospace", fontsize=9)
axis.set_title("Blue: made likelier. Red: made less likely. White: no gradient", loc="left", fontsize=11)
axis.set(xticks=[], yticks=range(8), ylabel="completion")
figure.tight_layout()

# %% [markdown]
# The objective is 0 and its gradient is not: the advantages cancel, the directions they ask for do not. All
# tokens of a completion, its end included, share one advantage; the prompt and the padding get nothing.
# Those of a short completion move more, each by $1/|o_i|$; Dr. GRPO (arXiv 2503.20783) removes this.
#
# ## 4. Sixty steps of rewards
#
# A step samples 16 groups of 8 and updates the weights twice. No example, no value model, no KL term.
#
# **Predict.** After 7,680 completions, how many held-out problems does it solve at the first attempt? Nothing
# rewards long thoughts: do they get longer, shorter, or stay?

# %%
less = {"steps": 2, "prompts": 2, "size": 4, "eval_problems": 16} if QUICK else {}


def by_rewards(name, **options):
    """Reinforcement learning from the base -> the rows of its log"""
    with contextlib.redirect_stdout(io.StringIO()):
        status = rl.train.train(ReasonConfig(**options | less), folder / "base", folder / name)
    assert status == 0
    rows = read_metrics(folder / name)
    for step, found in [(0, rows[0]["base"]), (rows[-1]["step"], rows[-1]["held_out"])]:
        print(f"step {step:2}, held out: {scaling.as_text(found)}")
    return rows


# %%
rows = by_rewards("exact", steps=60)
start, end = rows[0]["base"], rows[-1]["held_out"]
if strong:
    assert end["pass_at_1"] > 0.55 and end["pass_at_1"] > start["pass_at_1"] + 0.35
if not QUICK:
    assert end["pass_at_1"] > start["pass_at_1"] + 0.05
    assert end["in_form"] > 0.95 and end["length"] > 1.3 * start["length"]

# %%
policy = lm.load(folder / "exact")
after = by_style(sample(Engine(policy, max_batch=256), problems, 0, Sampling(8)))
if strong:
    assert after["long"][0] > 0.9 and after["direct"][0] < 0.05
    assert after["long"][1] > before["long"][1] + 0.1

# %% [markdown]
# Accuracy and length rise together, as in R1's figures, and the table says why. The styles that fail are
# gone, and the long one is left; its steps also became more exact. The length stops there: a chain has no
# more totals to write.
#
# ## 5. A control
#
# **Predict.** Give each completion 0 or 1 by the toss of a coin, and train in the same way for 20 steps. Some
# large models improve on random rewards (arXiv 2506.10947). Does this one?

# %%
random = by_rewards("random", steps=20, reward="random")
if not QUICK:
    assert random[-1]["held_out"]["pass_at_1"] < start["pass_at_1"] + 0.05


# %%
NEAR = {"ha": "right", "textcoords": "offset points"}  # where labels stand


def draw_log(axes, log, name, colour):
    """Accuracy and length on held-out problems over the steps."""
    held_out = [(0, log[0]["base"])] + [(row["step"], row["held_out"]) for row in log if "held_out" in row]
    for axis, key in zip(axes, ("pass_at_1", "length")):
        values = [found[key] for _, found in held_out]
        axis.plot([step for step, _ in held_out], values, "o-", color=colour)
        axis.annotate(name, (held_out[-1][0], values[-1]), (0, 9), color=colour, **NEAR)


def draw_styles(axis, shares, at):
    """Each style's share of the completions, as one column."""
    bottom = 0.0
    for number, (name, (share, _)) in enumerate(shares.items()):
        axis.bar(at, share, 0.6, bottom, color=f"C{number + 2}")
        if share > 0.04:
            axis.text(at, bottom + share / 2, name, ha="center", va="center", color="white")
        bottom += share


# %%
figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), width_ratios=(1, 1, 0.8))
draw_log(axes, rows, "right and wrong", "C0")
draw_log(axes, random, "coin", "C1")
draw_styles(axes[2], before, 0)
draw_styles(axes[2], after, 1)
axes[0].set(xlabel="step", ylabel="right and in form", ylim=(0, 1))
axes[1].set(xlabel="step", ylabel="length (tokens)", ylim=(0, None))
axes[2].set(xticks=(0, 1), xticklabels=("base", "after RL"), ylabel="share of the completions")
figure.tight_layout()

# %% [markdown]
# The coin does not raise accuracy: it moves the weights, but in no useful direction. So what improved the
# model was the reward, not the sampling or the updates.
#
# ## 6. o1's curves
#
# More compute at test time can mean a longer thought, or more attempts. We close the thought after a number
# of bytes and let the model answer; and we let 1 to 16 completions vote.
#
# **Predict.** A problem has 4 to 8 terms, so 3 to 7 totals of two bytes. Where does the curve of thoughts
# become flat? And does one completion after RL beat a vote of 16 before?

# %%
budgets, counts = (0, 2, 4, 6, 8, 10, 12, 14, 20), (1, 2, 4, 8, 16)
curves, votes = {}, {}
for name, model in {"base": base, "after RL": policy}.items():
    curves[name] = scaling.budget_curve(model, problems, budgets)
    votes[name] = scaling.votes(Engine(model, max_batch=256), problems, counts)
    print(f"{name:8} accuracy after {budgets} bytes:", *(f"{value:.2f}" for value in curves[name]))
    print(f"{name:8} majority of {counts}:", *(f"{value:.2f}" for value in votes[name]["majority"]))
if strong:
    curve, majority = curves["after RL"], {name: found["majority"] for name, found in votes.items()}
    assert all(early < late for early, late in itertools.pairwise(curve[2:8]))  # 4, 6, ... 14 bytes
    assert curve[-1] > curve[0] + 0.4 and abs(curve[-1] - curve[-2]) < 0.1
    assert all(found[-1] > found[0] + 0.03 for found in majority.values())
    assert majority["after RL"][0] > majority["base"][-1]

# %% [markdown]
# After RL, accuracy rises with every total from 4 bytes to 14, the longest chain, and then no more. A vote
# helps both models. One long thought after RL costs far less than 16 completions of the base, and is right
# more often.
#
# ## 7. What RL did not add
#
# A vote needs the right answer to be the most frequent. Now ask less: is *any* of $k$ completions right?
#
# **Predict.** For what share of the problems does the base have a right answer among 16? The lead of RL at
# $k = 1$ is above; how large is it at $k = 16$?

# %%
lead = [late - early for early, late in zip(votes["base"]["any"], votes["after RL"]["any"])]
for k, early, gain in zip(counts, votes["base"]["any"], lead):
    print(f"any of {k:2}: base {early:.2f}, after RL {early + gain:.2f}, lead {gain:+.2f}")
if strong:
    assert votes["base"]["any"][-1] > 0.6 and votes["base"]["any"][-1] > 3 * votes["base"]["any"][0]
    assert lead[-1] < 0.6 * lead[0]

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 3.8))
for number, name in enumerate(curves):
    colour = f"C{number}"
    axes[0].plot(budgets, curves[name], "o-", color=colour)
    axes[0].annotate(name, (budgets[-1], curves[name][-1]), (0, 8), color=colour, **NEAR)
    axes[1].plot(counts, votes[name]["majority"], "o-", color=colour)
    axes[1].plot(counts, votes[name]["any"], "o--", color=colour)
    axes[1].annotate(name, (1, votes[name]["majority"][0]), (0, -14), color=colour, **NEAR | {"ha": "left"})
axes[0].set(xlabel="bytes of thought, at most", ylabel="right and in form", ylim=(0, 1), xticks=budgets)
axes[1].set(xlabel="completions of a problem", ylabel="share of the problems", ylim=(0, 1.02), xscale="log")
axes[1].text(16, 0.02, "solid: the majority is right\ndashed: any is right", ha="right")
axes[1].minorticks_off()
axes[1].set_xticks(counts, counts)
figure.tight_layout()

# %% [markdown]
# The base already has most of the right answers among 16 attempts; RL makes likely what it could do, as
# arXiv 2504.13837 found for large models. `lm experiment what_rl_adds` compares it with
# fine-tuning on the right completions alone.
#
# **Your turn.** Write the advantage, the objective, the KL estimate and the vote yourself:
# `lm exercise start advantage`, `lm exercise start grpo`, `lm exercise start k3`,
# `lm exercise start majority` ([exercises/18_advantage.py](../exercises/18_advantage.py)).
#
# **Further reading.** DeepSeek-R1 (arXiv 2501.12948) sections 2.2 and 2.3, Kimi k1.5 (arXiv 2501.12599), each
# equation beside its line in [docs/reading/r1.md](../docs/reading/r1.md), with
# [rl/objectives.py](../rl/objectives.py) and [rl/train.py](../rl/train.py).
