"""Drawing for the notebooks. Nothing of the method is here."""

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib_inline.backend_inline import set_matplotlib_formats

# Okabe and Ito's colours: distinct for colour-blind readers, too.
BLUE, VERMILION, GREEN, ORANGE, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7"
CONTEXT, TARGETS = BLUE, (VERMILION, GREEN, ORANGE, PURPLE)  # of target 1, 2, 3, 4


def style() -> None:
    """Large letters for a projector; figures as JPEG, which keeps notebooks small."""
    set_matplotlib_formats("jpeg", pil_kwargs={"quality": 88, "subsampling": 0})
    plt.rcParams.update({
        "figure.constrained_layout.use": True, "figure.dpi": 90, "font.size": 14,
        "axes.titlesize": 14, "axes.spines.right": False, "axes.spines.top": False,
        "axes.prop_cycle": plt.cycler(color=(BLUE, *TARGETS)), "lines.linewidth": 2.5,
    })  # fmt: skip


def pixel_mask(idx, grid: int, size: int) -> torch.Tensor:
    """True at the pixels of the patches idx: (size, size)."""
    mask, side = torch.zeros(grid * grid, dtype=torch.bool), size // grid
    mask[idx] = True
    return mask.view(grid, grid).repeat_interleave(side, 0).repeat_interleave(side, 1)


def show(axis, image, idx=None, color: str = "black", title: str = "", grid: int = 14) -> None:
    """An image (3, S, S) uint8 with its patches; of these only idx, if given, with a border."""
    pixels, size = image.permute(1, 2, 0) / 255, image.shape[-1]
    if idx is not None:
        pixels = torch.where(pixel_mask(idx, grid, size)[..., None], pixels, torch.tensor(0.88))
        outline(axis, idx, color, grid, size)
    axis.imshow(pixels)
    for line in range(size // grid, size, size // grid):
        axis.axhline(line - 0.5, color="white", linewidth=0.6)
        axis.axvline(line - 0.5, color="white", linewidth=0.6)
    axis.set_title(title, color=color)
    axis.axis("off")


def outline(axis, idx, color: str, grid: int = 14, size: int = 224, width: float = 3) -> None:
    """The border of the patches idx."""
    mask = torch.nn.functional.pad(pixel_mask(idx, grid, size).float(), (1, 1, 1, 1))
    around = torch.arange(-1, size + 1)
    axis.contour(around, around, mask, levels=[0.5], colors=color, linewidths=width, zorder=3)


def method(image) -> None:
    """The method, as in Figure 3 of the paper, on an image (3, 224, 224)."""
    blocks = ((1, 1, 6, 5), (2, 8, 5, 5), (8, 1, 5, 6), (8, 8, 5, 5))  # top, left, height, width
    numbers, free = torch.arange(196).view(14, 14), torch.ones(14, 14, dtype=torch.bool)
    for top, left, height, width in blocks:
        free[top : top + height, left : left + width] = False
    axis = plt.subplots(figsize=(14, 6.2))[1]
    axis.set(xlim=(0, 14), ylim=(0, 6.2))
    axis.axis("off")

    def arrow(start, end, kind="-|>", line="-"):
        style = {"arrowstyle": kind, "linestyle": line, "mutation_scale": 24, "lw": 2.5}
        axis.add_patch(FancyArrowPatch(start, end, color="black", **style))

    for x, y, text, color in (
        (3.2, 4.1, "context\nencoder", BLUE), (6.3, 4.1, "predictor", BLUE),
        (3.2, 0.7, "target\nencoder", "0.35"), (6.3, 0.7, "LayerNorm", "0.35"),
    ):  # fmt: skip
        axis.add_patch(FancyBboxPatch((x, y), 1.8, 1.1, "round,pad=0.1", fc=color, ec="none"))
        axis.text(x + 0.9, y + 0.55, text, color="white", ha="center", va="center", fontsize=18)
        arrow((2.35 if x < 4 else 5.1, y + 0.55), (x - 0.12, y + 0.55))
    for y, idx, text in ((3.5, numbers[free], "context"), (0.1, None, "whole image")):
        inset = axis.inset_axes((0, y, 2.3, 2.3), transform=axis.transData)
        show(inset, image, idx, CONTEXT if "c" in text else "black", text)
        arrow((8.2, y + 1.15), (8.95, y + 1.15))
        for k in range(196 if idx is None else 0):  # representations of all patches
            corner = 9.0 + 0.165 * (k % 14), y + 0.165 * (k // 14)
            axis.add_patch(Rectangle(corner, 0.13, 0.13, fc="0.82"))
        for (top, left, height, width), color, name in zip(blocks, TARGETS, "1234", strict=True):
            for k in range(height * width):
                corner = 9.0 + 0.165 * (left + k % width), y + 0.165 * (13 - top - k // width)
                axis.add_patch(Rectangle(corner, 0.13, 0.13, fc=color))
            at = 8.98 + 0.165 * (left + width / 2), y - 0.02 + 0.165 * (14 - top - height / 2)
            bubble = {"boxstyle": "circle,pad=0.15", "fc": "white", "ec": "none"}
            axis.text(*at, name, ha="center", va="center", fontsize=14, color="black", bbox=bubble)
    arrow((4.1, 3.95), (4.1, 1.95), line="--")
    arrow((10.15, 3.55), (10.15, 2.5), "<|-|>")
    arrow((7.2, 5.75), (7.2, 5.35))
    for x, y, text in (
        (4.3, 2.95, "EMA: follows slowly"), (10.4, 3.02, "loss: distance"),
        (5.9, 5.95, "mask tokens: which patches?"), (11.5, 1.25, "targets\n(no gradient)"),
        (11.5, 4.65, "predictions\n(gradients flow back)"),
    ):  # fmt: skip
        axis.text(x, y, text, va="center", fontsize=16)
