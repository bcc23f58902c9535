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
# # 3. Loss curves, and what they do not tell
#
# In this notebook we train a small I-JEPA on CIFAR-10 for a minute. Then we look at a long run,
# and at two runs that we break on purpose. The question is always the same: **which curve tells us
# whether the network learns something useful?**
#
# CIFAR-10 has 50,000 training and 10,000 test images of 32 x 32 pixels in ten classes. 5,000 of the
# training images are our validation images. We train on 5,000 of the other 45,000. The first run
# downloads 170 MB into the folder `data`. (The outputs below are from a copy that was compressed as
# JPEG, so your numbers will differ a little.) I-JEPA never sees the classes. We use them only to
# measure.

# %%
import csv
import sys
from dataclasses import replace

import drawing
import torch
import torch.nn.functional as F

sys.path.insert(0, "..")  # ijepa.py is in the parent folder
import probe
from data import train_batches
from ijepa import IJEPA, MODELS, MaskCollator, parameter_groups

DATA = "cifar10"  # or a folder with train/<class>/<image>.png
drawing.style()
dataset, small = drawing.load_images(DATA)  # small: in the tests
IMAGES, STEPS, EVERY = (100, 4, 4) if small else (5000, 150, 50)
(_, train_idx), (_, val_idx) = probe.make_splits(dataset, train_images=IMAGES).values()

# %%
names = [dataset.classes[label] for label in dataset.labels[train_idx[:8]]]
drawing.row(dataset.load(train_idx[:8]), titles=names, grid=1)

# %% [markdown]
# ## The model and its masks
#
# `vit_nano` is a small ViT: 4 layers, 96 numbers per token. Patches have 4 x 4 pixels, so an image
# is a grid of 8 x 8 = 64 tokens. The targets are normalized by LayerNorm, as in notebook 2.

# %%
config = replace(MODELS["vit_nano"], target_norm="layer")
masks = MaskCollator(8)
torch.manual_seed(0)
model = IJEPA(config)

# %% [markdown]
# ## Three measurements beside the loss
#
# Every 50 steps we measure the target encoder on 400 validation images. An image is represented by
# the average of its 64 tokens: its **features**.
#
# - **20-NN**, or k-NN (k nearest neighbors) with k = 20, looks for the 20 most similar of 1,000
#   training images. They vote for a class, and more similar images count more. Chance is 10 %. Only
#   this needs labels.
# - **RankMe** ([Garrido et al. 2023](https://arxiv.org/abs/2210.02885)) counts the directions that
#   the features use, from 1 to 96. The mean is not subtracted: if all features are nearly equal, it
#   is 1.
# - **Feature std**: scale each image's features to length 1, take the standard deviation of each of
#   the 96 numbers over the images, and average. It is 0 if all images have the same features. Its
#   maximum is $1/\sqrt{96} = 0.102$.


# %%
few = {"train": (dataset, train_idx[:1000]), "val": (dataset, val_idx[:400])}


def measure(model):
    features = probe.extract_splits(few, model.target_encoder, batch_size=100)
    row = probe.monitor(features, len(dataset.classes))
    return row | {"knn": 100 * row["knn"]}  # in percent


# %% [markdown]
# ## The training loop
#
# Notebook 2 went through one step slowly. This is the same step, 150 times, with 32 images each.
# Each image is first cropped at random (30 to 100 % of its area) and flipped with probability 1/2,
# as `train.py` does.


# %%
def train(model, momentum):
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-3, weight_decay=0.04)
    steps, rows = range(STEPS + 1), []
    batches = train_batches(dataset, train_idx, masks, steps, batch_size=32, flip=True)
    for step, (images, context_idx, target_idx) in zip(steps, batches, strict=True):
        row = {"step": step} | (measure(model) if step % EVERY == 0 else {})
        loss = model(images, context_idx, target_idx)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_target(momentum)
        rows.append(row | {"loss": loss.item()})
    return rows


TITLES = {"loss": "loss", "knn": "20-NN, %", "rankme": "RankMe", "feature_std": "feature std"}
runs = {"I-JEPA": train(model, momentum=0.996)}
drawing.curves(runs, TITLES)

