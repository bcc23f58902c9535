"""What has the encoder learned? Frozen features, and simple readers on top of them.

    python probe.py runs/vit_tiny_cifar10                              # kNN and linear probe
    python probe.py vit_nano_cifar10                                   # the weights that come along
    python probe.py runs/vit_tiny_cifar10 --data shapes                # other pictures, other tasks
    python probe.py runs/vit_tiny_cifar10 --per-class 13               # few labels
    python probe.py runs/vit_tiny_cifar10 --finetune                   # train the encoder too
    python probe.py IN1K-vit.h.14-300e.pth.tar --data path/to/folder   # the released weights
    python probe.py facebook/ijepa_vith14_1k --data cifar100           # and Hugging Face's
    python probe.py runs/vit_tiny_cifar10 --export vit_tiny            # for transformers and timm

The protocol is that of Assran et al., CVPR 2023, Appendix A.2: the patches of a layer are averaged
to one vector an image; a linear classifier, or batch norm and a linear classifier, reads the last
layer or the last four; learning rate and weight decay are swept. Where the paper is silent, on the
choice among them, it is made here on held-out training images: the test set is read once, by the
winner. Raw pixels and the same encoder untrained stand beside it.

The report (probe.json, and pictures) goes beside the run, into probe_<data>; features are kept in
the folder features, and not computed twice.

How to find one's way: `main` and `evaluate`, at the end, are the whole of an evaluation. Above:

    features          an image as one vector: the mean of its patches
    neighbours        kNN, free of choices
    linear probe      a sweep of linear heads on stored features
    augmented probe   the same on random crops, with the paper's optimizer
    fine-tuning       the encoder trained too
    low-shot          a linear probe with few labels
    health            RankMe, spread, confusion matrix
    checkpoints       encoders read from files of three kinds, and exported
    comparing         raw pixels beside encoders, for the end of a training run
    which pictures    a set split in three: to learn from, to choose on, to report on
    features, kept    computed by all processes, once, and stored
    pictures          confusion matrix, neighbours, patches as colours
    command line      options, the three protocols, the report

Letters, in every shape comment of this file:

    n  images             C  classes                           S  seeds
    D  feature width      Q  settings: pairs of rate, decay    b  images in a batch
    k  neighbours         F  numbers of one image: D, several times D, or its pixels
"""

import copy
import dataclasses
import hashlib
import io
import json
import math
import pickletools
import re
import shlex
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from itertools import islice, zip_longest
from pathlib import Path
from types import UnionType
from typing import IO, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (
    MEAN,
    NAMED,
    STD,
    Folder,
    Pictures,
    Place,
    Plan,
    UserError,
    autocast,
    bf16_pays,
    cores,
    default_sizes,
    enlarge,
    eval_batches,
    fingerprint,
    generator_for,
    has_test,
    hold_out,
    load_data,
    main_first,
    one_line,
    option,
    parse_options,
    placed,
    progress,
    run_script,
    train_batches,
    whole_file,
    writing,
)
from ijepa import (
    IJEPA,
    MODELS,
    IJEPAConfig,
    Range,
    ViT,
    cosine,
    grid_of,
    init_weights,
    learning_rate,
    sincos_positions,
)

# ------------------------------------------------------------------------------------- features


def pooled_features(
    encoder: ViT,
    batches: Iterable[Tensor],
    layers: int = 1,
    device: torch.device | str | None = None,
    bf16: bool = False,
) -> Tensor:
    """One vector an image: the average over patches of each of the last layers (Appendix A.2).

    Args:
        encoder: the frozen network.
        batches: normalised images, each batch (b, C, H p, W p) float32, of any size and number.
        layers: how many of the last layers; each goes through the last norm.
        device: where to compute; the encoder is moved there. By default where the encoder is.
        bf16: run the layers in bfloat16; averages are taken in float32 either way.
    Returns:
        (n, layers * D) float32 on the CPU, the deepest layer last.
    Raises:
        ValueError: no images, no such number of layers, or features that are not finite; the
            message names the first such layer and the number of images.
    """
    depth = len(encoder.blocks)
    if not 1 <= layers <= depth:
        raise ValueError(f"layers is {layers}: the encoder has {depth}")
    device = encoder.pos_embed.device if device is None else torch.device(device)
    encoder.to(device)
    features = []
    for images in batches:
        with torch.inference_mode():
            images = images.to(device, non_blocking=True)
            features.append(pooled(encoder, images, layers, bf16))
            if len(features) > 1:
                # One batch late: the device computes this batch while the one before is copied.
                features[-2] = features[-2].cpu()
    if not features:
        raise ValueError("there are no images to take features of")
    features[-1] = features[-1].cpu()
    # Outside of inference mode, so that a head can be trained on the result.
    whole = torch.cat(features)  # (n, layers * D)

    broken = _broken(whole.view(len(whole), layers, -1))  # (n, layers)
    if broken.any():
        first = int(broken.any(0).int().argmax())
        raise ValueError(
            f"the features of layer {depth - layers + first + 1} of {depth} are not finite "
            f"for {int(broken[:, first].sum())} of {len(whole)} images"
        )
    return whole


@torch.inference_mode()
def pooled(encoder: ViT, images: Tensor, layers: int, bf16: bool) -> Tensor:
    """Of one batch, on its device: (b, C, H p, W p) -> (b, layers * D) float32."""
    with autocast(images.device, bf16):
        outputs = encoder.last_layers(images, layers)  # layers x (b, N, D)
    return torch.cat([x.float().mean(1) for x in outputs], dim=1)


