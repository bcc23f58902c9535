"""Drawing for the notebooks, and finding CIFAR-10. Nothing of the method is here."""

import itertools
import os

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib_inline.backend_inline import set_matplotlib_formats

# Okabe and Ito's colors: distinct for color-blind readers, too.
BLUE, VERMILION, GREEN, ORANGE, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7"
CONTEXT, TARGETS = BLUE, (VERMILION, GREEN, ORANGE, PURPLE)  # of target 1, 2, 3, 4
NETWORKS = {"pixels": (GREEN, ":^"), "untrained": (VERMILION, "--s"), "trained": (BLUE, "-o")}


def style() -> None:
    """Large letters for a projector; figures as JPEG, which keeps notebooks small."""
    set_matplotlib_formats("jpeg", pil_kwargs={"quality": 70})
    plt.rcParams.update({
        "figure.constrained_layout.use": True, "figure.dpi": 72, "font.size": 16,
        "axes.titlesize": 16, "axes.spines.right": False, "axes.spines.top": False,
        "axes.prop_cycle": plt.cycler(color=(BLUE, *TARGETS)), "lines.linewidth": 3,
    })  # fmt: skip


def load_images(name: str):
    """The training images of CIFAR-10 or of a folder; and True in the tests, which use few."""
    from data import UserError, load_dataset  # the notebook has made them importable by now

    try:
        data = load_dataset(os.environ.get("IJEPA_DATA", name), "train", 32, "../data")
    except UserError as error:
        file = "cifar-10-python.tar.gz from www.cs.toronto.edu/~kriz"
        raise SystemExit(f"No images: {error}. Put {file} into ../data.") from None
    return data, os.environ.get("IJEPA_FAST") == "1"


def row(images, masks=None, colors="black", titles=None, grid=14, width=14, name="") -> None:
    """Images in a row, each with a mask, a color and a title, see `show`; its name on the left."""
    count, colors = len(images), [colors] * len(images) if isinstance(colors, str) else colors
    size = min(width, 4 * count), min(width / count, 4) + 0.4  # in inches
    _, axes = plt.subplots(1, count, figsize=size)
    axes[0].set_ylabel(name)
    for i, axis in enumerate(axes):
        mask, title = masks[i] if masks is not None else None, titles[i] if titles else ""
        show(axis, images[i], mask, colors[i], title, grid)


