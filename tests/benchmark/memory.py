"""Memory of a training step by formula, for models that do not fit the machine at hand.

`python tests/benchmark/record.py memory` keeps the table; tests/test_memory.py compares the
formulas with what a small model is seen to keep.
"""

import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ijepa import IJEPA, MODELS, IJEPAConfig, MaskCollator, grid_of, pair

FLOAT, HALF = 4, 2  # bytes


def state_bytes(config: IJEPAConfig, processes: int = 1, shard: bool = False) -> int:
    """Weights, gradients, two moments of AdamW, and the target encoder, in each process.

    DistributedDataParallel keeps all of it everywhere. FSDP2 cuts each tensor along its first
    dimension, the last parts shorter, into parts for all; and while a layer is at work, has it
    whole, with the next one on its way, and what is in no layer whole from beginning to end.
    """
    with torch.device("meta"):
        model = IJEPA(config)
    total = layers = 0
    blocks: dict[str, int] = {}
    for name, p in model.named_parameters():
        copies = 4 if p.requires_grad else 1
        part = p.numel()
        if shard:
            part = -(-p.shape[0] // processes) * p.numel() // p.shape[0]
            owner = ".".join(name.split(".")[:3]) if "blocks." in name else ""
            blocks[owner] = blocks.get(owner, 0) + p.numel()
        total += FLOAT * copies * part
    if shard:
        layers = blocks.pop("") + 2 * max(blocks.values())
        layers += max(blocks.values())  # the gradient of one, before it is shared out
    return total + FLOAT * layers


def block_bytes(tokens: int, dim: int, hidden: int, heads: int, half: bool) -> int:
    """What the gradient of one layer needs: its input, and what is between its operations.

    Each LayerNorm keeps its float32 input (and two numbers a token), the linear layers keep theirs:
    after a norm (twice), attention's result and GELU's; attention keeps q, k, v and a number a
    head, its result being that input; GELU keeps its own.
    """
    width = HALF if half else FLOAT
    return tokens * (2 * FLOAT * (dim + 2) + width * (6 * dim + 2 * hidden) + FLOAT * heads)


def activation_bytes(
    config: IJEPAConfig, images: int, context: int, blocks: int, target: int,
    half: bool = False, recompute: bool = False,
) -> int:  # fmt: skip
    """What a forward pass keeps for the backward pass.

    Args:
        images, context, blocks, target: B, K, M and T of ijepa.py.
        half: bfloat16 autocast. Its bfloat16 copy of the weights is counted too.
        recompute: with --checkpoint-activations, where a layer keeps its input only, and one layer
            at a time the rest.
    """
    c, width = config, HALF if half else FLOAT
    inside, outside = images * context, images * blocks * (context + target)
    hidden = round(c.embed_dim * c.mlp_ratio)
    one = block_bytes(inside, c.embed_dim, hidden, c.num_heads, half)
    other = block_bytes(outside, c.predictor_dim, 4 * c.predictor_dim, c.predictor_heads, half)
    total = c.depth * one + c.predictor_depth * other
    if recompute:
        total = max(one, other) + FLOAT * (
            c.depth * inside * c.embed_dim + c.predictor_depth * outside * c.predictor_dim
        )
    asked = images * blocks * target
    total += width * images * c.in_chans * math.prod(pair(c.img_size))  # the convolution's input
    patches = math.prod(grid_of(c.img_size, c.patch_size))
    total += FLOAT * images * patches * c.embed_dim  # of which the context is taken
    total += FLOAT * inside * (c.embed_dim + 2) + width * inside * c.embed_dim  # last norm, embed
    total += FLOAT * outside * c.predictor_dim  # the last layer's output, for the last norm
    total += asked * (2 * FLOAT + width * c.predictor_dim + 2 * FLOAT * c.embed_dim)  # loss
    if half:
        with torch.device("meta"):
            model = IJEPA(c)
        total += HALF * sum(p.numel() for p in model.parameters() if p.requires_grad)
    return total


def table(images: int = 32) -> list[dict]:
    """Bytes in each process for each model and number of processes, and for `images` pictures."""
    rows = []
    for name, (config, _) in MODELS.items():
        if name == "vit_nano":
            continue
        masks = MaskCollator(grid_of(config.img_size, config.patch_size))
        target = round(masks.target_shapes.prod(1).double().mean().item())
        sizes = (images, masks.context_size, masks.num_targets, target)
        with torch.device("meta"):
            model = IJEPA(config)
        rows.append(
            {
                "model": name,
                "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "ddp": state_bytes(config),
                "fsdp": {n: state_bytes(config, n, shard=True) for n in (8, 64)},
                "activations": activation_bytes(config, *sizes, half=True),
                "recomputed": activation_bytes(config, *sizes, half=True, recompute=True),
            }
        )
    return rows
