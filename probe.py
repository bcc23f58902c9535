"""What has the encoder learned? k-NN, linear probes and figures for a frozen encoder.

    python probe.py runs/vit_tiny_cifar10                        table, probe.json and figures
    python probe.py runs/vit_tiny_cifar10 --labels-per-class 13                      few labels
    python probe.py vit_nano_cifar10 --data cifar10            pretrained weights included here

Features are the average-pooled patch tokens of the last layer, or of the last four concatenated
(Appendix A.2 of the paper). The encoder is never changed. Protocol, the same in `train.py`:

    training images     k-NN and linear probes learn from these, or from --train-images of them
    validation images   a fixed part of the training set; they choose the L2 strength
    test images         they choose nothing, and train.py never reads them

Every figure stands beside two baselines: raw pixels, and an untrained encoder of the same shape.

Notation: n images, L layers, D width of a layer, F width of a feature vector, C classes.
"""

import json
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from data import (
    UserError,
    atomic_write,
    distributed,
    eval_batches,
    load_dataset,
    option,
    output_folder,
    parse_args,
    run_main,
    seeded_generator,
    train_val_split,
)
from ijepa import IJEPAConfig, ViT

WEIGHTS = Path(__file__).resolve().parent / "results" / "weights"  # pretrained weights included
K, TEMPERATURE = 20, 0.07  # of k-NN, as in DINO
# L2 strengths of the linear probe, strongest first. scikit-learn's C is 1 / (n * l2).
L2_GRID = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
DRAWS = 3  # random samples of labeled images per low-shot result

Splits = dict[str, tuple]  # "train", "val", perhaps "test" -> (dataset, indices)
Features = dict[str, tuple[Tensor, Tensor]]  # the same names -> features (n, L, D), labels (n,)


# ------------------------------------------------------------------------------------- features


def make_splits(train_set, test_set=None, train_images: int | None = None) -> Splits:
    """Images to learn from, to choose with and, if there is a test set, to test on.

    The split of a training set is always the same. `train_images` limits the images to learn from
    to a fixed random subset.
    """
    train_idx, val_idx = train_val_split(train_set)
    train_idx = train_idx[train_set.labels[train_idx] >= 0]  # STL-10 is mostly unlabeled
    order = torch.randperm(len(train_idx), generator=seeded_generator("probe images"))
    splits = {"train": (train_set, train_idx[order[:train_images]]), "val": (train_set, val_idx)}
    if test_set is not None:
        splits["test"] = (test_set, torch.arange(len(test_set)))
    return splits


def extract_splits(
    splits: Splits,
    encoder: ViT | None,
    device: torch.device | str = "cpu",
    bf16: bool = False,
    batch_size: int = 100,
    workers: int | None = 0,
) -> Features:
    """Features and labels of every split; raw pixels if `encoder` is None."""
    features = {}
    for name, (dataset, indices) in splits.items():
        batches = eval_batches(dataset, indices, device, batch_size, workers)
        x = extract_features(encoder, batches, bf16=bf16) if encoder else pixel_features(batches)
        features[name] = x, dataset.labels[indices]
    return features


@torch.no_grad()
def extract_features(encoder: ViT, batches: Iterable[Tensor], bf16: bool = False) -> Tensor:
    """Average-pooled tokens of the last four layers, or of all if the encoder has fewer.

    Args:
        batches: normalized images (B, 3, S, S), on the device of the encoder.
    Returns:
        (n, L, D) float32 on the CPU, deepest layer last.
    Raises:
        UserError: features are not finite, as after a diverged training run.
    """
    n_layers = min(4, len(encoder.blocks))
    training = encoder.training
    encoder.eval()
    pooled = []
    for images in batches:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            layers = encoder.get_intermediate_layers(images, n_layers)  # L times (B, N, D)
        pooled.append(torch.stack([x.float().mean(1) for x in layers], dim=1).cpu())
    encoder.train(training)
    features = torch.cat(pooled)
    if not features.isfinite().all():
        raise UserError("the features are not finite: the training of this encoder diverged")
    return features


def pixel_features(batches: Iterable[Tensor]) -> Tensor:
    """Raw pixels as features: (B, 3, S, S) each -> (n, 1, 3 * s * s) with s = S, at most 16.

    On CIFAR-10, 16 pixels are no less accurate than 32, and faster.
    """
    rows = []
    for images in batches:
        if images.shape[-1] > 16:
            images = F.interpolate(images, size=(16, 16), mode="area")
        rows.append(images.flatten(1)[:, None].cpu())
    return torch.cat(rows)


