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
# # 4. Linear probing: what has the encoder learned?
#
# The encoder is **frozen**, and simple readers are put on top of it. What they can read was there
# before (Section 5 of [the paper](https://arxiv.org/abs/2301.08243), Appendix A.2):
#
# - **20 nearest neighbours** (20-NN): the most similar training pictures vote, nearer ones with
#   more weight ("plain": all alike). Nothing is trained. (Not in the paper.)
# - **linear probe**: one matrix from D numbers to the classes.
#
# Both read the target encoder's output, averaged over all patches (Appendix A.1). Beside it stand
# two baselines without which no figure means anything: **raw pixels**, and the same encoder
# **untrained**.

# %%
import classroom

classroom.begin()

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import probe
from data import generator_for, placed

# %% [markdown]
# This notebook is made for CIFAR-10 and a `vit_tiny`, which takes a GPU to train:
#
# ```bash
# python train.py --model vit_tiny --data cifar10
# ```
#
# It takes both if they are there. Otherwise it takes the pictures that the computer draws, and the
# small model of notebook 3. For others set `DATA` (a folder with `train/<class>/`, or a name) and
# `RUN` (a run's folder) by hand.

# %%
DATA, RUN = "cifar10", Path("runs/vit_tiny_cifar10")
if not (Path("data/cifar-10-batches-py").is_dir() and (RUN / "last.pt").is_file()):
    DATA, RUN = "shapes", classroom.small_run()
    print("no CIFAR-10 in data/, or no run in runs/vit_tiny_cifar10: taking shapes and vit_nano")

# %% [markdown]
# ## The protocol
#
# The settings of the linear probe (learning rate, weight decay, last layer or last four, with batch
# norm or without) are chosen on held-out *training* pictures. The test pictures are read once, by
# the winner. This is `python probe.py RUN --images 2000`, in this process. (Notebook 3 had other
# figures: fewer pictures, and the last layer alone.)

# %%
IMAGES = 1000 if classroom.FAST else 2000
home = classroom.RUNS / "04_probe"
home.mkdir(parents=True, exist_ok=True)
first = ["--task", "kind"] if DATA == "shapes" else []  # of its three tasks
config = probe.configure([str(RUN), "--data", DATA, "--images", str(IMAGES), *first])
with placed(config.device) as place:
    setup = probe.set_up(config, probe.load_encoder(config.checkpoint), place, home)
task, names = next(iter(setup.tasks.items()))
print(f"{len(setup.sets.bank)} pictures to learn from, {len(setup.sets.report)} to report on")

# %%
found = probe.probe_frozen(setup)
probe.draw_found(setup, found, home)
print(probe.format_report(found.rows))

# %%
rows = [row for row in found.rows if row["task"] == task]
ways = list(rows[0]["figures"])
figure, axis = plt.subplots(figsize=(11, 4))
colours, hatches = (classroom.GREY, classroom.SKY, classroom.BLUE), ("..", "//", "")
accuracies = {}
for i, (row, colour, hatch) in enumerate(zip(rows, colours, hatches, strict=True)):
    values = [probe.mean_std(row["figures"][way])[0] for way in ways]
    accuracies[row["features"]] = dict(zip(ways, values, strict=True))
    places = [place + 0.27 * (i - 1) for place in range(len(ways))]
    bars = axis.bar(places, values, 0.25, color=colour, hatch=hatch, label=row["features"])
    axis.bar_label(bars, fmt="%.0f", padding=2)
axis.axhline(rows[0]["chance"], color="black", linestyle=":", linewidth=2, label="largest class")
axis.set_xticks(range(len(ways)), ways)
axis.set(ylabel="accuracy (%)", ylim=(0, 105), title=f"{Path(DATA).name}, {task}")
axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
plt.show()

