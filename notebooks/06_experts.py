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
# # 06 Experts: who chooses the expert, and what do experts learn?
#
# DeepSeek-V3 has 256 experts in a layer, and each token goes to 8 of them. Nobody tells an expert what to
# learn, or a token where to go: a matrix in the layer decides, and it is trained with the rest. Here you
# route a few tokens by hand, then train a small model on verse, Python source and sums, look at which expert
# takes which text, and disable experts to see who needs them.

# %%
import os
import sys
import tempfile
from pathlib import Path

import torch

import lm
import moe

sys.path.append(str(Path(lm.__file__).parents[1]))  # the folder of experiments/
from experiments import common, specialization
from experiments.common import plt
from lm import data
from lm.evaluate import evaluate
from moe import metrics

# %matplotlib inline
plt.rcParams["figure.dpi"] = 90
QUICK = "QUICK" in os.environ  # fewer steps, shorter text
STEPS, BYTES = (40, 300_000) if QUICK else (300, 1_200_000)

# %% [markdown]
# ## 1. A router by hand
#
# Each expert $i$ has a row $e_i$ of the router. Its affinity to a token $u_t$ is a sigmoid (V3 eq. 15). The
# $K_r$ largest, after adding a bias $b_i$, are chosen (eq. 16). The weights $g_{i,t}$ are the chosen
# affinities divided by their sum (eq. 13, 14):
#
# $$s_{i,t} = \sigma(u_t^\top e_i), \qquad
# g'_{i,t} = \begin{cases} s_{i,t}, & s_{i,t} + b_i \text{ among the } K_r \text{ largest} \\
# 0, & \text{else} \end{cases}, \qquad
# g_{i,t} = \frac{g'_{i,t}}{\sum_j g'_{j,t}}$$
#
# Take three tokens and four experts, two for each token. The rows are chosen so that the affinities are round
# numbers.
#
# **Predict.** Token 0 has the affinities 0.9, 0.6, 0.5, 0.1. Which two experts does it go to, and with what
# weights? Then expert 3 gets the bias $b_3 = 9$: which two now, and with what weights? Write four numbers
# down.

# %%
affinities = torch.tensor([[0.9, 0.6, 0.5, 0.1], [0.2, 0.8, 0.3, 0.8], [0.5, 0.4, 0.6, 0.2]])
router = moe.SigmoidRouter(dim=3, num_experts=4, top_k=2)
with torch.no_grad():
    router.weight.copy_(affinities.logit().T)
tokens = torch.eye(3)
routing = router(tokens)
print("affinities of token 0:", [round(s, 3) for s in routing.scores[0].tolist()])
print("experts:", routing.experts[0].tolist(), "weights:", [round(w, 3) for w in routing.weights[0].tolist()])
assert torch.allclose(routing.scores, affinities)
assert routing.experts[0].tolist() == [0, 1]
assert torch.allclose(routing.weights[0], torch.tensor([0.9, 0.6]) / 1.5)

# %%
router.bias[3] = 9.0
biased = router(tokens)
print("experts:", biased.experts[0].tolist(), "weights:", [round(w, 3) for w in biased.weights[0].tolist()])
assert (biased.experts == 3).any(-1).all()  # every token goes to expert 3,
assert torch.equal(biased.scores, routing.scores)  # but the affinities have not changed,
assert biased.experts[0].tolist() == [3, 0]
assert torch.allclose(biased.weights[0], torch.tensor([0.1, 0.9]))  # and they alone set the weights

# %% [markdown]
# The bias selects, the affinity weights. Every token now goes to expert 3, but it counts little for a token
# that does not suit it. This is how V3 keeps experts busy without distorting the gate weights (notebook 07).
#
# ## 2. Three texts, 63 experts
#
# The model is the preset `mini`: two layers, each with one shared expert and 63 routed experts, of which each
# byte uses 3. A third of its text is Shakespeare, a third the standard library of the Python that runs this
# notebook, and a third sums. The texts alternate in blocks, and nothing marks where one begins.
#
# **Predict.** An expert without any preference takes 3 / 63 = 4.8 % of every text's bytes. What percentage of
# the sums does their favourite expert take after a short training? And of verse?

# %%
scratch = tempfile.TemporaryDirectory()
folder = Path(scratch.name)
paths = specialization.texts(folder, BYTES)
for name in specialization.DOMAINS:
    print(f"{name:7}", repr(paths[name].read_bytes()[1000:1060]))
mixed = common.changed(lm.Config.preset("mini"), data={"path": str(paths["mixed"])})
config = common.with_steps(mixed, STEPS, seed=0)
row = common.trained(config, folder, None)
trained = lm.load(folder / common.key(config))
print(f"{STEPS} steps, {row['tokens']:,} bytes: held-out loss {row['held_out_loss']:.2f} nats per byte")

# %% [markdown]
# `metrics.domain_specialization` gives the share of a text's bytes that each expert takes (OLMoE, arXiv
# 2409.02060 section 5.3). We measure the same on a model before any training.

# %%
texts = {name: data.Windows(data.open_text(paths[name]), 128) for name in specialization.DOMAINS}
batch = torch.stack([text[i][:-1] for text in texts.values() for i in range(128)])
domain = torch.arange(3).repeat_interleave(128).unsqueeze(1).repeat(1, 128)


@torch.no_grad()
def use(model):
    """The share of each text's bytes that goes to each expert -> (layers, texts, experts)"""
    model.eval()
    return torch.stack([metrics.domain_specialization(r, domain, 3) for r in model(batch).routings])


