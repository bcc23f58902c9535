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
# # 1. Masks: what is hidden, and what is left
#
# **I-JEPA** (Image-based Joint-Embedding Predictive Architecture,
# [the paper](https://arxiv.org/abs/2301.08243)) learns from pictures without labels. It hides
# blocks of a picture and predicts them from the rest: not their pixels, but their
# **representation**, the vectors that a second network, which sees the whole picture, makes of
# them. Such a vector may leave out what nobody can foretell, like the exact texture of grass. That
# is the idea (Section 1; Table 7: 66.9 % accuracy, and 40.7 % with pixels). The networks come in
# notebook 2.
#
# Here are the masks. Much depends on *what is hidden*: in Table 6 a linear classifier that reads
# the learned vectors is right in 15.5 to 54.2 % of the cases, and only the masks differ.
#
# A picture is cut into a grid of **patches**. For each picture are drawn (Section 3, "Targets" and
# "Context", and Appendix A.1):
#
# - **targets**: $M = 4$ blocks $B_1, \dots, B_4$, each 15 to 20 % of the picture, 0.75 to 1.5 times
#   as high as wide. They may overlap. Their representations are to be predicted.
# - **context**: one block $B_x$ of 85 to 100 % of the picture, *without* the patches of the
#   targets, thinned out to a quarter of the picture (the average in Table 6). It is all that the
#   network in training, the context encoder, sees.

# %%
import classroom

classroom.begin()

# %%
import matplotlib.pyplot as plt
import torch

from data import generator_for, load_data
from ijepa import STRATEGIES, MaskCollator, block_shapes

# %% [markdown]
# The pictures are drawn by the computer (`shapes`): one to four objects, each filled with one of
# eight patterns, under patches of light and film grain (`clutter`). To see your own, set `PICTURES`
# to a folder that has `train/<class>/<picture>`, or to `"cifar10"`, which is downloaded once if it
# is not there.

# %%
PICTURES = "shapes"
GRID = (14, 14)  # patches, as in the paper; there 224 pixels / 16, here 112 / 8

more = {"count": 8, "clutter": 0.4} if PICTURES == "shapes" else {}
pictures = load_data(PICTURES, img_size=112, **more).centre(torch.arange(3))  # (3, 3, 112, 112)
pictures.shape

# %% [markdown]
# ## Blocks on pictures (Figure 4)
#
# `MaskCollator` draws the masks of a whole batch. It returns the *numbers* of patches, counted row
# by row: the context as $(B, K)$, the targets as $(B, M, T)$, for $B$ pictures, $K$ context patches
# and $T$ patches in a target block.

# %%
masks = MaskCollator(GRID)
context, targets = masks.sample(len(pictures), generator_for("figure 4"))
print("context", tuple(context.shape), "targets", tuple(targets.shape))

figure, axes = plt.subplots(3, 6, figsize=(12, 6.5))
for row, picture in enumerate(pictures):
    titles = ["picture", "context", *(f"target {i + 1}" for i in range(4))]
    seen = [None, context[row], *targets[row]]
    for axis, idx, title in zip(axes[row], seen, titles, strict=True):
        colour = (
            None if idx is None else classroom.BLUE if title == "context" else classroom.VERMILION
        )
        classroom.show(axis, picture, idx, GRID, title if row == 0 else "", colour)

# %%
for one, blocks in zip(context, targets, strict=True):
    assert not torch.isin(one, blocks).any()  # context and targets never overlap
assert context.shape[1] == round(0.25 * 14 * 14)  # a quarter of the picture (Table 6, "Avg. Ratio")

# %% [markdown]
# The context looks like a sieve. After the targets are cut out, some 45 % of the patches are left,
# and $K$ of them (a quarter) are kept at random, so that all pictures of a batch have equally many,
# and the batch is a plain tensor.
#
# > **Question.** A target block is a rectangle and not a scatter of patches. What would a network
# > have to know to fill in a single missing patch, when it sees the patches around it?

