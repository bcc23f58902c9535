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
# encoder follows slowly, as a moving average (EMA). A constant would still be a perfect answer, but
# no gradient pulls the targets there. Why that is enough is understood in simplified cases only
# (Appendix B). That it is needed can be tried.
#
# In this notebook a small network (`vit_nano`) is trained on pictures that the computer draws, as
# it should be, without the average, and without both. **The lesson: the loss does not tell which
# is which.**

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
STEPS, STEPS_WITHOUT = (300, 100) if classroom.FAST else (400, 400)

# %% [markdown]
# ## As it should be
#
# This is `python train.py` with fewer steps. It takes about a minute. The log is cleared from the
# cell at the end; the table is from `result.json` in the run's folder.
#
# Labels are used only to look at what was learned, by two readers (notebook 4): `20-NN`, in which
# the 20 most similar training pictures vote, and `linear`, one matrix that is trained on the frozen
# vectors. They read three things: the **kind** of the nearest object (eight patterns), the
# **count** of objects (1 to 4), and how **near** the nearest is (four steps). Beside them: raw
# pixels, and the same encoder before training. With 250 pictures to report on, the standard error
# is some 3 points.

# %%
runs = {}
runs["I-JEPA"] = classroom.train("03_ijepa", "--steps", str(STEPS), *classroom.EVAL)
print(probe.format_table(json.loads((runs["I-JEPA"] / "result.json").read_text())))


