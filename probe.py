"""What has the encoder learned? Frozen features, and simple readers on top of them.

The protocol is that of Assran et al., CVPR 2023, Appendix A.2: the patches of a layer are averaged
to one vector an image; a linear classifier, or batch norm and a linear classifier, reads the last
layer or the last four; learning rate and weight decay are swept. Where the paper is silent, on the
choice among them, it is made here on held-out training images: the test set is read once, by the
winner.

Letters, in every shape comment of this file:

    n  images             C  classes                           S  seeds
    D  feature width      Q  settings: pairs of rate, decay    b  images in a batch
    k  neighbours
"""

import copy
import math
import struct
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (
    MEAN,
    Folder,
    Pictures,
    Place,
    Plan,
    UserError,
    enlarge,
    eval_batches,
    generator_for,
    progress,
    train_batches,
)
from ijepa import DAMAGED, Range, ViT, cosine, grid_of, learning_rate

# ------------------------------------------------------------------------------------- features


def pooled_features(
    encoder: ViT,
    batches: Iterable[Tensor],
    layers: int = 1,
    device: torch.device | str | None = None,
    bf16: bool = False,
    keep_on_device: bool = False,
) -> Tensor:
    """One vector an image: the average over patches of each of the last layers (Appendix A.2).

    Args:
        encoder: the frozen network.
        batches: normalised images, each batch (b, C, H p, W p) float32, of any size and number.
        layers: how many of the last layers; each goes through the last norm.
        device: where to compute; the encoder is moved there. By default where the encoder is.
        bf16: run the layers in bfloat16; averages are taken in float32 either way.
        keep_on_device: leave the features on the device.
    Returns:
        (n, layers * D) float32, the deepest layer last; on the CPU unless `keep_on_device`.
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
            if not keep_on_device and len(features) > 1:
                # One batch late: the device computes this batch while the one before is copied.
                features[-2] = features[-2].cpu()
    if not features:
        raise ValueError("there are no images to take features of")
    if not keep_on_device:
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
    with torch.autocast(images.device.type, torch.bfloat16) if bf16 else nullcontext():
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


def _broken(features: Tensor) -> Tensor:
    """Which vectors hold a NaN or an infinity: (..., D) -> (...)."""
    return ~features.sum(
        -1, dtype=torch.float32
    ).isfinite()  # a sum is finite only if all its terms are


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

    weighted: (
        Tensor  # (n,) int64 classes, a neighbour's vote counting exp(similarity / temperature)
    )
    plain: Tensor  # (n,) int64 classes, one neighbour one vote
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
            best[i] = _nearest_first(similarity, idx, k)
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


def _nearest_first(similarity: Tensor, idx: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row in falling order, equals in the order they stand."""
    order = similarity.argsort(dim=1, descending=True, stable=True)[:, :k]
    return similarity.gather(1, order), idx.gather(1, order)


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
    chunk: int = 2048,
    progress: bool = True,
) -> LinearProbe:
    """Sweep linear classifiers over frozen features (Appendix A.2), the whole grid in one pass.

    Every member of the grid (feature x head x rate x decay x seed) sees the training set as if it
    were alone, but all are trained at once: one product of matrices serves all settings of a head.
    The problem is convex and starts from zero: seeds differ in the order of the images alone, and
    not at all where a batch holds every one of them.

    Differs from the paper in the optimizer, see `_Heads`, and in that batch norm takes mean and
    variance from the whole training set, which on stored features costs nothing.

    Args:
        train_x: (n, D) features, or several kinds of them by name, of any width; all kinds go
            through the same images in the same order. They may stay on the CPU.
        train_y: (n,) int64 classes from 0.
        val_x, val_y: held out from training; the choice is made on them, by the mean over seeds.
            Of equals, the first in the order features, heads, rates, decays.
        test_x, test_y: read once, by the best setting of each feature.
        heads: "linear" and "bn" (batch norm without learned scale and shift, then linear).
        rates, decays: what to try. The rate falls along a cosine. A decay is a penalty of
            decay / 2 times the squared weights beside the mean cross entropy: 1 / (n C) in the
            terms of scikit-learn. Both are relative to the features' scale.
        seeds: how many (0, 1, ...), or which.
        epochs, min_steps: at least so many passes and so many steps, so that a small set is
            learned too.
        batch_size: images a step; a little more or less, to divide an epoch evenly.
        num_classes: by default what the labels say.
        device: where to compute; by default where the features are.
        chunk: images evaluated at a time; does not alter the answer.
        progress: show a bar, if it takes long and there is a terminal.
    Returns:
        A `LinearProbe`.
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
            if x.shape[1] != train_x[name].shape[1]:
                raise ValueError(
                    f"{split} set, {name}: width {x.shape[1]}, not {train_x[name].shape[1]}"
                )

    device = torch.device(device or next(iter(train_x.values())).device)
    settings = [(float(rate), float(decay)) for rate in rates for decay in decays]  # Q
    stacks = {
        (name, head): _Heads(head, *moments, num_classes, settings, len(seeds))
        for name, moments in ((name, _moments(x, device)) for name, x in train_x.items())
        for head in heads
    }
    _train(stacks, train_x, train_y, seeds, epochs, min_steps, batch_size, progress)
    return _choose(stacks, settings, val_x, val_y, test_x, test_y, chunk)


def _choose(
    stacks: Mapping[tuple[str, str], "_Heads | _LARSHeads"],
    settings: Sequence[tuple[float, float]],
    val_x: Mapping[str, Tensor],
    val_y: Tensor,
    test_x: Mapping[str, Tensor] | None,
    test_y: Tensor | None,
    chunk: int,
) -> LinearProbe:
    """Of trained heads by feature and kind: the best on validation images reads the test images."""
    grid, by_feature = [], {}
    for name in val_x:
        rows = []  # (row of the grid, the stack it is in, its place there)
        for stack, head in ((stack, head) for (of, head), stack in stacks.items() if of == name):
            hits = stack.predict(val_x[name], chunk) == val_y.to(stack.weight.device)  # (S, Q, n)
            accuracy = hits.double().mean(2).T.tolist()  # (Q, S)
            for q, (setting, val) in enumerate(zip(settings, accuracy, strict=True)):
                rows.append((GridRow(name, head, *setting, tuple(val)), stack, q))
        grid += [row for row, _, _ in rows]
        row, stack, q = max(rows, key=lambda r: mean_std(r[0].val)[0])  # the first of equals
        predictions, test = None, ()
        if test_x is not None:
            predictions = stack.predict(test_x[name], chunk, only=q)[:, 0].cpu()  # (S, n_test)
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


class _Heads:
    """All heads of one kind on one feature, (S, C, Q, D) weights, trained side by side.

    A sweep of plain SGD measures how well SGD copes with the features as much as what is in them:
    they vary a million times more in some directions than in others, most of all those of an
    untrained encoder. (Its `vit_tiny` on 20,000 CIFAR-10 images, JPEG copy: 37 % by the best of
    SGD and AdamW with 100 epochs, 45 % by this and by scikit-learn.) So the features are turned to
    their principal axes, where the loss is curved by about the variance along each axis, and each
    axis gets its own rate: rate / (variance + decay). To turn, to take out the mean and to divide
    all features by *one* number alters neither what a linear head can say nor, the bias being
    free, which weights are best; only how soon they are found, and that rates and decays mean the
    same for every encoder.

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
        device = mean.device
        variance = covariance.diagonal()
        spread = variance.mean().sqrt().expand_as(variance)  # one number
        if head == "bn":
            spread = (variance + BN_EPS * variance.mean()).sqrt()  # one a dimension
        # Features that do not vary at all have no scale; without their mean they are zeros anyway.
        spread = torch.where(spread > 0, spread, torch.ones_like(spread))
        curvature, axes = torch.linalg.eigh(covariance / torch.outer(spread, spread))
        self.mean = mean  # (D,)
        self.transform = axes / spread[:, None]  # (D, D): centred features to principal axes

        rates, decays = torch.tensor(settings, device=device).T[:, :, None]  # (Q, 1) each
        self.decays, self.bias_rates = decays, rates
        curvature = curvature.clamp_min(0).float() + CURVATURE_EPS
        self.weight_rates = rates / (curvature + decays)  # (Q, D)
        shape = (num_seeds, num_classes, len(settings))
        self.weight = torch.zeros(*shape, len(mean), device=device)  # (S, C, Q, D)
        self.bias = torch.zeros(*shape, 1, device=device)  # (S, C, Q, 1)
        self.weight_velocity = torch.zeros_like(self.weight)
        self.bias_velocity = torch.zeros_like(self.bias)

    def turned(self, x: Tensor) -> Tensor:
        """Features centred, scaled and along the principal axes: (n, D) -> (n, D)."""
        x = x.to(self.weight) - self.mean.float()
        return x @ self.transform.float()

    def step(self, x: Tensor, targets: Tensor, factor: float) -> None:
        """One step of SGD with Nesterov momentum for all, at `factor` times their rates.

        x: (S, b, D) turned features, a batch for each seed; targets: (S, C, 1, b) one-hot.
        """
        # Cross entropy of a linear map has a short gradient: (softmax(logits) - targets) x^T / b.
        logits = torch.bmm(self.weight.flatten(1, 2), x.mT).view(*self.bias.shape[:3], -1)
        error = (logits + self.bias).softmax(1).sub_(targets).div_(x.shape[1])  # (S, C, Q, b)
        weight_gradient = torch.bmm(error.flatten(1, 2), x).view_as(self.weight)
        weight_gradient.addcmul_(self.weight, self.decays)
        bias_gradient = error.sum(3, keepdim=True)
        for value, velocity, gradient, rates in (
            (self.weight, self.weight_velocity, weight_gradient, self.weight_rates),
            (self.bias, self.bias_velocity, bias_gradient, self.bias_rates),
        ):
            velocity.mul_(MOMENTUM).add_(gradient)
            gradient.add_(velocity, alpha=MOMENTUM)  # Nesterov's look ahead
            value.addcmul_(gradient, rates, value=-factor)

    def predict(self, x: Tensor, chunk: int, only: int | None = None) -> Tensor:
        """Classes by all settings, or by one: (n, D) -> (S, Q or 1, n) int64."""
        settings = slice(None) if only is None else slice(only, only + 1)
        weight, bias = self.weight[:, :, settings], self.bias[:, :, settings]
        logits = (weight @ self.turned(rows).T + bias for rows in x.split(chunk))  # (S, C, Q, b)
        return torch.cat([rows.argmax(1) for rows in logits], dim=2)

    def folded(self, q: int) -> tuple[Tensor, Tensor]:
        """One setting as a map from features as they come to logits: (S, C, D) and (S, C)."""
        weight = self.weight[:, :, q].double() @ self.transform.T
        bias = self.bias[:, :, q, 0] - weight @ self.mean
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
        key: torch.cat([stack.turned(rows).to(rows.device) for rows in train_x[key[0]].split(ROWS)])
        for key, stack in stacks.items()
    }
    some = next(iter(stacks.values())).weight
    n, classes, train_y = len(train_y), some.shape[1], train_y.cpu()
    batches = max(1, round(n / batch_size))  # of nearly equal size: no remainder, none tiny
    epochs = max(epochs, math.ceil(min_steps / batches))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    step, total = 0, epochs * batches
    with tqdm(total=total, desc="linear probe", delay=2, disable=None if progress else True) as bar:
        for _ in range(epochs):
            order = torch.stack([torch.randperm(n, generator=g) for g in generators])  # (S, n)
            for idx in order.tensor_split(batches, dim=1):  # (S, b)
                targets = F.one_hot(train_y[idx], classes).mT[:, :, None]  # (S, C, 1, b)
                targets = targets.to(some)
                factor = cosine(1.0, 0.0, step / total)
                for key, stack in stacks.items():
                    x = turned[key].index_select(0, idx.flatten().to(turned[key].device))
                    stack.step(x.to(some).view(*idx.shape, -1), targets, factor)
                step += 1
                bar.update()


