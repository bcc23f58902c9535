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

import math
import struct
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import UserError
from ijepa import DAMAGED, ViT, cosine

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
            with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
                outputs = encoder.last_layers(images, layers)  # layers x (b, N, D)
            features.append(torch.cat([x.float().mean(1) for x in outputs], dim=1))
            if not keep_on_device and len(features) > 1:
                # One batch late: the device computes this batch while the one before is copied.
                features[-2] = features[-2].cpu()
    if not features:
        raise ValueError("there are no images to take features of")
    if not keep_on_device:
        features[-1] = features[-1].cpu()
    # Outside of inference mode, so that a head can be trained on the result.
    pooled = torch.cat(features)  # (n, layers * D)

    broken = _broken(pooled.view(len(pooled), layers, -1))  # (n, layers)
    if broken.any():
        first = int(broken.any(0).int().argmax())
        raise ValueError(
            f"the features of layer {depth - layers + first + 1} of {depth} are not finite "
            f"for {int(broken[:, first].sum())} of {len(pooled)} images"
        )
    return pooled


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

    grid, by_feature = [], {}
    for name in train_x:
        rows = []  # (row of the grid, the stack it is in, its place there)
        for head in heads:
            stack = stacks[name, head]
            hits = stack.predict(val_x[name], chunk) == val_y.to(device)  # (S, Q, n_val)
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
