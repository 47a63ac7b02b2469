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
# # 01 First ten minutes: can this laptop train a small DeepSeek-V3?
#
# DeepSeek-V3 has 671 billion parameters and took 2.8 million GPU hours to train. What makes it DeepSeek-V3 is
# not its size but its design: latent attention, many small experts of which each token uses a few, a shared
# expert, and a router whose bias keeps the experts busy. The same design fits into a model that learns to
# write on two CPU cores in minutes. The other notebooks take such a model, or one of its parts, to pieces.
#
# Every lesson asks a question, lets you predict the answer, and then measures it. To run a lesson, install
# JupyterLab with the project, in the project's folder:
#
# ```
# python3 -m venv .venv  # if there is no .venv yet
# .venv/bin/pip install -c constraints.txt -e '.[lessons]'
# .venv/bin/jupyter lab notebooks
# ```
#
# Each notebook is also a script, which runs without figures:
# `.venv/bin/python notebooks/01_first_ten_minutes.py`.

# %%
import contextlib
import dataclasses
import io
import os
import re
import tempfile
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch

import lm
from lm import count, data, train
from lm.report import figures, info, measure
from lm.run import read_metrics
from lm.tokenizer import ByteTokenizer

matplotlib.use("agg")  # a script opens no window; a notebook shows its figures inline:
# %matplotlib inline
plt.rcParams.update({"figure.dpi": 90, "axes.spines.top": False, "axes.spines.right": False})
QUICK = "QUICK" in os.environ  # 60 steps instead of 800: everything runs, little is learnt

# %% [markdown]
# ## Predict
# The model reads and writes bytes. Its rival is a table: how often did each byte follow the last $n$ bytes in
# the training text? Such an n-gram model is trained by counting, in seconds. Write down before you run:
#
# 1. What fraction of the parameters does one byte use?
# 2. After 800 steps, which tables does the model beat: those with 0, 1, 2, 3, 4 or 5 bytes of context?
# 3. What fraction of the longer words it writes will be words of the training text?
#
# ## 1. The same parts
# The preset `mini` is [lm/presets/mini.toml](../lm/presets/mini.toml). Next to it we build DeepSeek-V3
# itself, on the device `meta`, which allocates no memory. Do the two consist of the same kinds of modules?

# %%
config = lm.Config.preset("mini")
large = lm.Config.preset("deepseek-v3")
kinds = []
for one in (config, large):
    with torch.device("meta"):
        model = lm.Transformer(one.model)
    kinds.append({type(part).__name__ for part in model.modules()})
print(*sorted(kinds[0]), sep=", ")
assert kinds[0] == kinds[1]

# %%
for name, one in (("mini", config), ("deepseek-v3", large)):
    total, active = count.total_parameters(one.model), count.active_parameters(one.model)
    print(f"{name:12}{total:>16,} parameters, {active:>15,} of them used by a token: {active / total:.1%}")
assert count.total_parameters(config.model) == 423_678 and count.active_parameters(config.model) == 55_038
assert count.total_parameters(large.model) == 671_026_419_200 and info.V3_TRAINING["all_hours"] == 2.788e6
assert [(one.model.moe.top_k, one.model.moe.num_experts) for one in (config, large)] == [(3, 63), (8, 256)]

# %% [markdown]
# The module types are the same. A byte uses 55,038 of 423,678 parameters, 13 %, because it passes through
# only 3 of 63 experts and the shared one. In DeepSeek-V3 a token passes through 8 of 256 and the shared one.
#
# ## 2. Train
# The text is Shakespeare's plays and poems; four plays are held out. Training takes a few minutes.

# %%
steps = 60 if QUICK else 800
changes = {"steps": steps, "eval_every": steps // 8, "sample_every": steps, "save_every": steps}
config = dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))
folder = tempfile.TemporaryDirectory()  # deleted at the end
run = Path(folder.name) / "run"
with contextlib.redirect_stdout(io.StringIO()):
    status = train.train(config, run)
rows = read_metrics(run)
assert status == 0 and rows[-1]["step"] == steps
print(f"{rows[-1]['tokens']:,} bytes in {rows[-1]['seconds'] / 60:.1f} minutes on this machine")

# %% [markdown]
# ## 3. Has it learnt anything?
# The loss is $-\ln p$ of the correct next byte, averaged over four plays the model never saw.
# [lm/corpus/ngram.py](../lm/corpus/ngram.py) computed the losses of the tables on the same text.