def at_once(encoder: ViT, size: int | None, device: torch.device, train: bool = False) -> int:
    """How many pictures of `size` pixels go through an encoder at a time, to bound the memory.

    To look, so many that the inside of one MLP is half a gigabyte in float32. To train, so many
    that what all layers keep for the gradients is about 16 GB on a GPU, 2 GB on a CPU.
    """
    rows, columns = encoder.grid if size is None else grid_of(size, encoder.patch_size)
    tokens = rows * columns * encoder.embed_dim  # numbers between two layers, for one picture
    if train:
        # Of each layer are kept: 2 norms, q k v, what attention gives, and 2 x 4 inside of the MLP,
        # each of them 4 bytes a number.
        kept = 4 * 15 * tokens * len(encoder.blocks)
        return max(1, int((16e9 if device.type == "cuda" else 2e9) / kept))
    return min(max(2**25 // tokens, 8), 2048 if device.type == "cuda" else 500)


def _broken(features: Tensor) -> Tensor:
    """Which vectors hold a NaN or an infinity: (..., D) -> (...)."""
    # A sum is finite only if all its terms are.
    return ~features.sum(-1, dtype=torch.float32).isfinite()


def _check(name: str, x: Tensor, y: Tensor | None = None, classes: int | None = None) -> None:
    """Raise ValueError if features (n, D) or labels (n,) cannot be used, and say why."""
    if x.ndim != 2 or len(x) == 0:
        raise ValueError(f"{name}: features must be (images, width), not {tuple(x.shape)}")
    if count := int(_broken(x).sum()):
        raise ValueError(f"{name}: the features of {count} of {len(x)} images are not finite")
    if y is None:
        return
    if y.shape != x.shape[:1]:
        raise ValueError(f"{name}: {len(x)} images, but labels of shape {tuple(y.shape)}")
    if y.is_floating_point() or int(y.min()) < 0:
        raise ValueError(f"{name}: labels must be whole numbers from 0")
    if classes is not None and int(y.max()) >= classes:
        raise ValueError(f"{name}: label {int(y.max())}, but there are only {classes} classes")


# ----------------------------------------------------------------------------------- neighbours


class Prediction(NamedTuple):
    """What the k nearest training images say about n images."""

    weighted: Tensor  # (n,) int64 classes; a neighbour's vote is exp(similarity / temperature)
    plain: Tensor  # (n,) int64 classes; one neighbour, one vote
    neighbours: Tensor  # (n, k) int64 rows of `train_x`, the nearest first
    similarity: Tensor  # (n, k) float32 cosine similarity to them


@torch.no_grad()
def knn(
    train_x: Tensor,
    train_y: Tensor,
    x: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
    chunk: int = 1024,
    train_chunk: int = 8192,
) -> Prediction:
    """Classes by the k nearest training images (cosine), as DINO and its successors report it.

    Not in the paper, which only has linear probes; free of choices, so it is what training shows.

    Args:
        train_x, train_y: (n_train, D) and (n_train,) int64 classes from 0.
        x: (n, D), the images to classify; the work is done on its device.
        k, temperature: neighbours, and the scale on which similarity becomes weight.
        num_classes: the largest training label plus one, by default.
        chunk, train_chunk: so many x so many similarities exist at a time; they do not alter the
            answer.
    Returns:
        A `Prediction` on the device of `x`. Of equally near images the first in `train_x` counts
        as nearer; of classes with equally many votes the lowest wins.
    Raises:
        ValueError: fewer than k training images, shapes that do not fit, features not finite.
    """
    _check("training set", train_x, train_y, num_classes)
    _check("images to classify", x)
    if train_x.shape[1] != x.shape[1]:
        raise ValueError(f"features of width {train_x.shape[1]} and {x.shape[1]} do not compare")
    if not 1 <= k <= len(train_x):
        raise ValueError(f"{k} neighbours asked of {len(train_x)} training images")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}: it must be positive")
    num_classes = num_classes or int(train_y.max()) + 1

    queries = F.normalize(x.float(), dim=1).split(chunk)
    best: list = [None] * len(queries)  # (similarity, neighbours) so far, both (b, k) or narrower
    start = 0
    for block in train_x.split(train_chunk):
        block = F.normalize(block.to(x.device, torch.float32), dim=1)  # (b', D)
        for i, query in enumerate(queries):
            similarity, idx = _top(query @ block.T, k)
            idx += start
            if best[i] is not None:  # earlier images stand first, so they win the ties
                similarity = torch.cat([best[i][0], similarity], dim=1)
                idx = torch.cat([best[i][1], idx], dim=1)
            order = similarity.argsort(dim=1, descending=True, stable=True)[:, :k]
            best[i] = similarity.gather(1, order), idx.gather(1, order)
        start += len(block)
    similarity = torch.cat([s for s, _ in best])  # (n, k)
    neighbours = torch.cat([idx for _, idx in best])  # (n, k)

    labels = train_y.to(x.device, torch.int64)[neighbours]  # (n, k)
    # Only ratios of weights matter: the nearest one weighs 1, so a small temperature overflows not.
    weights = ((similarity - similarity[:, :1]).double() / temperature).exp()
    votes = torch.zeros(2, len(x), num_classes, dtype=torch.float64, device=x.device)
    for j in range(k):  # one neighbour at a time: a GPU too adds in this order, and only in this
        votes[0].scatter_add_(1, labels[:, j : j + 1], weights[:, j : j + 1])
        votes[1].scatter_add_(1, labels[:, j : j + 1], torch.ones_like(weights[:, j : j + 1]))
    weighted, plain = votes.argmax(2)  # the first of equals
    return Prediction(weighted, plain, neighbours, similarity)


def _top(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, and of equals the first: (b, n) -> values and indices (b, k)."""
    n = similarity.shape[1]
    if k >= n:
        idx = torch.arange(n, device=similarity.device).expand(len(similarity), n)
        return similarity, idx.clone()
    # topk is fast, but of equal values takes any. One more than k tells where that could matter.
    values, idx = similarity.topk(k + 1, dim=1)
    tied = values[:, k - 1] == values[:, k]
    idx = idx[:, :k]
    if tied.any():
        rows, threshold = similarity[tied], values[tied, k - 1 : k]
        above, equal = rows > threshold, rows == threshold
        missing = k - above.sum(1, keepdim=True)
        taken = above | (equal & (equal.cumsum(1) <= missing))  # k in each row
        idx[tied] = taken.nonzero()[:, 1].view(-1, k)
    idx = idx.sort(dim=1).values
    return similarity.gather(1, idx), idx


# --------------------------------------------------------------------------------- linear probe

HEADS = ("linear", "bn")
# What a sweep tries. The rate hardly matters with the optimizer of `_Heads`; the decay does: none
# for 50,000 images and a few hundred dimensions, much for a few images a class.
RATES = (0.03, 0.3)
DECAYS = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
MOMENTUM = 0.9
BN_EPS = 1e-6  # beside variances that are 1 on average
CURVATURE_EPS = 1e-6  # the same: directions with less variance than this are learned more slowly
CHUNK = 2048  # images at a time where all heads of a kind look at them
ROWS = 16384  # images at a time where features are transformed, to bound the memory


@dataclass(frozen=True)
class Choice:
    """The setting that did best on validation images, and what it scored."""

    feature: str
    head: str  # "linear" or "bn"
    rate: float
    decay: float
    val: tuple[float, ...]  # accuracy in [0, 1], one entry a seed
    test: tuple[float, ...]  # the same; empty without a test set
    predictions: Tensor | None  # (S, n_test) int64 classes on the CPU; None without a test set
    weight: Tensor  # (S, C, D) on the CPU: logits = features @ weight[s].T + bias[s],
    bias: Tensor  # (S, C)               whichever the head, batch norm included

    val_mean = property(lambda self: mean_std(self.val)[0])
    val_std = property(lambda self: mean_std(self.val)[1])
    test_mean = property(lambda self: mean_std(self.test)[0])
    test_std = property(lambda self: mean_std(self.test)[1])


class GridRow(NamedTuple):
    """One setting of the sweep and its accuracy on validation images."""

    feature: str
    head: str
    rate: float
    decay: float
    val: tuple[float, ...]  # accuracy in [0, 1], one entry a seed


@dataclass(frozen=True)
class LinearProbe:
    """What came of a sweep."""

    best: Choice  # of everything: the paper's "best number among" features and heads
    by_feature: dict[str, Choice]  # the best of each feature; `best` is one of them
    grid: list[GridRow]  # every setting


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation: 0 for a single value, NaN and NaN for none."""
    if not values:
        return math.nan, math.nan
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of right answers: (n,) and (n,) -> [0, 1]."""
    return (predicted.cpu() == labels.cpu()).double().mean().item()


def linear_probe(
    train_x: Tensor | Mapping[str, Tensor],
    train_y: Tensor,
    val_x: Tensor | Mapping[str, Tensor],
    val_y: Tensor,
    test_x: Tensor | Mapping[str, Tensor] | None = None,
    test_y: Tensor | None = None,
    *,
    heads: Sequence[str] = HEADS,
    rates: Sequence[float] = RATES,
    decays: Sequence[float] = DECAYS,
    seeds: int | Sequence[int] = 3,
    epochs: int = 15,
    min_steps: int = 300,
    batch_size: int = 1024,
    num_classes: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> LinearProbe:
    """Sweep linear classifiers over frozen features (Appendix A.2), the whole grid in one pass.

    All members of the grid (feature x head x rate x decay x seed) are trained at once, and none
    touches another: one product of matrices serves all settings of a head. The problem is convex
    and starts from zero: seeds differ in the order of the images alone.

    Differs from the paper in the optimizer, see `_Heads`, and in that batch norm takes mean and
    variance from the whole training set, which on stored features costs nothing.

    Args:
        train_x: (n, D) features, or several kinds of them by name, of any width. They may stay on
            the CPU.
        train_y: (n,) int64 classes from 0.
        val_x, val_y: held out; the choice is made on them, by the mean over seeds. Of equals, the
            first in the order features, heads, rates, decays.
        test_x, test_y: read once, by the best setting of each feature.
        heads: "linear" and "bn" (batch norm without learned scale and shift, then linear).
        rates, decays: what to try, relative to the features' scale. The rate falls along a cosine.
            A decay is a penalty of decay / 2 times the squared weights beside the mean cross
            entropy: 1 / (n C) in the terms of scikit-learn.
        seeds: how many (0, 1, ...), or which.
        epochs, min_steps: at least so many passes and so many steps, so that a small set is
            learned too.
        batch_size: images a step; a little more or less, to divide an epoch evenly.
        num_classes: by default what the labels say.
        device: where to compute; by default where the features are.
        progress: show a bar, if it takes long and there is a terminal.
    Raises:
        ValueError: shapes, names or labels that do not fit, features that are not finite (how
            many), an empty grid, an unknown head.
    """
    train_x, val_x, test_x = _named(train_x), _named(val_x), _named(test_x)
    if unknown := [head for head in heads if head not in HEADS]:
        raise ValueError(f"unknown head {unknown[0]!r}: choose from {HEADS}")
    seeds = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not (train_x and heads and rates and decays and seeds):
        raise ValueError("an empty grid: give a feature, head, rate, decay and seed at least")
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"{epochs} epochs of batches of {batch_size}: both must be positive")
    if (test_x is None) != (test_y is None):
        raise ValueError("a test set needs features and labels")
    splits = [("training", train_x, train_y), ("validation", val_x, val_y)]
    if test_x is not None:
        splits.append(("test", test_x, test_y))
    if num_classes is None:
        num_classes = max(int(y.max()) + 1 for _, _, y in splits if len(y))
    for split, features, labels in splits:
        if features.keys() != train_x.keys():
            raise ValueError(f"{split} features {list(features)} are not {list(train_x)}")
        for name, x in features.items():
            _check(f"{split} set, {name}", x, labels, num_classes)
            if x.shape[1] != (width := train_x[name].shape[1]):
                raise ValueError(f"{split} set, {name}: width {x.shape[1]}, not {width}")

    device = torch.device(device or next(iter(train_x.values())).device)
    settings = [(float(rate), float(decay)) for rate in rates for decay in decays]  # Q
    stacks = {}
    for name, x in train_x.items():
        moments = _moments(x, device)
        for head in heads:
            stacks[name, head] = _Heads(head, *moments, num_classes, settings, len(seeds))
    _train(stacks, train_x, train_y, seeds, epochs, min_steps, batch_size, progress)
    return _choose(stacks, settings, val_x, val_y, test_x, test_y)


def _choose(
    stacks: Mapping[tuple[str, str], "_Stack"],
    settings: Sequence[tuple[float, float]],
    val_x: Mapping[str, Tensor],
    val_y: Tensor,
    test_x: Mapping[str, Tensor] | None,
    test_y: Tensor | None,
) -> LinearProbe:
    """Of trained heads by feature and kind: the best on validation images reads the test images."""
    grid, by_feature = [], {}
    for name in val_x:
        rows = []  # (row of the grid, the stack it is in, its place there)
        for (feature, head), stack in stacks.items():
            if feature != name:
                continue
            hits = stack.predict(val_x[name]) == val_y.to(stack.weight.device)  # (S, Q, n)
            shares = hits.double().mean(2).T.tolist()  # (Q, S)
            for q, (setting, val) in enumerate(zip(settings, shares, strict=True)):
                rows.append((GridRow(name, head, *setting, tuple(val)), stack, q))
        grid += [row for row, _, _ in rows]
        row, stack, q = max(rows, key=lambda r: mean_std(r[0].val)[0])  # the first of equals
        predictions, test = None, ()
        if test_x is not None:
            predictions = stack.predict(test_x[name], only=q)[:, 0].cpu()  # (S, n_test)
            test = tuple((predictions == test_y.cpu()).double().mean(1).tolist())
        by_feature[name] = Choice(*row, test, predictions, *stack.folded(q))
    best = max(by_feature.values(), key=lambda choice: choice.val_mean)
    return LinearProbe(best, by_feature, grid)


def _named(features: Tensor | Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Features by name; a single kind is called "features"."""
    if features is None:
        return None
    return {"features": features} if isinstance(features, Tensor) else dict(features)


@torch.no_grad()
def _moments(x: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and covariance: (n, D) -> (D,) and (D, D), float64 on the device."""
    mean = sum(rows.to(device, torch.float64).sum(0) for rows in x.split(ROWS)) / len(x)
    centred = (rows.to(device, torch.float64) - mean for rows in x.split(ROWS))
    return mean, sum(rows.T @ rows for rows in centred) / len(x)


class _Stack:
    """All heads of one kind on one feature: weights (S, Q, C, D) and biases (S, Q, C, 1)."""

    def __init__(self, first: Tensor, settings: Sequence[tuple[float, float]]):
        """first: (S, C, D), the initial weights, the same for all settings."""
        pairs = torch.tensor(settings, device=first.device)
        self.rates, self.decays = pairs.T[:, :, None, None]  # (Q, 1, 1) each
        self.weight = repeat(first, "s c d -> s q c d", q=len(settings)).clone()
        self.bias = torch.zeros_like(self.weight[..., :1])
        self.weight_velocity = torch.zeros_like(self.weight)
        self.bias_velocity = torch.zeros_like(self.bias)

    def seen(self, x: Tensor) -> Tensor:
        """Features as trained heads look at them: (n, D) -> (n, D)."""
        raise NotImplementedError

    @torch.no_grad()
    def predict(self, x: Tensor, only: int | None = None) -> Tensor:
        """Classes by all settings, or by one: (n, D) -> (S, Q or 1, n) int64."""
        settings = slice(None) if only is None else slice(only, only + 1)
        weight, bias = self.weight[:, settings], self.bias[:, settings]
        logits = (weight @ self.seen(rows).T + bias for rows in x.split(CHUNK))  # (S, Q, C, b)
        return torch.cat([rows.argmax(2) for rows in logits], dim=2)


class _Heads(_Stack):
    """Heads that start from zero and learn by SGD along the features' principal axes.

    Features vary a million times more in some directions than in others, and a sweep of plain SGD
    measures how well it copes with that. (An untrained vit_tiny, 20,000 CIFAR-10 images: 37 % by
    the best of SGD and AdamW with 100 epochs, 45 % by this and by scikit-learn.) So features are
    turned to their principal axes, where the loss is curved by about the variance along each axis,
    and each axis gets its own rate: rate / (variance + decay). To turn them, to take out the mean
    and to divide all by *one* number alters neither what a linear head can say nor which weights
    are best; only how soon they are found, and that rates and decays mean the same for every
    encoder.

    Batch norm divides each dimension by its own standard deviation instead. That is another
    model: the decay then weighs on weak and strong dimensions alike.
    """

    def __init__(
        self,
        head: str,
        mean: Tensor,
        covariance: Tensor,
        num_classes: int,
        settings: Sequence[tuple[float, float]],
        num_seeds: int,
    ):
        first = torch.zeros(num_seeds, num_classes, len(mean), device=mean.device)
        super().__init__(first, settings)
        variance = covariance.diagonal()
        spread = variance.mean().sqrt().expand_as(variance)  # one number
        if head == "bn":
            spread = (variance + BN_EPS * variance.mean()).sqrt()  # one a dimension
        # Features that do not vary at all have no scale; without their mean they are zeros anyway.
        spread = torch.where(spread > 0, spread, torch.ones_like(spread))
        curvature, axes = torch.linalg.eigh(covariance / torch.outer(spread, spread))
        self.mean = mean  # (D,)
        self.transform = axes / spread[:, None]  # (D, D): centred features to principal axes
        curvature = curvature.clamp_min(0).float() + CURVATURE_EPS
        self.weight_rates = self.rates / (curvature + self.decays)  # (Q, 1, D)

    def seen(self, x: Tensor) -> Tensor:
        """Centred, scaled and along the principal axes."""
        x = x.to(self.weight) - self.mean.float()
        return x @ self.transform.float()

    def step(self, x: Tensor, targets: Tensor, factor: float) -> None:
        """One step of SGD with Nesterov momentum for all, at `factor` times their rates.

        x: (S, b, D) features as `seen`, a batch for each seed; targets: (S, 1, C, b) one-hot.
        """
        # Cross entropy of a linear map has a short gradient: (softmax(logits) - targets) x^T / b.
        logits = torch.bmm(self.weight.flatten(1, 2), x.mT).view(*self.bias.shape[:3], -1)
        error = (logits + self.bias).softmax(2).sub_(targets).div_(x.shape[1])  # (S, Q, C, b)
        weight_gradient = torch.bmm(error.flatten(1, 2), x).view_as(self.weight)
        weight_gradient.addcmul_(self.weight, self.decays)
        bias_gradient = error.sum(3, keepdim=True)
        for value, velocity, gradient, rates in (
            (self.weight, self.weight_velocity, weight_gradient, self.weight_rates),
            (self.bias, self.bias_velocity, bias_gradient, self.rates),
        ):
            velocity.mul_(MOMENTUM).add_(gradient)
            gradient.add_(velocity, alpha=MOMENTUM)  # Nesterov's look ahead
            value.addcmul_(gradient, rates, value=-factor)

    def folded(self, q: int) -> tuple[Tensor, Tensor]:
        """One setting as a map from features as they come to logits: (S, C, D) and (S, C)."""
        weight = self.weight[:, q].double() @ self.transform.T
        bias = self.bias[:, q, :, 0] - weight @ self.mean
        return weight.float().cpu(), bias.float().cpu()


@torch.no_grad()
def _train(
    stacks: dict[tuple[str, str], _Heads],
    train_x: dict[str, Tensor],
    train_y: Tensor,
    seeds: Sequence[int],
    epochs: int,
    min_steps: int,
    batch_size: int,
    progress: bool,
) -> None:
    """Train all heads of all stacks in one pass; keeps a turned copy of the features for each."""
    turned = {
        key: torch.cat([stack.seen(rows).to(rows.device) for rows in train_x[key[0]].split(ROWS)])
        for key, stack in stacks.items()
    }
    some = next(iter(stacks.values())).weight  # (S, Q, C, D)
    n, classes, train_y = len(train_y), some.shape[2], train_y.cpu()
    batches = max(1, round(n / batch_size))  # of nearly equal size: no remainder, none tiny
    epochs = max(epochs, math.ceil(min_steps / batches))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    step, total = 0, epochs * batches
    with tqdm(total=total, desc="linear probe", delay=2, disable=None if progress else True) as bar:
        for _ in range(epochs):
            order = torch.stack([torch.randperm(n, generator=g) for g in generators])  # (S, n)
            for idx in order.tensor_split(batches, dim=1):  # (S, b)
                targets = F.one_hot(train_y[idx], classes).mT[:, None].to(some)  # (S, 1, C, b)
                factor = cosine(1.0, 0.0, step / total)
                for key, stack in stacks.items():
                    x = turned[key].index_select(0, idx.flatten().to(turned[key].device))
                    stack.step(x.to(some).view(*idx.shape, -1), targets, factor)
                step += 1
                bar.update()


# ------------------------------------------------------------- linear probe on augmented pictures

# What Appendix A.2 sweeps on ImageNet, and 0.5, which narrow encoders want: features of vit_tiny
# on 12,000 CIFAR-10 pictures gave 36 % by 0.05, 40 % by 0.5 and no more by 1 and 2. The rates are
# reference rates, see `augmented_probe`.
REFERENCE_RATES = (0.01, 0.05, 0.001, 0.5)
REFERENCE_DECAYS = (0.0005, 0.0)
TRUST = 0.001  # of LARS: a step is this share of the weights' norm, times the rate
HEAD_STD = 0.01  # of the initial weights, as in MAE; LARS cannot leave zero


class Examples(NamedTuple):
    """Some pictures of a set, and what they are."""

    data: Pictures | Folder
    index: Tensor  # (n,) int64, which pictures
    labels: Tensor  # (n,) int64 classes from 0, of these pictures


def augmented_batch(n: int) -> int:
    """Pictures a step for a training set of n: 16,384 for ImageNet, 1/78 of it for smaller sets.

    LARS moves weights by a share of their norm, so it is the number of steps that decides how far
    they get. An epoch of ImageNet has 78; other sets get as many, of 64 pictures at the least.
    """
    return _fit_batch(min(16384, max(64, n // 78 // 64 * 64)), n)


def _fit_batch(batch_size: int, n: int) -> int:
    """No more than there are; then a multiple of 64, for processes to share, or 2, for pairs."""
    return batch_size if batch_size <= n else n // 64 * 64 or n // 2 * 2 or n


def reference_factor(step: int, batch_size: int, n: int, epochs: int) -> float:
    """By what the rate is multiplied: 1, and a tenth after each 15 of 50 epochs (Appendix A.2)."""
    return 0.1 ** (50 * step * batch_size // (15 * epochs * n))


def augmented_probe(
    encoder: ViT,
    train: Examples,
    choose: Examples,
    report: Examples,
    place: Place,
    *,
    num_classes: int,
    layers: int = 4,
    rates: Sequence[float] = REFERENCE_RATES,
    decays: Sequence[float] = REFERENCE_DECAYS,
    seeds: int | Sequence[int] = 3,
    epochs: int = 50,
    batch_size: int | None = None,
    crop_scale: Range = (0.08, 1.0),
    flip: bool = True,
    size: int | None = None,
    bf16: bool = False,
    workers: int = 0,
) -> LinearProbe:
    """Sweep linear classifiers over random crops, with the optimizer of Appendix A.2, in one pass.

    Crops and flips of the training pictures stream through the frozen encoder, once for the whole
    grid (feature x head x rate x decay x seed). The features are the last layer and the
    concatenation of the last `layers`; the heads are linear, and batch norm (without learned scale
    and shift) + linear. Seeds differ in the heads' initial weights: all see the same crops.

    LARS copes less well than `linear_probe` with features that vary much in some directions and
    little in others: on the same stored features of vit_nano and shapes (one seed) it read 57 % of
    `count`, where `linear_probe` reads 62 %.

    However a batch is divided among processes and micro-batches, the heads see it whole: features
    are gathered, and every process computes the heads alike. Batch norm uses the moments of the
    batch to learn, and the average of all to predict: the encoder is frozen, so the first moments
    are as good as the last.

    Args:
        encoder: the frozen network.
        train, choose, report: to learn from; to choose the setting on, as `linear_probe` does;
            read once. The last two are seen whole, without crops.
        place: where this process runs. All processes get the answer.
        num_classes: C.
        layers: how many layers make the second feature; with 1 there is only the first.
        rates: for 256 pictures of ImageNet, so 64 times these at its batch of 16,384; the same at
            the `augmented_batch` of any set, and at other batches in proportion.
        decays: penalty of decay / 2 times the squared weights.
        seeds: how many (0, 1, ...), or which.
        epochs: passes over the training pictures; the rate falls to a tenth after each 30 %.
        batch_size: pictures a step, over all processes; by default `augmented_batch`.
        crop_scale, flip: share of the picture in a random crop, and whether half are mirrored.
        size: pixels a side, to which pictures in memory are enlarged once they are cropped.
        bf16: run the encoder in bfloat16; heads are float32 either way.
        workers: processes that decode the pictures of a folder.
    Returns:
        A `LinearProbe`; the features are called "last layer" and "last 4 layers".
    Raises:
        ValueError: the encoder has no such number of layers, or gives features that are not finite.
        UserError: the batch does not divide into the processes, or pictures cannot be read.
    """
    seeds = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    n, usual = len(train.index), augmented_batch(len(train.index))
    batch_size = _fit_batch(batch_size or usual, n)
    settings = [(float(rate), float(decay)) for rate in rates for decay in decays]  # Q
    kinds = {"last layer": slice(-encoder.embed_dim, None)}
    if layers > 1:
        kinds[f"last {layers} layers"] = slice(None)
    how = {"layers": layers, "size": size, "bf16": bf16, "workers": workers}
    # First, since an encoder whose features are not finite is better refused at once.
    choose_x = shared_features(encoder, choose.data, choose.index, place, everywhere=True, **how)
    stacks = {
        (name, head): _LARSHeads(
            head, choose_x[:, kind].shape[1], num_classes, settings, seeds,
            64 * batch_size / usual, place.device,
        )
        for name, kind in kinds.items()
        for head in HEADS
    }  # fmt: skip

    accum = micro_batches(batch_size, at_once(encoder, size, place.device), place)
    plan = Plan(
        0, train.index, batch_size, accum, None, crop_scale, flip, place.rank, place.world_size
    )
    label_of = _label_table(train, place.device)
    steps = range(math.ceil(epochs * n / batch_size))
    batches = train_batches(train.data, plan, steps, place.device, workers)
    lost = torch.zeros((), dtype=torch.int64, device=place.device)
    for step in progress(steps, "linear probe", " steps") if place.main else steps:
        features, labels = [], []
        for batch in islice(batches, accum):
            x = pooled(encoder, enlarge(batch.images, size), layers, bf16)
            y = label_of[batch.index.to(place.device, non_blocking=True)]
            features.append(_gathered(x, place))
            labels.append(_gathered(y, place))
        x, y = torch.cat(features), torch.cat(labels)  # (b, layers * D) and (b,): the whole batch
        lost += _broken(x).sum()
        factor = reference_factor(step, batch_size, n, epochs)
        for (name, _), stack in stacks.items():
            stack.step(x[:, kinds[name]], y, factor)
    if lost:
        raise ValueError(f"the features of {int(lost)} crops of training pictures are not finite")

    report_x = shared_features(encoder, report.data, report.index, place, everywhere=True, **how)
    choose_x, report_x = (
        {name: x[:, kind] for name, kind in kinds.items()} for x in (choose_x, report_x)
    )
    return _choose(stacks, settings, choose_x, choose.labels, report_x, report.labels)


def micro_batches(batch_size: int, most: int, place: Place, unit: int = 1) -> int:
    """How many equal parts of at most `most` pictures a process makes of its share of a batch.

    unit: so many pictures stay together. Raises UserError if the batch cannot be divided.
    """
    units, rest = divmod(batch_size, place.world_size * unit)
    if rest or not units:
        together = f" x {unit} pictures that stay together" if unit > 1 else ""
        raise UserError(
            f"a batch of {batch_size} pictures does not divide into {place.world_size} "
            f"process(es){together}: choose another --batch-size"
        )
    fits = max(1, most // unit)
    return next(k for k in range(1, units + 1) if units % k == 0 and units // k <= fits)


def _label_table(examples: Examples, device: torch.device) -> Tensor:
    """Labels by the number of the picture in its set, which is how batches name them: (N,)."""
    table = torch.full((len(examples.data),), -1)
    table[examples.index] = examples.labels
    return table.to(device)


def _gathered(x: Tensor, place: Place) -> Tensor:
    """The rows of all processes in the order of their ranks: (b, ...) -> (world_size * b, ...)."""
    if place.world_size == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(place.world_size)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


class _LARSHeads(_Stack):
    """Heads that learn by LARS (You et al. 2017), each a layer of its own.

    A gradient, decay included, is scaled to TRUST times the norm of the weights before it enters
    the momentum:

        g <- (g + decay w) x TRUST |w| / (|g| + decay |w|)

    Biases neither decay nor are they scaled. The rate stands outside of the momentum, as in MAE.
    """

    def __init__(
        self,
        head: str,
        width: int,
        num_classes: int,
        settings: Sequence[tuple[float, float]],
        seeds: Sequence[int],
        scale: float,
        device: torch.device,
    ):
        drawn = [
            torch.randn(num_classes, width, generator=generator_for(seed, "head")) for seed in seeds
        ]
        super().__init__(HEAD_STD * torch.stack(drawn).to(device), settings)
        self.rates = scale * self.rates
        self.norm = nn.Identity()
        if head == "bn":  # `momentum=None`: the running moments are those of all steps, averaged
            self.norm = nn.BatchNorm1d(width, BN_EPS, momentum=None, affine=False).to(device)

    def seen(self, x: Tensor) -> Tensor:
        """Normalised by the moments of all batches, where there is a batch norm."""
        return self.norm.eval()(x.to(self.weight))

    @torch.no_grad()
    def step(self, x: Tensor, y: Tensor, factor: float) -> None:
        """One step for all, at `factor` times their rates; x: (b, D) features, y: (b,) classes."""
        x = self.norm.train()(x)
        weight_gradient = torch.zeros_like(self.weight)
        bias_gradient = torch.zeros_like(self.bias)
        for rows, classes in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            error = (self.weight @ rows.T + self.bias).softmax(2)  # (S, Q, C, b)
            error.sub_(F.one_hot(classes, error.shape[2]).T).div_(len(x))
            weight_gradient += error @ rows
            bias_gradient += error.sum(3, keepdim=True)

        norm, gradient_norm = (
            v.flatten(2).norm(dim=2)[..., None, None] for v in (self.weight, weight_gradient)
        )  # (S, Q, 1, 1) each
        # A head that makes no error has no gradient: the last term keeps 0 / 0 away, as in timm.
        trust = TRUST * norm / (gradient_norm + self.decays * norm + 1e-8)
        weight_gradient.addcmul_(self.weight, self.decays).mul_(trust)
        for value, velocity, gradient in (
            (self.weight, self.weight_velocity, weight_gradient),
            (self.bias, self.bias_velocity, bias_gradient),
        ):
            velocity.mul_(MOMENTUM).add_(gradient)
            value.addcmul_(velocity, self.rates, value=-factor)

    def folded(self, q: int) -> tuple[Tensor, Tensor]:
        """One setting as a map from features as they come to logits: (S, C, D) and (S, C)."""
        weight, bias = self.weight[:, q].double(), self.bias[:, q, :, 0].double()
        if isinstance(self.norm, nn.BatchNorm1d):
            weight = weight / (self.norm.running_var.double() + BN_EPS).sqrt()
            bias = bias - weight @ self.norm.running_mean.double()
        return weight.float().cpu(), bias.float().cpu()


# ------------------------------------------------------------------------------------ fine-tuning


@dataclass(frozen=True)
class FineTuneConfig:
    """How the whole network is trained. The defaults are those of low-shot in Appendix A.2."""

    lr: float = 3e-5  # of the head; a layer below has `layer_decay` times that of the one above
    weight_decay: float = 0.05
    batch_size: int = 512  # pictures an optimizer step, over all processes
    epochs: int = 50
    warmup: float = 0.1  # share of the run, as in MAE, like the next
    final_lr: float = 1e-6
    layer_decay: float = 0.75
    label_smoothing: float = 0.1
    rand_augment: tuple[int, int] | None = (2, 9)  # operations a picture, and their strength of 30
    mixup: float = 0.0  # of the Beta distribution that pictures are mixed by; 0: never
    cutmix: float = 0.0
    drop_path: float = 0.0  # how often the last layer is skipped; others less, the first never
    crop_scale: Range = (0.08, 1.0)
    flip: bool = True


def fine_tune_recipe(embed_dim: int, low_shot: bool) -> FineTuneConfig:
    """What suits an encoder of this width: with few labels, or with all of them.

    From 1,024 on (ViT-L) the paper's: Appendix A.2 for few labels, Appendix D for all, which is
    silent on label smoothing; 0.1 as in MAE. Below that the paper is silent. Batches are smaller,
    since the sets are; a drop path of 0.1 is MAE's for ViT-B; rates are 0.3 / width, which suits
    vit_nano (1,000 labels of `kind` of shapes, 25 epochs, one seed: 81, 98 and 99 % of held-out
    pictures by 3e-4, 1e-3 and 3e-3) and meets the paper's from above; in between it is a guess.

    Crops and RandAugment suit photographs. Where classes are patterns of pixels, numbers or
    distances they do harm: there 98 % fell to 93 % with RandAugment, and to 60 % with crops too.
    """
    if embed_dim < 1024:
        narrow = FineTuneConfig(lr=0.3 / embed_dim, batch_size=64)
        if low_shot:
            return narrow
        return dataclasses.replace(narrow, batch_size=256, mixup=0.8, cutmix=1.0, drop_path=0.1)
    if low_shot:
        return FineTuneConfig(weight_decay=0.05 if embed_dim < 1280 else 0.4)
    return FineTuneConfig(
        lr=1e-4, weight_decay=0.04, batch_size=528, mixup=0.8, cutmix=1.0, drop_path=0.25
    )


class Epoch(NamedTuple):
    """What an epoch of fine-tuning came to."""

    seed: int
    epoch: int  # from 1
    loss: float  # mean over its steps
    val: float  # accuracy in [0, 1] on the held-out pictures


@dataclass(frozen=True)
class FineTuned:
    """What came of fine-tuning. No choice was made: the last epoch counts."""

    val: tuple[float, ...]  # accuracy in [0, 1] on pictures held out, one entry a seed
    test: tuple[float, ...]  # the same on the pictures to report on
    predictions: Tensor  # (S, n_report) int64 classes on the CPU
    epochs: list[Epoch]  # those of all seeds


def fine_tune(
    encoder: ViT,
    train: Examples,
    choose: Examples,
    report: Examples,
    place: Place,
    config: FineTuneConfig,
    *,
    num_classes: int,
    seeds: int | Sequence[int] = 1,
    size: int | None = None,
    bf16: bool = False,
    workers: int = 0,
) -> FineTuned:
    """Train a copy of the encoder and a linear head on the mean of its patches (Appendix A.2, D).

    Crops, flips, RandAugment and order depend on the seed and the step alone: neither workers nor
    processes nor micro-batches alter the result by more than rounding. Drop path does: each process
    draws for its own pictures.

    Differs from the paper in RandAugment, which is torchvision's, where MAE has that of timm: a few
    other operations, of a strength that varies a little.

    Args:
        encoder: where to start from. It is left as it is.
        train, choose, report: to learn from; to show progress on, nothing is chosen; read once for
            each seed, at the end.
        config: see `fine_tune_recipe`.
        seeds: how many (0, 1, ...), or which; of everything random. The head starts from zero.
        The others are those of `augmented_probe`.
    Raises:
        UserError: the batch does not divide into the processes, pictures cannot be read, or the
            loss is not finite any more.
    """
    seeds = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    how = (place, size, bf16, workers)
    val, predictions, epochs = [], [], []
    for seed in seeds:
        # What is drawn here is no business of the caller, nor the other way round.
        with torch.random.fork_rng([place.device] if place.device.type == "cuda" else []):
            torch.manual_seed(generator_for(seed, "fine-tune", place.rank).initial_seed())
            network = _Classifier(encoder, num_classes, config.drop_path).to(place.device)
            epochs += _fine_tune(network, train, choose, config, seed, *how)
        val.append(epochs[-1].val)
        predictions.append(_predicted(network, report, *how))
    stacked = torch.stack(predictions)  # (S, n_report)
    test = (stacked == report.labels.cpu()).double().mean(1).tolist()
    return FineTuned(tuple(val), tuple(test), stacked, epochs)


class _Classifier(nn.Module):
    """A copy of an encoder, and a linear head on the mean of its patches."""

    def __init__(self, encoder: ViT, num_classes: int, drop_path: float = 0.0):
        from torchvision.ops import stochastic_depth  # only here: training has no need of it

        super().__init__()
        self.encoder = copy.deepcopy(encoder).requires_grad_(True)
        self.head = nn.Linear(encoder.embed_dim, num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        blocks = self.encoder.blocks
        rates = torch.linspace(0, drop_path, len(blocks)).tolist()
        for block, p in zip(blocks, rates, strict=True):

            def skip(branch, _, output, p=p):  # of some pictures the branch is left out
                return stochastic_depth(output, p, "row", branch.training)

            block.attn.register_forward_hook(skip)
            block.mlp.register_forward_hook(skip)

    def forward(self, images: Tensor) -> Tensor:
        """(b, C, H p, W p) -> logits (b, classes)."""
        return self.head(self.encoder(images).mean(1))


def layer_groups(network: _Classifier, config: FineTuneConfig) -> list[dict]:
    """For AdamW: a group for each layer's matrices, which decay, and one for the rest of it.

    `scale` multiplies the rate: layer_decay ** (L + 1 - l), with l = 0 for the patch embedding, 1
    to L for the blocks, and L + 1 for the last norm and the head (Bao et al., BEiT, ICLR 2022).
    """
    top = len(network.encoder.blocks) + 1
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in network.named_parameters():
        layer = top
        if name.startswith("encoder.patch_embed."):
            layer = 0
        elif name.startswith("encoder.blocks."):
            layer = int(name.split(".")[2]) + 1
        matrix = parameter.ndim > 1
        empty = {
            "params": [],
            "scale": config.layer_decay ** (top - layer),
            "weight_decay": config.weight_decay if matrix else 0.0,
        }
        groups.setdefault((layer, matrix), empty)["params"].append(parameter)
    return list(groups.values())


def _fine_tune(
    network: _Classifier,
    train: Examples,
    choose: Examples,
    config: FineTuneConfig,
    seed: int,
    place: Place,
    size: int | None,
    bf16: bool,
    workers: int,
) -> list[Epoch]:
    """Train the network with one seed."""
    device, cuda, n = place.device, place.device.type == "cuda", len(train.index)
    batch_size = _fit_batch(config.batch_size, n)
    mixing = config.mixup > 0 or config.cutmix > 0
    most = at_once(network.encoder, size, device, train=True)
    accum = micro_batches(batch_size, most, place, unit=2 if mixing else 1)
    plan = Plan(
        seed, train.index, batch_size, accum, None, config.crop_scale, config.flip,
        place.rank, place.world_size, _rand_augment(config),
    )  # fmt: skip
    total = math.ceil(config.epochs * n / batch_size)
    warmup = round(total * config.warmup)
    optimizer = torch.optim.AdamW(layer_groups(network, config), fused=cuda)
    wrapped = network
    if place.world_size > 1:
        wrapped = DistributedDataParallel(
            network, device_ids=[device] if cuda else None, broadcast_buffers=False
        )
    label_of = _label_table(train, device)
    batches = train_batches(train.data, plan, range(total), device, workers)
    steps = range(total)
    if place.main:
        steps = progress(steps, f"fine-tuning, seed {seed}", " steps")
    epochs: list[Epoch] = []
    losses: list[Tensor] = []  # of this epoch, on the device
    for step in steps:
        lr = learning_rate(step, total, warmup, 0.0, config.lr, config.final_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        for micro, batch in enumerate(islice(batches, accum)):
            labels = label_of[batch.index.to(device, non_blocking=True)]
            targets = F.one_hot(labels, network.head.out_features).float()
            images = enlarge(batch.images, size)
            images, targets = mixed(images, targets, config, (seed, "mix", step))
            last = micro == accum - 1
            with nullcontext() if last or wrapped is network else wrapped.no_sync():
                with autocast(device, bf16):
                    logits = wrapped(images)
                smoothing = config.label_smoothing
                loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing) / accum
                loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()

        epoch = (step + 1) * batch_size // n
        if epoch > step * batch_size // n:
            loss = torch.stack(losses).sum() / (len(losses) // accum * place.world_size)
            if place.world_size > 1:
                dist.all_reduce(loss)
            if not math.isfinite(loss):
                raise UserError(
                    f"fine-tuning: the loss is {float(loss)} in epoch {epoch}: try a lower --lr"
                )
            found = _predicted(network, choose, place, size, bf16, workers)
            val = accuracy(found, choose.labels)
            epochs.append(Epoch(seed, epoch, float(loss), val))
            losses = []
            if place.main:
                said = f"loss {loss:.3f}, {100 * val:.1f} % of held-out pictures"
                steps.set_postfix_str(said, refresh=False)
    return epochs


def _rand_augment(config: FineTuneConfig):
    """RandAugment of one picture (Cubuk et al., NeurIPS 2020), or None."""
    from torchvision.transforms import v2

    if config.rand_augment is None:
        return None
    grey = [round(255 * x) for x in MEAN]  # where a picture is turned or moved away
    bilinear = v2.InterpolationMode.BILINEAR
    return v2.RandAugment(*config.rand_augment, interpolation=bilinear, fill=grey)


def mixed(images: Tensor, targets: Tensor, config: FineTuneConfig, key: tuple):
    """MixUp or CutMix, whichever comes up; images (b, C, H, W) and targets (b, classes) float32.

    As in MAE one of the two in each step, and each picture with another that gets the rest of it.
    Here that is the neighbour, (0, 1), (2, 3) and so on, and the random numbers depend on `key`
    alone: so it does not matter into how many parts the batch has been divided.
    """
    from torchvision.transforms import v2

    kinds = ((v2.MixUp, config.mixup), (v2.CutMix, config.cutmix))
    kinds = [kind(alpha=alpha) for kind, alpha in kinds if alpha > 0]
    if not kinds:
        return images, targets
    # To torchvision these are two pictures of very many channels, which it mixes with each other.
    sides = rearrange(images, "(b two) c h w -> two (b c) h w", two=2)
    labels = rearrange(targets, "(b two) k -> two (b k)", two=2)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator_for(*key).initial_seed())
        sides, labels = kinds[int(torch.randint(len(kinds), ()))](sides, labels)
    images = rearrange(sides, "two (b c) h w -> (b two) c h w", c=images.shape[1])
    return images, rearrange(labels, "two (b k) -> (b two) k", k=targets.shape[1])


@torch.inference_mode()
def _predicted(
    network: _Classifier,
    examples: Examples,
    place: Place,
    size: int | None,
    bf16: bool,
    workers: int,
) -> Tensor:
    """Classes by all processes together, for all: (n,) int64 on the CPU."""
    mine = examples.index[place.rank :: place.world_size]
    at_a_time = at_once(network.encoder, size, place.device)
    network.eval()
    found = []
    for images in eval_batches(examples.data, mine, at_a_time, place.device, workers, size):
        with autocast(place.device, bf16):
            found.append(network(images).argmax(1))
    network.train()
    whole = torch.zeros(len(examples.index), dtype=torch.int64, device=place.device)
    if found:
        whole[place.rank :: place.world_size] = torch.cat(found)
    if place.world_size > 1:
        dist.all_reduce(whole)
    return whole.cpu()


# -------------------------------------------------------------------------------------- low-shot


def low_shot_sample(
    labels: Tensor,
    names: Sequence[str],
    fraction: float | None = None,
    per_class: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Some pictures of each class: (n,) labels -> sorted places (n_sample,), stratified.

    Args:
        names: of the classes.
        fraction: the share of each class, rounded, or `per_class`: their number; one of the two.
        seed: which sample.
    Raises:
        UserError: a class would be absent, or has fewer pictures than are wanted.
    """
    order = torch.randperm(len(labels), generator=generator_for("low-shot", seed))
    chosen = []
    for label, name in enumerate(names):
        places = order[labels[order] == label]
        wanted = round(fraction * len(places)) if per_class is None else per_class
        if wanted < 1:
            raise UserError(
                f"--fraction {fraction:g} leaves none of the {len(places)} pictures of class "
                f"{name!r}: raise it, or use --per-class"
            )
        if wanted > len(places):
            raise UserError(f"--per-class {wanted}: class {name!r} has only {len(places)} pictures")
        chosen.append(places[:wanted])
    return torch.cat(chosen).sort().values


def low_shot_probe(
    train_x: Mapping[str, Tensor],
    train_y: Tensor,
    report_x: Mapping[str, Tensor],
    report_y: Tensor,
    num_classes: int,
    device: torch.device,
) -> tuple[float, dict]:
    """A linear probe that sees no other labels than these few, not even to choose its settings.

    They are chosen by cross-validation within the sample, in five stratified parts, or fewer if a
    class has fewer pictures; of equals, the strongest decay. One head then learns from all of it.
    With one picture of some class there is nothing to choose on: the setting is then the last
    layer, linear, with the strongest decay but one.

    Returns:
        The accuracy in [0, 1], and the setting.
    """
    counts = train_y.bincount(minlength=num_classes)
    folds = min(5, int(counts[counts > 0].min()))
    rank = torch.empty_like(train_y)  # the number of a picture among those of its class
    for label in range(num_classes):
        rank[train_y == label] = torch.arange(int(counts[label]))
    more = {"num_classes": num_classes, "device": device, "progress": False}
    scores: dict[tuple, float] = {}
    for fold in range(folds) if folds > 1 else ():
        held = rank % folds == fold
        probe = linear_probe(
            {name: x[~held] for name, x in train_x.items()}, train_y[~held],
            {name: x[held] for name, x in train_x.items()}, train_y[held], seeds=1, **more,
        )  # fmt: skip
        for row in probe.grid:
            scores[row[:4]] = scores.get(row[:4], 0.0) + row.val[0] * int(held.sum())
    feature, head, rate, decay = next(iter(train_x)), "linear", RATES[0], DECAYS[-2]
    if scores:  # few pictures, many equals: of these the strongest decay
        feature, head, rate, decay = max(scores, key=lambda s: (scores[s], s[3]))
    x, report = {feature: train_x[feature]}, {feature: report_x[feature]}
    probe = linear_probe(
        x, train_y, x, train_y, report, report_y,
        heads=(head,), rates=(rate,), decays=(decay,), seeds=1, **more,
    )  # fmt: skip
    chosen = {"feature": feature, "head": head, "rate": rate, "decay": decay}
    return probe.best.test[0], chosen


# --------------------------------------------------------------------------- health and mistakes


@torch.no_grad()
def rankme(features: Tensor, eps: float = 1e-7) -> float:
    """RankMe (Garrido et al., ICML 2023, equation 1): how many dimensions are in use, 1 to D.

    The exponential of the entropy of p = sigma / sum(sigma) + eps, with sigma the singular values
    of the features as they are (not centred): 1 if all vectors are parallel, D if the features
    fill all directions alike. A fall while training is a collapse under way. Comparable for the
    same number of images; 25,600 are the paper's.

    Singular values are taken from the smaller Gram matrix, in double precision: exact to 1e-8 of
    the largest one, less than `eps`, and many times faster than an SVD.

    Args:
        features: (n, D).
        eps: the paper's, for float32 features.
    Raises:
        ValueError: no features, or features that are not finite.
    """
    _check("rankme", features)
    if len(features) < features.shape[1]:
        features = features.T  # the same singular values
    parts = (rows.double() for rows in features.split(ROWS))
    gram = sum(rows.T @ rows for rows in parts)  # (D, D)
    sigma = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    p = sigma / sigma.sum().clamp_min(torch.finfo(torch.float64).tiny) + eps
    return float((-(p * p.log()).sum()).exp())


@torch.no_grad()
def feature_std(features: Tensor) -> float:
    """Spread of the features: 0 if all images look alike, 1/sqrt(D) if they differ in every way.

    Vectors are scaled to length one; of each dimension the standard deviation over the images is
    taken, and these are averaged (Chen and He, "SimSiam", CVPR 2021, Section 4.1).

    Args:
        features: (n, D).
    Raises:
        ValueError: no features, or features that are not finite.
    """
    _check("feature_std", features)
    return float(F.normalize(features.double(), dim=1).std(0, correction=0).mean())


def confusion(y_true: Tensor, y_pred: Tensor, num_classes: int) -> Tensor:
    """How often class i was taken for class j: (n,) and (n,) -> (C, C) int64, on the CPU.

    Raises:
        ValueError: different lengths, or a class outside 0 to C - 1.
    """
    y_true, y_pred = y_true.cpu().long(), y_pred.cpu().long()
    if y_true.ndim != 1 or y_true.shape != y_pred.shape:
        raise ValueError(f"labels {tuple(y_true.shape)}, predictions {tuple(y_pred.shape)}")
    for y in (y_true, y_pred):
        if len(y) and not 0 <= int(y.min()) <= int(y.max()) < num_classes:
            raise ValueError(f"classes {int(y.min())} to {int(y.max())} of only {num_classes}")
    pairs = y_true * num_classes + y_pred
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


# ----------------------------------------------------------------------------------- checkpoints
# Files come from anywhere, so nothing in them is believed. No code in them is run, what they say of
# sizes must be what their tensors have, and networks are built on the meta device, which takes no
# memory, until everything agrees. Functions that begin with _ raise ValueError for what is wrong
# with a file, in words that follow its name.

CHECKPOINT_FORMAT = "ijepa-1"
WEIGHTS = Path(__file__).resolve().parent / "results" / "weights"  # what comes with the project
NETWORKS = {"target": "target_encoder", "context": "encoder"}  # ours and the released names
MAX_PATCHES = 2**16  # 256 x 256: positions take memory, and only the file's word stands for them


@dataclass(frozen=True)
class Loaded:
    """An encoder to be probed, and what is known of it."""

    encoder: ViT  # float32 on the CPU, in evaluation mode, without gradients
    kind: str  # "ijepa" (of train.py), "released" or "huggingface"
    which: str  # "target" or "context": what it is, whatever was asked for
    sha256: str  # of the file; of several (sharded weights), of one after the other
    config: dict | None = None  # the training configuration, if the file has one
    step: int | None = None
    note: str = ""  # what the reader of a table should know, in one line


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint of train.py: configuration, architecture, weights, optimizer, step.

    Nothing in the file is run. Raises UserError if it is missing, damaged, or something else.
    """
    path = Path(path)
    with _blaming(path):
        checkpoint = _load(path, mmap=False)
        _architecture(checkpoint)
        _need(checkpoint, {"optimizer": dict, "pictures": int, "best_knn": int | float})
    return checkpoint


def load_encoder(source: str, which: str = "target", num_heads: int | None = None) -> Loaded:
    """The encoder in a file or a folder, of this project or of others.

    What is read: checkpoints of train.py, or a run's folder for its last.pt; files in the format of
    the released code; Hugging Face folders of I-JEPA with safetensors, and the names of such models
    there; what `export` writes; and by its name what comes with the project, in results/weights.

    Memory is bounded by this one encoder: the rest of a file stays on the disk, and its own weights
    are read from there when they are used, so leave the file in its place meanwhile. (What
    torch.save wrote before 2020 is read whole.)

    Args:
        source: a path, or a name such as facebook/ijepa_vith14_1k if there is no such path.
        which: "target", which the paper evaluates (Appendix A.1), or "context". A file with one
            encoder gives that one: see `which` and `note` of the result.
        num_heads: only for released files of widths that no released model has.
    Raises:
        UserError: there is no such file, or it cannot be read, with the reason in one line.
    """
    if which not in NETWORKS:
        raise ValueError(f"which is {which!r}: choose target or context")
    path = Path(source)
    with _blaming(path):
        if (path / "last.pt").is_file():
            path = path / "last.pt"
        elif not path.exists():
            path = coming_along().get(str(source)) or _from_hub(str(source))
    with _blaming(path):
        if path.is_dir() or path.suffix == ".safetensors":
            loaded = _load_huggingface(path, which)
        else:
            loaded = _load_checkpoint(path, which, num_heads)
        heads = loaded.encoder.blocks[0].attn.num_heads
        if num_heads not in (None, heads):
            raise ValueError(f"has {heads} heads, not {num_heads}: leave their number out")
    return loaded


def coming_along() -> dict[str, Path]:
    """The weights that come with the project: name -> folder."""
    return {folder.name: folder for folder in sorted(WEIGHTS.glob("*/"))}


def released_model(checkpoint, num_heads: int | None = None) -> IJEPA:
    """The three networks of a checkpoint in the format of the released code.

    Args:
        checkpoint: a path (no code in the file is run), or the loaded dict with `encoder`,
            `predictor` and `target_encoder`; a `module.` before names is dropped.
        num_heads: only for widths that no released model has: weights do not tell it.
    Raises:
        ValueError: it is no such checkpoint, or `num_heads` is missing or does not fit.
    """
    if not isinstance(checkpoint, Mapping):
        checkpoint = _load(Path(checkpoint), mmap=True)
    encoder, predictor, target_encoder = (
        _released(checkpoint, part) for part in ("encoder", "predictor", "target_encoder")
    )
    if "mask_token" not in predictor:
        raise ValueError("is no released I-JEPA checkpoint: it lacks the predictor's mask_token")
    config = _released_sizes(encoder, num_heads)
    config["predictor_dim"] = predictor["mask_token"].shape[-1]
    config["predictor_depth"] = _layers(predictor, "predictor_blocks")
    config = _config(config | {"predictor_heads": config["num_heads"]})
    _check_positions(encoder.pop("pos_embed", None), config.embed_dim, config)
    _check_positions(target_encoder.pop("pos_embed", None), config.embed_dim, config)
    _check_positions(predictor.pop("predictor_pos_embed", None), config.predictor_dim, config)
    weights = {f"encoder.{name}": x for name, x in encoder.items()}
    weights |= {f"predictor.{name}": x for name, x in predictor.items()}
    weights |= {f"target_encoder.{name}": x for name, x in target_encoder.items()}
    _on_meta(lambda: IJEPA(config), weights)
    model = IJEPA(config)
    model.load_state_dict(weights)
    return model


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Turn what is wrong with a file into one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {path}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise UserError(f"{path} {error}") from error


# All that a pickle of tensors and of dicts of them may name. torch allows more, and some of that,
# such as bytearray, takes as much memory as a file asks for.
PICKLED = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)"
    r"|torch (\w+Storage|Size|device|b?float\d+|int\d+)"
)


def _load(path: Path, mmap: bool):
    """What torch.save wrote. With `mmap`, tensors stay in the file until they are used."""
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # as torch.save writes since 2020
    try:
        with warnings.catch_warnings(action="ignore"):  # what is wrong is said below, in one line
            names = _checked_archive(path) if zipped else _old_names(path)
            foreign = next((name for name in names if not PICKLED.fullmatch(name)), None)
            if foreign is None:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipped)
    except Exception as error:  # unpicklers raise almost anything on damaged files
        # What torch says of pickles that it does not know is advice to trust them.
        known = isinstance(error, RuntimeError | OSError | zipfile.BadZipFile)
        reason = one_line(error).split(". ")[0] if known else type(error).__name__
        raise ValueError(
            f"is no checkpoint, or is truncated or damaged ({reason}): copy it again"
        ) from error
    raise ValueError(
        f"is no checkpoint to trust: reading it would run code ({foreign.replace(' ', '.')}), so "
        "it was not read. Ask its maker for a file of tensors alone"
    )


def _checked_archive(path: Path) -> list[str]:
    """What the pickle in a zip archive names, once the archive agrees with its checksums.

    torch does not compare them. All of the file is read, at a gigabyte or more a second.
    """
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        packed = any(record.compress_type for record in records)  # never by torch
        if packed or sum(record.file_size for record in records) > path.stat().st_size:
            raise zipfile.BadZipFile("it would unpack to more than it holds")
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"{damaged} does not match its checksum")
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        return [name for each in pickles for name in _names(io.BytesIO(archive.read(each)))]


def _old_names(path: Path) -> list[str]:
    """The same of a file as torch.save wrote before 2020: five pickles, then the tensors."""
    names = []
    with open(path, "rb") as file:
        for _ in range(5):
            names += _names(file)
            if not all(map(PICKLED.fullmatch, names)):
                break  # a pickle of something else need not have five parts
    return names


def _names(pickled: IO[bytes]) -> list[str]:
    """The functions and classes that a pickle names, as "module name"; nothing of it is run."""
    names, strings = [], []
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("GLOBAL", "INST"):
            names.append(argument)
        elif opcode.name == "STACK_GLOBAL":  # of newer protocols, which torch does not read
            names.append(" ".join(strings[-2:]))
        elif isinstance(argument, str):
            strings.append(argument)
    return names


def _need(found: Mapping, kinds: Mapping[str, type | UnionType]) -> None:
    """Refuse a file where an entry is missing or of another kind."""
    for name, kind in kinds.items():
        if not isinstance(found.get(name), kind):
            raise ValueError(f"lacks its {name}: it was not written as it should be, or altered")


def _check_tensors(weights: object, part: str) -> None:
    """Refuse what is no state dict of plain tensors, which the file does hold."""
    if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights):
        raise ValueError(f"is no I-JEPA checkpoint: it has no weights called {part}")
    for name, x in weights.items():
        plain = isinstance(x, Tensor) and x.layout == torch.strided and not x.is_meta
        # A view can claim any size: of one number, repeated.
        if not plain or not x.is_floating_point() or x.nbytes > x.untyped_storage().nbytes():
            raise ValueError(f"has no plain tensor of numbers for {name} in its {part}")


def _layers(weights: Mapping[str, Tensor], blocks: str) -> int:
    """How many layers there are weights for."""
    return sum(bool(re.fullmatch(rf"{blocks}\.\d+\.norm1\.bias", name)) for name in weights)


def _sizes(weights: Mapping[str, Tensor]) -> dict:
    """Of an encoder's architecture what its tensors tell."""
    shapes = {}
    for name, ndim in (("patch_embed.proj.weight", 4), ("blocks.0.mlp.fc1.bias", 1)):
        if name not in weights or weights[name].ndim != ndim:
            raise ValueError(f"is no I-JEPA encoder: it lacks {name}, or has another kind of it")
        shapes[name] = weights[name].shape
    (dim, in_chans, patch_size, _), (hidden,) = shapes.values()
    return {
        "patch_size": patch_size, "in_chans": in_chans, "embed_dim": dim,
        "depth": _layers(weights, "blocks"), "mlp_ratio": hidden / max(1, dim),
    }  # fmt: skip


def _config(fields: Mapping) -> IJEPAConfig:
    """The architecture that a file asks for, if there can be such a one."""
    defaults = {field.name: field.default for field in dataclasses.fields(IJEPAConfig)}
    if unknown := sorted(str(name) for name in fields.keys() - defaults.keys()):
        raise ValueError(
            f"has an architecture of another version, with {', '.join(unknown)}: use the version "
            "of this project that wrote it, or a newer one"
        )
    try:
        for name, value in fields.items():
            kinds = (int, float) if isinstance(defaults[name], float) else (type(defaults[name]),)
            values = value if name == "img_size" and isinstance(value, tuple) else (value,)
            right = len(values) <= 2 and all(type(x) in kinds for x in values)
            if not right or (float in kinds and not 0 <= value < math.inf):
                raise ValueError(f"{name} is {value!r}")
        config = IJEPAConfig(**fields)
        patches = math.prod(grid_of(config.img_size, config.patch_size))
        if patches > MAX_PATCHES:
            raise ValueError(f"{patches:,} patches an image")
    except (ValueError, IndexError) as error:
        raise ValueError(f"has an impossible architecture: {error}") from error
    return config


def _on_meta(build: Callable[[], nn.Module], weights: Mapping[str, Tensor]) -> nn.Module:
    """A network on the meta device, if these weights have all its names and shapes."""
    sincos_positions(4, (1, 1))  # einops' first use: torch 2.6 imports what fails on that device
    try:
        with torch.device("meta"):
            network = build()
    except (RuntimeError, OverflowError, TypeError) as error:
        raise ValueError("has an impossible architecture: no tensor can be so large") from error
    expected = network.state_dict()
    for what, names in (
        ("lacks the weights", expected.keys() - weights.keys()),
        ("has weights that the architecture lacks:", weights.keys() - expected.keys()),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{what} {min(names)}{more}")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            wanted = tuple(expected[name].shape)
            raise ValueError(f"has {name} of shape {tuple(tensor.shape)}, where {wanted} is needed")
    return network


def _positions_off(stored: Tensor | None, dim: int, config: IJEPAConfig) -> float:
    """How far positions (1, N, dim) are from sine and cosine; 0 if only by rounding."""
    grid = grid_of(config.img_size, config.patch_size)
    if stored is None or stored.shape != (1, math.prod(grid), dim):
        found = "none" if stored is None else tuple(stored.shape)
        raise ValueError(f"lacks the positions of a {grid[0]}x{grid[1]} grid ({found})")
    off = (stored[0].float() - sincos_positions(dim, grid)).abs().max().item()
    if not math.isfinite(off):
        raise ValueError("has positions that are not finite")
    # float16 and bfloat16 cannot hold them more exactly than this.
    return off if off > max(1e-5, torch.finfo(stored.dtype).eps) else 0.0


def _check_positions(stored: Tensor | None, dim: int, config: IJEPAConfig) -> None:
    """Refuse positions (1, N, dim) other than those we compute for their grid."""
    if off := _positions_off(stored, dim, config):
        raise ValueError(f"has other positions than sine and cosine (off by {off:.2g}): not I-JEPA")


def _frozen(c: IJEPAConfig, weights: Mapping[str, Tensor]) -> ViT:
    """An encoder that *is* these weights, without a copy of them (of float32 ones)."""
    encoder = _on_meta(
        lambda: ViT(
            c.img_size, c.patch_size, c.embed_dim, c.depth, c.num_heads, c.mlp_ratio, c.in_chans,
            c.norm_eps,
        ),
        weights,
    )  # fmt: skip
    encoder.load_state_dict({name: x.float() for name, x in weights.items()}, assign=True)
    encoder.pos_embed = sincos_positions(c.embed_dim, encoder.grid)  # in no file: it was on meta
    return encoder.eval().requires_grad_(False)


def _sha256(paths: Iterable[Path]) -> str:
    """Of the contents of files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while part := file.read(2**20):
                digest.update(part)
    return digest.hexdigest()


def _note(holds: str, wanted: str, why: str = "the only one in the file") -> str:
    """What to say if another encoder was wanted."""
    paper = "; the paper evaluates the target encoder" if holds == "context" else ""
    return "" if holds == wanted else f"this is the {holds} encoder, {why}{paper}"


# Of train.py, and of the released code.


def _architecture(checkpoint: object) -> IJEPAConfig:
    """The architecture of a checkpoint of train.py, which its weights must have."""
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise ValueError("is no checkpoint of train.py")
    _need(checkpoint, {"config": dict, "architecture": dict, "model": dict, "step": int})
    config, weights = _config(checkpoint["architecture"]), checkpoint["model"]
    _check_tensors(weights, "model")
    for blocks, depth in (
        ("encoder.blocks", config.depth),
        ("predictor.predictor_blocks", config.predictor_depth),
    ):
        if (found := _layers(weights, blocks)) != depth:  # before that many are built
            raise ValueError(f"has {found} {blocks}, where its architecture has {depth}")
    _on_meta(lambda: IJEPA(config), weights)
    return config


def _released(checkpoint: object, part: str) -> dict[str, Tensor]:
    """The state dict of one network of a released file, without `module.`."""
    weights = checkpoint.get(part) if isinstance(checkpoint, Mapping) else None
    _check_tensors(weights, part)
    return {name.removeprefix("module."): x for name, x in weights.items()}


def _released_sizes(weights: Mapping[str, Tensor], num_heads: int | None) -> dict:
    """The architecture of a released encoder, from its tensors and from what is known of them."""
    sizes, positions = _sizes(weights), weights.get("pos_embed")
    if positions is None or positions.ndim != 3:
        raise ValueError("is no released I-JEPA checkpoint: it lacks the positions")
    width = sizes["embed_dim"]
    known = {model.config.embed_dim: model.config.num_heads for model in MODELS.values()}
    if num_heads is None and width not in known:
        raise ValueError(f"has width {width}, which does not tell its heads: give num_heads")
    img_size = math.isqrt(positions.shape[1]) * sizes["patch_size"]
    return sizes | {"img_size": img_size, "num_heads": num_heads or known[width]}


def _load_checkpoint(path: Path, which: str, num_heads: int | None) -> Loaded:
    """An encoder of train.py's or of the released code's file."""
    checkpoint = _load(path, mmap=True)
    if isinstance(checkpoint, dict) and checkpoint.get("format") == CHECKPOINT_FORMAT:
        config, start = _architecture(checkpoint), NETWORKS[which] + "."
        weights = {
            name.removeprefix(start): x
            for name, x in checkpoint["model"].items()
            if name.startswith(start)
        }
        # What was not given on the command line stands in the architecture alone.
        of_run = checkpoint["config"] | {"init_std": config.init_std}, checkpoint["step"]
        return Loaded(_frozen(config, weights), "ijepa", which, _sha256([path]), *of_run)
    if not isinstance(checkpoint, Mapping) or not checkpoint.keys() & set(NETWORKS.values()):
        raise ValueError("is no checkpoint of train.py, nor of the released code")
    holds = next(w for w in (which, *NETWORKS) if NETWORKS[w] in checkpoint)
    weights = _released(checkpoint, NETWORKS[holds])
    config = _config(_released_sizes(weights, num_heads))
    _check_positions(weights.pop("pos_embed", None), config.embed_dim, config)
    encoder, note = _frozen(config, weights), _note(holds, which)
    return Loaded(encoder, "released", holds, _sha256([path]), note=note)


# Of transformers and of `export`.

LAYER = r"(?:blocks|encoder\.layer|layers)\.(\d+)\.(.+)\.(weight|bias)"  # any of the names
# transformers' names of a layer's parts: in its files, and in its modules since version 5.
HF_LAYER = {
    "norm1": ("layernorm_before", "layernorm_before"),
    "attn.q": ("attention.attention.query", "attention.q_proj"),
    "attn.k": ("attention.attention.key", "attention.k_proj"),
    "attn.v": ("attention.attention.value", "attention.v_proj"),
    "attn.proj": ("attention.output.dense", "attention.o_proj"),
    "norm2": ("layernorm_after", "layernorm_after"),
    "mlp.fc1": ("intermediate.dense", "mlp.fc1"),
    "mlp.fc2": ("output.dense", "mlp.fc2"),
}
HF_OTHERS = {
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "pos_embed": "embeddings.position_embeddings",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
OF_A_MACHINE = (  # what an exported encoder does not tell of its training
    "out", "data_dir", "resume", "auto_resume", "device", "workers", "timeout", "wandb",
)  # fmt: skip
OURS = {theirs: ours for ours, names in HF_LAYER.items() for theirs in names}
OURS |= {theirs: ours for ours, theirs in HF_OTHERS.items()}


def _load_huggingface(path: Path, which: str) -> Loaded:
    """The encoder of a folder of transformers or of `export`, or of one .safetensors file in it."""
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").is_file():
        if path.is_dir():
            raise ValueError("has neither last.pt nor config.json: give a run, or a model's folder")
        raise ValueError("has no config.json beside it, which tells its heads: put it there")
    config = _read_json(folder / "config.json")
    if config.get("model_type") != "ijepa" or config.get("hidden_act", "gelu") != "gelu":
        kind = f"{config.get('model_type')}, {config.get('hidden_act', 'gelu')}"
        raise ValueError(f"is no I-JEPA model of transformers (its config.json says {kind})")
    files = _shards(folder) if path.is_dir() else [path]
    weights, metadata = _safetensors(files)
    training = _training(metadata)

    sizes = _sizes(weights)
    for name, found in (
        ("hidden_size", sizes["embed_dim"]),
        ("num_hidden_layers", sizes["depth"]),
        ("intermediate_size", round(sizes["embed_dim"] * sizes["mlp_ratio"])),
        ("num_channels", sizes["in_chans"]),
        ("patch_size", sizes["patch_size"]),
    ):
        said = config.get(name)
        if said not in (found, [found, found]):
            raise ValueError(f"has {name} {said} in its config.json, but {found} in its weights")
    size = config.get("image_size")
    sizes["img_size"] = tuple(size) if isinstance(size, list) else size
    sizes["num_heads"] = config.get("num_attention_heads")
    c = _config(sizes | {"norm_eps": config.get("layer_norm_eps")})
    positions = weights.pop("pos_embed", None)  # (1, N, D)
    off = _positions_off(positions, c.embed_dim, c)

    # Only our own files say which encoder they hold; transformers' and timm's converters of the
    # released files take the context encoder.
    holds = metadata.get("encoder", "context")
    if holds not in NETWORKS:
        raise ValueError(f"holds the encoder {holds!r}: neither target nor context")
    hub = "which Hugging Face and timm hold of the released files"
    note = _note(holds, which) if "encoder" in metadata else _note(holds, which, hub)
    encoder = _frozen(c, weights)
    encoder.pos_embed = positions[0].float()  # a parameter there, so it may have been trained
    if off:
        _only_its_own_grid(encoder)
        grid = f"{encoder.grid[0]}x{encoder.grid[1]} patches"
        own = f"its positions are not sine and cosine, so only pictures of {grid} fit"
        note = f"{note}; {own}" if note else own
    of_run = training.get("config"), training.get("step")
    return Loaded(encoder, "huggingface", holds, _sha256(files), *of_run, note=note)


def _safetensors(files: Sequence[Path]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights of an encoder by our names, and what the files say of themselves."""
    weights, metadata = {}, {}
    try:
        for file in files:
            with safe_open(file, framework="pt") as opened:
                metadata |= opened.metadata() or {}
                for name in opened.keys():  # noqa: SIM118, it is no dict
                    ours = name.removeprefix("ijepa.")  # inside of a classifier
                    if found := re.fullmatch(LAYER, ours):
                        layer, part, kind = found.groups()
                        ours = f"blocks.{layer}.{OURS.get(part, part)}.{kind}"
                    if not ours.startswith(("classifier.", "pooler.")):  # on top of the encoder
                        weights[OURS.get(ours, ours)] = opened.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(
            f"has weights in {file.name} that are truncated or damaged ({error}): copy it again"
        ) from error
    _check_tensors(weights, "safetensors")
    # Three linear maps there, one here.
    for start in {name.rpartition(".attn.")[0] for name in weights if ".attn." in name}:
        for kind in ("weight", "bias"):
            names = [f"{start}.attn.{x}.{kind}" for x in "qkv"]
            parts = [weights.pop(name) for name in names if name in weights]
            if parts and (len(parts) < 3 or len({x.shape for x in parts}) > 1):
                names = ", ".join(names)
                raise ValueError(f"lacks one of {names}, or has them of different shapes")
            if parts:
                weights[f"{start}.attn.qkv.{kind}"] = torch.cat(parts)
    return weights, metadata


def _training(metadata: Mapping[str, str]) -> dict:
    """`config` and `step` of the run that an encoder is from, if `export` noted them."""
    if "training" not in metadata:
        return {}
    try:
        training = json.loads(metadata["training"])
        _need(training if isinstance(training, dict) else {}, {"config": dict, "step": int})
        std, data = (training["config"].get(name) for name in ("init_std", "data"))
        if not isinstance(std, float | None) or not isinstance(data, str | None):
            raise ValueError(f"init_std {std}, data {data}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"has a note on its training that is damaged ({error})") from error
    return training


def _only_its_own_grid(encoder: ViT) -> None:
    """For positions that we did not compute: let an encoder refuse pictures of another size."""
    grid, patch_size = encoder.grid, encoder.patch_size

    def check(_, inputs: tuple[Tensor]) -> None:
        if (found := grid_of(inputs[0].shape[-2:], patch_size)) != grid:
            raise ValueError(
                f"this encoder knows the positions of {grid[0]}x{grid[1]} patches alone, "
                f"not of {found[0]}x{found[1]}"
            )

    encoder.patch_embed.register_forward_pre_hook(check)


def _read_json(path: Path) -> dict:
    """A JSON object."""
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"has a {path.name} that is truncated or damaged ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"has a {path.name} that is no JSON object")
    return found


def _shards(folder: Path) -> list[Path]:
    """The files that the weights of a folder are in."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not (folder / "model.safetensors.index.json").is_file():
        raise ValueError("has no model.safetensors (pickled weights are not read)")
    index = _read_json(folder / "model.safetensors.index.json")
    _need(index, {"weight_map": dict})
    names = {str(name) for name in index["weight_map"].values()}
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"lacks {name}, which its model.safetensors.index.json names")
    return [folder / name for name in sorted(names)]


def _from_hub(name: str) -> Path:
    """The folder of a model on Hugging Face, downloaded once; UserError if there is none."""
    missing = f"there is no file or folder {name}"
    file_like = Path(name).suffix in (".pt", ".pth", ".tar", ".safetensors")
    if file_like or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        known = ", ".join(coming_along())
        raise UserError(missing + (f" (weights that come with the project: {known})" * bool(known)))
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f"{missing}; for a model on Hugging Face, first: pip install huggingface_hub"
        ) from error
    try:
        patterns = ["config.json", "*.safetensors", "*.safetensors.index.json"]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # of its network library, which has changed before
        errors = huggingface_hub.errors
        why = f"Hugging Face did not give it ({one_line(error)})"
        if isinstance(error, errors.RepositoryNotFoundError):
            why = "no such public model on Hugging Face"
        if isinstance(error, errors.LocalEntryNotFoundError):
            why = "Hugging Face cannot be reached: check the network, or give a folder"
        raise UserError(f"{missing}, and {why}") from error


def export(
    encoder: ViT, folder: Path, which: str, training: Mapping | None = None, half: bool = False
) -> None:
    """Write an encoder for other projects: float32, as it is, or in half the space.

    `config.json` and `model.safetensors` are what `transformers.IJepaModel.from_pretrained(folder)`
    reads, and `timm.safetensors` is a state dict of timm's VisionTransformer, without class token
    and with the average *after* the last norm, as in ours (fc_norm=False). README.md has the calls.

    Args:
        encoder: the network, on any device.
        folder: made if it is not there; files of the same names are replaced.
        which: "target" or "context", to be noted in the files.
        training: `config` and `step` of the run, to be noted likewise, but no paths of the machine.
        half: weights in float16 (positions stay as they are: they are compared when read).
    Raises:
        UserError: a file cannot be written.
        ValueError: float16 cannot hold a weight.
    """
    if which not in NETWORKS:
        raise ValueError(f"which is {which!r}: choose target or context")
    first = encoder.blocks[0]
    size = tuple(side * encoder.patch_size for side in encoder.grid)  # (height, width)
    hidden, in_chans = first.mlp.fc1.out_features, encoder.patch_embed.proj.in_channels
    config = {
        "architectures": ["IJepaModel"],
        "model_type": "ijepa",
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": first.attn.num_heads,
        "intermediate_size": hidden,
        "hidden_act": "gelu",
        "layer_norm_eps": encoder.norm.eps,
        "image_size": size[0] if size[0] == size[1] else size,
        "patch_size": encoder.patch_size,
        "num_channels": in_chans,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    weights = {name: x.detach().float().cpu() for name, x in encoder.state_dict().items()}
    if half:
        config["dtype"] = "float32"  # to compute in, or transformers goes by the first weight
        weights = {name: x.half() for name, x in weights.items()}
        if broken := [name for name, x in weights.items() if not x.isfinite().all()]:
            raise ValueError(f"{broken[0]} is too large for float16")
    weights["pos_embed"] = encoder.pos_embed.float().cpu()[None]  # (1, N, D)
    theirs = {}
    for name, tensor in weights.items():
        if name in HF_OTHERS:
            theirs[HF_OTHERS[name]] = tensor
            continue
        layer, part, kind = re.fullmatch(LAYER, name).groups()
        parts = {part: tensor}
        if part == "attn.qkv":  # (3 D, ...) -> three of (D, ...)
            parts = {f"attn.{x}": t.clone() for x, t in zip("qkv", tensor.chunk(3), strict=True)}
        for part, tensor in parts.items():
            theirs[f"encoder.layer.{layer}.{HF_LAYER[part][0]}.{kind}"] = tensor

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "encoder": which}
    if training is not None:
        told = {k: v for k, v in training["config"].items() if k not in OF_A_MACHINE}
        if told.get("data") not in NAMED:  # a folder
            told.pop("data", None)
        metadata["training"] = json.dumps({"config": told, "step": training["step"]})
    _save_tensors(folder / "model.safetensors", theirs, metadata)
    _save_tensors(folder / "timm.safetensors", weights, metadata)
    # timm rounds the product down, so the quotient itself may give one less.
    ratios = (hidden / encoder.embed_dim, (hidden + 0.5) / encoder.embed_dim)
    ratio = next(r for r in ratios if int(encoder.embed_dim * r) == hidden)
    values = config | {"which": which, "size": size, "mlp_ratio": ratio, "mean": MEAN, "std": STD}
    with whole_file(folder / "README.md") as temporary:
        temporary.write_text(EXPORT_README.format(**values))
    with whole_file(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n")


def _save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict | None = None) -> None:
    """Write a .safetensors file; UserError if that fails."""
    with whole_file(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # which is no OSError, on a full disk neither
            raise OSError(str(error)) from error


EXPORT_README = """\
# An I-JEPA encoder: the {which} encoder

Images are (B, {num_channels}, {size[0]}, {size[1]}), scaled to 0 to 1, then normalised with the
mean {mean} and the standard deviation {std}.

With transformers, (B, N, {hidden_size}), one vector for each patch:

```python
from transformers import IJepaModel

model = IJepaModel.from_pretrained(".")
patches = model(images).last_hidden_state
```

With timm, (B, {hidden_size}), the average of the patches:

```python
from functools import partial

import timm
import torch
from safetensors.torch import load_file

model = timm.create_model(
    "vit_base_patch16_224", num_classes=0, class_token=False, global_pool="avg", fc_norm=False,
    img_size={size}, patch_size={patch_size}, in_chans={num_channels}, embed_dim={hidden_size},
    depth={num_hidden_layers}, num_heads={num_attention_heads}, mlp_ratio={mlp_ratio},
    norm_layer=partial(torch.nn.LayerNorm, eps={layer_norm_eps}),
)
model.load_state_dict(load_file("timm.safetensors"))
features = model.eval()(images)
```
"""


# ------------------------------------------------------------------------------------- comparing


def pixels(images: Tensor) -> Tensor:
    """Images as features, (b, C, H, W) -> (b, C H W) on the CPU: what every encoder must beat.

    Images of more than 64 pixels a side are averaged down to 32: thousands of them must fit memory.
    """
    if max(images.shape[-2:]) > 64:
        images = F.interpolate(images, (32, 32), mode="area")
    return images.flatten(1).float().cpu()


def narrow(train_x: Tensor, *others: Tensor, width: int = 512) -> list[Tensor]:
    """Features along the `width` strongest principal axes of `train_x`, (n, F) -> (n, width) each.

    For the linear probe of raw pixels: there are thousands, far more than pictures to fit them.
    """
    mean = train_x.mean(0)
    with torch.random.fork_rng():  # the sketch behind pca_lowrank is random, but always the same
        torch.manual_seed(0)
        axes = torch.pca_lowrank(train_x - mean, min(width, *train_x.shape), center=False)[2]
    return [(x - mean) @ axes for x in (train_x, *others)]


def compare(
    features: dict[str, Sequence[Tensor]], labels: dict[str, Sequence[Tensor]], k: int = 20
) -> list[dict]:
    """kNN and linear probe of several representations on several tasks.

    The linear probe is a small one, batch norm and linear, for the end of a training run; features
    of more than 1,024 numbers are made `narrow` for it.

    Args:
        features: name -> three tensors (n, F): to learn from, to choose the probe's settings on,
            to report on.
        labels: task -> three tensors (n,) int64.
        k: neighbours.
    Returns:
        One dict for each pair: features, task, knn, linear, linear_std (accuracies in percent) and
        chance (the share of the most frequent class, in percent).
    """
    rows = []
    narrowed = {
        name: narrow(*parts) if parts[0].shape[1] > 1024 else parts
        for name, parts in features.items()
    }
    for task, (train_y, choose_y, report_y) in labels.items():
        for name, (train_x, _, report_x) in features.items():
            prediction = knn(train_x, train_y, report_x, k=k)
            train_x, choose_x, report_x = narrowed[name]
            best = linear_probe(
                train_x, train_y, choose_x, choose_y, report_x, report_y,
                heads=("bn",), rates=(0.1, 0.3, 1.0), decays=(5e-4,), epochs=10, min_steps=300,
            ).best  # fmt: skip
            figures = {
                "knn": accuracy(prediction.weighted, report_y),
                "linear": best.test_mean,
                "linear_std": best.test_std,
                "chance": report_y.bincount().max().item() / len(report_y),
            }
            percent = {measured: 100 * value for measured, value in figures.items()}
            rows.append({"features": name, "task": task} | percent)
    return rows


def format_table(rows: list[dict]) -> str:
    """The rows of `compare`, a line for each representation and two columns for each task."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    names = list(dict.fromkeys(row["features"] for row in rows))
    width = max(len(name) for name in names)
    header = "".join(f" | {task + ': 20-NN':>14} {'linear':>12}" for task in tasks)
    lines = [" " * width + header]
    for name in names:
        cells = []
        for task in tasks:
            row = next(r for r in rows if (r["features"], r["task"]) == (name, task))
            linear = f"{row['linear']:.1f} ± {row['linear_std']:.1f}"
            cells.append(f" | {row['knn']:14.1f} {linear:>12}")
        lines.append(f"{name:{width}}" + "".join(cells))
    return "\n".join(lines)


# -------------------------------------------------------------------------------- which pictures


@dataclass(frozen=True)
class Sets:
    """The pictures of an evaluation: to learn from, to choose settings on, to report on."""

    train: Pictures | Folder
    test: Pictures | Folder  # the same object as `train` if there is no test part
    bank: Tensor  # (n_bank,) pictures of `train`: all that are labelled and not reported on
    fit: Tensor  # (n_fit,) places in the bank: what linear heads learn from
    choose: Tensor  # (n_choose,) places in the bank: held out, for every choice
    report: Tensor  # (n_report,) pictures of `test`
    reported: str  # what these are, in words

    def labels(self, task: str) -> tuple[Tensor, Tensor]:
        """Labels of the bank, (n_bank,), and of the pictures reported on, (n_report,)."""
        return self.train.labels[task][self.bank], self.test.labels[task][self.report]


def load_sets(
    name: str, data_dir: str, img_size: int, place: Place, limit: int | None = None
) -> Sets:
    """The pictures of a set, split as `Sets` says; held out are the same ones as in training.

    Half of the held-out pictures of a folder without `test/` or `val/` are there to choose on, the
    other half to report on.

    Args:
        name, data_dir: as for `load_data`.
        img_size: side in pixels that the encoder wants. Sets that are kept in memory are stored no
            larger than they come, and enlarged when they are used.
        place: where this process runs.
        limit: at most so many training pictures and so many test pictures, drawn at random.
    Raises:
        UserError: the set cannot be had, or has too few labelled pictures.
    """
    if name in NAMED and name not in ("clevr", "imagenet"):
        img_size = min(img_size, default_sizes(name, data_dir)[0])

    def load(part: str) -> Pictures | Folder:
        return main_first(place, lambda: load_data(name, part, data_dir, img_size, place.device))

    train = load("train")
    fit, choose = hold_out(train)
    fit = fit[_labelled(train)[fit]]
    if has_test(name, data_dir):
        test = load("test")
        report = _labelled(test).nonzero()[:, 0]
        report = report[torch.randperm(len(report), generator=generator_for("report"))]
        reported = f"{name}, test pictures"
    else:
        test, choose, report = train, choose[::2], choose[1::2]
        reported = f"{name}, held-out training pictures: it has no test/ or val/"
    if limit is not None:  # a tenth to choose on, as without a limit
        choose = choose[: max(2, limit // 10)]
        fit, report = fit[: limit - len(choose)], report[:limit]
    if min(len(fit), len(choose), len(report)) < 2:
        raise UserError(
            f"{name} has too few labelled pictures: {len(fit)} to learn from, {len(choose)} to "
            f"choose settings on, {len(report)} to report on"
        )
    places = torch.arange(len(fit) + len(choose)).split([len(fit), len(choose)])
    return Sets(train, test, torch.cat([fit, choose]), *places, report, reported)


def _labelled(data: Pictures | Folder) -> Tensor:
    """(n,) bool: which pictures have a label, for the first task."""
    return next(iter(data.labels.values())) >= 0


def check_labels(task: str, names: Sequence[str], learn_y: Tensor, report_y: Tensor) -> None:
    """Raise UserError if labels (n,) are too few to learn a task and be reported on (n_report,)."""
    if len(learn_y) < len(names):
        raise UserError(
            f"{task}: only {len(learn_y)} pictures to learn {len(names)} classes from: give more"
        )
    seen = learn_y.unique()
    if absent := [names[int(label)] for label in report_y.unique() if label not in seen]:
        raise UserError(
            f"{task}: no picture to learn from of {len(absent)} classes that are reported on, such "
            f"as {absent[0]!r}: give more pictures"
        )


# ------------------------------------------------------------------------ features, kept on disk


def shared_features(
    encoder: ViT,
    data: Pictures | Folder,
    index: Tensor,
    place: Place,
    *,
    layers: int = 1,
    size: int | None = None,
    bf16: bool = False,
    workers: int = 0,
    what: str = "features",
    everywhere: bool = False,
) -> Tensor:
    """`pooled_features` of the pictures `index`, by all processes together.

    Args:
        size: pixels a side, if other than the pictures have.
        what: for the progress bar.
        everywhere: all processes get the features; by default the main one, the others nothing.
        The others are those of `pooled_features` and `eval_batches`.
    Returns:
        (n, layers * D) float32 on the CPU.
    """
    world, rank = (place.world_size, place.rank) if len(index) >= 8 * place.world_size else (1, 0)
    mine = index[rank::world]
    batch_size = at_once(encoder, size, place.device)
    batches = eval_batches(data, mine, batch_size, place.device, workers, size)
    bar = progress(batches, what, f" x {batch_size}") if place.main else batches
    if place.main:
        bar.total = math.ceil(len(mine) / batch_size)
    part = pooled_features(encoder, bar, layers, place.device, bf16)
    if world == 1:
        return part
    wanted = place.main or everywhere
    whole = torch.empty(len(index) if wanted else 0, part.shape[1])
    for start in range(0, len(index), 8192 * world):  # in pieces: ImageNet's do not fit a GPU
        piece = torch.zeros(min(8192 * world, len(index) - start), part.shape[1])
        piece[rank::world] = part[start // world :][: len(piece[rank::world])]
        piece = piece.to(place.device)
        dist.all_reduce(piece)
        if wanted:
            whole[start : start + len(piece)] = piece.cpu()
    return whole


def kept(path: Path | None, compute: Callable[[], Tensor], place: Place) -> Tensor:
    """What `compute` gives, from the file `path` if it has been computed before.

    The main process reads and writes; the file is one tensor, in safetensors format. A file that
    cannot be read is said so, and made anew. None: always compute.
    """
    found = None
    if path is not None and place.main and path.exists():
        try:
            found = load_file(path)["features"]
        except (SafetensorError, OSError, KeyError) as error:
            tqdm.write(f"{path} cannot be read ({error}): computed again", file=sys.stderr)
    hit = torch.tensor(int(found is not None), device=place.device)
    if place.world_size > 1:
        dist.broadcast(hit, 0)
    if hit:
        return found if place.main else torch.empty(0)
    computed = compute()
    if path is not None and place.main:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        _save_tensors(path, {"features": computed})
    return computed


def untrained(encoder: ViT, init_std: float = 0.02, seed: int = 0) -> ViT:
    """An encoder of the same architecture that has learned nothing."""
    fresh = copy.deepcopy(encoder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        init_weights(fresh, fresh.blocks, init_std)
    for module in fresh.modules():
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    return fresh


# -------------------------------------------------------------------------------------- pictures

BLUE, VERMILION = "#0072B2", "#D55E00"  # told apart by the colour-blind too (Okabe and Ito)


def plt_subplots(*args, **kwargs):
    """Subplots that need no screen."""
    from matplotlib.figure import Figure

    figure = Figure(**{k: kwargs.pop(k) for k in ("figsize", "layout")})
    return figure, figure.subplots(*args, **kwargs)


def draw_confusion(path: Path, matrix: Tensor, names: Sequence[str], title: str) -> None:
    """How often class i (row) was taken for class j (column), (C, C), in percent of the row.

    Of more than 20 classes, the 20 with the most errors.
    """
    errors = matrix.sum(1) - matrix.diagonal()
    shown = errors.argsort(descending=True, stable=True)[:20].sort().values
    share = 100 * matrix.double() / matrix.sum(1, keepdim=True).clamp_min(1)
    share, names = share[shown][:, shown], [names[int(i)] for i in shown]
    side = 3 + 0.55 * len(names)
    figure, axis = plt_subplots(figsize=(side, side * 0.92), layout="constrained")
    # Roots, so that small shares are seen too.
    axis.imshow(share.sqrt().numpy(), cmap="Blues", vmin=0, vmax=10)
    for i, row in enumerate(share.tolist()):
        for j, value in enumerate(row):
            if value >= 0.5:
                colour = "white" if value > 40 else "black"
                axis.text(j, i, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=11)
    ticks = range(len(names))
    axis.set_xticks(ticks, names, rotation=45, ha="right", rotation_mode="anchor", fontsize=11)
    axis.set_yticks(ticks, names, fontsize=11)
    axis.set_xlabel("taken for", fontsize=12)
    axis.set_ylabel("is", fontsize=12)
    more = "" if len(names) == len(matrix) else f"\nthe {len(names)} classes with the most errors"
    axis.set_title(f"{title}, % of each row{more}", fontsize=12)
    _save_figure(figure, path)


def draw_neighbours(
    path: Path, sets: Sets, task: str, neighbours: Tensor, predicted: Tensor, rows: int = 8
) -> None:
    """Pictures, and the nearest of the training set: neighbours (n_report, k) places in the bank.

    One of each class in turn; the title says what a picture is, in blue if the neighbours have
    that class too, in vermilion and parentheses if not.
    """
    bank_y, report_y = sets.labels(task)
    names = sets.train.classes[task]
    turn = [(report_y == label).nonzero()[:, 0].tolist() for label in range(len(names))]
    queries = [i for together in zip_longest(*turn) for i in together if i is not None][:rows]
    columns = 1 + min(8, neighbours.shape[1])
    size = (1.35 * columns, 1.55 * len(queries))
    figure, axes = plt_subplots(
        len(queries), columns, figsize=size, layout="constrained", squeeze=False
    )
    for row, i in zip(axes, queries, strict=True):
        near = neighbours[i, : columns - 1]
        pictures = [sets.test.centre(sets.report[i : i + 1]), sets.train.centre(sets.bank[near])]
        labels = [int(report_y[i]), *bank_y[near].tolist()]
        for j, (axis, picture, label) in enumerate(
            zip(row, torch.cat([p.cpu() for p in pictures]), labels, strict=True)
        ):
            axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            right = label == labels[0]
            colour = "black" if j == 0 else BLUE if right else VERMILION
            name = names[label][:14]
            name = f"{name}?" if j == 0 else name if right else f"({name})"
            axis.set_title(name, fontsize=11, color=colour)
            for side in axis.spines.values():
                side.set(color=colour, linewidth=2 if j else 0)
    share = 100 * accuracy(predicted, report_y)
    figure.suptitle(
        f"first column: pictures reported on; then their nearest training pictures, "
        f"(in parentheses) of another class\n{neighbours.shape[1]}-NN accuracy {share:.1f} %",
        fontsize=11,
    )
    _save_figure(figure, path)


@torch.no_grad()
def draw_patches(
    path: Path, encoders: Mapping[str, ViT], sets: Sets, place: Place, size: int, columns: int = 8
) -> None:
    """Patch features as colours: the first three principal components as red, green and blue.

    One basis for all pictures of an encoder: patches with like features have like colours, also
    in different pictures.
    """
    index = sets.report[:columns]
    pictures = sets.test.centre(index).cpu()
    images = torch.cat(list(eval_batches(sets.test, index, 8, place.device, size=size)))
    rows = {"picture": pictures.permute(0, 2, 3, 1)}
    for name, encoder in encoders.items():
        tokens = encoder.to(place.device)(images).float().cpu()  # (b, N, D)
        flat = tokens.flatten(0, 1) - tokens.mean((0, 1))
        axes = torch.linalg.eigh(flat.T @ flat).eigenvectors[:, -3:].flip(1)  # (D, 3)
        parts = flat @ axes  # (b N, 3)
        low, high = parts.quantile(0.02, 0), parts.quantile(0.98, 0)
        parts = ((parts - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
        grid = grid_of(size, encoder.patch_size)
        rows[name] = parts.view(len(images), *grid, 3)
    shape = (1.4 * len(images) + 0.4, 1.45 * len(rows) + 0.5)
    figure, axes = plt_subplots(
        len(rows), len(images), figsize=shape, layout="constrained", squeeze=False
    )
    for line, (name, shown) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, shown, strict=True):
            axis.imshow(picture.numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[], frame_on=False)
        line[0].set_ylabel(name, fontsize=12)
    figure.suptitle(
        "patch features: their first three principal components as colours", fontsize=12
    )
    _save_figure(figure, path)


def _save_figure(figure, path: Path) -> None:
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


# ------------------------------------------------------------------------------ the command line


@dataclass(frozen=True)
class ProbeConfig:
    """All that defines an evaluation. What is None depends on the rest."""

    checkpoint: str | None = option(
        None,
        "a run's folder or checkpoint, vit_nano_cifar10 (comes along), a released .pth.tar, a "
        "Hugging Face folder or hub name",
        positional=True,
    )
    encoder: str = option("target", "which of its two encoders", ("target", "context"))
    heads: int | None = option(None, "attention heads, where the file does not tell")
    data: str | None = option(
        None, f"{', '.join(NAMED)}, or a folder (default: what the run was trained on)"
    )
    data_dir: str = option("data", "where named sets are, or are downloaded to")
    task: str | None = option(None, "which labels, of a set with several (default: all)")
    images: int | None = option(None, "at most so many training and test pictures: a quick look")
    out: str | None = option(None, "folder of the report (default: probe_<data> beside the run)")
    export: str | None = option(None, "write the encoder for transformers and timm, and end")

    fraction: float | None = option(None, "low-shot: the share of the labels to learn from")
    per_class: int | None = option(None, "low-shot: so many labelled pictures of each class")
    augment: bool = option(False, "linear probe on random crops, as in the paper (slow)")
    finetune: bool = option(False, "train the encoder too (slower)")

    k: int | None = option(None, "neighbours (default: 20)")
    temperature: float = option(0.07, "of their weights, exp(similarity / temperature)")
    layers: int | None = option(
        None, "linear probe: the last layer, and so many concatenated (default: 4, or all)"
    )
    seeds: int | None = option(None, "of heads and low-shot samples (default: 3; fine-tuning: 1)")
    epochs: int | None = option(None, "of --augment and --finetune")
    batch_size: int | None = option(None, "of --augment and --finetune")
    lr: float | None = option(None, "of --finetune")
    weight_decay: float | None = option(None, "of --finetune")
    img_size: int | None = option(None, "pixels a side (default: what the encoder was made for)")
    baselines: bool = option(True, "beside it: raw pixels, and the encoder untrained")

    bf16: bool | None = option(None, "autocast to bfloat16 (default: where it pays)")
    workers: int | None = option(None, "processes that decode pictures (default: one a core)")
    device: str | None = option(None, "cuda or cpu (default: a GPU if there is one)")
    cache: bool = option(True, "keep features on disk, beside the run")

    protocol = property(
        lambda self: "finetune" if self.finetune else "augment" if self.augment else "frozen"
    )
    low_shot = property(lambda self: self.fraction is not None or self.per_class is not None)


def configure(argv: list[str] | None = None) -> ProbeConfig:
    """The command line, checked."""
    config, given = parse_options(ProbeConfig, __doc__.partition("\nHow to find")[0], argv)
    if config.checkpoint is None:
        raise UserError(
            "which encoder? Give a checkpoint: python probe.py runs/NAME --data cifar10"
        )
    if config.finetune and config.augment:
        raise UserError("--finetune and --augment contradict each other: give one")
    if config.fraction is not None and config.per_class is not None:
        raise UserError("--fraction and --per-class contradict each other: give one")
    if config.low_shot and config.augment:
        raise UserError("--augment takes all labels: leave out --fraction or --per-class")
    if config.fraction is not None and not 0 < config.fraction <= 1:
        raise UserError(f"--fraction {config.fraction:g}: it must be above 0, and at most 1")
    if config.temperature <= 0:
        raise UserError(f"--temperature {config.temperature:g}: it must be positive")
    needs = {"epochs": "augment", "batch_size": "augment", "lr": "finetune"}
    needs |= {"weight_decay": "finetune"}
    for name, other in needs.items():
        if name in given and not (config.finetune or (other == "augment" and config.augment)):
            raise UserError(f"--{name.replace('_', '-')} needs --{other}")
    unused = {"k", "temperature"} if config.augment else set()
    unused = {"k", "temperature", "layers"} if config.finetune else unused
    if unused & given:
        raise UserError(
            f"--{min(unused & given)} has no effect with --{config.protocol}: leave it out"
        )
    for name in ("per_class", "images", "k", "layers", "seeds", "epochs", "batch_size", "img_size"):
        if (value := getattr(config, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
    if config.lr is not None and not config.lr > 0:
        raise UserError(f"--lr is {config.lr:g}: it must be positive")
    for name in ("workers", "weight_decay"):
        if (value := getattr(config, name)) is not None and not value >= 0:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be at least 0")
    return config


@dataclass(frozen=True)
class Setup:
    """What every protocol needs to know."""

    config: ProbeConfig
    loaded: Loaded
    name: str  # of the set of pictures
    sets: Sets
    tasks: dict[str, list[str]]  # task -> names of its classes
    samples: dict[str, list[Tensor]]  # task -> places in the bank that neighbours are among
    place: Place
    size: int  # of the pictures as the encoder sees them, in pixels
    bf16: bool
    workers: int
    cache: Path | None  # folder

    layers = property(lambda self: self.config.layers or min(4, len(self.loaded.encoder.blocks)))
    trained = property(lambda self: f"{self.loaded.which} encoder")
    hardware = property(
        lambda self: torch.cuda.get_device_name() if self.place.device.type == "cuda" else "CPU"
    )

    @cached_property
    def fingerprints(self) -> list[str]:
        """Of the pictures to learn from and of those reported on."""
        return [fingerprint(self.sets.train), fingerprint(self.sets.test)]

    @cached_property
    def encoders(self) -> dict[str, ViT | None]:
        """What is compared; None stands for the pixels."""
        encoder, config = self.loaded.encoder, self.loaded.config or {}
        if not self.config.baselines:
            return {self.trained: encoder}
        fresh = untrained(encoder, config.get("init_std") or 0.02)
        return {"raw pixels": None, "untrained": fresh, self.trained: encoder}


def set_up(config: ProbeConfig, loaded: Loaded, place: Place, cache: Path) -> Setup:
    """Load the pictures, and refuse what cannot work before anything is computed."""
    name, encoder = data_name(config, loaded), loaded.encoder
    if encoder.grid[0] != encoder.grid[1] and config.img_size is None:
        raise UserError(f"the encoder was made for {encoder.grid} patches: give --img-size")
    size = config.img_size or encoder.grid[0] * encoder.patch_size
    try:
        grid_of(size, encoder.patch_size)
    except ValueError as error:
        raise UserError(f"--img-size {size}: {error}") from error
    sets = load_sets(name, config.data_dir, size, place, config.images)
    tasks = sets.train.classes
    if config.task is not None:
        if config.task not in tasks:
            raise UserError(f"{name} has no task {config.task!r}: choose from {', '.join(tasks)}")
        tasks = {config.task: tasks[config.task]}
    samples = {}
    for task, names in tasks.items():
        bank_y, report_y = sets.labels(task)
        fit_y = bank_y[sets.fit]
        samples[task], learned = [torch.arange(len(sets.bank))], [sets.fit]
        if config.low_shot:
            samples[task] = learned = [
                sets.fit[low_shot_sample(fit_y, names, config.fraction, config.per_class, seed)]
                for seed in range(config.seeds or 3)
            ]
        for places in learned:
            check_labels(task, names, bank_y[places], report_y)
        fewest = min(len(places) for places in samples[task])
        # By default a sample with fewer pictures than 20 is looked through whole.
        if (k := config.k or (1 if config.low_shot else 20)) > fewest:
            raise UserError(f"--k {k}: there are only {fewest} pictures to look among")
    if (config.layers or 1) > len(encoder.blocks):
        raise UserError(f"--layers {config.layers}: the encoder has {len(encoder.blocks)}")
    bf16 = bf16_pays(encoder.embed_dim, place.device) if config.bf16 is None else config.bf16
    workers = cores() if config.workers is None else config.workers
    kept_in = cache if config.cache else None
    return Setup(config, loaded, name, sets, tasks, samples, place, size, bf16, workers, kept_in)


def data_name(config: ProbeConfig, loaded: Loaded) -> str:
    """The set of pictures: what --data says, or what the run was trained on."""
    name = config.data or (loaded.config or {}).get("data")
    if name is None:
        raise UserError(f"{config.checkpoint} does not say what it was trained on: give --data")
    return name


def describe(setup: Setup) -> str:
    """What is about to happen, in a few lines."""
    config, loaded, sets = setup.config, setup.loaded, setup.sets
    encoder = loaded.encoder
    size = sum(p.numel() for p in encoder.parameters()) / 1e6
    step = "" if loaded.step is None else f", step {loaded.step}"
    learn = f"{len(sets.fit)} to learn from, {len(sets.choose)} to choose settings on"
    if config.low_shot:
        samples = next(iter(setup.samples.values()))
        learn = f"{len(samples)} samples of {len(samples[0])} to learn from"
    how = {
        "frozen": f"{config.k or 20}-NN and linear probe on stored features",
        "augment": "linear probe on random crops",
        "finetune": "fine-tuning",
    }[config.protocol]
    precision = "bfloat16 autocast" if setup.bf16 else "float32"
    lines = [
        f"encoder  {config.checkpoint}: {loaded.which}, {size:.2f} M parameters{step}",
        f"pictures {learn}, {len(sets.report)} to report on ({sets.reported}), {setup.size} pixels",
        f"protocol {how}",
        f"device   {setup.hardware} x {setup.place.world_size}, {precision}",
    ]
    return "\n".join(lines + ([f"note     {loaded.note}"] if loaded.note else []))


class Found(NamedTuple):
    """What a protocol found out."""

    rows: list[dict]  # of the report, by `report_row`
    neighbours: Prediction | None = None  # of the first task, by the encoder at hand
    predictions: Tensor | None = None  # (n_report,) of the first task, by its linear probe


def report_row(
    setup: Setup, features: str, task: str, figures: dict[str, list[float]], chosen: list[dict]
) -> dict:
    """One row: what was measured (shares in [0, 1], one a seed or sample), and the settings."""
    report_y = setup.sets.labels(task)[1]
    return {
        "features": features,
        "task": task,
        "classes": len(setup.tasks[task]),
        "chance": 100 * report_y.bincount().max().item() / len(report_y),
        "figures": {name: [100 * x for x in values] for name, values in figures.items()},
        "chosen": chosen,
    }


def setting_of(choice: Choice) -> dict:
    """The settings of a linear probe, and what it scored on the pictures they were chosen on."""
    return {name: getattr(choice, name) for name in GridRow._fields}


def features_of(setup: Setup, name: str, encoder: ViT | None) -> tuple[Tensor, Tensor]:
    """Features of the bank, (n_bank, F), and of the pictures reported on, (n_report, F).

    On the main process; the others may get empty tensors.
    """
    sets, place, found = setup.sets, setup.place, []
    parts = ((sets.train, sets.bank), (sets.test, sets.report))
    for (data, index), pictures in zip(parts, setup.fingerprints, strict=True):
        if encoder is None:
            batches = eval_batches(data, index, 500, place.device, setup.workers)
            found.append(torch.cat([pixels(x) for x in batches]) if place.main else torch.empty(0))
            continue
        key = (
            encoder_hash(encoder), setup.layers, setup.size, setup.bf16, place.device.type,
            pictures, index.tolist(),
        )  # fmt: skip
        digest = hashlib.blake2b(repr(key).encode(), digest_size=12).hexdigest()
        compute = partial(
            shared_features, encoder, data, index, place, layers=setup.layers, size=setup.size,
            bf16=setup.bf16, workers=setup.workers, what=name,
        )  # fmt: skip
        path = setup.cache / f"{digest}.safetensors" if setup.cache else None
        try:
            found.append(kept(path, compute, place))
        except ValueError as error:  # features that are not finite
            raise UserError(f"{name}: {error}") from error
    return found[0], found[1]


def encoder_hash(encoder: ViT) -> str:
    """A name for this very encoder: weights, positions, and what the weights do not tell."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((encoder.blocks[0].attn.num_heads, encoder.norm.eps)).encode())
    for name, tensor in (encoder.state_dict() | dict(encoder.named_buffers())).items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def probe_frozen(setup: Setup) -> Found:
    """kNN and the sweep of linear heads on stored features."""
    config, device = setup.config, setup.place.device
    protocol = _few_labels if config.low_shot else _all_labels
    rows, shown = [], ()
    for name, encoder in setup.encoders.items():
        bank, report = features_of(setup, name, encoder)
        if not setup.place.main:
            continue
        width = bank.shape[1] if encoder is None else encoder.embed_dim
        last = bank[:, -width:], report[:, -width:].to(device)  # what neighbours are near in
        kinds = {"last layer": last}
        if encoder is None:
            kinds = {"pixels": narrow(bank, report)}
        elif setup.layers > 1:
            kinds[f"last {setup.layers} layers"] = (bank, report)
        bank_x, report_x = ({kind: near(x[i], device) for kind, x in kinds.items()} for i in (0, 1))
        for task in setup.tasks:
            figures, chosen, *more = protocol(setup, task, last, bank_x, report_x)
            rows.append(report_row(setup, name, task, figures, chosen))
            if name == setup.trained and task == next(iter(setup.tasks)):
                shown = more
    return Found(rows, *shown)


ON_DEVICE = 8e9  # bytes: larger features stay on the CPU and are read in parts


def near(features: Tensor, device: torch.device) -> Tensor:
    """On the device, if they are not too large for it."""
    return features.to(device) if features.nbytes < ON_DEVICE else features


def _all_labels(setup: Setup, task: str, last, bank_x, report_x) -> tuple:
    """One task with all labels: figures, settings, neighbours, and predictions of one head."""
    config, sets = setup.config, setup.sets
    bank_y, report_y = sets.labels(task)
    classes, k = len(setup.tasks[task]), config.k or 20
    found = knn(last[0], bank_y, last[1], k, config.temperature, classes)
    fit, choose = sets.fit, sets.choose
    best = linear_probe(
        {kind: x[fit] for kind, x in bank_x.items()}, bank_y[fit],
        {kind: x[choose] for kind, x in bank_x.items()}, bank_y[choose],
        report_x, report_y,
        seeds=config.seeds or 3, num_classes=classes, device=setup.place.device,
    ).best  # fmt: skip
    figures = {
        f"{k}-NN": [accuracy(found.weighted, report_y)],
        f"{k}-NN, plain": [accuracy(found.plain, report_y)],
        "linear probe": list(best.test),
    }
    return figures, [setting_of(best)], found, best.predictions[0]


def _few_labels(setup: Setup, task: str, last, bank_x, report_x) -> tuple:
    """One task with few labels, a figure for each sample, and the settings."""
    config, sets = setup.config, setup.sets
    bank_y, report_y = sets.labels(task)
    classes, chosen = len(setup.tasks[task]), []
    k = min(config.k or 20, *(len(places) for places in setup.samples[task]))
    figures = {f"{k}-NN": [], f"{k}-NN, plain": [], "linear probe": []}
    for places in progress(setup.samples[task], f"low-shot, {task}", " samples"):
        found = knn(last[0][places], bank_y[places], last[1], k, config.temperature, classes)
        few_x = {kind: x[places] for kind, x in bank_x.items()}
        score, setting = low_shot_probe(
            few_x, bank_y[places], report_x, report_y, classes, setup.place.device
        )
        values = accuracy(found.weighted, report_y), accuracy(found.plain, report_y), score
        for measured, value in zip(figures.values(), values, strict=True):
            measured.append(value)
        chosen.append(setting)
    return figures, chosen


# Tasks that random crops would make impossible: objects to count would be cut off (Appendix A.2).
WHOLE_PICTURES = ("shapes", "clevr")


def examples(setup: Setup, task: str, learn: Tensor) -> tuple[Examples, Examples, Examples]:
    """What one task learns from (places in the bank), chooses on and reports on."""
    sets = setup.sets
    bank_y, report_y = sets.labels(task)
    return (
        Examples(sets.train, sets.bank[learn], bank_y[learn]),
        Examples(sets.train, sets.bank[sets.choose], bank_y[sets.choose]),
        Examples(sets.test, sets.report, report_y),
    )


def probe_trained(setup: Setup, measure: Callable) -> Found:
    """A protocol that runs pictures through the encoders; raw pixels have no part in it.

    measure: (setup, encoder, task) -> figures, settings, and predictions (n_report,) of one head.
    """
    rows, predictions = [], []
    for name, encoder in setup.encoders.items():
        if encoder is None:
            continue
        for task in setup.tasks:
            try:
                figures, chosen, predicted = measure(setup, encoder, task)
            except ValueError as error:  # features that are not finite
                raise UserError(f"{name}: {error}") from error
            rows.append(report_row(setup, name, task, figures, chosen))
            if name == setup.trained:
                predictions.append(predicted)
    return Found(rows, predictions=predictions[0])


def augmented(setup: Setup, encoder: ViT, task: str) -> tuple:
    """The sweep of linear heads on random crops."""
    crops = {"crop_scale": (1.0, 1.0)} if setup.name in WHOLE_PICTURES else {}
    best = augmented_probe(
        encoder, *examples(setup, task, setup.sets.fit), setup.place,
        num_classes=len(setup.tasks[task]), layers=setup.layers, seeds=setup.config.seeds or 3,
        epochs=setup.config.epochs or 50, batch_size=setup.config.batch_size, size=setup.size,
        bf16=setup.bf16, workers=setup.workers, **crops,
    ).best  # fmt: skip
    return {"linear probe, crops": list(best.test)}, [setting_of(best)], best.predictions[0]


def fine_tuned(setup: Setup, encoder: ViT, task: str) -> tuple:
    """The whole network trained: with few labels once for each sample, else for each seed."""
    config, recipe, scores = setup.config, fine_tuning(setup), []
    samples = setup.samples[task] if config.low_shot else [setup.sets.fit]
    for number, places in enumerate(samples):
        tuned = fine_tune(
            encoder, *examples(setup, task, places), setup.place, recipe,
            num_classes=len(setup.tasks[task]),
            seeds=[number] if config.low_shot else config.seeds or 1,
            size=setup.size, bf16=setup.bf16, workers=setup.workers,
        )  # fmt: skip
        scores += tuned.test
    setting = {"fine-tuning": dataclasses.asdict(recipe)}
    return {"fine-tuned": scores}, [setting], tuned.predictions[0]


def fine_tuning(setup: Setup) -> FineTuneConfig:
    """The recipe for this encoder and so many labels, with what the command line changes."""
    config = setup.config
    recipe = fine_tune_recipe(setup.loaded.encoder.embed_dim, config.low_shot)
    names = ("lr", "weight_decay", "batch_size", "epochs")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    if setup.name in WHOLE_PICTURES:  # nor may objects be mixed, cut out, turned or moved away
        given |= {"crop_scale": (1.0, 1.0), "mixup": 0.0, "cutmix": 0.0, "rand_augment": None}
    return dataclasses.replace(recipe, **given)


def format_report(rows: list[dict]) -> str:
    """The rows of a report as tables, one for each task; accuracies in percent."""
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        columns = list(of_task[-1]["figures"])
        width = max(len(row["features"]) for row in rows)
        first = of_task[0]
        lines.append(f"{task}: {first['classes']} classes, the largest {first['chance']:.1f} %")
        lines.append(" " * width + "".join(f"  {name:>14}" for name in columns) + "   chosen")
        for row in of_task:
            cells = ""
            for name in columns:
                values = row["figures"][name]
                mean, spread = mean_std(values)
                cell = f"{mean:.1f}" + (f" ± {spread:.1f}" if len(values) > 1 else "")
                cells += f"  {cell:>14}"
            chosen = "; ".join(dict.fromkeys(_in_words(setting) for setting in row["chosen"]))
            lines.append(f"{row['features']:{width}}{cells}   {chosen}")
        lines.append("")
    return "\n".join(lines[:-1])


def _in_words(setting: dict) -> str:
    """A setting in a few words."""
    if "fine-tuning" in setting:
        recipe = setting["fine-tuning"]
        return f"{recipe['epochs']} epochs, rate {recipe['lr']:g}, the last epoch"
    head = {"bn": "batch norm + linear"}.get(setting["head"], setting["head"])
    return f"{setting['feature']}, {head}, rate {setting['rate']:g}, decay {setting['decay']:g}"


def main() -> None:
    """Read the encoder, look at the pictures, report."""
    config = configure()
    loaded = load_encoder(config.checkpoint, config.encoder, config.heads)
    if config.export is not None:
        training = {"config": loaded.config, "step": loaded.step} if loaded.config else None
        export(loaded.encoder, Path(config.export), loaded.which, training)
        print(f"wrote {config.export}: the {loaded.which} encoder, for transformers and timm")
        return
    with placed(config.device) as place:
        evaluate(config, loaded, place)


def evaluate(config: ProbeConfig, loaded: Loaded, place: Place) -> None:
    """Features, classifiers, the table and the pictures."""
    begin = time.perf_counter()
    out, cache = folders(config, loaded)
    if place.main:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
    setup = set_up(config, loaded, place, cache)
    if place.main:
        tqdm.write(describe(setup))
    if config.protocol == "frozen":
        found = probe_frozen(setup)
    else:
        found = probe_trained(setup, fine_tuned if config.finetune else augmented)
    if not place.main:
        return
    table = format_report(found.rows)
    tqdm.write(f"\nAccuracy, %, on {len(setup.sets.report)} pictures ({setup.sets.reported})\n")
    tqdm.write(table)
    draw_found(setup, found, out)
    seconds = time.perf_counter() - begin
    with whole_file(out / "probe.json") as temporary:
        temporary.write_text(json.dumps(account(setup, found, seconds), indent=1) + "\n")
    tqdm.write(f"\nreport and pictures: {out} ({seconds:.0f} s)")


def folders(config: ProbeConfig, loaded: Loaded) -> tuple[Path, Path]:
    """Where the report goes, and where features are kept."""
    home = Path("runs") / re.sub(r"[^\w.-]+", "_", config.checkpoint.strip("/."))
    if not Path(config.checkpoint).exists() and config.checkpoint in coming_along():
        home = Path("runs") / f"weights_{config.checkpoint}"  # not that of the run of this name
    if loaded.kind == "ijepa":  # beside the run
        home = Path(config.checkpoint)
        home = home if home.is_dir() else home.parent
    few = config.fraction if config.per_class is None else f"{config.per_class}_a_class"
    variant = (Path(data_name(config, loaded)).name, config.protocol, loaded.which, few)
    variant = [str(x) for x in variant if x not in ("frozen", "target", None)]
    out = Path(config.out) if config.out else home / "_".join(["probe", *variant])
    return out, home / "features"


def draw_found(setup: Setup, found: Found, out: Path) -> None:
    """confusion.png, neighbours.png and pca.png, those that the protocol has something for."""
    task, names = next(iter(setup.tasks.items()))
    if found.predictions is not None:
        matrix = confusion(setup.sets.labels(task)[1], found.predictions, len(names))
        title = f"{setup.trained}, {[*found.rows[-1]['figures']][-1]}"
        draw_confusion(out / "confusion.png", matrix, names, title)
    if found.neighbours is not None:
        rows, predicted = found.neighbours.neighbours.cpu(), found.neighbours.weighted
        draw_neighbours(out / "neighbours.png", setup.sets, task, rows, predicted)
    encoders = {name: encoder for name, encoder in setup.encoders.items() if encoder is not None}
    draw_patches(out / "pca.png", encoders, setup.sets, setup.place, setup.size)


def account(setup: Setup, found: Found, seconds: float) -> dict:
    """Everything that is needed to repeat the evaluation, and what came of it."""
    config, loaded, sets = setup.config, setup.loaded, setup.sets
    checkpoint = {"path": config.checkpoint, "encoder": loaded.which}
    for name in ("kind", "sha256", "note", "step", "config"):
        checkpoint[name] = getattr(loaded, name)
    pictures = {"name": setup.name, "size": setup.size, "reported": sets.reported}
    pictures |= {part: len(getattr(sets, part)) for part in ("fit", "choose", "report")}
    pictures["fingerprints"] = setup.fingerprints
    return {
        "command": shlex.join(["python", "probe.py", *sys.argv[1:]]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "checkpoint": checkpoint,
        "pictures": pictures,
        "options": dataclasses.asdict(config),
        "device": setup.hardware,
        "processes": setup.place.world_size,
        "bf16": setup.bf16,
        "versions": {"python": sys.version.split()[0], "torch": str(torch.__version__)},
        "results": found.rows,
    }


if __name__ == "__main__":
    run_script(main)