# ------------------------------------------------------------- linear probe on augmented pictures

# What Appendix A.2 sweeps on ImageNet. The rates are reference rates, see `augmented_probe`.
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
    """No more than there are; a multiple of 64 then too, so that processes can share it."""
    return batch_size if batch_size <= n else n // 64 * 64 or n


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

    However a batch is divided among processes and micro-batches, the heads see it whole: the
    features of all are gathered, and the heads, which cost little beside the encoder, are computed
    by every process alike. Batch norm uses the moments of the batch to learn, and to predict the
    average of all of them: the encoder is frozen, so the first are as good as the last.

    Args:
        encoder: the frozen network.
        train, choose, report: to learn from; to choose the setting on, by the mean over seeds, as
            `linear_probe` does; read once, by the best setting of each feature. The last two are
            seen whole, without crops.
        place: where this process runs. All processes get the answer.
        num_classes: C.
        layers: how many layers make the second feature; with 1 there is only the first.
        rates: for 256 pictures of ImageNet: at a batch of 16,384 they are 64 times these. On sets
            of any size the batch of `augmented_batch` has these 64 times, others in proportion.
        decays: penalty of decay / 2 times the squared weights.
        seeds: how many (0, 1, ...), or which.
        epochs: passes over the training pictures; the rate falls to a tenth after each 30 %.
        batch_size: pictures a step, over all processes; by default `augmented_batch`.
        crop_scale, flip: share of the picture in a random crop, and whether half are mirrored.
            (1, 1) for tasks that cropping would make impossible: counting and distance.
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
            features.append(_gathered(x, place))
            labels.append(_gathered(label_of[batch.index.to(place.device)], place))
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
    return _choose(stacks, settings, choose_x, choose.labels, report_x, report.labels, CHUNK)


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


