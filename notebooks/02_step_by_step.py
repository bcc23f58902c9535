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
# # 2. Step by step: one batch through the method
#
# Three networks (Section 3 of [the paper](https://arxiv.org/abs/2301.08243), Figure 3):
#
# - the **context encoder** $f_\theta$ sees the context patches and nothing else,
# - the **target encoder** $f_{\bar\theta}$ sees the whole picture; its weights are a moving average
#   of those of the context encoder,
# - the **predictor** $g_\phi$ says what the target encoder would say at the hidden places.
#
# $\theta, \bar\theta, \phi$ are their weights. All three are Vision Transformers (ViT): a sequence
# of vectors ("tokens") goes in, and as many come out; in each layer every token looks at all others
# (attention), and a small MLP works on each by itself.
#
# We call the real functions one after the other, and look at every tensor between them, in the
# smallest model, `vit_nano`: 6 x 6 patches. The letters are those of `ijepa.py`:
#
# | | | | |
# |---|---|---|---|
# | B | pictures in the batch | K | context patches of a picture |
# | H, W | rows and columns of patches | M | target blocks of a picture |
# | N | patches of a picture, H W | T | patches of a target block |
# | D | numbers in a token of the encoders | P | numbers in a token of the predictor |
# | C | colour channels | p | side of a patch in pixels |

# %%
import classroom

classroom.begin()

# %%
import copy
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from einops import rearrange

from data import draw_shapes, generator_for, normalize
from ijepa import IJEPA, MODELS, MaskCollator, sincos_positions, take

# %%
torch.manual_seed(0)
model = IJEPA(MODELS["vit_nano"].config)
pictures, _ = draw_shapes(seed=1, index=torch.arange(8), clutter=0.4)  # uint8
images = normalize(pictures)


def tell(name: str, x: torch.Tensor, letters: str, what: str) -> None:
    """One line: a tensor's name, shape, the letters of it, and what it is."""
    print(f"{name:12} {tuple(x.shape)!s:18} ({letters})".ljust(54) + what)


tell("images", images, "B, C, H p, W p", "48 x 48 pixels, mean about 0")

# %% [markdown]
# ## Patches
#
# A picture becomes a sequence: it is cut into patches of p x p pixels, and each is projected to D
# numbers by the same matrix. A convolution with stride p does both at once.

# %%
patches = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=8, q=8)
tokens = model.encoder.patch_embed(images)
tell("patches", patches, "B, N, C p p", "the pixels of each patch")
tell("tokens", tokens, "B, N, D", "each patch as D numbers")

projection = model.encoder.patch_embed.proj  # a convolution, or a matrix (D, C p p)
by_hand = patches @ projection.weight.flatten(1).T + projection.bias
assert torch.allclose(tokens, by_hand, atol=1e-5)

# %% [markdown]
# ## Positions
#
# To the network the patches are a set. So that it knows where each one was, a fixed vector of sines
# and cosines of its row and column is added. The picture shows how alike the position of one patch
# (the cross) is to all others: near ones are alike.

# %%
positions = model.encoder.pos_embed
tell("positions", positions, "N, D", "not trained")
assert torch.equal(positions, sincos_positions(96, (6, 6)))

large = F.normalize(sincos_positions(96, (14, 14)), dim=1)  # a finer grid, to see more
figure, axes = plt.subplots(1, 3, figsize=(12, 3.8))
for axis, (row, column) in zip(axes, ((2, 2), (7, 7), (12, 4)), strict=True):
    alike = (large @ large[row * 14 + column]).view(14, 14)
    image = axis.imshow(alike, cmap="cividis", vmin=0.6, vmax=1)
    axis.plot(column, row, "x", color=classroom.VERMILION, markersize=12, markeredgewidth=3)
    axis.set(xlabel="column of patches", title=f"patch in row {row}, column {column}")
axes[0].set_ylabel("row of patches")
bar = figure.colorbar(image, ax=axes, label="cosine similarity")

# %% [markdown]
# ## Context: what the context encoder sees
#
# Patches that are not context are taken out *before* the first layer: nothing of them can leak in,
# and they cost nothing.

# %%
masks = MaskCollator(model.encoder.grid)
context_idx, target_idx = masks.sample(len(images), generator_for("a batch"))
context = model.encoder(images, keep=context_idx)
tell("context_idx", context_idx, "B, K", "numbers of the context patches")
tell("target_idx", target_idx, "B, M, T", "numbers of the target patches")
tell("context", context, "B, K, D", "the context encoder's output")

seen = torch.zeros(8, 36, dtype=torch.bool).scatter_(1, context_idx, True).view(8, 1, 6, 6)
seen = seen.repeat_interleave(8, 2).repeat_interleave(8, 3)  # (B, 1, H p, W p)
noise = torch.randn(images.shape)
other = model.encoder(torch.where(seen, images, noise), keep=context_idx)
assert torch.equal(context, other)  # whatever is hidden may be anything

# %% [markdown]
# ## Targets: what is to be predicted
#
# The target encoder sees the **whole** picture, and the blocks are cut from its *output*: each
# target knows what surrounds it (Section 3, "Targets"; Table 11 shows that this matters). Each
# target is normalized to mean 0 and variance 1 over its D numbers (deviation D1), so that it cannot
# be made easy by making it small. It can still be the same for all pictures: notebook 3.