# %% [markdown]
# ## Four strategies (Table 6)
#
# The accuracies are the paper's: a linear classifier on 1 % of the labels of ImageNet, ViT-B/16.

# %%
PAPER = {"multiblock": 54.2, "rasterized": 15.5, "block": 20.2, "random": 17.6}  # Top-1 in %

figure, axes = plt.subplots(2, 4, figsize=(12, 6.8))
for column, strategy in enumerate(STRATEGIES):
    sampler = MaskCollator(GRID, strategy)
    seen, hidden = sampler.sample(1, generator_for(strategy))
    share = sampler.context_size / sampler.num_patches
    title = f"{strategy} (paper: {PAPER[strategy]} %)\ncontext: {share:.0%}"
    classroom.show(axes[0, column], pictures[1], seen[0], GRID, title, classroom.BLUE)
    title = f"targets: {hidden.shape[1]} x {hidden.shape[2]}"
    classroom.show(axes[1, column], pictures[1], hidden.unique(), GRID, title, classroom.VERMILION)

# %% [markdown]
# `random` hides as much as `block`, but each hidden patch has visible ones beside it that look like
# it: it can be copied from next door. `rasterized` shows one quarter, from which the opposite one
# cannot be known. `multiblock` hides pieces that are large enough to mean something, and shows
# patches on several sides of them.

# %% [markdown]
# ## Coverage: who is seen how often?
#
# The heat maps count, over 4,096 draws, how often each patch is in the context, and how often in at
# least one target.


# %%
def coverage(strategy: str) -> torch.Tensor:
    """How often each patch is context, and how often a target: (2, H, W) shares."""
    sampler = MaskCollator(GRID, strategy)
    generator = generator_for("coverage", strategy)
    total = torch.zeros(2, sampler.num_patches)
    for _ in range(64):  # many batches: all blocks of one batch have the same shape
        for kind, idx in enumerate(sampler.sample(64, generator)):
            total[kind] += (
                torch.zeros(64, sampler.num_patches).scatter_(1, idx.flatten(1), 1).sum(0)
            )
    return (total / 4096).view(2, *GRID)


covered = {strategy: coverage(strategy) for strategy in STRATEGIES}
figure, axes = plt.subplots(2, 4, figsize=(12, 6.2))
for column, (strategy, shares) in enumerate(covered.items()):
    for row, (share, kind) in enumerate(zip(shares, ("context", "a target"), strict=True)):
        image = axes[row, column].imshow(100 * share, cmap="cividis", vmin=0, vmax=100)
        axes[row, column].set(xticks=[0, 13], yticks=[0, 13])
        axes[row, column].set_title(f"{strategy}: {kind}", fontsize=13)
axes[1, 0].set(xlabel="column of patches", ylabel="row of patches")
bar = figure.colorbar(image, ax=axes, label="of all draws (%)")

# %%
context_share, target_share = covered["multiblock"]
assert context_share.min() > 0.03 and target_share.min() > 0.02  # every patch gets a turn
assert target_share[6:8, 6:8].mean() > 3 * target_share[[0, 0, -1, -1], [0, -1, 0, -1]].mean()
assert (target_share - target_share.flip(1)).abs().max() < 0.06  # left and right alike
assert (target_share - target_share.flip(0)).abs().max() < 0.06  # top and bottom alike

# %% [markdown]
# All positions where a block fits are equally likely (deviation D3: the top of `ijepa.py` numbers
# where it differs from the paper or from its authors' code). A corner is covered from one position,
# the centre from many: the centre is hidden, and what is near the border is seen. (The outermost
# ring less: the context block may miss it.) The quadrants of `rasterized` and the patches of
# `random` know no centre.

# %% [markdown]
# ## What goes wrong with cut masks
#
# Pictures of a batch have differently many patches left. The authors' code cuts all of them to the
# *shortest* of the batch and keeps the **first** patches, counted row by row: what is cut is the
# lower part of the picture. The larger the batch, the shorter its shortest mask. Here $K$ does not
# depend on the batch, and what is too many is dropped at random (deviation D5).
#
# We imitate the cut with our own draws: `free` is what the targets leave, before our $K$ are
# chosen.