class _LARSHeads:
    """All heads of one kind on one feature, (S, Q, C, D) weights, trained side by side by LARS.

    To LARS (You et al. 2017) each member of the grid is a layer of its own. Its gradient, decay
    included, is scaled to TRUST times the norm of its weights before it enters the momentum:

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
        rates, self.decays = torch.tensor(settings, device=device).T[:, :, None, None]  # (Q, 1, 1)
        self.rates = scale * rates
        drawn = [
            torch.randn(num_classes, width, generator=generator_for(seed, "head")) for seed in seeds
        ]
        first = HEAD_STD * torch.stack(drawn).to(device)  # (S, C, D), the same for all settings
        self.weight = repeat(first, "s c d -> s q c d", q=len(settings)).clone()
        self.bias = torch.zeros_like(self.weight[..., :1])  # (S, Q, C, 1)
        self.weight_velocity = torch.zeros_like(self.weight)
        self.bias_velocity = torch.zeros_like(self.bias)
        self.norm = torch.nn.Identity()
        if head == "bn":  # `momentum=None`: the running moments are those of all steps, averaged
            self.norm = torch.nn.BatchNorm1d(width, BN_EPS, momentum=None, affine=False).to(device)

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

    @torch.no_grad()
    def predict(self, x: Tensor, chunk: int, only: int | None = None) -> Tensor:
        """Classes by all settings, or by one: (n, D) -> (S, Q or 1, n) int64."""
        settings = slice(None) if only is None else slice(only, only + 1)
        weight, bias = self.weight[:, settings], self.bias[:, settings]
        rows = (self.norm.eval()(rows.to(weight)) for rows in x.split(chunk))  # (b, D) each
        return torch.cat([(weight @ row.T + bias).argmax(2) for row in rows], dim=2)

    def folded(self, q: int) -> tuple[Tensor, Tensor]:
        """One setting as a map from features as they come to logits: (S, C, D) and (S, C)."""
        weight, bias = self.weight[:, q].double(), self.bias[:, q, :, 0].double()
        if isinstance(self.norm, torch.nn.BatchNorm1d):
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
    warmup_epochs: float = 5  # as in MAE, like the next
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
    silent on label smoothing; 0.1 as in MAE. Below that the paper is silent.
    """
    if embed_dim >= 1024:
        if low_shot:
            return FineTuneConfig(weight_decay=0.05 if embed_dim < 1280 else 0.4)
        return FineTuneConfig(
            lr=1e-4, weight_decay=0.04, batch_size=528, mixup=0.8, cutmix=1.0, drop_path=0.25
        )
    return FineTuneConfig()  # TODO measured