# ----------------------------------------------------------------------------------------- k-NN


@torch.no_grad()
def nearest(train_features: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """The K most similar training images by cosine: (n_train, F), (n, F) -> two times (n, K).

    Returns similarities and indices of training images, most similar first.
    """
    train = F.normalize(train_features, dim=1)
    chunks = [
        (F.normalize(chunk, dim=1) @ train.T).topk(min(K, len(train)), dim=1)
        for chunk in features.split(512)  # 512 x n_train similarities in memory
    ]
    return torch.cat([c.values for c in chunks]), torch.cat([c.indices for c in chunks])


def knn_classify(
    train_features: Tensor, train_labels: Tensor, features: Tensor, num_classes: int
) -> Tensor:
    """Classes (n,) by a weighted vote of the K nearest training images, as in DINO.

    A neighbor counts exp(similarity / TEMPERATURE). Shapes: (n_train, F), (n_train,), (n, F).
    """
    similarity, neighbors = nearest(train_features, features)  # (n, K)
    votes = similarity.new_zeros(len(features), num_classes)
    votes.scatter_add_(1, train_labels[neighbors], (similarity / TEMPERATURE).exp())
    return votes.argmax(1)


# --------------------------------------------------------------------------------- linear probe


@dataclass
class LinearProbe:
    """Multinomial logistic regression on standardized features."""

    mean: Tensor  # (F,)
    std: Tensor  # (F,)
    weight: Tensor  # (F, C)
    bias: Tensor  # (C,)
    l2: float
    val_accuracy: float = 0.0

    def predict(self, features: Tensor) -> Tensor:
        """(n, F) -> classes (n,)."""
        return ((features - self.mean) / self.std @ self.weight + self.bias).argmax(1)


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    num_classes: int,
    l2_grid: Sequence[float] = L2_GRID,
) -> LinearProbe:
    """Fit one probe per L2 strength; return the one that is best on the validation images.

    The objective is mean cross-entropy + l2 / 2 * |weight|^2, bias excluded: scikit-learn's
    LogisticRegression(C=1 / (n * l2)) after StandardScaler. Of equally good probes, the one with
    the strongest L2 is returned.

    Shapes: (n_train, F), (n_train,), (n_val, F), (n_val,), on any one device, in float32 or 64.
    """
    mean = train_features.mean(0)
    std = train_features.std(0, correction=0).clamp_min(1e-6)  # a constant feature stays zero
    x = (train_features - mean) / std
    # In principal axes the problem is the same, but its curvature is almost diagonal, which suits
    # L-BFGS.
    axes, variances = principal_axes(x)
    x = x @ axes  # (n_train, R)
    weight, bias = x.new_zeros(x.shape[1], num_classes), x.new_zeros(num_classes)
    best = None
    for l2 in sorted(l2_grid, reverse=True):
        weight, bias = fit_softmax(x, train_labels, l2, variances, weight, bias)  # warm start
        probe = LinearProbe(mean, std, axes @ weight, bias, l2)
        probe.val_accuracy = accuracy(probe.predict(val_features), val_labels)
        if best is None or probe.val_accuracy > best.val_accuracy:
            best = probe
    return best


