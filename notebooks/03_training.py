# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3. Training: learning, and collapse
#
# The easiest way to predict what another network says is to make it say always the same. Then the
# loss of Section 3 is zero, and nothing is learned: the representation has **collapsed**. Two
# things stand against it (Section 3, "Loss"): no gradient flows into the targets, and the target
# encoder follows slowly, as a moving average (EMA).
#
# In this notebook a small network (`vit_nano`) is trained on pictures that the computer draws,
# first as it should be, then without one of the two. **The lesson: the loss does not tell which is
# which.**

# %%
import classroom

classroom.begin()

# %%
import csv
import json
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import torch

import probe
import train
from data import eval_batches, hold_out, load_data
from ijepa import IJEPA

# %%
STEPS, SHORT = (300, 100) if classroom.FAST else (500, 200)

# %% [markdown]
# ## As it should be
#
# This is `python train.py` with fewer steps. It takes about a minute. The log is cleared from the
# cell at the end; the table is from `result.json` in the run's folder.

# %%
runs = {}
runs["I-JEPA"] = classroom.train("03_ijepa", "--steps", str(STEPS), *classroom.EVAL)


def table(out: Path) -> None:
    """The table at the end of a run: accuracy on held-out pictures in percent."""
    print(probe.format_table(json.loads((out / "result.json").read_text())))


table(runs["I-JEPA"])


