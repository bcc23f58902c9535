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
# # 2. One training step
#
# We follow one photograph through one training step of I-JEPA and look at every tensor on the way.
# The model is the paper's ViT-B/16, but with 2 layers instead of 12, so that it runs on a laptop. Its
# weights are random: nothing has been learned yet.
#
# | letter | meaning | here |
# |---|---|---|
# | B | images in the batch | 1 |
# | N | patches of an image | 14 x 14 = 196 |
# | K | context patches of an image | 49 |
# | M | target blocks of an image | 4 |
# | T | patches of a target block | depends on the masks |
# | D | width of the encoder: numbers per patch | 768 |
# | P | width of the predictor | 384 |

# %%
import dataclasses
import sys

import drawing
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torchvision.io import decode_image

sys.path.insert(0, "..")  # ijepa.py is in the parent folder
from data import normalize
from ijepa import IJEPA, MODELS, MaskCollator

drawing.style()
torch.manual_seed(0)
model = IJEPA(dataclasses.replace(MODELS["vit_base"], depth=2, predictor_depth=2))
drawing.method(decode_image("images/chelsea.jpg"))

# %% [markdown]
# ## Image and masks
#
# The masks come from `MaskCollator` (notebook 1). They are numbers of patches.

# %%
photo = decode_image("images/coffee.jpg")
images = normalize(photo[None])  # (B, 3, 224, 224), about zero mean and unit variance
context_idx, target_idx = MaskCollator(14).sample(1, torch.Generator().manual_seed(2))
print("images", tuple(images.shape), images.dtype)
print("context_idx (B, K)", tuple(context_idx.shape))
print("target_idx (B, M, T)", tuple(target_idx.shape))

colors, titles = ("black", drawing.CONTEXT, "black"), ("the image", "context", "four targets")
drawing.row([photo] * 3, [None, context_idx[0], target_idx[0]], colors, titles)

# %% [markdown]
# ## Step 1: patches become tokens
#
# Each patch is a list of 16 x 16 x 3 = 768 pixel values. One matrix, the same for all patches, turns
# it into a **token** of D numbers. (That D is 768, too, is a coincidence.) The model uses a
# convolution with stride 16, which computes the same.

# %%
patches = F.unfold(images, kernel_size=16, stride=16).transpose(1, 2)  # (B, N, 768): pixels
projection = model.encoder.patch_embed.proj  # nn.Conv2d(3, 768, kernel_size=16, stride=16)
by_hand = patches @ projection.weight.flatten(1).T + projection.bias  # (B, N, D)
tokens = model.encoder.patch_embed(images)  # (B, N, D)
print("tokens", tuple(tokens.shape), f"largest difference {(tokens - by_hand).abs().max():.0e}")

# %% [markdown]
# ## Step 2: positions
#
# Attention does not know the order of its tokens. So a fixed vector of sines and cosines is added to
# each token: its position. Positions of neighbouring patches are similar. The figure compares the
# position of one patch (the cross) with all others.

# %%
positions = F.normalize(model.encoder.pos_embed, dim=1)  # (N, D), scaled to length 1
figure, axes = plt.subplots(1, 3, figsize=(13, 4.2))
for axis, (row, column) in zip(axes, ((2, 2), (6, 7), (11, 4)), strict=True):
    similarity = positions @ positions[14 * row + column]  # (N,)
    heat = axis.imshow(similarity.view(14, 14), cmap="cividis", vmax=1)
    axis.plot(column, row, "x", color=drawing.VERMILION, markersize=16, markeredgewidth=4)
    axis.set(title=f"row {row}, column {column}", xticks=(0, 13), yticks=(0, 13))
bar = figure.colorbar(heat, ax=axes, label="cosine similarity")

# %% [markdown]
# ## Step 3: the context encoder sees the context only
#
# All other tokens are removed *before* the first layer. Hidden patches cannot leak into the context,
# and they cost no computation. To check it, we replace all hidden pixels by noise.

# %%
context = model.encoder(images, keep=context_idx)  # (B, K, D)
visible = drawing.pixel_mask(context_idx[0], grid=14, size=224)
noisy = torch.where(visible, images, torch.randn(images.shape))
change = (model.encoder(noisy, keep=context_idx) - context).abs().max()
print("context", tuple(context.shape), f"change with noise in all hidden pixels: {change:.0f}")

# %% [markdown]
# ## Step 4: the target encoder sees everything
#
# The target encoder is a second network of the same shape. It gets the **whole** image, and the blocks
# are cut from its *output*. So a target knows its surroundings (Table 11 of the paper: this matters).
# LayerNorm then gives each target mean 0 and variance 1. No gradients are recorded.

# %%
with torch.no_grad():
    whole = model.target_encoder(images)  # (B, N, D)
    normalized = F.layer_norm(whole, (768,))  # (B, N, D)
    targets = normalized[:, target_idx[0]]  # (B, M, T, D)
