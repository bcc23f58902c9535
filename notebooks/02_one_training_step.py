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
# The model is the paper's ViT-B/16 with two layers in the encoder and two in the predictor, so that
# it runs on a laptop. Its weights are random: nothing has been learned yet.
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
import math
import sys

import drawing
import torch
import torch.nn.functional as F
from torchvision.io import decode_image

sys.path.insert(0, "..")  # ijepa.py is in the parent folder
from data import normalize
from ijepa import IJEPA, IJEPAConfig, MaskCollator

drawing.style()
torch.manual_seed(0)
model = IJEPA(IJEPAConfig(depth=2, predictor_depth=2))  # the other defaults are ViT-B/16
photo = decode_image("images/coffee.jpg")  # (3, 224, 224) uint8
drawing.method(photo)

# %% [markdown]
# ## Image and masks
#
# The masks come from `MaskCollator` (notebook 1). They hold the numbers of patches.

# %%
images = normalize(photo[None]).requires_grad_()  # gradients of pixels: for a figure in step 7
masks = MaskCollator(14)
context_idx, target_idx = masks.sample(1, torch.Generator().manual_seed(2))  # (B, K), (B, M, T)
print(*(tuple(x.shape) for x in (images, context_idx, target_idx)))

colors, titles = ("black", drawing.CONTEXT, "black"), ("the image", "context", "four targets")
drawing.row([photo] * 3, [None, context_idx[0], target_idx[0]], colors, titles)

# %% [markdown]
# ## Step 1: patches become tokens
#
# Each patch is a list of 16 x 16 x 3 = 768 pixel values. One matrix, the same for all patches,
# turns it into a **token** of D numbers. (D is 768, too. That is a coincidence.) The model uses a
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
# Attention does not know the order of its tokens. So a fixed vector of sines and cosines is added
# to each token: its position. Half of the numbers encode the column and half the row. The figure
# compares the position of one patch (the cross) with all others. Patches nearby have similar
# positions, and so have patches of the same row or column.

# %%
embedded = tokens + model.encoder.pos_embed  # (B, N, D)
positions = F.normalize(model.encoder.pos_embed, dim=1)  # (N, D), scaled to length 1
drawing.positions(positions @ positions.T, patches=(30, 91, 158))

# %% [markdown]
# ## Step 3: the context encoder sees the context only
#
# All other tokens are removed *before* the first layer. So hidden patches cannot leak into the
# context, and they cost no computation. To check it, we replace all hidden pixels by noise.

# %%
context = embedded[:, context_idx[0]]  # (B, K, D)
for layer in model.encoder.blocks:
    context = layer(context)  # (B, K, D)
context = model.encoder.norm(context)  # the same as model.encoder(images, keep=context_idx)
visible = drawing.pixel_mask(context_idx[0], grid=14, size=224)
noisy = torch.where(visible, images, torch.randn(images.shape))
print("largest change:", (model.encoder(noisy, keep=context_idx) - context).abs().max().item())

# %% [markdown]
# ## Step 4: the target encoder sees everything
#
# The target encoder is a second network of the same architecture. It gets the **whole** image, and
# the blocks are cut from its *output*. So a target knows its surroundings. In Table 11 of the paper
# (ViT-H/16, 1 % of the ImageNet labels), cutting from the output gives 67.3 % accuracy, and cutting
# from the input 56.1 %. LayerNorm then gives each target mean 0 and variance 1. It is in the
# released code, not in the paper (D1 in `ijepa.py`).

# %%
with torch.no_grad():  # nothing is recorded for gradients
    whole = model.target_encoder(images)  # (B, N, D)
    normalized = F.layer_norm(whole, (768,))  # (B, N, D)
    targets = normalized[:, target_idx[0]]  # (B, M, T, D)
print("whole", tuple(whole.shape), "targets", tuple(targets.shape))

# %% [markdown]
# > **Question.** The target encoder starts as a copy of the context encoder. Why is
# > `whole[:, context_idx[0]]` (before LayerNorm) not equal to `context`?
#
# <details><summary>Answer</summary>
#
# The weights are equal, the input is not. In the target encoder, each patch attends to all 196
# patches. In the context encoder, it attends to the 49 of the context only.
#
# </details>
#
# ## Step 5: the predictor
#
# The predictor is a narrow ViT. A linear layer makes the context narrower (D to P), and the
# positions are added again. Each patch to predict gets a **mask token**: one learned vector, the
# same for all patches, plus the position of the patch. A last linear layer goes back from P to D.
# Each block is predicted separately: the four are four rows of a batch, with K + T tokens each.

# %%
narrow_positions = model.predictor.predictor_pos_embed  # (N, P)
narrow = model.predictor.predictor_embed(context) + narrow_positions[context_idx]  # (B, K, P)
mask_tokens = model.predictor.mask_token + narrow_positions[target_idx[:, 0]]  # (B, T, P)
print("tokens of block 1", tuple(torch.cat([narrow, mask_tokens], dim=1).shape))  # (B, K + T, P)
predictions = model.predictor(context, context_idx, target_idx)  # (B, M, T, D)
print("predictions", tuple(predictions.shape))

# %% [markdown]
# ## Step 6: the loss
#
# The loss is the distance between predictions and targets, averaged over all numbers. We use smooth
# L1, as the released code does: half the square for distances below 1, and linear above. The paper
# writes the squared distance (D1). `model(...)` runs steps 1 to 6 in one call.