# %%
baseline = measure.read_baseline(config)
tables = {int(order): loss for order, loss in baseline["loss"].items()}
reached = rows[-1]["val_loss"]
beaten = [order for order, loss in tables.items() if reached < loss]
print(f"loss {reached:.3f}; better than the tables with {beaten} bytes of context")
assert 0 in beaten
if not QUICK:
    assert {0, 1, 2, 3} <= set(beaten) and baseline["best_order"] == 5
    assert reached < tables[5] + 0.1

# %%
figure, axis = plt.subplots(figsize=(8, 4))
axis.plot([row["step"] for row in rows], [row["loss"] for row in rows], color="tab:blue", alpha=0.4)
tested = [row for row in rows if "val_loss" in row]
axis.plot([row["step"] for row in tested], [row["val_loss"] for row in tested], "o-", color="tab:blue", ms=4)
axis.text(tested[0]["step"], tested[0]["val_loss"] + 0.08, "held-out plays", color="tab:blue")
axis.text(0.75 * steps, 1.45, "training batches", color="tab:blue", alpha=0.6)
for order in (1, 2, 3, baseline["best_order"]):
    axis.axhline(tables[order], color="0.6", lw=0.8)
    name = f"{order}-byte table" + (" (best)" if order == baseline["best_order"] else "")
    axis.text(1.01 * steps, tables[order], name, va="center", fontsize=9)
axis.set(xlabel="step", ylabel="loss (nats per byte)", xlim=(0, steps), ylim=(1.4, 3.4))
axis.grid(alpha=0.3)

# %% [markdown]
# The full training beats the tables with one, two and three bytes of context, and comes within a tenth of a
# nat of the best table, which has five. `lm train` without options trains a larger model for three times as
# many steps; the README shows its loss.
#
# ## 4. What does it write?

# %%
model = lm.load(run)
tokenizer = ByteTokenizer()
start = torch.tensor([tokenizer.encode("\n")])
length = 200 if QUICK else 1500
written = lm.generate(model, start, length, temperature=0.8, seed=1, window=config.train.context)
text = tokenizer.decode(written[0].tolist())
print(text[:400].strip())

# %%
known = set(re.findall("[a-z]+", (data.CORPUS / "train.txt").read_text("utf-8").lower()))
longer = [word for word in re.findall("[a-z]+", text.lower())[:-1] if len(word) >= 4]
share = sum(word in known for word in longer) / len(longer)
print(f"{share:.0%} of {len(longer)} words of four or more letters occur in the training text")
if not QUICK:
    assert share > 0.6

# %% [markdown]
# Most of its longer words are real words, its lines break like verse, and its speeches begin with a name. It
# learnt all of this from bytes, and spends only 55,038 parameters on each. The text makes no sense; that
# takes a larger model and more data.
#
# ## 5. Which expert did the work?
# Here is a passage from a held-out play. The colour of each byte, and the number below it, show which expert
# of the first layer has the largest weight for it.

# %%
passage = measure.passage_experts(model, data.Windows(data.load(config.data, 256)[1], config.train.context))
first = passage[0]
leaders = {token["expert"] for token in first}
of_letter = {letter: {t["expert"] for t in first if t["text"] == letter} for letter in "etaoin"}
print(f"{len(leaders)} of {config.model.moe.num_experts} experts lead in this passage")
print("experts that lead for each letter:", {letter: len(experts) for letter, experts in of_letter.items()})
assert len(leaders) > 1
if not QUICK:
    assert sum(len(experts) > 1 for experts in of_letter.values()) > 3
    assert len(leaders) > config.model.moe.num_experts / 2

# %%
figure = figures.draw_passage(passage)

# %% [markdown]
# Most experts lead somewhere, and most of the common letters have several leaders: the router sees what
# attention gathered, not just the letter. How the router chooses, and what experts learn, is the subject of
# notebook 06.
#
# **Your turn.** `lm exercise start rms-norm`: the norm before each attention and each expert layer, a warm-up
# that shows how exercises work ([exercises/00_rms_norm.py](../exercises/00_rms_norm.py)).
#
# **Further reading.** DeepSeek-V3 (arXiv 2412.19437) section 2.1, with [lm/model.py](../lm/model.py).
