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
# In this notebook we train a small I-JEPA on CIFAR-10 for a minute. Then we look at a long run, and
# at two runs that we break on purpose. The question is always the same: **which curve tells us
# whether the network learns something useful?**
#
# CIFAR-10 has 60,000 images of 32 x 32 pixels in ten classes. I-JEPA never sees the classes. We use
# them only to measure.

# %%
import csv
import os
import sys
from dataclasses import replace

import drawing
import torch
import torch.nn.functional as F

sys.path.insert(0, "..")  # ijepa.py is in the parent folder
import probe
from data import UserError, load_dataset, train_batches
from ijepa import IJEPA, MODELS, MaskCollator, parameter_groups

DATA = os.environ.get("IJEPA_DATA", "cifar10")  # or a folder with train/<class>/<image>.png
FAST = os.environ.get("IJEPA_FAST") == "1"  # set by the tests
STEPS, EVERY = (4, 2) if FAST else (240, 60)
drawing.style()
try:
    dataset = load_dataset(DATA, "train", data_dir="../data", img_size=32)
except UserError:
    sys.exit("No images. Put cifar-10-python.tar.gz from www.cs.toronto.edu/~kriz into ../data.")
splits = probe.make_splits(dataset, train_images=5000)  # small, so that the notebook is fast
(_, train_idx), (_, val_idx) = splits["train"], splits["val"]

# %%
print(f"{os.path.basename(DATA)}: we train on {len(train_idx):,} of {len(dataset):,} images")
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
count = sum(p.numel() for p in model.encoder.parameters())
print(f"{count:,} parameters; context of {masks.context_size} of {masks.num_patches} patches")

# %% [markdown]
# ## Three measurements beside the loss
#
# Every 60 steps we measure the target encoder on 500 validation images. An image is represented by
# the average of its 64 tokens.
#
# - **20-NN** looks for the 20 most similar training images. They vote for a class. Chance is 10 %.
#   This needs labels.
# - **RankMe** ([Garrido et al. 2023](https://arxiv.org/abs/2210.02885)) counts the dimensions that
#   the features use: 1 if all lie on one line, 96 if all directions are used alike. No labels.
# - **Feature std** is the standard deviation of the features, scaled to length 1. It is 0 if all
#   images have the same features. Its maximum is $1/\sqrt{96} = 0.102$. No labels.


# %%
few = {"train": (dataset, train_idx[:1500]), "val": (dataset, val_idx[:500])}


def measure(model):
    features = probe.extract_splits(few, model.target_encoder)
    row = probe.monitor(features, len(dataset.classes))
    return row | {"knn": 100 * row["knn"]}  # in percent


# %% [markdown]
# ## The training loop
#
# Notebook 2 went through one step slowly. This is the same step, 240 times, with 32 images each.


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
runs = {"I-JEPA": train(model, momentum=0.99)}
drawing.curves(runs, TITLES)

# %% [markdown]
# TEXT about what is seen.
#
# ## The long run
#
# The encoder that comes with this repository was trained by `train.py`: the same loop, all 45,000
# training images, 20 epochs. Its log is in `results/`. Two things differ from our loop. The targets
# are *whitened* instead of normalized by LayerNorm (D10 in `ijepa.py`), and the momentum is 0.998.
#
# > **Question.** Before you run the cell: the loss is the only number that the optimizer sees. How
# > will it develop over 20 epochs? And k-NN accuracy?

# %%
with open("../results/vit_nano_cifar10_log.csv", newline="") as file:
    log = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
long_run = [row | {"knn": 100 * row["knn"]} for row in log if "knn" in row]
titles = {"val_loss": "validation loss", "knn": "20-NN, %", "rankme": "RankMe"}
drawing.curves({"long run": long_run}, titles, x="epoch")

# %% [markdown]
# TEXT
#
# ## Break it, 1: without EMA
#
# With momentum 0 the target encoder is a copy of the context encoder, renewed after every step. There
# is still no gradient through the targets.
#
# > **Question.** Predict the four curves before you run the cell. Raise your hand: the loss will be
# > lower, the same, higher? RankMe? 20-NN?

# %%
torch.manual_seed(0)
without_ema = IJEPA(config)
runs["without EMA"] = train(without_ema, momentum=0.0)
drawing.curves(runs, TITLES)

# %% [markdown]
# ## Break it, 2: without stop-gradient
#
# Now the targets come from the context encoder itself, *with* gradients. Compare `IJEPA.targets` in
# `ijepa.py`: `@torch.no_grad()` is gone, and `self.target_encoder` has become `self.encoder`.
# Now the encoder can lower the loss in two ways: predict better, or make its output easier to
# predict.


# %%
class WithoutStopGradient(IJEPA):
    def targets(self, images, target_idx):
        x = self.target_norm(self.encoder(images))  # (B, N, D)
        return x[torch.arange(len(x))[:, None, None], target_idx]  # (B, M, T, D)


torch.manual_seed(0)
without_stop_gradient = WithoutStopGradient(config)
runs["without stop-gradient"] = train(without_stop_gradient, momentum=0.0)
drawing.curves(runs, TITLES)

# %%
print(f"after {STEPS} steps            loss  20-NN  RankMe  feature std")
for name, rows in runs.items():
    row = rows[-1]
    print(f"{name:24}{row['loss']:7.3f}{row['knn']:7.1f}{row['rankme']:8.1f}", end="")
    print(f"{row['feature_std']:13.4f}")

# %% [markdown]
# ## What a collapse looks like
#
# Here are the features of 40 validation images, compared with each other by cosine similarity. Bright
# yellow means: these two images have the same features.

# %%
models = (model, without_ema, without_stop_gradient)
shown = {"val": (dataset, val_idx[:40])}
features = [probe.extract_splits(shown, m.target_encoder)["val"][0][:, -1] for m in models]
similarities = [F.normalize(x, dim=1) @ F.normalize(x, dim=1).T for x in features]
drawing.heatmaps(similarities, list(runs), "cosine similarity")