# %%
def cut_context(batch: int, batches: int, generator: torch.Generator) -> torch.Tensor:
    """Masks cut to the shortest of the batch: how often each patch is context, (H, W)."""
    total = torch.zeros(masks.num_patches)
    for _ in range(batches):
        pick = int(torch.randint(len(masks.target_shapes), (1,), generator=generator))
        shape = masks.target_shapes[pick].tolist()
        _, free = masks._draw(batch, shape, generator)  # (B, N) bool
        shortest = free.sum(1).min()
        first = free & (free.cumsum(1) <= shortest)  # the first `shortest` ones, row by row
        total += first.sum(0)
    return (total / (batch * batches)).view(GRID)


generator = generator_for("cut masks")
BATCHES = {1: 1024, 8: 256, 64: 64, 512: 16, 2048: 8}  # batch size: how many batches
cut = {batch: cut_context(batch, count, generator) for batch, count in BATCHES.items()}

figure, axes = plt.subplots(1, 5, figsize=(12, 3.2))
for axis, batch in zip(axes, (1, 8, 64, 2048), strict=False):
    axis.imshow(100 * cut[batch], cmap="cividis", vmin=0, vmax=100)
    axis.set_title(f"cut, batch of {batch}", fontsize=13)
image = axes[4].imshow(100 * context_share, cmap="cividis", vmin=0, vmax=100)
axes[4].set_title("ours, any batch", fontsize=13)
for axis in axes:
    axis.set(xticks=[0, 13], yticks=[0, 13], xlabel="column")
axes[0].set_ylabel("row of patches")
bar = figure.colorbar(image, ax=axes, label="is context (%)")

# %%
sizes = list(cut)
kept = [100 * float(cut[batch].mean()) for batch in sizes]
lower = [100 * float(cut[batch][7:].sum() / cut[batch].sum()) for batch in sizes]
ours = 100 * float(context_share[7:].sum() / context_share.sum())

figure, axes = plt.subplots(1, 2, figsize=(12, 4))
axes[0].plot(sizes, kept, "o-", color=classroom.VERMILION, label="cut to the shortest")
axes[0].axhline(25, color=classroom.BLUE, label="ours")
axes[0].set(xscale="log", ylim=(0, 55), title="Size of the context")
axes[0].set(xlabel="batch size (pictures)", ylabel="share of all patches (%)")
axes[1].plot(sizes, lower, "o-", color=classroom.VERMILION, label="cut to the shortest")
axes[1].axhline(ours, color=classroom.BLUE, label="ours")
axes[1].set(xscale="log", ylim=(0, 55), title="How much of it is in the lower half")
axes[1].set(xlabel="batch size (pictures)", ylabel="share of the context (%)")
for axis in axes:
    axis.grid()
    axis.legend()

# %%
assert kept == sorted(kept, reverse=True) and lower == sorted(lower, reverse=True)
assert abs(ours - 50) < 2  # ours: as much below as above
assert lower[0] > 45 and lower[-1] < 25  # cut: the lower half is lost, in large batches
print(f"lower half: {lower[0]:.0f} % of the context in batches of 1, {lower[-1]:.0f} % in 2,048")

# %% [markdown]
# > **Question.** Which other way is there to make the masks of a batch equally long? What would it
# > cost?

# %% [markdown]
# ## Try it
#
# The picture shows the default setting; with the sliders in the cell after it you can change it.
# Settings that cannot be met are refused, with the reason.