# %% [markdown]
# The loss falls quickly. The other curves do not get better: RankMe falls, and 20-NN stays about
# where it was with random weights. (With 400 images, differences of 5 points are hardly more than
# chance.) In our longer runs this passes. We think the encoder first loses random features and then
# finds better ones. After 150 steps, it has not even seen each of the 5,000 images once.
#
# ## The long run
#
# The `vit_nano` encoder of this repository was trained by `train.py` for 15 epochs on all 45,000
# images. It differs from our short run in more than its length. The targets are *half whitened*:
# directions of small variance are enlarged, so they count more in the loss (exercise 3). AdamW
# averages squared gradients over fewer steps (its beta2 is 0.98 instead of 0.999). Batch size and
# momentum differ, too, and are printed below; the learning rate falls along a cosine, and the
# weight decay rises along one. So we cannot say which of them causes a difference to our curves.
#
# Here 20-NN uses 10,000 training images, and RankMe 5,000 validation images. So do not compare
# these numbers with those above, only along the curve. The validation loss is the loss on
# validation images, always with the same masks. (The axes do not start at 0.)
#
# > **Question.** Before you run the cell: the loss is the only number that the optimizer sees. How
# > will it develop over 15 epochs? And k-NN accuracy?

# %%
with open("../results/vit_nano_cifar10_log.csv", newline="") as file:
    log = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
long_run, losses = [], []
for row in log:
    losses.append(row["loss"])
    if "knn" in row:  # measured here: average the loss since the last time
        long_run.append(row | {"knn": 100 * row["knn"], "loss": sum(losses) / len(losses)})
        losses = []
titles = {"loss": "training loss", "val_loss": "validation loss"}
titles |= {"knn": "20-NN, %", "rankme": "RankMe"}
drawing.curves({"long run": long_run}, titles, x="epoch", zero=False)

first, last, most = log[0], log[-1], max(row["lr"] for row in log)
print("images per step", round(45_000 * last["epoch"] / last["step"]), end=", ")
print(f"lr {most:.2g} to {last['lr']:.2g}, EMA {first['momentum']:.4g} to {last['momentum']:.4g}")

# %% [markdown]
# From epoch 3 to 9 both losses *rise*, and 20-NN accuracy and RankMe rise, too. In the last epochs
# all four hardly change: the learning rate falls to a hundredth of its peak and the momentum goes
# to 1, so both encoders almost stop. How can a network get better while its loss gets worse?
#
# Our explanation: the targets come from the network itself. If they hold more about the image, they
# are harder to predict. **So the loss does not say how good the representation is**, and losses of
# different runs cannot be compared. RankMe follows 20-NN closely here, and needs no labels.
#
# The momentum matters at the end. In a run of 20 epochs with a constant 0.998 (and whitened
# targets), 20-NN fell after epoch 10, while the validation loss fell, too (`results/README.md`).
#
# ## Break it, 1: without EMA
#
# With momentum 0 the target encoder is a copy of the context encoder, renewed after every step.
# There is still no gradient through the targets.
#
# > **Question.** Predict the four curves before you run the cell, and write your prediction down.
# > Will the loss be lower or higher than before? RankMe? Feature std? 20-NN?

# %%
torch.manual_seed(0)
without_ema = IJEPA(config)
runs["without EMA"] = train(without_ema, momentum=0.0)
drawing.curves(runs, TITLES)

# %% [markdown]
# The loss jumps back three times, and ends far lower than in the run that is not broken. RankMe and
# feature std fall. 20-NN does not show it.
#
# ## Break it, 2: without stop-gradient
#
# Now the targets come from the context encoder itself, *with* gradients. Compare `IJEPA.targets`
# in `ijepa.py`: `@torch.no_grad()` is gone, and `self.target_encoder` has become `self.encoder`.
# So the encoder can lower the loss in two ways: predict better, or make its own output easier to
# predict.
#
# > **Question.** Which outputs are the easiest to predict?
#
# <details><summary>Answer</summary>
#
# Constant ones: the same vector for each image and each patch. LayerNorm does not prevent it,
# because a constant vector can have mean 0 and variance 1.
#
# </details>


# %%
class WithoutStopGradient(IJEPA):
    def targets(self, images, target_idx):
        x = self.target_norm(self.encoder(images))  # (B, N, D)
        pairs = zip(x, target_idx, strict=True)  # image by image
        return torch.stack([tokens[idx] for tokens, idx in pairs])  # (B, M, T, D)


torch.manual_seed(0)
without_stop_gradient = WithoutStopGradient(config)
# Targets come from the encoder. Momentum 0 copies it to the target encoder, which is measured.
runs["without stop-gradient"] = train(without_stop_gradient, momentum=0.0)
drawing.curves(runs, TITLES)

# %%
print(f"after {STEPS} steps", " " * 9, *(f"{title:>11}" for title in TITLES.values()))
for name, rows in runs.items():
    print(f"{name:25}", *(f"{rows[-1][column]:11.4g}" for column in TITLES))