def principal_axes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors (F, R) and eigenvalues (R,) of x^T x / n, largest first; R = min(n, F)."""
    if len(x) < x.shape[1]:
        _, singular_values, axes = torch.linalg.svd(x, full_matrices=False)
        return axes.T.contiguous(), singular_values.square() / len(x)
    variances, axes = torch.linalg.eigh(x.T @ x / len(x))
    return axes.flip(1), variances.flip(0).clamp_min(0)


def fit_softmax(
    x: Tensor, labels: Tensor, l2: float, variances: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Minimize mean cross-entropy + l2 / 2 * |weight|^2 by L-BFGS, from (weight, bias).

    Args:
        x: (n, R), in principal axes. labels: (n,). variances: (R,), of the axes.
        weight, bias: (R, C) and (C,), where to start.
    """
    # The optimizer sees weight / scale: then the curvature is near 1 along every axis. It is at
    # most variance / C + l2 or so, because the probability of a class is about 1 / C.
    scale = (variances / len(bias) + l2).rsqrt()[:, None]  # (R, 1)
    scaled = (weight / scale).requires_grad_()
    bias = bias.clone().requires_grad_()
    eps = torch.finfo(x.dtype).eps
    options = {"max_iter": 200, "tolerance_grad": 10 * eps, "tolerance_change": 10 * eps}
    optimizer = torch.optim.LBFGS(
        [scaled, bias], history_size=10, line_search_fn="strong_wolfe", **options
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        w = scaled * scale
        loss = F.cross_entropy(x @ w + bias, labels) + l2 / 2 * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (scaled * scale).detach(), bias.detach()


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Fraction of correct predictions."""
    return float((predicted == labels).double().mean())


# --------------------------------------------------------------------------- collapse indicators


@torch.no_grad()
def rankme(features: Tensor) -> float:
    """RankMe (Garrido et al., 2023, eq. 1): effective rank of features (n, F), from 1 to F.

    The exponential of the entropy of the normalized singular values. It falls when features
    collapse to few dimensions. It depends on n: compare it for the same number of images.
    """
    features = features.double()
    if len(features) < features.shape[1]:
        features = features.T  # the same singular values from a smaller matrix
    singular_values = torch.linalg.eigvalsh(features.T @ features).clamp_min(0).sqrt()
    p = singular_values / singular_values.sum() + 1e-7
    return float((-(p * p.log()).sum()).exp())


@torch.no_grad()
def feature_std(features: Tensor) -> float:
    """Mean standard deviation of L2-normalized features (n, F), as in SimSiam.

    0 if all images have the same features (collapse); at most 1 / sqrt(F).
    """
    return float(F.normalize(features.double(), dim=1).std(0, correction=0).mean())


# ----------------------------------------------------------------------------------- evaluation


def monitor(features: Features, num_classes: int, device="cpu") -> dict[str, float]:
    """Figures that take seconds, for the log of a training run.

    Returns "knn", the accuracy in [0, 1] on the validation images, "rankme" and "feature_std" of
    their last layer; "test_knn" if there is a test split.
    """
    last = {name: (x[:, -1].to(device), y.to(device)) for name, (x, y) in features.items()}
    train_x, train_y = last.pop("train")
    row = {}
    for split, (x, y) in last.items():
        predicted = knn_classify(train_x, train_y, x, num_classes)
        row[_key(split, "knn")] = accuracy(predicted, y)
    val_x = last["val"][0]
    return row | {"rankme": rankme(val_x), "feature_std": feature_std(val_x)}


def evaluate(features: Features, num_classes: int, device="cpu") -> dict[str, float]:
    """`monitor`, and linear probes of the last layer and of the last four concatenated.

    Returns also "linear" and "linear_4", the accuracies on the validation images, "linear_l2" and
    "linear_4_l2", their L2 strengths; "test_linear" and "test_linear_4" if there is a test split.
    Raw pixels, which are one layer, have no "linear_4".
    """
    row = monitor(features, num_classes, device)
    inputs = {"linear": lambda x: x[:, -1], "linear_4": lambda x: x.flatten(1)}
    if features["train"][0].shape[1] == 1:
        del inputs["linear_4"]
    for name, select in inputs.items():
        data = {k: (select(x).to(device), y.to(device)) for k, (x, y) in features.items()}
        probe = linear_probe(*data.pop("train"), *data["val"], num_classes)
        row[f"{name}_l2"] = probe.l2
        for split, (x, y) in data.items():
            row[_key(split, name)] = accuracy(probe.predict(x), y)
    return row


def _key(split: str, name: str) -> str:
    return name if split == "val" else f"{split}_{name}"


def evaluate_low_shot(
    features: Features, num_classes: int, labels_per_class: int, seed: int = 0, device="cpu"
) -> dict[str, float]:
    """`evaluate` with few labeled training images: mean and std ("..._std") over random draws.

    Validation images still choose the L2 strength: this needs more labels than are learned from.

    Raises:
        UserError: a class has too few training images.
    """
    x, y = features["train"]
    rows = []
    for draw in range(DRAWS):
        generator = seeded_generator("low-shot", seed, labels_per_class, draw)
        order = torch.randperm(len(y), generator=generator)
        idx = torch.cat([order[y[order] == c][:labels_per_class] for c in range(num_classes)])
        if len(idx) < labels_per_class * num_classes:
            raise UserError(f"a class has fewer than {labels_per_class} training images: ask less")
        rows.append(evaluate(features | {"train": (x[idx], y[idx])}, num_classes, device))
    values = {key: torch.tensor([row[key] for row in rows]).double() for key in rows[0]}
    mean = {key: float(v.mean()) for key, v in values.items()}
    std = {f"{key}_std": float(v.std()) for key, v in values.items() if "l2" not in key}
    return mean | std


COLUMNS = {"knn": f"{K}-NN", "linear": "linear, last layer", "linear_4": "linear, last 4 layers"}


def format_table(rows: Sequence[dict]) -> str:
    """Rows of `evaluate`, each with a "name", as text: validation / test accuracy in percent."""

    def cell(row: dict, column: str) -> str:
        parts = []
        for key in (column, f"test_{column}"):
            if key in row:
                std = f"±{100 * row[key + '_std']:.1f}" if key + "_std" in row else ""
                parts.append(f"{100 * row[key]:.1f}{std}")
        return " / ".join(parts) or "-"

    lines = [["", *COLUMNS.values(), "RankMe", "feature std"]]
    for row in rows:
        health = [f"{row[key]:.3g}" if key in row else "-" for key in ("rankme", "feature_std")]
        lines.append([row["name"], *(cell(row, column) for column in COLUMNS), *health])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


# ----------------------------------------------------------------------------------- checkpoints


def load_checkpoint(path: Path) -> dict:
    """A checkpoint of `train.py`, on the CPU. Raises UserError; no code in the file is ever run."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"config", "architecture", "model", "step"} - checkpoint.keys()
    except pickle.UnpicklingError:
        raise UserError(f"{path} was not loaded: it is damaged, or holds code") from None
    except Exception as error:  # a damaged or foreign file can fail in any way
        raise UserError(f"{path} is not a checkpoint of train.py ({_one_line(error)})") from None
    if missing:
        raise UserError(f"{path} is not a checkpoint of train.py: no {', '.join(sorted(missing))}")
    return checkpoint


def load_encoder(name: str, online: bool = False) -> tuple[ViT, IJEPAConfig, dict]:
    """Load an encoder from a run's folder, a .pt of `train.py`, a .safetensors of `save_encoder`,
    or by the name of pretrained weights included in results/weights.

    `online`: the context encoder instead of its EMA, the target encoder.

    Returns the encoder, on the CPU and frozen (`encoder.requires_grad_(True)` to train it), its
    config, and {"file", "network", "step", "train_config"}, None where it is not known.
    Raises UserError if there is no such file, or if it is not an encoder.
    """
    path = _find_weights(name)
    network = "encoder" if online else "target_encoder"
    info = {"file": str(path), "network": network, "step": None, "train_config": {}}
    if path.suffix != ".safetensors":
        checkpoint = load_checkpoint(path)
        config, model = checkpoint["architecture"], checkpoint["model"]
        info |= {"step": checkpoint["step"], "train_config": checkpoint["config"]}
    elif online:
        raise UserError(f"{path} holds one encoder only: leave out --online")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
            config, saved = json.loads(metadata["config"]), json.loads(metadata["info"])
            info["network"] = None  # unknown, if a foreign file was converted
            info |= {k: saved[k] for k in ("network", "step", "train_config") if k in saved}
            model = {f"{network}.{k}": v.float() for k, v in load_file(path).items()}
        encoder = ViT(config := IJEPAConfig(**config))
        prefix = f"{network}."
        weights = {k.removeprefix(prefix): v for k, v in model.items() if k.startswith(prefix)}
        encoder.load_state_dict(weights)
    except Exception as error:  # as above
        raise UserError(f"{path} does not hold an encoder ({_one_line(error)})") from None
    return encoder.eval().requires_grad_(False), config, info


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:150]