# %%
targets = model.targets(images, target_idx)
tell("targets", targets, "B, M, T, D", "what the target encoder says there")

whole = model.target_encoder(images)
tell("whole", whole, "B, N, D", "all of the target encoder's output")
cut = take(F.layer_norm(whole, (96,)), target_idx.flatten(1)).view(targets.shape)
assert torch.equal(targets, cut)
assert targets.mean(-1).abs().max() < 1e-5 and (targets.var(-1) - 1).abs().max() < 0.02

# %% [markdown]
# ## Predictions, and the loss
#
# The predictor gets the context, and for each place that is asked for one **mask token**: a learned
# vector, the same everywhere, plus the position. Each of the M blocks is predicted by itself. The
# loss of Section 3 compares the prediction $\hat s_{y_j}$ with the target $s_{y_j}$ at each patch
# $j$ of each block $B_i$:
#
# $$\frac{1}{M} \sum_{i=1}^{M} \sum_{j \in B_i} \left\| \hat s_{y_j} - s_{y_j} \right\|_2^2 .$$
#
# The authors' code, and ours, takes smooth $L_1$ instead of the square, and the mean over all
# numbers (deviation D1).

# %%
predictions = model.predictor(context, context_idx, target_idx)
tell("predictions", predictions, "B, M, T, D", "what the predictor says there")
loss = model(images, context_idx, target_idx)  # all of the above in one call
print(f"loss         {loss:.4f}, untrained")

error = (predictions - targets).abs()
by_hand = torch.where(error < 1, error**2 / 2, error - 0.5).mean()
assert torch.allclose(loss, by_hand)
alone = model.predictor(context, context_idx, target_idx[:, 1:2])  # the second block by itself
assert torch.allclose(alone, predictions[:, 1:2], atol=1e-5)

# %% [markdown]
# > **Question.** Predictions and targets are both made by networks that are trained. What is the
# > easiest way to make them equal? (Notebook 3 tries it.)

# %% [markdown]
# ## Where the gradient goes, and where it stops
#
# Context encoder and predictor learn by gradient descent. The targets are computed without
# gradients. If they had some, both sides could meet at a constant. We ask for the gradient of the
# loss with respect to every weight, and to every **pixel**. The target encoder sees all pixels: if
# a gradient came back through it, it would show everywhere.

# %%
watched = images.clone().requires_grad_()
model(watched, context_idx, target_idx).backward()
for name in ("encoder", "predictor", "target_encoder"):
    gradients = [p.grad for p in getattr(model, name).parameters()]
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradients if g is not None))
    print(f"{name:16} {sum(g is not None for g in gradients):3} gradients, norm {norm:.4f}")

figure, axes = plt.subplots(2, 3, figsize=(11, 7.4))
strength = watched.grad.abs().sum(1)  # (B, H p, W p)
for i, (whole_picture, part, gradient) in enumerate(axes):
    titles = ("target encoder sees", "context encoder sees", "gradient (dark: exactly 0)")
    titles = titles if i == 0 else ("", "", "")
    classroom.show(whole_picture, pictures[i], title=titles[0], colour=classroom.VERMILION)
    classroom.show(part, pictures[i], context_idx[i], (6, 6), titles[1], classroom.BLUE)
    gradient.imshow(strength[i].sqrt(), cmap="cividis", vmin=0)
    gradient.set(xticks=[], yticks=[])
    gradient.set_title(titles[2], fontsize=13)

# %%
assert all(p.grad is None for p in model.target_encoder.parameters())
assert all(p.grad is not None for p in model.encoder.parameters())
assert all(p.grad is not None for p in model.predictor.parameters())
# The target encoder saw all pixels, but gradients reach the context's alone.
reached = strength[:, None] > 0
assert not reached[~seen].any() and reached[seen].float().mean() > 0.99

# %% [markdown]
# ## The target encoder follows
#
# After each step of the optimizer, every weight of the target encoder moves a little, so that what
# is to be predicted changes slowly (an exponential moving average, EMA):
#
# $$\bar\theta \leftarrow m \bar\theta + (1 - m) \theta ,$$
#
# where $m$ rises from 0.996 to 1 over a run (Appendix A.1). What the encoder was $n$ steps ago
# still counts $m^n$: after $\ln 0.5 / \ln m$ steps a half.

# %%
before = copy.deepcopy(model.target_encoder).state_dict()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
optimizer.step()
online = model.encoder.state_dict()
model.update_target(0.996)

name = "blocks.0.mlp.fc1.weight"
old, new, follows = before[name], online[name], model.target_encoder.state_dict()[name]
moved, followed = float((new - old).norm()), float((follows - old).norm())
print(f"encoder moved by {moved:.4f}, target by {followed:.6f}: {followed / moved:.1%} of it")
assert torch.allclose(follows, 0.996 * old + 0.004 * new, atol=1e-7)

