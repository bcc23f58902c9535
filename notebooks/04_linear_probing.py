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
# An encoder was trained on CIFAR-10 without labels (notebook 3 shows its curves). We **freeze**
# it: its weights no longer change. Then we ask how easily the classes can be found in its output.
# The usual test is a *linear* classifier, called a **linear probe**.
#
# > **Question.** Why a linear classifier, and not a network with three layers?
#
# <details><summary>Answer</summary>
#
# A strong classifier can find the classes by itself, even from pixels. Then we would test the
# classifier, not the features. A linear probe can only use what the encoder has made easy to find.
#
# </details>

# %%
import sys

import drawing
import torch
import torch.nn.functional as F

sys.path.insert(0, "..")  # ijepa.py is in the parent folder
from data import eval_batches
from probe import load_encoder, make_splits, untrained_encoder

DATA = "cifar10"  # or a folder with train/<class>/<image>.png
drawing.style()
dataset, small = drawing.load_images(DATA)  # small: in the tests
IMAGES, STEPS = (400, 10) if small else (10_000, 300)  # of 45,000 images, to save time
splits = make_splits(dataset, train_images=IMAGES)
train_idx, val_idx = splits["train"][1], splits["val"][1][: IMAGES // 5]
train_labels, val_labels = dataset.labels[train_idx], dataset.labels[val_idx]

# %% [markdown]
# No label was used in training. But we chose the recipe by accuracy on these validation images, so
# the numbers are slightly too good. For a clean number, use the test images (`probe.py`). The
# outputs below are from a copy of CIFAR-10 that was compressed as JPEG, in another order. So your
# numbers will differ a little, and the encoder has seen most of your validation images in training,
# without labels.
#
# ## Load the encoder, and freeze it
#
# `load_encoder` returns it frozen: no parameter will get a gradient. We compare it with two
# others: an encoder of the same shape with random weights, and no encoder at all, just the pixels.
# (We halve the image to 16 x 16 pixels. That is no less accurate here, and faster.)

# %%
encoder, config, info = load_encoder("vit_nano_cifar10")
pixels = torch.nn.Sequential(torch.nn.AvgPool2d(2), torch.nn.Flatten())  # 16 x 16 x 3 = 768
networks = {"pixels": pixels, "untrained": untrained_encoder(config), "trained": encoder}
print("tensors to train:", sum(p.requires_grad for p in encoder.parameters()))

# %% [markdown]
# ## Features
#
# The encoder turns an image into 64 tokens of 96 numbers. We average the tokens. So an image
# becomes **96 numbers**: its features.
#
# At the end, each feature is shifted and scaled to mean 0 and variance 1 on the training images.
# That makes the classifier easier to train.


# %%
@torch.no_grad()
def extract(network, indices):
    batches = eval_batches(dataset, indices, batch_size=100)  # normalized images (100, 3, 32, 32)
    outputs = (network(images) for images in batches)  # (B, 64, 96), or pixels (B, 768)
    return torch.cat([x.mean(dim=1) if x.ndim == 3 else x for x in outputs])


features = {}
for name, network in networks.items():
    train_x, val_x = extract(network, train_idx), extract(network, val_idx)
    mean, std = train_x.mean(0), train_x.std(0)
    features[name] = (train_x - mean) / std, (val_x - mean) / std
    print(f"{name:10}", tuple(train_x.shape), tuple(val_x.shape))

# %% [markdown]
# ## The linear probe
#
# One `nn.Linear`, and an ordinary training loop. For an encoder, only 96 x 10 weights and 10
# biases are trained.


# %%
def linear_probe(x, labels):
    torch.manual_seed(0)
    head = torch.nn.Linear(x.shape[1], len(dataset.classes))
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.03, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)  # lr falls to 0
    for _ in range(STEPS):
        batch = torch.randint(len(x), (500,))
        loss = F.cross_entropy(head(x[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head


def accuracy(predicted):
    return 100 * (predicted == val_labels).float().mean().item()


heads, linear = {}, {}
for name, (train_x, val_x) in features.items():
    heads[name] = linear_probe(train_x, train_labels)
    linear[name] = accuracy(heads[name](val_x).argmax(1))
    print(f"{name:10} training loss {F.cross_entropy(heads[name](train_x), train_labels):.2f}")

# %% [markdown]
# ## k-NN: no training at all
#
# For each validation image we look for the 20 training images with the most similar features, by
# cosine similarity. The class that occurs most often among them is the prediction. (`probe.py` and
# the long run of notebook 3 weight votes by similarity, do not standardize the features, and use
# all 5,000 validation images; `probe.py` also learns from all 45,000 training images. So their
# numbers differ from these.)
#
# > **Question.** Guess before you run the cell: how accurate are pixels, the untrained encoder and
# > the trained one? Chance is 10 %.


# %%
def neighbors(train_x, val_x, k=20):
    similarity = F.normalize(val_x, dim=1) @ F.normalize(train_x, dim=1).T  # (2000, 10000)
    return similarity.topk(k).indices  # (2000, k), the most similar first


knn = {name: accuracy(train_labels[neighbors(*x)].mode().values) for name, x in features.items()}

drawing.bars({"20-NN": knn, "linear probe": linear}, "validation accuracy, %")

# %% [markdown]
# The untrained encoder is worse than pixels by 20-NN, and a little worse by our linear probe. But
# both are far above chance, so "better than chance" proves nothing. What counts is the gain over
# **both**.
#
# Our probe stops early. `probe.py` trains it until it converges. With 10,000 images and the last
# layer it gives 39 % for pixels, 42 % for the untrained encoder and 55 % for the trained one.
# There, the untrained encoder is a little better than pixels. With the last four layers, it gives
# 48 % (untrained) and 60 % (trained).
#
# ## Nearest neighbors
#
# The first image of each row is a validation image. Beside it are the training images with the
# most similar features. Blue: the same class. Orange: another class. The printed numbers count over
# all validation images.

# %%
nearest = {name: neighbors(*features[name]) for name in ("pixels", "trained")}  # (2000, 20) each
for name, idx in nearest.items():
    same = (train_labels[idx] == val_labels[:, None]).float().mean()
    print(f"{name}: {same:.0%} of the 20 neighbors of an image are of its class")
for query in ((val_labels == label).nonzero()[1, 0] for label in (0, 1, 3, 7)):
    for name, idx in nearest.items():
        shown = torch.cat([val_idx[query, None], train_idx[idx[query, :7]]])
        labels = dataset.labels[shown]
        colors = [drawing.BLUE if x == labels[0] else drawing.VERMILION for x in labels]
        titles = [dataset.classes[x] for x in labels]
        drawing.row(dataset.load(shown), None, ["black", *colors[1:]], titles, grid=1, name=name)

# %% [markdown]
# Pixels find images that are light and dark at the same positions. The trained encoder finds
# images with similar structure: things on a white background, large vehicles, animals on grass.
# Over all images, more of these are of the same class (see the printed numbers), but by far not
# all. For this airplane, pixels do better.
#
# ## Which classes are confused?
#
# Row by row: how the linear probe on the trained encoder classifies the images of each class, in
# %.


# %%
def confusion(predicted):
    matrix = torch.zeros(len(dataset.classes), len(dataset.classes))
    for label, guess in zip(val_labels, predicted, strict=True):
        matrix[label, guess] += 1
    return 100 * matrix / matrix.sum(1, keepdim=True)  # in percent of each row


predicted = heads["trained"](features["trained"][1]).argmax(1)
drawing.confusion(confusion(predicted), dataset.classes)

# %% [markdown]
# The diagonal is what is right. The largest mistakes are trucks predicted as automobiles (27 %),
# cats as dogs (24 %), automobiles as trucks (21 %), dogs as cats (18 %) and airplanes as ships
# (17 %). Airplanes and ships share a blue background. The others are about shape and content, and
# you might make them, too, at 32 x 32 pixels.
#
# ## Few labels
#
# Images are cheap, labels are expensive. How many labels does the probe need? We train it again
# with 1, 5, 20, 100 and 500 labels per class. The labels are drawn at random, so we average three
# draws. The vertical lines go from the lowest draw to the highest.


# %%
def few_labels(name, n, order):
    few = torch.cat([order[train_labels[order] == c][:n] for c in train_labels.unique()])
    train_x, val_x = features[name]
    return accuracy(linear_probe(train_x[few], train_labels[few])(val_x).argmax(1))


numbers = (1, 5, 20, 100, 500)
orders = [torch.randperm(IMAGES, generator=torch.Generator().manual_seed(i)) for i in range(3)]
found = {name: [[few_labels(name, n, order) for order in orders] for n in numbers] for name in knn}
drawing.draws(found, numbers, "labels per class", "validation accuracy, %")

# %% [markdown]
# Draw a horizontal line in your mind: how many labels per class do pixels need to reach what the
# trained encoder reaches with 20? About 500, 25 times as many.
#
# This is why self-supervised learning is useful: the encoder has learned from images without
# labels, and the probe needs few. We have not measured what the same network reaches if it is
# trained on these labels alone.
#
# ## Exercises
#
# **1. How many neighbors?** Measure the k-NN accuracy of the trained encoder for *k* = 1, 5, 20,
# 100 and 300. Why is a very small *k* bad? Why is a very large one?
#
# <details><summary>Solution</summary>
#
# ```python
# for k in (1, 5, 20, 100, 300):
#     votes = train_labels[neighbors(*features["trained"], k)]
#     print(f"k = {k:3}: {accuracy(votes.mode().values):.1f} %")
# ```
#
# The best *k* lies between 20 and 100. With *k* = 1, one odd neighbor decides. With *k* = 300 the
# vote includes images that are not similar any more: there are only about 1,000 images of each
# class.
#
# </details>
#
# **2. More layers.** The last layer is not always the best one. `get_intermediate_layers(images,
# 4)` of the encoder returns the tokens of all four layers. Average the tokens of each layer, and
# train a linear probe on all 4 x 96 = 384 numbers.
#
# <details><summary>Solution</summary>
#
# ```python
# @torch.no_grad()
# def extract_layers(indices):
#     rows = []
#     for images in eval_batches(dataset, indices, batch_size=100):
#         layers = encoder.get_intermediate_layers(images, 4)  # 4 tensors (B, 64, 96)
#         rows.append(torch.cat([x.mean(dim=1) for x in layers], dim=1))
#     return torch.cat(rows)  # (n, 384)
#
#
# train_x, val_x = extract_layers(train_idx), extract_layers(val_idx)
# mean, std = train_x.mean(0), train_x.std(0)
# head = linear_probe((train_x - mean) / std, train_labels)
# print(f"last layer {linear['trained']:.1f} %", end=", ")
# print(f"four layers {accuracy(head((val_x - mean) / std).argmax(1)):.1f} %")
# ```
#
# Four layers are some points better. The last layer of the encoder serves the predictor: it has to
# hold what the predictor needs, not what a classifier needs. Part of the content is easier to find
# in the layers before. The paper also uses the last four layers for some of its linear probes
# (Appendix A.2).
#
# </details>
#
# **3. What do pixels confuse?** Draw the confusion matrix of the linear probe on pixels. Which
# mistakes does the trained encoder not make? Think of the color of the background.
#
# <details><summary>Solution</summary>
#
# ```python
# predicted = heads["pixels"](features["pixels"][1]).argmax(1)
# drawing.confusion(confusion(predicted), dataset.classes)
# ```
#
# The diagonal is lower in all rows. With pixels, animals are predicted as vehicles, or vehicles as
# animals, about twice as often as with the trained encoder. Cats and dogs are confused by both:
# they differ in small things only.
#
# </details>