# %%
pixels, untrained, trained = (row["linear probe"] for row in accuracies.values())
print(f"linear probe: pixels {pixels:.1f}, untrained {untrained:.1f}, trained {trained:.1f} %")
assert all(0 <= value <= 100 for row in accuracies.values() for value in row.values())
if DATA == "shapes":  # of other pictures and runs the notebook does not know what to expect
    assert trained > pixels + 15

# %% [markdown]
# ## One layer or four?
#
# The probe may choose the last layer or the last four side by side (Appendix A.2). What does the
# last layer hold by itself?

# %%
bank_y, report_y = setup.sets.labels(task)
sets = setup.sets
alone = {}
for name, encoder in setup.encoders.items():
    if encoder is not None:
        bank, report = (x[:, -encoder.embed_dim :] for x in probe.features_of(setup, name, encoder))
        alone[name] = probe.linear_probe(
            bank[sets.fit], bank_y[sets.fit], bank[sets.choose], bank_y[sets.choose],
            report, report_y, seeds=1, num_classes=len(names), progress=False,
        ).best.test_mean * 100  # fmt: skip
        print(f"{name:16} last layer {alone[name]:.1f} %, best of both ", end="")
        print(f"{accuracies[name]['linear probe']:.1f} %")
if DATA == "shapes":
    assert alone[setup.trained] > alone["untrained"] + 5

# %% [markdown]
# On `shapes` the untrained encoder finds look-alikes even better than the trained one: random
# features of two pictures with the same pattern are alike (`results/shapes.md`). With four layers,
# hundreds of random features, much can be read off them, too. In the last layer *alone* a linear
# probe can hardly read the kind before training, and reads it twice as well after it: that is what
# was learned in these 500 steps. Without the untrained encoder beside it, a good figure would prove
# nothing.
#
# > **Question.** The linear probe sees labels, nearest neighbours see them too. Which of the two
# > could still succeed if every class fell into several separate clusters? (On `shapes` it does: a
# > pattern begins at one of four places, and light and dark may be swapped.)

# %% [markdown]
# ## Neighbours
#
# First column: test pictures. Then their nearest training pictures, in parentheses if they show
# something else.

# %%
classroom.display_file(home / "neighbours.png")

# %% [markdown]
# ## Who is taken for whom?
#
# Rows: what a picture shows. Columns: what the linear probe takes it for, in percent.

# %%
classroom.display_file(home / "confusion.png", 640)

# %%
matrix = probe.confusion(report_y, found.predictions, len(names))
assert int(matrix.sum()) == len(report_y)
first_seed = 100 * float(matrix.diagonal().sum()) / len(report_y)  # the matrix is of one head
assert abs(first_seed - trained) < 3

# %% [markdown]
# ## Patches as colours
#
# The features of all patches, projected onto their first three principal components, as red, green
# and blue: patches with like features have like colours. A picture has 6 x 6 patches in `vit_nano`.

# %%
classroom.display_file(home / "pca.png")

# %% [markdown]
# > **Question.** Compare the rows of the untrained and of the trained encoder. Where does each give
# > like colours to patches that lie together, and what do these have in common in the picture?

# %% [markdown]
# ## Few labels
#
# How good is the linear probe with 2, 5, 20 labels a class? (Table 2 has about 13 a class.) Three
# samples each; the settings are chosen within the sample. Bars: standard deviation.

# %%
COUNTS = (2, 10) if classroom.FAST else (2, 5, 20)
SAMPLES = 1 if classroom.FAST else 3
low_shot: dict[str, list[list[float]]] = {}
for name, encoder in setup.encoders.items():
    bank, report = probe.features_of(setup, name, encoder)
    bank, report = probe.narrow(bank, report) if encoder is None else (bank, report)
    low_shot[name] = []
    for count in COUNTS:
        scores = []
        for seed in range(SAMPLES):
            places = probe.low_shot_sample(bank_y, names, per_class=count, seed=seed)
            score, _ = probe.low_shot_probe(
                {"all": bank[places]}, bank_y[places], {"all": report}, report_y, len(names),
                setup.place.device,
            )  # fmt: skip
            scores.append(100 * score)
        low_shot[name].append(scores)