steps = torch.arange(0, 2001)
figure, axis = plt.subplots(figsize=(10, 4))
styles = {0.98: ":", 0.996: "-", 0.999: "--"}
for (momentum, style), colour in zip(styles.items(), classroom.COLOURS, strict=False):
    half = math.log(0.5) / math.log(momentum)
    label = f"m = {momentum}: half after {half:.0f} steps"
    axis.plot(steps, 100 * momentum**steps, style, color=colour, label=label)
axis.set(
    xlabel="steps ago", ylabel="what it still counts (%)", title="Memory of the target encoder"
)
axis.legend()
axis.grid()
assert round(math.log(0.5) / math.log(0.996)) == 173

# %% [markdown]
# > **Question.** With $m = 0$ the target encoder *is* the context encoder. With $m = 1$ it never
# > moves. What would be learned in each case?

# %% [markdown]
# ## How large are the parts?
#
# Most weights of a ViT are in its MLPs. The predictor is narrow on purpose (Table 14: tokens of 384
# numbers do better than of 1,024), and the target encoder is a copy, not trained.


# %%
def count(network: torch.nn.Module, part: str = "") -> int:
    """Numbers in the weights whose name contains `part`."""
    return sum(p.numel() for name, p in network.named_parameters() if part in name)


sizes = {}
for name in ("vit_nano", "vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"):
    with torch.device("meta"):  # shapes without numbers: it takes no memory
        networks = IJEPA(MODELS[name].config)
    encoder = networks.encoder
    parts = {part: count(encoder, part) for part in (".attn.", ".mlp.")}
    parts["rest"] = count(encoder) - sum(parts.values())
    sizes[name] = parts | {"predictor": count(networks.predictor), "encoder": count(encoder)}

figure, axis = plt.subplots(figsize=(10, 4.6))
left = torch.zeros(len(sizes))
hatches = {".attn.": "", ".mlp.": "//", "rest": "xx", "predictor": ".."}
labels = {
    ".attn.": "encoder: attention", ".mlp.": "encoder: MLPs",
    "rest": "encoder: patches, norms", "predictor": "predictor",
}  # fmt: skip
colours = (classroom.BLUE, classroom.VERMILION, classroom.GREY, classroom.GREEN)
for (part, hatch), colour in zip(hatches.items(), colours, strict=True):
    both = [size["encoder"] + size["predictor"] for size in sizes.values()]
    share = torch.tensor([100 * s[part] / b for s, b in zip(sizes.values(), both, strict=True)])
    bars = axis.barh(list(sizes), share, left=left, color=colour, hatch=hatch, label=labels[part])
    left += share
axis.set(xlabel="share of what is trained (%)", xlim=(0, 100))
axis.invert_yaxis()
axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.28), ncols=2)
for name, size in sizes.items():
    print(f"{name:10} encoder {size['encoder'] / 1e6:7.2f} M, predictor", end=" ")
    print(f"{size['predictor'] / 1e6:6.2f} M")

# %%
assert 630e6 < sizes["vit_huge"]["encoder"] < 633e6  # ViT-H
assert 85e6 < sizes["vit_base"]["encoder"] < 87e6  # ViT-B
assert all(1.9 < size[".mlp."] / size[".attn."] < 2.1 for size in sizes.values())

# %% [markdown]
# ## Exercises
#
# Each solution is folded: click on "1 cell hidden" below its heading.

# %% [markdown]
# ### Exercise 1
#
# How many numbers are predicted for one picture, and how many would it be in pixels?

# %% [markdown] jp-MarkdownHeadingCollapsed=true
# #### Solution 1

# %% tags=["solution"]
_, blocks, places, width = targets.shape
print(f"{blocks} x {places} x {width} = {blocks * places * width} numbers")
print(f"{blocks} x {places} x {3 * 8 * 8} = {blocks * places * 3 * 8 * 8} in pixels")
assert blocks * places * width == predictions[0].numel()

# %% [markdown]
# ### Exercise 2
#
# What happens to the predictions if the context patches are given in another order?

# %% [markdown] jp-MarkdownHeadingCollapsed=true
# #### Solution 2

# %% tags=["solution"]
fresh = model.predictions(images, context_idx, target_idx)
shuffled = model.predictions(images, context_idx.flip(1), target_idx)
print(f"largest difference: {(fresh - shuffled).abs().max():.1e}")
# Nothing: each patch brings its position along, and attention does not know an order.
assert torch.allclose(fresh, shuffled, atol=1e-5)

# %% [markdown]
# ### Exercise 3
#
# A run has 1,000 steps. With which momentum does the target encoder go half of the way to an
# encoder that stands still, in 5 % of the run? Check it by calling `update_target` so many times.

# %% [markdown] jp-MarkdownHeadingCollapsed=true
# #### Solution 3

# %% tags=["solution"]
momentum = 0.5 ** (1 / 50)
print(f"momentum {momentum:.4f}")
start = model.target_encoder.state_dict()[name := "blocks.0.mlp.fc1.weight"].clone()
for _ in range(50):
    model.update_target(momentum)
end = model.target_encoder.state_dict()[name]
halfway = (start + model.encoder.state_dict()[name]) / 2
assert torch.allclose(end, halfway, atol=1e-5)