# %%
def try_masks(scale: float, aspect: float, num_targets: int, context: int) -> None:
    """One picture under other masks: scale of a target, its height by width, M, and K in %."""
    try:
        sampler = MaskCollator(
            GRID,
            num_targets=num_targets,
            target_scale=(scale, scale),
            target_aspect=(aspect, aspect),
            context_size=round(context / 100 * 14 * 14),
        )
    except ValueError as error:
        print(error)
        return
    seen, hidden = sampler.sample(3, generator_for("slider"))
    axes = plt.subplots(1, 6, figsize=(12, 2.5))[1]
    for i in range(3):
        left, right = axes[2 * i], axes[2 * i + 1]
        classroom.show(left, pictures[i], seen[i], GRID, "context", classroom.BLUE)
        classroom.show(right, pictures[i], hidden[i].unique(), GRID, "targets", classroom.VERMILION)
    plt.show()


try_masks(scale=0.175, aspect=1.0, num_targets=4, context=25)

# %% tags=["skip-execution"]
import ipywidgets as widgets

wide = {"style": {"description_width": "11em"}, "layout": {"width": "32em"}}
calm = {"continuous_update": False} | wide
widgets.interactive(
    try_masks,
    scale=widgets.FloatSlider(0.175, min=0.05, max=0.5, step=0.025, description="scale", **calm),
    aspect=widgets.FloatSlider(1.0, min=0.3, max=3.0, step=0.1, description="aspect ratio", **calm),
    num_targets=widgets.IntSlider(4, min=1, max=8, description="number of targets", **calm),
    context=widgets.IntSlider(25, min=5, max=60, step=5, description="context size (%)", **calm),
)

# %% [markdown]
# ## Exercises
#
# Each solution is folded: click on "1 cell hidden" below its heading.

# %% [markdown]
# ### Exercise 1
#
# How many different shapes can a target block take on the grid of 14 x 14, and how many on
# the 8 x 8 of CIFAR-10? (`block_shapes` lists them.) How many patches has the smallest, and the
# largest? Is that 15 to 20 % of the picture?

# %% [markdown] jp-MarkdownHeadingCollapsed=true
# #### Solution 1

# %% tags=["solution"]
for side in (14, 8):
    shapes = block_shapes((side, side), (0.15, 0.2), (0.75, 1.5)).unique(dim=0)
    areas = shapes.prod(1)
    print(f"{side} x {side}: {len(shapes)} shapes of {areas.min()} to {areas.max()} patches")
    assert len(shapes) > 3 and areas.min() >= 0.1 * side**2 and areas.max() <= 0.25 * side**2
# 25 of 196 patches are 13 %, not 15 %: height and width are rounded to whole patches.

# %% [markdown]
# ### Exercise 2
#
# Four targets of 17.5 % each do not hide 70 % of the picture, since they overlap. If each
# patch were in each block with probability 0.175 independently of where it is, what share would be
# hidden? How much is it in truth, and why is it less?

# %% [markdown] jp-MarkdownHeadingCollapsed=true
# #### Solution 2

# %% tags=["solution"]
independent = 1 - (1 - 0.175) ** 4
measured = float(target_share.mean())
print(f"independent: {independent:.1%}, measured: {measured:.1%}")
# Blocks crowd in the centre, where they overlap more. (The draws that leave too little context are
# repeated, which favours overlap too, slightly: deviation D6.)
assert 0.40 < measured < independent

# %% [markdown]
# ### Exercise 3
#
# `MaskCollator` refuses a `context_size` if more than half of its draws would leave fewer patches.
# What is the largest that it accepts beside 1, 2, 4 and 8 targets?

# %% [markdown] jp-MarkdownHeadingCollapsed=true
# #### Solution 3

# %% tags=["solution"]


def largest_context(num_targets: int) -> int:
    for size in range(196, 0, -1):
        try:
            return MaskCollator(GRID, num_targets=num_targets, context_size=size).context_size
        except ValueError:
            continue  # refused: try one patch less
    raise AssertionError("none is granted")


largest = {count: largest_context(count) for count in (1, 2, 4, 8)}
for count, size in largest.items():
    print(f"{count} targets: {size} of 196 patches")
assert list(largest.values()) == sorted(largest.values(), reverse=True)