print("whole", tuple(whole.shape), "targets", tuple(targets.shape))
print(f"mean {targets[0, 0, 0].mean():.3f}, variance {targets[0, 0, 0].var():.3f} of the first one")

# %% [markdown]
# > **Question.** The target encoder starts as a copy of the context encoder. Why is
# > `normalized[:, context_idx[0]]` not equal to `context`?
#
# ## Step 5: the predictor
#
# The predictor gets the context, and for each hidden patch a **mask token**: one learned vector, the
# same for all patches, plus the position of the patch. It is a narrow ViT. It predicts the four
# blocks one at a time: each pass has K + T tokens.

# %%
mask_tokens = model.predictor.mask_token + model.predictor.predictor_pos_embed[target_idx]
predictions = model.predictor(context, context_idx, target_idx)  # (B, M, T, D)
print("mask tokens (B, M, T, P)", tuple(mask_tokens.shape))
print("predictions (B, M, T, D)", tuple(predictions.shape))

# %% [markdown]
# ## Step 6: the loss
#
# The loss is the distance between predictions and targets, averaged over all numbers. We use smooth
# L1, as the released code does: half the square for distances below 1, and linear above. The paper
# writes the squared distance (D1 in `ijepa.py`). `model(...)` runs steps 1 to 6 in one call.

# %%
distance = (predictions - targets).abs()  # (B, M, T, D)
by_hand = torch.where(distance < 1, distance**2 / 2, distance - 0.5).mean()
images.requires_grad_()  # only for the next figure: we want gradients of the pixels, too
loss = model(images, context_idx, target_idx)
print(f"by hand {by_hand:.6f}, model(...) {loss:.6f}")

# %% [markdown]
# ## Step 7: backward, and where gradients arrive
#
# > **Question.** Before you run the cell: the target encoder has seen every pixel. At which pixels
# > will a gradient arrive?

# %%
loss.backward()
norms = {}
for network in ("encoder", "predictor", "target_encoder"):
    for part, module in getattr(model, network).named_children():
        gradients = [p.grad.norm() for p in module.parameters() if p.grad is not None]
        norms[f"{network}: {part}"] = torch.tensor(gradients).norm().item()

figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5), width_ratios=(1.7, 1))
bars = left.barh(list(norms), list(norms.values()), color=drawing.CONTEXT)
left.bar_label(bars, [f"{x:.3f}" if x else "no gradient" for x in norms.values()], padding=5)
left.set(xlabel="norm of the gradient", ylim=(len(norms) - 0.4, -0.6))
right.imshow(F.avg_pool2d(images.grad.abs().sum(1), 16)[0], cmap="cividis")
right.set(title="gradient at the pixels of each patch", xticks=(), yticks=())

# %% [markdown]
# All parts of the context encoder and of the predictor get a gradient. The target encoder gets none
# (**stop-gradient**). On the right, yellow patches are the context, and all others are exactly 0: no
# gradient came back through the target encoder. Otherwise the two encoders could agree on a constant
# answer, which makes the loss zero and is useless. That is called **collapse** (notebook 3).
#
# ## Step 8: the optimizer moves encoder and predictor

# %%
optimizer = torch.optim.AdamW(
    [p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.04
)
flat = torch.nn.utils.parameters_to_vector
before = flat(model.target_encoder.parameters())  # at the start, equal to the context encoder
optimizer.step()
moved = (flat(model.encoder.parameters()) - before).norm().item()
print(f"the context encoder has moved by {moved:.2f}")

# %% [markdown]
# ## Step 9: the target encoder follows (EMA)
#
# The target encoder is not trained. After each step, every weight moves a small step towards the
# context encoder. Its weights are an **exponential moving average** of all earlier ones. The paper
# starts with a momentum of 0.996 and raises it to 1 during training.

# %%
momentum = 0.996
with torch.no_grad():
    for t, e in zip(model.target_encoder.parameters(), model.encoder.parameters(), strict=True):
        t.copy_(momentum * t + (1 - momentum) * e)
followed = (flat(model.target_encoder.parameters()) - before).norm().item()
print(f"the target encoder has followed by {followed:.4f}: {followed / moved:.1%} of it")

# %% [markdown]
# ## The whole step in seven lines
#
# This is what `train.py` does thousands of times, with new images and new masks each time. Here it
# runs ten times on our four photographs. The loss falls, but four images teach nothing general.

# %%
names = ("chelsea", "astronaut", "coffee", "temple")
images = normalize(torch.stack([decode_image(f"images/{name}.jpg") for name in names]))
masks = MaskCollator(14)
for _ in range(10):
    context_idx, target_idx = masks.sample(4)
    loss = model(images, context_idx, target_idx)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    model.update_target(momentum=0.996)
    print(f"{loss:.3f}", end=" ")