# %%
def column(out: Path, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a column of log.csv, where it has a value."""
    with open(out / "log.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row[name]]
    return [int(row["step"]) for row in rows], [float(row[name]) for row in rows]


PANELS = {
    "val_loss": "Loss, held-out pictures",
    "knn": "20-NN accuracy (%)",
    "rankme": "RankMe (dimensions)",
    "feature_std": "Feature spread",
}
STYLES = ("o-", "s--", "^:")  # told apart without colours, too


def curves(runs: dict[str, Path]) -> None:
    """The four curves to look at together, for several runs."""
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.9))
    for axis, (name, title) in zip(axes, PANELS.items(), strict=True):
        for (label, out), style in zip(runs.items(), STYLES, strict=False):
            axis.plot(*column(out, name), style, label=label, markersize=6)
        axis.set(xlabel="step", title=title, ylim=(0, 100) if name == "knn" else (0, None))
        axis.grid()
    if len(runs) > 1:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(runs))


curves(runs)

# %% [markdown]
# What the curves say:
#
# - **Loss**: falls, as it should. By itself it says little.
# - **20-NN accuracy**: is a picture's nearest neighbours' kind its own? High from the start, since
#   even random features of pictures with the same pattern are alike (`results/shapes.md`).
# - **RankMe** ([Garrido et al. 2023](https://arxiv.org/abs/2210.02885)): in how many dimensions the
#   features of pictures differ, at most D = 96.
# - **Spread**: standard deviation of the features, scaled to length 1; 0 if all pictures look
#   alike, $1/\sqrt{D} \approx 0.1$ at most.
#
# RankMe falls here too, while the network forgets what it was born with, and then it holds. The
# **linear** probe in the table tells most: it rises above that of the untrained encoder.


# %%
def linear(out: Path, which: str = "trained") -> float:
    """Linear probe on the kind of the nearest object, held-out accuracy in percent."""
    rows = json.loads((out / "result.json").read_text())
    found = {row["features"]: row["linear"] for row in rows if row["task"] == "kind"}
    return found[which]


assert linear(runs["I-JEPA"]) > linear(runs["I-JEPA"], "untrained") + 5
assert linear(runs["I-JEPA"]) > linear(runs["I-JEPA"], "raw pixels") + 20

# %% [markdown]
# > **Question.** RankMe is lower at the end than at the start. Is the network at the start better?
# > What would you look at to decide?

# %% [markdown]
# ## Without the moving average
#
# With momentum 0 the target encoder is a copy of the context encoder after each step. There is
# still no gradient through the targets.

# %%
runs["without EMA"] = classroom.train(
    "03_without_ema",
    "--steps",
    str(SHORT),
    "--momentum",
    "0",
    "--final-momentum",
    "0",
    *classroom.EVAL,
)
table(runs["without EMA"])

# %% [markdown]
# ## Without stop-gradient
#
# The targets come from the context encoder itself, and the gradient flows through both sides. Two
# lines make this variant of the method: one network in both places, and `targets` without the
# `torch.no_grad` around it.


# %%
class WithoutStopGradient(IJEPA):
    """An experiment: the encoder is its own target, and may be changed to be predictable."""

    targets = IJEPA.targets.__wrapped__  # the function inside of torch.no_grad

    def __init__(self, config):
        super().__init__(config)
        self.target_encoder = self.encoder


with mock.patch.object(train, "IJEPA", WithoutStopGradient):
    runs["without stop-gradient"] = classroom.train(
        "03_without_stop_gradient", "--steps", str(SHORT), *classroom.EVAL
    )
table(runs["without stop-gradient"])

# %% [markdown]
# ## What is seen

# %% tags=["results/class_collapse.png"]
curves(runs)

# %%
print(f"{'':24}{'loss':>8}{'20-NN':>8}{'RankMe':>8}{'spread':>9}{'linear':>8}")
last = {}
for label, out in runs.items():
    last[label] = {name: column(out, name)[1][-1] for name in PANELS} | {"linear": linear(out)}
    figures = "{val_loss:8.4f}{knn:8.1f}{rankme:8.1f}{feature_std:9.4f}{linear:8.1f}"
    print(f"{label:24}" + figures.format(**last[label]))
untrained = linear(runs["I-JEPA"], "untrained")
print(f"{'untrained':24}" + " " * 33 + f"{untrained:8.1f}")

# %%
good = last["I-JEPA"]
for label in ("without EMA", "without stop-gradient"):
    bad = last[label]
    assert bad["val_loss"] < good["val_loss"] / 3  # the loss is much *better*
    assert bad["rankme"] < 5 < good["rankme"]  # a handful of dimensions is left
    assert bad["feature_std"] < good["feature_std"] / 4  # all pictures look alike
    assert bad["linear"] < good["linear"] - 10  # and nothing can be read off
    assert bad["linear"] < untrained  # less than before training
    assert bad["knn"] > column(runs["I-JEPA"], "knn")[1][0] - 15  # which 20-NN does not show

# %% [markdown]
# Both variants collapse, within the first evaluations, and with a loss that looks excellent: far
# below that of the run that learns. RankMe and spread fall with it. Both end *below* the untrained
# encoder in the linear probe.
#
# What one might not expect: **20-NN accuracy hardly falls**, and without stop-gradient it even
# rises. The features of all pictures are almost parallel, but the tiny rest of the differences is
# still in the right order, and neighbours need the order only (exercise 2). In the runs of
# `vit_tiny` on CIFAR-10 in the README it does fall. So look at all four curves, and do not trust
# one alone.
#
# > **Question.** The paper writes that EMA "has proven essential". Is the collapse without it
# > caused by the missing average, or by targets that change too fast? How could one find out?

# %% [markdown]
# ## Exercises
#
# Each solution is folded: click on "1 cell hidden" below its heading.

# %% [markdown]
# ### Exercise 1
#
# What are RankMe and spread of features that are all equal, and of features that differ in
# every way (Gaussian noise)? Compute it for 2,000 pictures and D = 96.

# %% [markdown] jp-MarkdownHeadingCollapsed=true
# #### Solution 1

# %% tags=["solution"]
generator = torch.Generator().manual_seed(0)
equal = torch.ones(2000, 96)
noise = torch.randn(2000, 96, generator=generator)
for name, features in (("equal", equal), ("noise", noise)):
    print(f"{name}: RankMe {probe.rankme(features):.1f}, spread {probe.feature_std(features):.3f}")
assert abs(probe.rankme(equal) - 1) < 0.01 and probe.feature_std(equal) < 1e-6
assert probe.rankme(noise) > 90 and abs(probe.feature_std(noise) - 96**-0.5) < 0.003

# %% [markdown]
# ### Exercise 2
#
# Why does 20-NN accuracy survive the collapse? Take features of the good run, centre them,
# and add to all of them one and the same long vector. What happens to 20-NN, RankMe and spread?

# %% [markdown] jp-MarkdownHeadingCollapsed=true
# #### Solution 2

# %% tags=["solution"]
pictures = load_data("shapes", count=4000)
bank, queries = hold_out(pictures)
kinds = pictures.labels["kind"]
encoder = probe.load_encoder(str(runs["I-JEPA"])).encoder
of_bank = probe.pooled_features(encoder, eval_batches(pictures, bank))
of_queries = probe.pooled_features(encoder, eval_batches(pictures, queries))

mean, direction = of_bank.mean(0), torch.ones(96)
accuracy, ranks = [], []
for length in (0, 1, 100):
    moved = [(x - mean).double() + length * direction for x in (of_bank, of_queries)]
    found = probe.knn(moved[0], kinds[bank], moved[1])
    accuracy.append(100 * probe.accuracy(found.weighted, kinds[queries]))
    ranks.append(probe.rankme(moved[1].float()))
    spread = probe.feature_std(moved[1])
    print(f"+ {length:3}: 20-NN {accuracy[-1]:.1f} %, RankMe {ranks[-1]:.1f}, spread {spread:.4f}")
# The nearest stay nearly the same, however little they differ beside what all share.
assert ranks[2] < 5 < ranks[0] and accuracy[2] > accuracy[0] - 20

# %% [markdown]
# ### Exercise 3
#
# How early could one have known? Find the first evaluation at which RankMe is below a third
# of what it was at the start, in the two runs that collapse, and in the good one.

# %% [markdown] jp-MarkdownHeadingCollapsed=true
# #### Solution 3

# %% tags=["solution"]
for label, out in runs.items():
    steps, ranks = column(out, "rankme")
    fallen = [step for step, rank in zip(steps, ranks, strict=True) if rank < ranks[0] / 3]
    print(f"{label:24}{f'step {fallen[0]}' if fallen else 'never'}")
    assert (not fallen) if label == "I-JEPA" else fallen[0] <= SHORT / 2