# %%
untrained = lm.Transformer(config.model)
untrained.initialize(torch.Generator().manual_seed(0))
before, after = use(untrained)[-1], use(trained)[-1]
even = config.model.moe.top_k / config.model.moe.num_experts
for name, shares in zip(texts, after):
    print(f"{name:7} favourite: expert {int(shares.argmax()):2}, {shares.max():.1%} (even: {even:.1%})")
assert torch.allclose(after.sum(-1), torch.tensor(3.0))  # three experts per byte
assert (after.amax(-1) > 2 * even).all()

# %% [markdown]
# Each text has a favourite expert, which takes more than twice an even share of it.
#
# How much of that was learned? Compare an expert's share of the text it takes most of with its mean share of
# the three texts: 1 means no preference, 3 means that text alone.


# %%
def preference(shares):
    """An expert's largest share of a text over its mean share, averaged over experts by load."""
    return float(shares.amax(0).sum() / shares.mean(0).sum())


print(f"last layer, before training: {preference(before):.2f}, after {STEPS} steps: {preference(after):.2f}")
assert 1.5 < preference(before) < preference(after) < 3

# %% [markdown]
# Much of the preference is there before the first step. Sums have different bytes from verse, different bytes
# have different embeddings, and a router with random rows sends them to different experts. So a heat map
# alone does not show that experts *learned* a text; training sharpens what the bytes begin. A better question
# is what the model loses without an expert.
#
# ## 3. Disable the favourites
#
# A bias of minus infinity disables an expert, since the bias decides the selection. For each text, in both
# layers, we disable the 12 experts whose share of that text is furthest above their share of the other two;
# each byte then gets the best of the remaining ones.
#
# **Predict.** By how much does the loss of verse rise without verse's favourites, in nats per byte? And
# without those of the sums?


# %%
def losses():
    """The held-out loss of each text, in nats per byte."""
    return torch.tensor([evaluate(trained, text, 16384, torch.float32, 32) for text in texts.values()])


def favourites(number):
    """The experts whose share of a text is furthest above that of the other two -> (layers, 12)"""
    others = [other for other in range(3) if other != number]
    shares = use(trained)
    return (shares[:, number] - shares[:, others].amax(1)).topk(12).indices


# %%
whole, kept = losses(), [router.bias.clone() for router in trained.routers()]
chosen = [favourites(number) for number in range(3)]
rise = torch.zeros(3, 3)  # row: whose favourites are disabled; column: whose loss
for number in range(3):
    for router, experts in zip(trained.routers(), chosen[number]):
        router.bias[experts] = -torch.inf
    rise[number] = losses() - whole
    for router, bias in zip(trained.routers(), kept):
        router.bias.copy_(bias)
print("loss with all experts", dict(zip(texts, [round(x, 2) for x in whole.tolist()])))
print("rise without the favourites of (row) in the loss of (column):", rise.numpy().round(3), sep="\n")
assert torch.equal(rise.argmax(0), torch.arange(3))  # each text loses most without its own favourites
assert torch.equal(rise.argmax(1), torch.arange(3))  # and its own text misses them most
assert rise[:2, 2].max() < rise[2, 2] / 10  # sums need no other text's favourites
assert torch.allclose(losses(), whole)  # all experts are enabled again

# %% [markdown]
# Each text loses most without its own favourites; the others notice it less, the sums hardly at all. This is
# specialization that the loss can feel. The full experiment also disables each token's *best* experts, over
# three seeds and next to a GShard: `lm experiment specialization`. The published claim did not hold there;
# [docs/claims.md](../docs/claims.md) says why.


# %%
def draw_use(axis):
    """Heat map of texts and experts, the experts sorted by the text they prefer."""
    order = (after.argmax(0) - after.amax(0) / after.sum(0).clamp(min=1e-9) / 2).argsort()
    image = axis.imshow(100 * after[:, order], aspect="auto", cmap="magma_r", vmin=0)
    axis.set_yticks(range(3), list(texts))
    axis.set_xticks([])
    for number, name in enumerate(texts):
        taken, start = (after.argmax(0) == number).sum(), (after.argmax(0) < number).sum()
        axis.text(start + taken / 2 - 0.5, 2.62, f"{taken} prefer {name}", ha="center", va="top")
        axis.axvline(start - 0.5, color="black", lw=0.8)
    return image


# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), width_ratios=(2.6, 1))
figure.colorbar(draw_use(axes[0]), ax=axes[0], label="% of the text's bytes", pad=0.02)
axes[0].set_title("Last layer: which expert takes what (one column per expert)", loc="left", fontsize=11)
axes[1].imshow(rise, cmap="Reds", vmin=0, vmax=1.6 * rise.max())
for number, column in torch.cartesian_prod(torch.arange(3), torch.arange(3)).tolist():
    axes[1].text(column, number, f"{rise[number, column]:+.3f}", ha="center", va="center")
axes[1].set_xticks(range(3), list(texts))
axes[1].set_yticks(range(3), list(texts))
axes[1].set_xlabel("loss of")
axes[1].set_ylabel("disabled favourites of")
axes[1].set_title("Rise in loss (nats per byte)", loc="left", fontsize=11)
figure.tight_layout()

# %% [markdown]
# **Your turn.** `lm exercise start router`: write the router yourself
# ([exercises/03_router.py](../exercises/03_router.py)). The most common wrong answer is to weight by the
# biased score.
#
# **Further reading.** DeepSeek-V3 (arXiv 2412.19437) section 2.1.2, with [moe/router.py](../moe/router.py),
# and OLMoE (arXiv 2409.02060) section 5.3, with [moe/metrics.py](../moe/metrics.py).