# %% [markdown]
# ## What a collapse looks like
#
# Here are 40 validation images. Each is compared with each by the cosine similarity of their
# features. Yellow everywhere means that all images have nearly the same features.

# %%
models = {"I-JEPA": model, "without EMA": without_ema}
models["without stop-gradient"] = without_stop_gradient
shown, matrices = {"val": (dataset, val_idx[:40])}, {}
for name, network in models.items():
    features, _ = probe.extract_splits(shown, network.target_encoder)["val"]  # (40, layers, 96)
    x = F.normalize(features[:, -1], dim=1)
    matrices[name] = x @ x.T
drawing.similarities(matrices, "cosine similarity")

# %% [markdown]
# In both broken runs **all images have nearly the same features**. This is **collapse**. A constant
# answer is easy to predict, so the loss is small at the end.
#
# What is wrong with such an encoder? Our reading, which we have not measured: the differences that
# are left are mostly what the random weights gave at the start. While the loss is almost zero,
# there is little to learn from. So 20-NN may look fine now, but it has no reason to get better.
# (With 400 images and one seed, do not conclude that collapse helps.)
#
# Which curve tells?
#
# | curve | does it show the collapse? |
# |---|---|
# | loss | No. A broken run can look best. |
# | 20-NN | No. The run without stop-gradient even has the highest. Exercise 2 shows why. |
# | RankMe | Yes, and without labels. It falls below 3. |
# | feature std | Yes, and without labels. It falls to about a tenth, or far less. |
#
# So stop-gradient alone does not prevent the collapse here. The targets must also follow slowly.
# With both, a constant would still give a loss of zero, but training does not go there. Why that
# is so is understood only in simple cases. The paper shows by experiment that it works.
#
# In practice, log RankMe or feature std in every run. `train.py` logs both.
#
# ## Exercises
#
# **1. Know your instruments.** What are RankMe and feature std if all images have the same
# features? And if the features are Gaussian noise? Try it with 400 images and 96 features, and
# with 4,000.
#
# <details><summary>Solution</summary>
#
# ```python
# for count in (400, 4000):
#     for name, x in ("equal", torch.ones(count, 96)), ("noise", torch.randn(count, 96)):
#         print(f"{count} {name}: {probe.rankme(x):.1f} {probe.feature_std(x):.4f}")
# ```
#
# Equal features: RankMe 1, std 0. Noise: std is the maximum, 0.102. RankMe is near 96, but with
# 400 images it is lower than with 4,000. So compare RankMe only between equal numbers of images.
#
# </details>
#
# **2. Why does 20-NN survive?** Subtract the mean of the features from all features of a collapsed
# run. Then measure again. What has happened to the images?
#
# <details><summary>Solution</summary>
#
# ```python
# for name, network in models.items():
#     (x, labels), (val_x, val_labels) = probe.extract_splits(few, network.target_encoder).values()
#     x, val_x, mean = x[:, -1], val_x[:, -1], x[:, -1].mean(dim=0)
#     for shift in (0, mean):
#         predicted = probe.knn_classify(x - shift, labels, val_x - shift, 10)
#         accuracy, rank = probe.accuracy(predicted, val_labels), probe.rankme(val_x - shift)
#         print(f"{name:24}{accuracy:6.1%}  RankMe {rank:5.1f}", end="")
#         print(f"  std {probe.feature_std(val_x - shift):.4f}")
# ```
#
# The mean was nearly all there was. Without it, std is close to its maximum again, and RankMe is
# far higher. 20-NN changes little. So the images still differ, but only by tiny amounts. The
# nearest neighbors depend on the *order* of the similarities, and the order survives when nearly
# all of them are above 0.99 (without EMA) or 0.999 (without stop-gradient).
#
# </details>
#
# **3. Does half whitening prevent the collapse?** Set `target_norm="whiten"`, as in the long run,
# and train without EMA again.
#
# <details><summary>Solution</summary>
#
# ```python
# torch.manual_seed(0)
# half_whitened = IJEPA(replace(config, target_norm="whiten"))
# runs["half whitened, without EMA"] = train(half_whitened, momentum=0.0)
# drawing.curves(runs, TITLES)
# ```
#
# No. RankMe and feature std collapse, too. But now the loss tells: it jumps between about a
# quarter of its first value and more than twice that value. Half whitening enlarges the small
# differences that are left, so the targets are noise that changes from step to step. (Without
# stop-gradient, the loss is small with half whitening, too.)
#
# </details>