# %%
distance = (predictions - targets).abs()  # (B, M, T, D)
by_hand = torch.where(distance < 1, distance**2 / 2, distance - 0.5).mean()
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
    for name, p in getattr(model, network).named_parameters():
        part = f"{network}: {name.split('.')[0]}"
        norm = 0 if p.grad is None else p.grad.norm().item()
        norms[part] = math.hypot(norms.get(part, 0), norm)

arrived = F.avg_pool2d(images.grad.abs().sum(1), 16)[0]  # (14, 14)
print(f"{(arrived > 0).sum()} of 196 patches get a gradient")
drawing.gradients(norms, arrived)

# %% [markdown]
# All parts of the context encoder and of the predictor get a gradient. The target encoder gets
# none. This is called **stop-gradient**. On the right, only the 49 patches of the context get a
# gradient: none has come back through the target encoder. With gradients there, the two encoders
# could agree on one constant answer. The loss would be zero, and nothing would be learned. That is
# **collapse** (notebook 3).
#
# ## Step 8: the optimizer moves encoder and predictor
#
# AdamW's first step moves nearly every weight by the learning rate, 0.001.

# %%
trained = [*model.encoder.parameters(), *model.predictor.parameters()]
optimizer = torch.optim.AdamW(trained, lr=1e-3)
weight = model.encoder.blocks[0].mlp.fc1.weight  # (3072, 768), one of the matrices
before = weight.detach().clone()
optimizer.step()
print(f"this matrix has moved by {(weight - before).norm() / before.norm():.1%} of its norm")

# %% [markdown]
# ## Step 9: the target encoder follows (EMA)
#
# The target encoder is not trained. After each step, every weight $\bar\theta$ moves a little
# towards the weight $\theta$ of the context encoder:
#
# $$\bar\theta \leftarrow m\,\bar\theta + (1 - m)\,\theta$$
#
# This is an **exponential moving average**. The paper starts with a momentum $m$ of 0.996 and
# raises it to 1 during training (Appendix A.1).

# %%
with torch.no_grad():
    for t, e in zip(model.target_encoder.parameters(), model.encoder.parameters(), strict=True):
        t.copy_(0.996 * t + 0.004 * e)
followed = (model.target_encoder.blocks[0].mlp.fc1.weight - before).norm()
print(f"its copy in the target encoder has moved {followed / (weight - before).norm():.1%} as far")

# %% [markdown]
# ## The whole step in six lines
#
# `train.py` repeats this loop, with new images and new masks in each step. Here it runs ten times,
# on our photograph with new masks. The loss falls, but one image teaches nothing general.

# %%
for _ in range(10):
    context_idx, target_idx = masks.sample(1)
    loss = model(images, context_idx, target_idx)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    model.update_target(momentum=0.996)
    print(f"{loss:.3f}", end="  ")

# %% [markdown]
# ## Exercises
#
# **1. Does the order of the context matter?** The context patches come in the order of their
# numbers. Reverse the order in `context_idx`. What happens to the context, and what to the
# predictions?
#
# <details><summary>Solution</summary>
#
# ```python
# with torch.no_grad():
#     predictions = model.predictor(model.encoder(images, context_idx), context_idx, target_idx)
#     flipped = context_idx.flip(1)
#     again = model.predictor(model.encoder(images, flipped), flipped, target_idx)
# print(f"{(predictions - again).abs().max():.0e}")
# ```
#
# The context tokens come out in reverse order, and the predictions are the same up to rounding.
# Each token carries its position, and attention ignores the order.
#
# </details>
#
# **2. How long is the memory of the target encoder?** With momentum 0.996, after how many steps has
# the target encoder gone half of the way to an encoder that no longer moves? Compute it, then check
# it by calling `model.update_target(0.996)` that often.
#
# <details><summary>Solution</summary>
#
# ```python
# import math
#
# steps = round(math.log(0.5) / math.log(0.996))
# encoder, target = model.encoder.blocks[0].mlp.fc1, model.target_encoder.blocks[0].mlp.fc1
# distance = (encoder.weight - target.weight).norm()
# for _ in range(steps):
#     model.update_target(0.996)
# print(steps, f"{(encoder.weight - target.weight).norm() / distance:.2f}")
# ```
#
# 173 steps: each step multiplies the distance by 0.996, and $0.996^{173} = 0.5$.
#
# </details>
#
# **3. Remove the stop-gradient.** Compute the targets with the context encoder and without
# `torch.no_grad()`, then call `backward()`. At how many of the 196 patches does a gradient arrive?
# Predict it first.
#
# <details><summary>Solution</summary>
#
# ```python
# images = normalize(photo[None]).requires_grad_()
# targets = F.layer_norm(model.encoder(images), (768,))[:, target_idx[0]]
# predictions = model.predictor(model.encoder(images, context_idx), context_idx, target_idx)
# F.smooth_l1_loss(predictions, targets).backward()
# print(int((F.avg_pool2d(images.grad.abs().sum(1), 16) > 0).sum()))
# ```
#
# At all 196, because each target depends on the whole image through attention. Now the encoder can
# lower the loss in two ways: by predicting better, or by making the targets easier to predict.
#
# </details>