def show(axis, image, idx=None, color: str = "black", title: str = "", grid: int = 14) -> None:
    """An image (3, S, S) uint8 in patches; of these only idx (K,), or the targets idx (M, T).

    On a grid of 1, an image without patches: the color is that of its title and of its frame.
    """
    pixels, size = image.permute(1, 2, 0) / 255, image.shape[-1]
    fine = 32  # mask pixels of a patch, many so that outlines have sharp corners
    left, right = -0.5 - size / grid / fine / 2, size - 0.5 + size / grid / fine / 2
    for line in range(size // grid, size, size // grid):
        axis.axhline(line - 0.5, color="white", linewidth=0.5)
        axis.axvline(line - 0.5, color="white", linewidth=0.5)
    if idx is not None:
        visible, colors = pixel_mask(idx, grid, size), 2 * TARGETS if idx.ndim == 2 else [color]
        pixels = torch.where(visible[..., None], pixels, torch.tensor(0.88))
        for block, border in zip(idx.view(-1, idx.shape[-1]), colors, strict=False):
            mask = pixel_mask(block, grid, fine * grid).float()
            mask = torch.nn.functional.pad(mask, (1, 1, 1, 1))
            lines = axis.contour(
                mask, [0.5], extent=(left, right, left, right), colors=border, linewidths=3
            )
            lines.set_clip_on(False)  # at the border of the image, too, the line is whole
    axis.imshow(pixels)
    axis.set_title(title, color=color if grid == 1 else "black")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set(visible=grid == 1, color=color, linewidth=4)


def pixel_mask(idx, grid: int, size: int) -> torch.Tensor:  # (S, S) bool
    mask = torch.zeros(grid * grid).index_fill(0, idx.flatten(), 1).view(grid, grid)
    return mask.kron(torch.ones(size // grid, size // grid)).bool()


def method(image) -> None:
    """The method, as in Figure 3 of the paper, on an image (3, 224, 224)."""
    grid = torch.arange(196).view(14, 14)
    blocks = (grid[1:7, 1:6], grid[2:7, 8:13], grid[8:13, 1:7], grid[8:13, 8:13])
    context = grid[~torch.isin(grid, torch.cat([block.flatten() for block in blocks]))]
    axis = plt.figure(figsize=(14, 6.2)).add_subplot(xlim=(0, 14), ylim=(0, 6.2))
    axis.axis("off")
    center, thick = {"ha": "center", "va": "center"}, {"lw": 2.5, "mutation_scale": 24, "fc": "k"}

    def arrow(start, end, kind="-|>", line="-"):
        axis.add_patch(FancyArrowPatch(start, end, arrowstyle=kind, ls=line, **thick))

    for y, visible, color, others, names in (
        (3.5, context, BLUE, "none", ("context", "context\nencoder", "predictor")),
        (0.1, None, "0.35", "0.82", ("image", "target\nencoder", "LayerNorm")),
    ):
        inset = axis.inset_axes((0, y, 2.3, 2.3), transform=axis.transData)
        show(inset, image, visible, color, names[0])
        for x, name in zip((3.2, 6.3), names[1:], strict=True):
            axis.add_patch(FancyBboxPatch((x, y + 0.6), 1.8, 1.1, "round,pad=0.1", color=color))
            axis.text(x + 0.9, y + 1.15, name, color="white", fontsize=18, **center)
        for start, end in ((2.35, 3.08), (5.1, 6.18), (8.2, 8.95)):
            arrow((start, y + 1.15), (end, y + 1.15))
        colors = (others, *TARGETS)  # of the patches outside the blocks, then of the blocks
        for idx, color, name in zip((grid, *blocks), colors, " 1234", strict=True):
            x_token, y_token = 9.1 + 0.165 * (idx % 14), y + 0.165 * (13.5 - idx // 14)
            axis.scatter(x_token, y_token, s=95, c=color, marker="s", linewidths=0)
            axis.text(x_token.mean(), y_token.mean(), name, fontsize=20, weight="bold", **center)
    arrow((4.1, 4), (4.1, 1.9), line="--")
    arrow((10.15, 3.6), (10.15, 2.45), "<|-|>")
    arrow((7.2, 5.8), (7.2, 5.3))
    for x, y, text in (
        (5.6, 2.95, "EMA: follows slowly"), (11.3, 3.02, "loss: distance"),
        (7.2, 5.95, "mask tokens: which patches?"), (12.6, 1.25, "targets\n(no gradient)"),
        (12.6, 4.65, "predictions\n(gradients\nflow back)"),
    ):  # fmt: skip
        axis.text(x, y, text, fontsize=16, **center)


def positions(similarity, patches, grid: int = 14) -> None:
    """For some patches, row `patch` of a matrix (N, N) as a map, with a cross at the patch."""
    figure, axes = plt.subplots(1, len(patches), figsize=(14, 4.2))
    for axis, patch in zip(axes, patches, strict=True):
        heat = axis.imshow(similarity[patch].view(grid, grid), cmap="cividis", vmin=0.65, vmax=1)
        axis.plot(patch % grid, patch // grid, "x", color=VERMILION, ms=16, mew=4)
        axis.set_title(f"patch {patch}: row {patch // grid}, column {patch % grid}")
        axis.set(xlabel="column", ylabel="row")
    figure.colorbar(heat, ax=axes, label="cosine similarity")


def gradients(norms: dict[str, float], patches) -> None:
    """Norms of the gradients of some parts as bars, and a map of those of the patches (H, W)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5), width_ratios=(1.7, 1))
    bars = left.barh(list(norms), list(norms.values()), color=CONTEXT)
    left.bar_label(bars, [f"{x:.3f}" if x else "no gradient" for x in norms.values()], padding=5)
    left.set(xlabel="norm of the gradient", ylim=(len(norms) - 0.4, -0.6))
    heat = right.imshow(patches, cmap="cividis")
    right.set(title="mean absolute gradient of a patch", xlabel="column", ylabel="row")
    right.locator_params(integer=True)
    figure.colorbar(heat, ax=right)


def curves(runs: dict[str, list[dict]], titles: dict[str, str], x: str = "step", zero=True) -> None:
    """A panel for each column in `titles`, and in it a line for each run (its rows)."""
    figure, axes = plt.subplots(1, len(titles), figsize=(14, 4.6))
    for axis, (column, title) in zip(axes, titles.items(), strict=True):
        styles = itertools.cycle(("-o", "--s", ":^", "-.D"))
        for (name, rows), style in zip(runs.items(), styles, strict=False):
            shown = [row for row in rows if column in row]
            style = style if len(shown) < 50 else style[:-1]
            axis.plot([r[x] for r in shown], [r[column] for r in shown], style, label=name, ms=9)
        axis.set(xlabel=x, title=title)
        if zero:
            axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
    if len(runs) > 1:
        handles, names = axis.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)


def similarities(matrices: dict[str, torch.Tensor], label: str) -> None:
    """Matrices (n, n) side by side, each under its name, on one color scale up to 1."""
    figure, axes = plt.subplots(1, len(matrices), figsize=(14, 5))
    low = min(matrix.min() for matrix in matrices.values())
    for axis, (name, matrix) in zip(axes, matrices.items(), strict=True):
        heat = axis.imshow(matrix, cmap="cividis", vmin=low, vmax=1)
        axis.set(title=name, xlabel="image", ylabel="image")
    figure.colorbar(heat, ax=axes, label=label)


def bars(groups: dict[str, dict[str, float]], ylabel: str) -> None:
    """For each group, a bar for each of `NETWORKS`."""
    axis = plt.figure(figsize=(12, 5)).add_subplot(ylabel=ylabel)
    for shift, (name, (color, _)) in zip((-0.28, 0, 0.28), NETWORKS.items(), strict=True):
        positions, values = range(len(groups)), [group[name] for group in groups.values()]
        bar = axis.bar([x + shift for x in positions], values, 0.26, color=color, label=name)
        axis.bar_label(bar, fmt="%.1f")
    axis.set_xticks(positions, groups)
    axis.legend(frameon=False, loc="upper left", ncols=3)
    axis.set_ylim(0, 1.2 * axis.get_ylim()[1])


def draws(found: dict[str, list[list[float]]], x, xlabel: str, ylabel: str) -> None:
    """For each of `NETWORKS`, the mean, minimum and maximum of some draws at each x."""
    axis = plt.figure(figsize=(12, 5)).add_subplot(xlabel=xlabel, ylabel=ylabel)
    for name, (color, style) in NETWORKS.items():
        y = torch.tensor(found[name])  # (points, draws)
        mean = y.mean(1)
        # Equal draws: their mean may differ from them by rounding, and matplotlib rejects it.
        error = torch.stack([mean - y.amin(1), y.amax(1) - mean]).clamp(min=0)
        axis.errorbar(
            range(len(x)), mean, error, fmt=style, color=color, label=name, ms=9, capsize=6
        )
    axis.set_xticks(range(len(x)), x)
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, loc="upper left")


def confusion(matrix, names) -> None:
    """A confusion matrix (C, C) in percent of each row."""
    axis = plt.figure(figsize=(10, 8.5)).add_subplot(xlabel="predicted as", ylabel="class")
    axis.imshow(matrix, cmap="Blues", vmin=0, vmax=100)
    for i in range(len(names)):
        for j in range(len(names)):
            color = "white" if matrix[i, j] > 60 else "black"
            axis.text(j, i, f"{matrix[i, j]:.0f}", color=color, ha="center", va="center")
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axis.set_yticks(range(len(names)), names)
