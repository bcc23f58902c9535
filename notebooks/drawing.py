"""Drawing for the notebooks. Nothing of the method is here."""

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib_inline.backend_inline import set_matplotlib_formats

# Okabe and Ito's colours: distinct for colour-blind readers, too.
BLUE, VERMILION, GREEN, ORANGE, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7"
CONTEXT, TARGETS = BLUE, (VERMILION, GREEN, ORANGE, PURPLE)  # of target 1, 2, 3, 4


def style() -> None:
    """Large letters for a projector; figures as JPEG, which keeps notebooks small."""
    set_matplotlib_formats("jpeg", pil_kwargs={"quality": 75})
    plt.rcParams.update({
        "figure.constrained_layout.use": True, "figure.dpi": 72, "font.size": 16,
        "axes.titlesize": 16, "axes.spines.right": False, "axes.spines.top": False,
        "axes.prop_cycle": plt.cycler(color=(BLUE, *TARGETS)), "lines.linewidth": 3,
    })  # fmt: skip


def row(images, masks=None, colors="black", titles=None, grid: int = 14) -> None:
    """Images in a row, each with a mask, a color and a title, see `show`."""
    count, colors = len(images), [colors] * len(images) if isinstance(colors, str) else colors
    _, axes = plt.subplots(1, count, figsize=(min(14, 4 * count), min(14 / count, 4) + 0.4))
    for i, axis in enumerate(axes):
        mask, title = masks[i] if masks is not None else None, titles[i] if titles else ""
        show(axis, images[i], mask, colors[i], title, grid)


def show(axis, image, idx=None, color: str = "black", title: str = "", grid: int = 14) -> None:
    """An image (3, S, S) uint8 in patches; of these only idx (K,), or the targets idx (M, T)."""
    pixels, size = image.permute(1, 2, 0) / 255, image.shape[-1]
    for line in range(size // grid, size, size // grid):
        axis.axhline(line - 0.5, color="white", linewidth=0.5)
        axis.axvline(line - 0.5, color="white", linewidth=0.5)
    if idx is not None:
        visible, colors = pixel_mask(idx, grid, size), 2 * TARGETS if idx.ndim == 2 else [color]
        pixels = torch.where(visible[..., None], pixels, torch.tensor(0.88))
        for block, border in zip(idx.view(-1, idx.shape[-1]), colors, strict=False):
            mask = torch.nn.functional.pad(pixel_mask(block, grid, size).float(), (1, 1, 1, 1))
            axis.contour(mask, [0.5], extent=(-1, size, -1, size), colors=border, linewidths=3)
    axis.imshow(pixels)
    axis.set_title(title, color=color)
    axis.axis("off")


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


def curves(runs: dict[str, list[dict]], titles: dict[str, str], x: str = "step", zero=True) -> None:
    """A panel for each column in `titles`, and in it a line for each run (its rows)."""
    size = (14 if len(titles) > 1 else 9, 4.6)
    figure, axes = plt.subplots(1, len(titles), figsize=size, squeeze=False)
    for axis, (column, title) in zip(axes[0], titles.items(), strict=True):
        for (name, rows), style in zip(runs.items(), ("-o", "--s", ":^"), strict=False):
            shown = [row for row in rows if column in row]
            style = style if len(shown) < 50 else style[:-1]
            axis.plot([r[x] for r in shown], [r[column] for r in shown], style, label=name, ms=9)
        axis.set(xlabel=x, title=title)
        if zero:
            axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
    if len(runs) > 1:
        handles, names = axis.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)


def bars(groups: dict[str, dict[str, float]], ylabel: str) -> None:
    """One bar for each name in each of two groups."""
    axis = plt.figure(figsize=(12, 5)).add_subplot(ylabel=ylabel)
    for shift, (label, values) in zip((-0.2, 0.2), groups.items(), strict=True):
        positions = [i + shift for i in range(len(values))]
        axis.bar_label(axis.bar(positions, values.values(), 0.38, label=label), fmt="%.1f")
    axis.set_xticks(range(len(values)), values)
    axis.legend(frameon=False, loc="upper left")


def confusion(matrix, names) -> None:
    """A confusion matrix (C, C) in percent of each row."""
    axis = plt.figure(figsize=(10, 8.5)).add_subplot(xlabel="predicted as", ylabel="class")
    axis.imshow(matrix, cmap="Blues", vmin=0, vmax=100)
    for (i, j), value in zip((matrix > -1).nonzero().tolist(), matrix.flatten(), strict=True):
        axis.text(
            j, i, f"{value:.0f}", color="white" if value > 60 else "black", ha="center", va="center"
        )
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axis.set_yticks(range(len(names)), names)