class Epoch(NamedTuple):
    """What an epoch of fine-tuning came to."""

    seed: int
    epoch: int  # from 1
    loss: float  # mean over its steps
    val: float  # accuracy in [0, 1] on the pictures held out for choices, which are not made


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
    processes nor micro-batches alter the result by more than rounding. Drop path is an exception,
    whose random numbers every process draws for its pictures.

    Differs from the paper in RandAugment, which is torchvision's with the same number and strength,
    where MAE has that of timm: a few other operations, of a strength that varies a little.

    Args:
        encoder: where to start from. It is left as it is.
        train: to learn from.
        choose: to show progress on, after each epoch. Nothing is chosen.
        report: read once for each seed, at the end.
        place: where this process runs. All processes get the answer.
        config: see `fine_tune_recipe`.
        num_classes: C.
        seeds: how many (0, 1, ...), or which; of everything random. The head starts from zero.
        size: pixels a side, to which pictures in memory are enlarged once they are augmented.
        bf16: autocast to bfloat16.
        workers: processes that crop and augment, and decode if need be.
    Returns:
        A `FineTuned`.
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


class _Classifier(torch.nn.Module):
    """A copy of an encoder, and a linear head on the mean of its patches."""

    def __init__(self, encoder: ViT, num_classes: int, drop_path: float = 0.0):
        from torchvision.ops import stochastic_depth  # only here: training has no need of it

        super().__init__()
        self.encoder = copy.deepcopy(encoder).requires_grad_(True)
        self.head = torch.nn.Linear(encoder.embed_dim, num_classes)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        blocks = self.encoder.blocks
        for block, p in zip(
            blocks, torch.linspace(0, drop_path, len(blocks)).tolist(), strict=True
        ):

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
    warmup = round(total * config.warmup_epochs / config.epochs)
    optimizer = torch.optim.AdamW(layer_groups(network, config), fused=cuda)
    wrapped = network
    if place.world_size > 1:
        wrapped = DistributedDataParallel(
            network, device_ids=[device] if cuda else None, broadcast_buffers=False
        )
    label_of = _label_table(train, device)
    batches = train_batches(train.data, plan, range(total), device, workers)
    bar = progress(range(total), f"fine-tuning, seed {seed}", " steps") if place.main else None
    epochs: list[Epoch] = []
    losses: list[Tensor] = []  # of this epoch, on the device
    for step in range(total) if bar is None else bar:
        lr = learning_rate(step, total, warmup, 0.0, config.lr, config.final_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        for micro, batch in enumerate(islice(batches, accum)):
            targets = F.one_hot(label_of[batch.index.to(device)], network.head.out_features)
            images = enlarge(batch.images, size)
            images, targets = mixed(images, targets.float(), config, (seed, "mix", step))
            last = micro == accum - 1
            with nullcontext() if last or wrapped is network else wrapped.no_sync():
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    logits = wrapped(images)
                smoothing = config.label_smoothing
                loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing) / accum
                loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()

        epoch = (step + 1) * batch_size // n
        if epoch > step * batch_size // n or step + 1 == total:
            loss = torch.stack(losses).sum() / (len(losses) // accum * place.world_size)
            if place.world_size > 1:
                dist.all_reduce(loss)
            if not math.isfinite(loss):
                raise UserError(
                    f"fine-tuning: the loss is {float(loss)} in epoch {epoch}: try a lower --lr"
                )
            found = _predicted(network, choose, place, size, bf16, workers)
            val = (found == choose.labels.cpu()).double().mean().item()
            epochs.append(Epoch(seed, epoch, float(loss), val))
            losses = []
            if bar is not None:
                bar.set_postfix_str(f"loss {loss:.3f}, {100 * val:.1f} % of held-out pictures")
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
        with torch.autocast(place.device.type, torch.bfloat16, enabled=bf16):
            found.append(network(images).argmax(1))
    network.train()
    whole = torch.zeros(len(examples.index), dtype=torch.int64, device=place.device)
    if found:
        whole[place.rank :: place.world_size] = torch.cat(found)
    if place.world_size > 1:
        dist.all_reduce(whole)
    return whole.cpu()


# --------------------------------------------------------------------------- health and mistakes


@torch.no_grad()
def rankme(features: Tensor, eps: float = 1e-7) -> float:
    """RankMe (Garrido et al., ICML 2023, equation 1): how many dimensions are in use, 1 to D.

    The exponential of the entropy of p = sigma / sum(sigma) + eps, with sigma the singular values
    of the features as they are (not centred): 1 if all vectors are parallel, D if the features
    fill all directions alike. A fall while training is a collapse under way. Comparable for the
    same number of images; 25,600 are the paper's.

    Singular values are roots of the eigenvalues of the smaller Gram matrix, in double precision:
    exact to 1e-8 of the largest one, less than `eps`, and many times faster than an SVD.

    Args:
        features: (n, D).
        eps: the paper's, for float32 features.
    Raises:
        ValueError: no features, or features that are not finite.
    """
    _check("rankme", features)
    if len(features) < features.shape[1]:
        features = features.T  # the same singular values
    # Added up in parts, so that the double precision copy stays small.
    parts = (rows.double() for rows in features.split(16384))
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

CHECKPOINT_FORMAT = "ijepa-1"


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint of train.py: configuration, architecture, weights, optimizer, step.

    Nothing in the file is run. Raises UserError if it is missing, damaged, or something else.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # what is wrong is said below, in one line
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {path}") from error
    except (*DAMAGED, OSError, ValueError, struct.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} is no checkpoint, or is truncated or damaged ({reason})"
        ) from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise UserError(f"{path} is no checkpoint of train.py")
    return checkpoint


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
        chance = report_y.bincount().max().item() / len(report_y)
        for name, (train_x, _, report_x) in features.items():
            prediction = knn(train_x, train_y, report_x, k=k)
            train_x, choose_x, report_x = narrowed[name]
            probe = linear_probe(
                train_x, train_y, choose_x, choose_y, report_x, report_y,
                heads=("bn",), rates=(0.1, 0.3, 1.0), decays=(5e-4,), epochs=10, min_steps=300,
            )  # fmt: skip
            rows.append(
                {
                    "features": name,
                    "task": task,
                    "knn": 100 * (prediction.weighted == report_y).double().mean().item(),
                    "linear": 100 * probe.best.test_mean,
                    "linear_std": 100 * probe.best.test_std,
                    "chance": 100 * chance,
                }
            )
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