def _find_weights(name: str) -> Path:
    """The file that `name` means. Raises UserError if there is none."""
    folders = (Path(name), WEIGHTS / name)
    candidates = [folder / file for folder in folders for file in ("last.pt", "model.safetensors")]
    for path in (Path(name), *candidates):
        if path.is_file():
            return path
    included = ", ".join(sorted(folder.name for folder in WEIGHTS.glob("*/"))) or "none"
    raise UserError(f"no checkpoint in {name!r}; pretrained weights included: {included}")


def save_encoder(path, encoder: ViT, config: IJEPAConfig, half=False, info: dict | None = None):
    """Write weights as safetensors, in float16 if `half`; config and `info` become metadata.

    `info` may hold "step" and "train_config", as `load_encoder` returns them.
    """
    dtype = torch.float16 if half else torch.float32
    state = {k: v.to("cpu", dtype).contiguous() for k, v in encoder.state_dict().items()}
    metadata = {"config": json.dumps(asdict(config)), "info": json.dumps(info or {})}
    with atomic_write(path) as temporary:
        save_file(state, temporary, metadata=metadata)


def untrained_encoder(config: IJEPAConfig, seed: int = 0) -> ViT:
    """An encoder of the same architecture with fresh weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViT(config).eval().requires_grad_(False)


# --------------------------------------------------------------------------------------- figures

BLUE, VERMILION = "#0072B2", "#D55E00"  # can be told apart by color-blind readers


def _subplots(rows: int, columns: int, width: float, height: float):
    from matplotlib.figure import Figure  # imported late, because it starts slowly

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure, path: Path) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def _show(axis, image: Tensor, color: str | None = None) -> None:
    """Draw an image (3, H, W) without ticks, framed in `color`."""
    axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set(visible=color is not None, color=color, linewidth=2.5)


def _examples(labels: Tensor) -> list[int]:
    """Up to eight images, of different classes first."""
    first = [int((labels == c).nonzero()[0]) for c in labels.unique()[:8]]
    return (first + [i for i in range(len(labels)) if i not in first])[:8]


def _only(image: Tensor, patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """The image (3, H, W) with everything but some patches gray."""
    keep = torch.zeros(grid[0] * grid[1]).index_fill_(0, patches, 1.0).view(1, 1, *grid)
    keep = F.interpolate(keep, size=image.shape[-2:], mode="nearest")[0]
    return torch.where(keep > 0, image, torch.tensor(224, dtype=torch.uint8))


def draw_neighbors(path: Path, splits: Splits, split: str, neighbors: Tensor, masks=None) -> None:
    """Eight images, of different classes if possible, and their nearest training images.

    Args:
        split: where the images come from, "val" or "test".
        neighbors: (n, k) indices within the training split, for each image of `split`.
        masks: a MaskCollator; given, context and target blocks of each image are shown, too.
    """
    (train_set, train_idx), (dataset, indices) = splits["train"], splits[split]
    labels, train_labels = dataset.labels[indices], train_set.labels[train_idx]
    queries = _examples(labels)
    columns, shown = min(6, neighbors.shape[1]), 3 if masks else 1
    width = 1.05 * (columns + shown) + 0.6
    figure, axes = _subplots(len(queries), shown + columns, width, 1.1 * len(queries) + 0.3)
    if masks:
        context_idx, target_idx = masks.sample(len(queries), seeded_generator("figure"))
    for i, (row, query) in enumerate(zip(axes, queries, strict=True)):
        image = dataset.load(indices[[query]])[0]
        _show(row[0], image)
        row[0].set_ylabel(dataset.classes[labels[query]], fontsize=9)
        if masks:
            _show(row[1], _only(image, context_idx[i], masks.grid))
            _show(row[2], _only(image, target_idx[i].flatten(), masks.grid))
        found = neighbors[query, :columns].tolist()
        for axis, other, i in zip(
            row[shown:], train_set.load(train_idx[found]), found, strict=True
        ):
            _show(axis, other, BLUE if train_labels[i] == labels[query] else VERMILION)
    for axis, title in zip(axes[0], ("image", "context", "targets")[:shown], strict=False):
        axis.set_title(title, fontsize=9)
    title = "nearest training images: same class blue, other class orange"
    note = axes[0, shown].annotate(title, (0, 1.05), xycoords="axes fraction", fontsize=9)
    note.set_in_layout(False)  # or its length would push the columns apart
    _save(figure, path)


def draw_confusion(path: Path, labels: Tensor, predicted: Tensor, classes: Sequence[str]) -> None:
    """Confusion matrix in percent of each class; of more than 20 classes, the 20 worst."""
    count = len(classes)
    matrix = torch.bincount(labels * count + predicted, minlength=count**2).view(count, count)
    matrix = 100 * matrix / matrix.sum(1, keepdim=True).clamp_min(1)
    worst = matrix.diagonal().argsort()[:20].sort().values
    matrix, names = matrix[worst][:, worst], [classes[i] for i in worst]
    side = 2.2 + 0.36 * len(names)
    figure, axes = _subplots(1, 1, side, side)
    axis = axes[0, 0]
    axis.imshow(matrix.numpy(), cmap="Blues", vmin=0, vmax=100)
    for i, row in enumerate(matrix.tolist()):
        for j, value in enumerate(row):
            color = "white" if value > 50 else "black"
            if value >= 0.5:
                axis.text(j, i, f"{value:.0f}", ha="center", va="center", color=color, fontsize=8)
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="predicted as", ylabel="class")
    axis.set_title(f"{K}-NN predictions, % of each class", fontsize=10)
    _save(figure, path)


@torch.no_grad()
def draw_patch_pca(
    path: Path, encoders: dict[str, ViT], dataset, shown: Tensor, others: Tensor, device="cpu"
) -> None:
    """Patch features as colors: their first three principal components as red, green, blue.

    Each encoder has two rows: features less their mean, and less their mean at each position,
    because position can hide the content. Means and components are those of all images, `shown`
    and `others`, so that colors can be compared.
    """
    rows = {"image": dataset.load(shown)}
    for name, encoder in encoders.items():
        batches = eval_batches(dataset, torch.cat([shown, others]), device)
        tokens = torch.cat([encoder(images).cpu() for images in batches])  # (B, N, D)
        side = round(tokens.shape[1] ** 0.5)
        means = {name: tokens.mean((0, 1)), f"{name},\nno position": tokens.mean(0)}
        for label, mean in means.items():
            centered = (tokens - mean).flatten(0, 1)  # (B N, D)
            axes, _ = principal_axes(centered)
            components = centered @ axes[:, :3]  # (B N, 3)
            low, high = components.quantile(0.02, dim=0), components.quantile(0.98, dim=0)
            colors = ((components - low) / (high - low)).clamp(0, 1)
            rows[label] = colors.view(-1, side, side, 3).permute(0, 3, 1, 2)[: len(shown)]
    figure, axes = _subplots(len(rows), len(shown), 1.1 * len(shown) + 0.4, 1.1 * len(rows) + 0.4)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name, fontsize=9)
        for axis, image in zip(line, images, strict=True):
            _show(axis, image)
    figure.suptitle("Patch features as colors (3 principal components)", fontsize=10)
    _save(figure, path)


def draw_curves(path: Path, rows: Sequence[dict]) -> None:
    """Loss, k-NN accuracy, RankMe and feature std over the steps, from the rows of log.csv."""
    panels = {"loss": ("loss", "val_loss"), f"{K}-NN accuracy, %": ("knn",)}
    panels |= {"RankMe": ("rankme",), "feature std": ("feature_std",)}
    figure, axes = _subplots(1, 4, 11, 2.6)
    for axis, (title, names) in zip(axes[0], panels.items(), strict=True):
        for name, color in zip(names, (BLUE, VERMILION), strict=False):
            shown = [row for row in rows if row.get(name) not in (None, "")]
            steps = [int(row["step"]) for row in shown]
            values = [float(row[name]) * (100 if name == "knn" else 1) for row in shown]
            axis.plot(steps, values, color=color, label=name, marker="." if len(shown) < 30 else "")
        if "loss" in names:  # the first steps would flatten the rest
            late = [float(r[n]) for r in rows[len(rows) // 20 :] for n in names if r.get(n)]
            if late:
                axis.set_ylim(0.98 * min(late), 1.02 * max(late))
        axis.set(xlabel="step", title=title)
        if len(names) > 1:
            axis.legend()
    _save(figure, path)


# ---------------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class ProbeConfig:
    """Options of this script."""

    encoder: str = option(
        "vit_nano_cifar10", "run folder, .pt, .safetensors or included weights", positional=True
    )
    data: str | None = option(None, "dataset; default: what the encoder was trained on")
    data_dir: str | None = option(None, "folder of the datasets; default: the run's")
    img_size: int | None = option(None, "image side in pixels; default: the encoder's")
    train_images: int | None = option(None, "labeled images to learn from; default: all")
    labels_per_class: int | None = option(None, "also learn from so few labels per class")
    baselines: bool = option(True, "also evaluate raw pixels and an untrained encoder")
    online: bool = option(False, "evaluate the context encoder, not the EMA target encoder")
    seed: int = option(0, "of the untrained encoder and of the low-shot draws")
    out: str | None = option(
        None, "folder for probe.json and figures; default: the encoder's, or runs/probe_NAME"
    )
    device: str | None = option(None, "cpu, cuda or cuda:1; default: a GPU if there is one")
    bf16: bool = option(False, "compute features in bfloat16")
    batch_size: int = option(500, "images per forward pass")
    workers: int | None = option(
        None, "processes that decode a folder's images; default: 8 beside a GPU, or 0"
    )


def load_splits(config: ProbeConfig, architecture: IJEPAConfig, info: dict) -> Splits:
    """The splits that the options and the checkpoint name. Raises UserError."""
    if any(n is not None and n < 1 for n in (config.train_images, config.labels_per_class)):
        raise UserError("--train-images and --labels-per-class start at 1")
    if config.batch_size < 1 or (config.workers or 0) < 0:
        raise UserError("--batch-size starts at 1, --workers at 0")
    data = config.data or info["train_config"].get("data")
    if data is None:
        raise UserError(f"{info['file']} does not say what it was trained on: add --data")
    size = config.img_size
    if size is None:
        size = info["train_config"].get("img_size") or architecture.img_size
    if not isinstance(size, int) or size < 1 or size % architecture.patch_size:
        raise UserError(f"--img-size must be a multiple of {architecture.patch_size}, not {size}")
    data_dir = config.data_dir or info["train_config"].get("data_dir", "data")
    train_set, test_set = (load_dataset(data, split, size, data_dir) for split in ("train", "test"))
    return make_splits(train_set, test_set, config.train_images)


def main() -> None:
    config = parse_args(ProbeConfig, __doc__)
    encoder, architecture, info = load_encoder(config.encoder, config.online)
    splits = load_splits(config, architecture, info)
    num_classes = len(splits["train"][0].classes)
    sizes = {name: len(indices) for name, (_, indices) in splits.items()}
    print(f"{info['file']}, {info['network'] or 'encoder'}, step {info['step'] or 'unknown'}")
    print(f"{sizes['train']:,} labeled training images for k-NN and linear probes,")
    print(f"{sizes['val']:,} validation images to choose the L2 strength,", end=" ")
    print(f"{sizes['test']:,} test images.")
    if config.labels_per_class:
        print("With few labels, the same validation images and all their labels choose it.")
    folder = Path(info["file"]).resolve().parent
    included = WEIGHTS in folder.parents  # which is not for output
    out = output_folder(config.out or (f"runs/probe_{folder.name}" if included else folder))
    encoders: dict[str, ViT | None] = {"trained": encoder}
    if config.baselines:
        untrained = untrained_encoder(architecture, config.seed)
        encoders = {"pixels": None, "untrained": untrained, "trained": encoder}

    rows = []
    with distributed(config.device, alone=True) as process:
        device = process.device
        for name, network in encoders.items():
            network = network and network.to(device)
            features = extract_splits(
                splits, network, device, config.bf16, config.batch_size, config.workers
            )
            rows.append({"name": name} | evaluate(features, num_classes, device))
            if n := config.labels_per_class:
                row = evaluate_low_shot(features, num_classes, n, config.seed, device)
                rows.append({"name": f"{name}, {n} per class"} | row)
    print(f"\nAccuracy in %, validation / test\n{format_table(rows)}")

    result = {"options": asdict(config), "encoder": info, "images": sizes, "rows": rows}
    with atomic_write(out / "probe.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    (train_x, train_y), (x, y) = features["train"], features["test"]  # of the trained encoder
    train_x, x = train_x[:, -1].to(device), x[:, -1].to(device)
    dataset, indices = splits["test"]
    draw_neighbors(out / "neighbors.png", splits, "test", nearest(train_x, x)[1].cpu())
    predicted = knn_classify(train_x, train_y.to(device), x, num_classes).cpu()
    draw_confusion(out / "confusion.png", y, predicted, dataset.classes)
    networks = {k: v for k, v in encoders.items() if v is not None}
    shown, others = indices[_examples(y)], indices[:: len(indices) // 200 + 1]
    draw_patch_pca(out / "patch_pca.png", networks, dataset, shown, others, device)
    print(f"\nWrote probe.json, neighbors.png, confusion.png and patch_pca.png to {out}")


if __name__ == "__main__":
    run_main(main)