# %%
def column(out: Path, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a column of log.csv, where it has a value."""
    with open(out / "log.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row[name]]
    return [int(row["step"]) for row in rows], [float(row[name]) for row in rows]


PANELS = {
    "val_loss": "Loss, held-out pictures",
    "knn": "20-NN, kind (%)",
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
# - **20-NN**: high from the start, since even random features of pictures with the same pattern are
#   alike (`results/shapes.md`). So few steps do not better it; those of `python train.py` do.
# - **RankMe** ([Garrido et al. 2023](https://arxiv.org/abs/2210.02885)): how many dimensions the
#   features use. 1 if they all point in one direction, D = 96 if in all directions alike.
# - **Spread**: standard deviation of the features, scaled to length 1; 0 if all pictures look
#   alike, $1/\sqrt{D} \approx 0.1$ at most.
#
# Features are the target encoder's, averaged over the patches of a picture. RankMe falls here too,
# while the network forgets what it was born with, and then it holds. The **linear** probe of the
# kind tells most: it rises far above that of the untrained encoder.


# %%
def linear(out: Path, which: str = "trained", task: str = "kind") -> float:
    """Linear probe, held-out accuracy in percent."""
    rows = json.loads((out / "result.json").read_text())
    return next(r["linear"] for r in rows if (r["features"], r["task"]) == (which, task))


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
    str(STEPS_WITHOUT),
    "--momentum",
    "0",
    "--final-momentum",
    "0",
    *classroom.EVAL,
)

# %% [markdown]
# ## Without stop-gradient
#
# The targets come from the context encoder itself (so there is no average either), and the gradient
# flows through both sides. Two lines make this variant of the method: one network in both places,
# and `targets` without the `torch.no_grad` around it.


# %%
class WithoutStopGradient(IJEPA):
    """An experiment: the encoder is its own target, and may be changed to be predictable."""

    targets = IJEPA.targets.__wrapped__  # the function inside of torch.no_grad

    def __init__(self, config):
        super().__init__(config)
        self.target_encoder = self.encoder


with mock.patch.object(train, "IJEPA", WithoutStopGradient):
    runs["without stop-gradient"] = classroom.train(
        "03_without_stop_gradient", "--steps", str(STEPS_WITHOUT), *classroom.EVAL
    )

# %% [markdown]
# ## What is seen

# %% tags=["results/class_collapse.png"]
curves(runs)

# %%
TASKS = ("kind", "count", "near")
print(" " * 57 + "linear probe")
print(" " * 24 + "    loss   20-NN  RankMe   spread" + "".join(f"{task:>8}" for task in TASKS))
last = {}
for label, out in runs.items():
    last[label] = {name: column(out, name)[1][-1] for name in PANELS}
    last[label] |= {task: linear(out, task=task) for task in TASKS}
    figures = "{val_loss:8.4f}{knn:8.1f}{rankme:8.1f}{feature_std:9.4f}"
    figures += "{kind:8.1f}{count:8.1f}{near:8.1f}"
    print(f"{label:24}" + figures.format(**last[label]))
untrained = {task: linear(runs["I-JEPA"], "untrained", task) for task in TASKS}
print(f"{'untrained':57}" + "".join(f"{value:8.1f}" for value in untrained.values()))

# %%
good = last["I-JEPA"]
for label in ("without EMA", "without stop-gradient"):
    bad = last[label]
    assert bad["val_loss"] < good["val_loss"] / 3  # the loss is much *better*
    assert bad["rankme"] < 5 < good["rankme"]  # all features point in nearly one direction
    assert bad["feature_std"] < good["feature_std"] / 4  # all pictures look alike
    assert bad["kind"] < good["kind"] - 10  # and a linear probe reads less
    assert bad["kind"] < untrained["kind"]  # less than before training
    assert bad["knn"] > column(runs["I-JEPA"], "knn")[1][0] - 15  # which 20-NN does not show

# %% [markdown]
# Both variants collapse, within the first evaluations, and with a loss that looks excellent: far
# below that of the run that learns. Every picture gets nearly the same vector: RankMe and spread
# fall. The linear probe of the kind ends *below* that of the untrained encoder. (Of near the good
# run reads most, too; in count the runs hardly differ.)
#
# What one might not expect: **20-NN accuracy hardly falls**, and without stop-gradient it even
# rises. Tiny differences between the pictures are left, and neighbours need no more (exercise 2).
# They find other pictures of the same pattern, as random features do; what is missing is what
# training adds, features from which the kind can be *read off* (notebook 4). In the runs of
# `vit_tiny` on CIFAR-10 in the README 20-NN does fall. So look at all four curves, and do not trust
# one alone.
#
# > **Question.** The paper writes that EMA "has proven essential". Is the collapse without it
# > caused by the missing average, or by targets that change after every step? What would you train
# > to find out? (A target encoder could also be a copy that is renewed every 100 steps.)

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
# Why does 20-NN accuracy survive the collapse? Take features of the run without stop-gradient, and
# subtract from all of them their mean. What happens to 20-NN, RankMe and spread? Compare with the
# good run.

# %% [markdown] jp-MarkdownHeadingCollapsed=true
# #### Solution 2

# %% tags=["solution"]
pictures = load_data("shapes", count=4000)
bank, queries = hold_out(pictures)
kinds = pictures.labels["kind"]
found = {}
for label in ("I-JEPA", "without stop-gradient"):
    encoder = probe.load_encoder(str(runs[label])).encoder
    parts = [probe.pooled_features(encoder, eval_batches(pictures, i)) for i in (bank, queries)]
    mean = parts[0].mean(0)
    for way, (x, y) in (("as it is", parts), ("centred", [part - mean for part in parts])):
        knn = 100 * probe.accuracy(probe.knn(x, kinds[bank], y).weighted, kinds[queries])
        found[label, way] = knn, probe.rankme(y)
        print(f"{label:22} {way:9} 20-NN {knn:.1f} %, RankMe {probe.rankme(y):4.1f}, ", end="")
        print(f"spread {probe.feature_std(y):.4f}")
# The collapsed features differ in many dimensions still, but by less than a hundredth of what they
# share, and RankMe and spread look at the whole vector. Which neighbours are nearest does not
# depend on how small the differences are.
(before, low), (after, high) = (found["without stop-gradient", w] for w in ("as it is", "centred"))
assert low < 5 and high > 5 * low and abs(after - before) < 20

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
    assert (not fallen) if label == "I-JEPA" else fallen[0] <= STEPS_WITHOUT / 2