# %%
figure, axis = plt.subplots(figsize=(9, 4.2))
for (name, scores), colour, style in zip(low_shot.items(), colours, (":", "--", "-"), strict=True):
    mean, spread = zip(*(probe.mean_std(values) for values in scores), strict=True)
    axis.errorbar(COUNTS, mean, spread, fmt="o" + style, color=colour, capsize=5, label=name)
axis.set(xscale="log", xlabel="labels a class", ylabel="accuracy (%)", ylim=(0, 100))
axis.set_xticks(COUNTS, [str(count) for count in COUNTS], minor=False)
axis.minorticks_off()
axis.grid()
axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
plt.show()

# %%
chance = rows[0]["chance"]
best = max(low_shot, key=lambda name: probe.mean_std(low_shot[name][-1])[0])
print(f"with {COUNTS[-1]} labels a class, the best is: {best}")
if DATA == "shapes":
    assert probe.mean_std(low_shot[setup.trained][-1])[0] > chance + 5

# %% [markdown]
# > **Question.** On `shapes` the untrained encoder does worse with 20 labels a class than with 2.
# > How can more labels hurt a linear probe? (Think of the clusters above.)

# %% [markdown]
# ## Exercises
#
# Each solution is folded: click on "1 cell hidden" below its heading.

# %% [markdown]
# ### Exercise 1
#
# Write 1-nearest-neighbour classification by cosine similarity in three lines, and compare
# it with `probe.knn`.

# %% [markdown] jp-MarkdownHeadingCollapsed=true
# #### Solution 1

# %% tags=["solution"]
import numpy as np

bank, report = probe.features_of(setup, setup.trained, setup.encoders[setup.trained])
a, b = (x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (report, bank))
predicted = bank_y.numpy()[(a @ b.T).argmax(1)]
same = predicted == probe.knn(bank, bank_y, report, k=1).plain.numpy()
print(f"the same for {same.mean():.1%} of the pictures")
assert same.mean() > 0.995  # but for ties and rounding

# %% [markdown]
# ### Exercise 2
#
# Which two classes are confused most often?

# %% [markdown] jp-MarkdownHeadingCollapsed=true
# #### Solution 2

# %% tags=["solution"]
errors = matrix - torch.diag(matrix.diagonal())
true, taken = divmod(int(errors.argmax()), len(names))
share = int(errors.max()) / int(matrix[true].sum())
print(f"{names[true]} is taken for {names[taken]} in {share:.0%} of the cases")
assert true != taken and int(errors.max()) == max(
    int(matrix[i, j]) for i in range(len(names)) for j in range(len(names)) if i != j
)

# %% [markdown]
# ### Exercise 3
#
# How do you know that no test picture is among the training pictures? Look for copies. Then shuffle
# the labels to learn from: what is left, which leak would that show, and which not?

# %% [markdown] jp-MarkdownHeadingCollapsed=true
# #### Solution 3

# %% tags=["solution"]
known = {picture.numpy().tobytes() for picture in sets.train.centre(sets.bank).cpu()}
test_pictures = sets.test.centre(sets.report).cpu()
copies = sum(picture.numpy().tobytes() in known for picture in test_pictures)
print(f"{copies} of {len(test_pictures)} test pictures are training pictures, too")

order = torch.randperm(len(bank_y), generator=generator_for("shuffled labels"))
found_with = probe.knn(bank, bank_y[order], report).weighted
shuffled = 100 * probe.accuracy(found_with, report_y)
print(f"with shuffled labels: {shuffled:.1f} %, the largest class has {chance:.1f} %")
# More than chance would mean that the answer comes from elsewhere than from these labels. Copies
# are not shown by it: a copy has a shuffled label as well.
assert shuffled < chance + 6  # chance, as it should be
assert copies == 0 or DATA != "shapes"
