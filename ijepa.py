"""I-JEPA in one file: images in, representations out, without labels or hand-made augmentations.

Paper: Assran et al., "Self-Supervised Learning from Images with a Joint-Embedding Predictive
Architecture", CVPR 2023. Sections, figures and tables named below are those of the paper.

The idea. Hide several blocks of an image and predict them from the rest: not their pixels, but
their *representations*. The representations come from a second network, the target encoder, whose
weights are an exponential moving average (EMA) of the encoder being trained. A representation can
leave out what no context could predict, such as the exact texture of grass; pixels cannot.

The algorithm: one training step (Section 3, Figure 3).

    1. context_idx, target_idx = masks.sample(B)       M target blocks, a context without them
    2. targets     = LayerNorm(target_encoder(images))[target_idx]     whole image, no gradient
    3. context     = encoder(images, keep=context_idx)            sees the context patches only
    4. predictions = predictor(context, context_idx, target_idx)          each block separately
    5. loss        = mean distance between predictions and targets
    6. one optimizer step on encoder and predictor
    7. target_encoder <- momentum * target_encoder + (1 - momentum) * encoder

In step 2, small models half whiten the targets instead (D10). After training, the average of
`target_encoder(images)` over the patches represents the image.

Notation, used in every shape comment:

    B  images in the batch              D  width of the encoder
    C  channels, p  patch size          P  width of the predictor
    N  patches of an image, H rows      K  context patches of an image
       and W columns: N = H * W         M  target blocks of an image, T  patches of each

Where this code differs from the paper or from the released code, a comment says so with a number
(D1 to D10). The list is at the end of this file.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

# ------------------------------------------------------------------------------- configuration

Pair = tuple[int, int]  # (rows, columns), or (height, width)
Range = tuple[float, float]  # (low, high)


def to_pair(size: int | Pair) -> Pair:
    """One side as (side, side); a pair unchanged."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def patch_grid(img_size: int | Pair, patch_size: int) -> Pair:
    """Rows and columns of patches. Raises ValueError if patches do not tile the image."""
    height, width = to_pair(img_size)
    if min(height, width, patch_size) < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"{height}x{width} pixels do not divide into patches of {patch_size}")
    return height // patch_size, width // patch_size


@dataclass(frozen=True)
class IJEPAConfig:
    """The architecture. Raises ValueError for values that do not fit together."""

    img_size: int | Pair = 224  # pixels
    patch_size: int = 16  # pixels
    embed_dim: int = 768  # D
    depth: int = 12
    num_heads: int = 12  # of the predictor, too (Appendix A.1)
    predictor_dim: int = 384  # P: a narrow predictor works better (Table 14)
    predictor_depth: int = 6  # 6 for ViT-B, 12 for L and H, 16 for G: deeper is better (Table 12)
    mlp_ratio: float = 4.0  # of the encoder; the predictor's is always 4
    in_chans: int = 3
    norm_eps: float = 1e-6
    init: str = "normal"  # or "xavier": for small models (D10)
    target_norm: str = "layer"  # or "whiten": half whitened, for small models (D10)

    def __post_init__(self):
        patch_grid(self.img_size, self.patch_size)
        if min(self.depth, self.num_heads, self.predictor_depth) < 1:
            raise ValueError("depth, num_heads and predictor_depth start at 1")
        for name, allowed in ("init", ("normal", "xavier")), ("target_norm", ("layer", "whiten")):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose from {allowed}")
        for dim in (self.embed_dim, self.predictor_dim):
            if dim < 1 or dim % 4 or dim % self.num_heads:
                raise ValueError(
                    f"width {dim} must be divisible by 4 and by {self.num_heads} heads"
                )


SMALL = {"init": "xavier", "target_norm": "whiten"}  # ours, for 32-pixel images (D10)
MODELS = {
    #              image patch   D  layers heads  P  layers of the predictor
    "vit_nano": IJEPAConfig(32, 4, 96, 4, 3, 48, 2, **SMALL),
    "vit_mini": IJEPAConfig(32, 4, 160, 4, 4, 64, 2, **SMALL),
    "vit_tiny": IJEPAConfig(32, 4, 192, 12, 3, 96, 4, **SMALL),
    "vit_small": IJEPAConfig(32, 4, 384, 12, 6, 192, 6, **SMALL),
    # The paper's. Predictors: Appendix A.1. Encoders: standard ViTs, sizes as released.
    "vit_base": IJEPAConfig(224, 16, 768, 12, 12, 384, 6),
    "vit_large": IJEPAConfig(224, 16, 1024, 24, 16, 384, 12),
    "vit_huge": IJEPAConfig(224, 14, 1280, 32, 16, 384, 12),
    "vit_giant": IJEPAConfig(224, 16, 1408, 40, 16, 384, 16, mlp_ratio=48 / 11),
}


# -------------------------------------------------------------------------- positions and tokens


def sincos_positions(dim: int, grid: Pair, train_grid: Pair | None = None) -> Tensor:
    """Fixed 2-D sine-cosine positions (N, dim), float32: half for the column, half for the row.

    A coordinate c becomes sin(c w_i) and cos(c w_i) with w_i = 10000^(-4 i / dim), i < dim / 4,
    as in the released code; the paper does not say. On a grid other than `train_grid` the
    coordinates are scaled so that the image keeps its extent (D8). Needs 4 to divide `dim`.
    """
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))

    def encode(length: int, train_length: int) -> Tensor:
        centers = torch.arange(length, dtype=torch.float64) + 0.5
        coordinates = centers * (train_length / length) - 0.5  # in patches of `train_grid`
        angles = torch.outer(coordinates, frequencies)  # (length, dim/4)
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # (length, dim/2)

    (rows, columns), (train_rows, train_columns) = grid, train_grid or grid
    column = repeat(encode(columns, train_columns), "w d -> (h w) d", h=rows)
    row = repeat(encode(rows, train_rows), "h d -> (h w) d", w=columns)
    return torch.cat([column, row], dim=1).float()  # (N, dim)


def gather_tokens(tokens: Tensor, idx: Tensor) -> Tensor:
    """Select tokens by patch index: (B, N, D) and (B, K) -> (B, K, D)."""
    return tokens.gather(1, repeat(idx, "b k -> b k d", d=tokens.shape[-1]))


# ---------------------------------------------------------------- Vision Transformer (Section 3)
# In the three layers below, N is any number of tokens: the context has K, the predictor K + T.


class Attention(nn.Module):
    """Multi-head self-attention: every token attends to every token."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D) -> (B, N, D)
        # h heads of width d = D / h: (B, h, N, d) each.
        q, k, v = rearrange(self.qkv(x), "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.num_heads)
        x = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(d)) v: (B, h, N, d)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class MLP(nn.Module):
    """Two linear layers applied to each token separately."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D) -> (B, N, D)
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """One transformer layer, pre-norm: each branch adds its output to x."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, norm_eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = MLP(dim, round(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D) -> (B, N, D)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def init_weights(module: nn.Module, init: str) -> None:
    """Initial weights, zero biases, and residual branches that shrink with depth."""
    for m in module.modules():
        if isinstance(m, nn.Linear | nn.Conv2d):
            if init == "xavier":  # scaled by width; 0.02 is too small for narrow models (D10)
                nn.init.xavier_uniform_(m.weight.flatten(1))
            else:
                nn.init.trunc_normal_(m.weight, std=0.02)
            nn.init.zeros_(m.bias)
    blocks = [m for m in module.modules() if isinstance(m, Block)]
    for layer, block in enumerate(blocks, start=1):
        block.attn.proj.weight.data.div_(math.sqrt(2 * layer))  # as BEiT does (D7)
        block.mlp.fc2.weight.data.div_(math.sqrt(2 * layer))


class PatchEmbed(nn.Module):
    """Cut the image into patches and project each to D numbers; a strided convolution does both."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H p, W p) -> (B, N, D)
        # Contiguous, because every later layer is slower on transposed memory.
        return rearrange(self.proj(images), "b d h w -> b (h w) d").contiguous()


class ViT(nn.Module):
    """Vision Transformer without a class token: context encoder and target encoder (Section 3).

    Parameter names are those of timm and of the released code.
    """

    def __init__(self, config: IJEPAConfig):
        super().__init__()
        self.config = c = config
        self.grid = patch_grid(c.img_size, c.patch_size)
        self.patch_embed = PatchEmbed(c.patch_size, c.in_chans, c.embed_dim)
        # A constant: not trained, and not stored in checkpoints.
        positions = sincos_positions(c.embed_dim, self.grid)  # (N, D)
        self.register_buffer("pos_embed", positions, persistent=False)
        self.blocks = nn.ModuleList(
            Block(c.embed_dim, c.num_heads, c.mlp_ratio, c.norm_eps) for _ in range(c.depth)
        )
        self.norm = nn.LayerNorm(c.embed_dim, eps=c.norm_eps)
        init_weights(self, c.init)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Encode the patches `keep`, or all of them.

        Args:
            images: (B, C, H p, W p), float32; any size that patches tile.
            keep: (B, K) int64, patch indices in row-major order.
        Returns:
            (B, K, D), or (B, N, D) without `keep`.
        """
        x = self._embed(images)  # (B, N, D)
        if keep is not None:
            # After adding positions, so that each patch knows its own. Before the first block,
            # so that hidden patches cannot leak into the context, and cost nothing.
            x = gather_tokens(x, keep)  # (B, K, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def _embed(self, images: Tensor) -> Tensor:  # (B, C, H p, W p) -> (B, N, D)
        grid, positions = patch_grid(images.shape[-2:], self.config.patch_size), self.pos_embed
        if grid != self.grid:
            positions = sincos_positions(self.config.embed_dim, grid, self.grid).to(positions)
        return self.patch_embed(images) + positions

    def get_intermediate_layers(self, images: Tensor, n: int) -> list[Tensor]:
        """Outputs of the last n layers, each through the final norm: n tensors (B, N, D).

        The deepest layer comes last and equals `forward`.
        """
        x, outputs = self._embed(images), []
        for block in self.blocks:
            x = block(x)
            outputs = [*outputs, x][-n:]  # keeping all would cost memory
        return [self.norm(x) for x in outputs]


class Predictor(nn.Module):
    """A narrow ViT that predicts the representations of target blocks from the context (Sec. 3).

    Each of the M blocks is predicted separately. Context tokens and the block's mask tokens (one
    learned vector plus positions) pass through the layers together. Blocks are rows of the batch.
    """

    def __init__(self, config: IJEPAConfig):
        super().__init__()
        c, dim = config, config.predictor_dim
        self.predictor_embed = nn.Linear(c.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        positions = sincos_positions(dim, patch_grid(c.img_size, c.patch_size))  # (N, P)
        self.register_buffer("predictor_pos_embed", positions, persistent=False)
        self.predictor_blocks = nn.ModuleList(
            Block(dim, c.num_heads, 4.0, c.norm_eps) for _ in range(c.predictor_depth)
        )
        self.predictor_norm = nn.LayerNorm(dim, eps=c.norm_eps)
        self.predictor_proj = nn.Linear(dim, c.embed_dim)
        init_weights(self, c.init)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, context: Tensor, context_idx: Tensor, target_idx: Tensor) -> Tensor:
        """(B, K, D), (B, K) and (B, M, T) -> predictions (B, M, T, D)."""
        num_targets, target_size = target_idx.shape[1:]
        # Positions are added again: the encoder has mixed them with the content.
        context = self.predictor_embed(context) + self.predictor_pos_embed[context_idx]  # (B, K, P)
        queries = self.mask_token + self.predictor_pos_embed[target_idx]  # (B, M, T, P)

        context = repeat(context, "b k p -> (b m) k p", m=num_targets)
        queries = rearrange(queries, "b m t p -> (b m) t p")
        x = torch.cat([context, queries], dim=1)  # (B M, K + T, P)
        for block in self.predictor_blocks:
            x = block(x)
        x = self.predictor_proj(self.predictor_norm(x[:, -target_size:]))  # (B M, T, D)
        return rearrange(x, "(b m) t d -> b m t d", m=num_targets)


# ------------------------------------------------------- masks (Section 3, Figure 4, Appendix A.1)


def block_shapes(grid: Pair, scale: Range, aspect: Range, steps: int = 32) -> Tensor:
    """Every shape that a block can take: (steps^2, 2) int64, height and width in patches.

    One row for each pair of a scale (fraction of the grid's area) and an aspect ratio (height over
    width, relative to the grid's), both evenly spaced. A row drawn at random is a scale and an
    aspect ratio drawn independently (D4). With all of them listed, `MaskCollator` knows the largest
    and can choose K before training. Raises ValueError if a shape does not fit the grid.
    """

    def evenly(low: float, high: float) -> Tensor:
        return low + (high - low) * (torch.arange(steps, dtype=torch.float64) + 0.5) / steps

    s, a = torch.cartesian_prod(evenly(*scale), evenly(*aspect)).unbind(1)  # (steps^2,) each
    shapes = torch.stack([grid[0] * (s * a).sqrt(), grid[1] * (s / a).sqrt()], dim=1)
    shapes = shapes.round().clamp(min=1).long()
    if not (shapes <= torch.tensor(grid)).all():
        raise ValueError(
            f"blocks of scale {scale} and aspect {aspect} do not fit a grid of {grid[0]}x{grid[1]}"
        )
    return shapes


class MaskCollator:
    """Multi-block masking: draws context and target patches for a whole batch (Section 3).

    The M target blocks have one shape per batch and a position each. The context is a large block
    minus the targets, reduced at random to K patches. All sizes are equal within a batch, so masks
    are index tensors. The other strategies of Table 6 are in `scripts/ablations.py`.

    Args:
        grid: patches, a side or (rows, columns).
        num_targets: M.
        target_scale, context_scale: area of a block, as a fraction of the grid.
        target_aspect: height over width of a target, relative to the grid's.
        context_size: K (D5). Default: the size that nine draws in ten reach beside the largest
            targets, but at most `max_context` of the grid, the paper's average (Table 6).
    Raises:
        ValueError: the settings cannot be met on this grid; the message says why.
    """

    def __init__(
        self, grid: int | Pair, num_targets: int = 4, target_scale: Range = (0.15, 0.2),
        target_aspect: Range = (0.75, 1.5), context_scale: Range = (0.85, 1.0),
        context_size: int | None = None, max_context: float = 0.25,
    ):  # fmt: skip
        self.grid = to_pair(grid)
        self.num_patches = math.prod(self.grid)  # N
        self.num_targets = num_targets
        if min(*self.grid, num_targets) < 1:
            raise ValueError(f"{num_targets} targets on a grid of {self.grid} patches")
        for low, high in (target_scale, context_scale):
            if not 0 < low <= high <= 1:
                raise ValueError(f"a block's scale is a range within 0 to 1, not {low} to {high}")
        self.target_shapes = self._target_shapes(target_scale, target_aspect)  # (steps^2, 2)
        self.context_shapes = block_shapes(self.grid, context_scale, (1.0, 1.0))  # (steps^2, 2)
        self.context_size = self._choose_context_size(context_size, max_context)  # K

    def sample(self, batch_size: int, generator: torch.Generator | None = None):
        """Masks for a batch: `context_idx` (B, K) and `target_idx` (B, M, T), int64 on the CPU.

        Patches are numbered row by row. The same generator state gives the same masks.
        """
        pick = torch.randint(len(self.target_shapes), (1,), generator=generator)
        shape = self.target_shapes[pick.item()].tolist()
        target_idx, free = self._draw(batch_size, shape, generator)
        # Redraw images with fewer than K patches left (D6): by default at most about a tenth.
        while len(redo := (free.sum(1) < self.context_size).nonzero()[:, 0]):
            target_idx[redo], free[redo] = self._draw(len(redo), shape, generator)
        # K of the free patches, every subset equally likely (D5).
        noise = torch.rand(free.shape, generator=generator).masked_fill_(~free, -1.0)
        context_idx = noise.topk(self.context_size, sorted=False).indices.sort().values
        return context_idx, target_idx

    def _draw(self, batch: int, shape: list[int], generator) -> tuple[Tensor, Tensor]:
        """Targets (B, M, T), and which patches of a context block they leave, (B, N) bool."""
        target_idx = self._targets(batch, *shape, generator)
        pick = torch.randint(len(self.context_shapes), (batch, 1), generator=generator)
        height, width = self.context_shapes[pick].unbind(-1)  # (B, 1) each
        top, left = self._corners(height, width, (batch, 1), generator)
        row, column = torch.arange(self.grid[0]), torch.arange(self.grid[1])
        in_rows = (row >= top) & (row < top + height)  # (B, H)
        in_columns = (column >= left) & (column < left + width)  # (B, W)
        free = (in_rows[:, :, None] & in_columns[:, None, :]).flatten(1)  # (B, N)
        return target_idx, free.scatter_(1, target_idx.flatten(1), False)

    def _targets(self, batch: int, height: int, width: int, generator) -> Tensor:
        """M blocks of one shape in each image, (B, M, T)."""
        top, left = self._corners(height, width, (batch, self.num_targets), generator)
        return self._block_patches(top, left, height, width)

    def _corners(self, height, width, size: tuple[int, int], generator) -> tuple[Tensor, Tensor]:
        """Top left corners of `size` blocks, uniform over all positions where they fit (D3)."""
        top, left = torch.rand(2, *size, generator=generator)
        rows, columns = self.grid
        return (top * (rows - height + 1)).long(), (left * (columns - width + 1)).long()

    def _block_patches(self, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
        """Corners (B, M) -> patch indices of the blocks (B, M, T), T = height * width."""
        columns = self.grid[1]
        offsets = torch.arange(height)[:, None] * columns + torch.arange(width)  # (height, width)
        return (top * columns + left)[..., None] + offsets.flatten()  # (B, M, 1) + (T,)

    def _target_shapes(self, scale: Range, aspect: Range) -> Tensor:
        """Other strategies override this and `_targets`, see `scripts/ablations.py`."""
        return block_shapes(self.grid, scale, aspect)

    def _choose_context_size(self, wanted: int | None, limit: float) -> int:
        """K: `wanted`, or the default. ValueError if fewer than half of the draws reach it."""
        largest = max(self.target_shapes.tolist(), key=math.prod)
        _, free = self._draw(1000, largest, torch.Generator().manual_seed(0))
        remain = free.sum(1).sort().values  # (1000,) patches beside the largest targets
        size = min(int(remain[100]), round(limit * self.num_patches)) if wanted is None else wanted
        if not 1 <= size <= remain[500]:
            raise ValueError(
                f"a context of {size} patches beside {self.num_targets} targets of "
                f"{largest[0]}x{largest[1]} on a {self.grid[0]}x{self.grid[1]} grid: half of the "
                f"draws leave {remain[500]} or fewer. Lower the context size or the targets' scale"
            )
        return size


# ------------------------------------------------------------------------ the method (Section 3)


class IJEPA(nn.Module):
    """Context encoder, predictor, target encoder, and the loss."""

    def __init__(self, config: IJEPAConfig):
        super().__init__()
        self.config = config
        self.encoder = ViT(config)
        self.predictor = Predictor(config)
        # The target encoder starts as a copy and follows by EMA; it has no gradient of its own.
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        if config.target_norm == "layer":
            # Fixes the length of each target: the learned scale of the final norm cannot shrink it.
            self.target_norm = nn.LayerNorm(config.embed_dim, elementwise_affine=False)  # (D1)
        else:
            self.target_norm = Whitening(math.prod(self.encoder.grid), config.embed_dim)

    def forward(self, images: Tensor, context_idx: Tensor, target_idx: Tensor) -> Tensor:
        """The loss (Section 3), a scalar: images (B, C, H p, W p), masks (B, K) and (B, M, T).

        Images have the size of the config, for which predictor and whitening are made.
        """
        targets = self.targets(images, target_idx)  # (B, M, T, D)
        context = self.encoder(images, keep=context_idx)  # (B, K, D)
        predictions = self.predictor(context, context_idx, target_idx)  # (B, M, T, D)
        return self.distance(predictions.float(), targets.float())

    @torch.no_grad()  # stop-gradient: targets must not move toward the predictions (collapse)
    def targets(self, images: Tensor, target_idx: Tensor) -> Tensor:
        """Representations to predict: (B, C, H p, W p) and (B, M, T) -> (B, M, T, D).

        The target encoder sees the whole image and blocks are cut from its *output*, so that a
        target knows its surroundings (Section 3, Table 11).
        """
        x = self.target_norm(self.target_encoder(images))  # (B, N, D)
        x = gather_tokens(x, target_idx.flatten(1))  # (B, M T, D)
        return rearrange(x, "b (m t) d -> b m t d", m=target_idx.shape[1])

    def distance(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Smooth L1, averaged over all elements (D1). Ablations override it, and `targets`."""
        return F.smooth_l1_loss(predictions, targets)

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """After each optimizer step: target <- momentum * target + (1 - momentum) * encoder."""
        pairs = zip(self.target_encoder.parameters(), self.encoder.parameters(), strict=True)
        for target, online in pairs:
            target.lerp_(online, 1 - momentum)
        if isinstance(self.target_norm, Whitening):
            self.target_norm.update()  # its statistics follow, too


# ------------------------------------------------------------------- schedules (Appendix A.1)
# Functions of the step alone, counted from 0. Resuming needs no state but the step.


def cosine(start: float, end: float, progress: float) -> float:
    """From `start` to `end` along half a cosine while `progress` goes from 0 to 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def learning_rate(step: int, total: int, warmup: int, start: float, peak: float, final: float):
    """Linear from `start` to `peak` over `warmup` steps, then along a cosine to `final`."""
    done = step + 1  # the last warm-up step runs at `peak`, the last step of all at `final`
    if done < warmup:
        return start + (peak - start) * done / warmup
    return cosine(peak, final, (done - warmup) / max(1, total - warmup))


def weight_decay(step: int, total: int, start: float, end: float) -> float:
    """Along a cosine from `start` to `end` (D2)."""
    return cosine(start, end, (step + 1) / total)


def target_momentum(step: int, total: int, start: float, end: float) -> float:
    """Linear: `start` at step 0, and step `total` would reach `end`, as released."""
    return start + (end - start) * step / total


def parameter_groups(model: IJEPA) -> list[dict]:
    """For AdamW: matrices and the mask token decay; biases and norms do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "decays": True},
        {"params": [p for p in trained if p.ndim == 1], "decays": False, "weight_decay": 0.0},
    ]


# ------------------------------------------------------------------- targets of small models


class Whitening(nn.Module):
    """Targets without the mean of their position, half whitened (D10).

    x -> (x - mean[position]) (v (covariance + shrinkage v I))^(-1/4), v = trace(covariance) / D.
    Of the target encoder's output, `mean` and `covariance` are running averages: of each position's
    mean, and of the covariance within a batch about its positions' means. The first step leaves x
    as it is. A position's mean is what a predictor could say without looking at the image.
    The power -1/2 of the covariance would whiten: equal variance in all directions. The power -1/4
    goes half the way: without shrinkage the covariance becomes (covariance / v)^(1/2). v cancels
    the scale of x; `shrinkage` limits how much the smallest directions are enlarged.
    """

    def __init__(self, num_patches: int, dim: int, rate: float = 0.01, shrinkage: float = 0.1):
        super().__init__()
        self.rate, self.shrinkage = rate, shrinkage
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(num_patches, dim))
        self.register_buffer("covariance", torch.eye(dim))
        self.register_buffer("matrix", torch.eye(dim))  # what x is multiplied by
        # Sums over the micro-batches of a step. As buffers, DDP would make them those of rank 0.
        self.sum_x = self.sum_xx = self.count = 0.0

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D) -> (B, N, D)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 is too coarse for covariances
            x = x.float() - self.mean
            if self.training:
                self.sum_x += x.sum(0)
                self.sum_xx += torch.einsum("bnd,bne->de", x, x)
                self.count += x.new_full((), len(x))  # of images
            return x @ self.matrix

    def update(self) -> None:
        """Once per optimizer step, after all micro-batches; the same on every process."""
        sums = (self.sum_x, self.sum_xx, self.count)
        if dist.is_initialized():
            for total in sums:
                dist.all_reduce(total)
        if self.count < 2:
            raise ValueError("whitening needs two or more images per step, in training mode")
        shift = self.sum_x / self.count  # (N, D): mean of the batch minus the running mean
        covariance = (self.sum_xx / self.count - shift.T @ shift) / len(shift)  # (D, D)
        self.sum_x = self.sum_xx = self.count = 0.0
        self.step += 1
        step = self.step.item()
        rate = max(self.rate, 1 / step)
        self.mean += rate * shift
        self.covariance.lerp_(covariance, rate)
        if step <= 20 or step % 10 == 0:  # the inverse root is the expensive part
            values, vectors = torch.linalg.eigh(self.covariance)
            v = values.mean()
            powers = (v * (values + self.shrinkage * v)) ** -0.25
            self.matrix.copy_((vectors * powers) @ vectors.T)


# --------------------------------------------------------------------------------- differences
# From the paper and from the code its authors released, on purpose:
#
# D1  (paper)    Targets are LayerNormed and the loss is smooth L1, averaged over all elements, as
#                released. The paper sums squared differences and does not normalize.
# D2  (paper)    Weight decay follows a cosine, as released; the paper says "linearly".
# D3  (released) Blocks are placed uniformly over the whole grid. As released, the last row and
#                column are never used, and the context block starts in the top left corner.
# D4  (released) Scale and aspect ratio of a block are independent; an aspect ratio is relative to
#                the grid's. Targets share a shape in a batch, but each image has its own context
#                shape. As released, one number gives both, and contexts share a shape, too.
# D5  (both)     The context has K patches whatever the batch size; patches above K are dropped at
#                random. Released: all masks of a batch are cut to the shortest and keep their
#                first patches in raster order, so the context loses its lower part.
# D6  (released) Context and targets never overlap; an image whose targets leave fewer than K
#                patches is drawn again (this slightly favors overlapping targets). Released: after
#                20 failed draws the context may overlap the targets.
# D7  (released) Output weights of the branches of layer l are divided by sqrt(2 l). Released: the
#                same, but a second initialization undoes it.
# D8  (released) The encoder computes positions for the grid at hand, so it takes other image sizes
#                and non-square images. Released: interpolated, assuming a class token that does
#                not exist.
# D9  (both)     Recipes (`train.py`): random crops of 30 to 100 % of the area, as released; the
#                paper names none. Warm-up of 15 epochs from 1e-4, as in the paper; released: 40
#                from 2e-4.
# D10 (both)     Small models on 32-pixel images (`SMALL`) predict half-whitened targets, start with
#                Xavier initialization and have predictors of about half their width and, but for
#                `vit_small`, fewer layers (paper: 384 wide, at least 6 layers).
#                Their recipes (`train.py`) also differ: flips, warm-up, batch size, beta2, learning
#                rates, the EMA; the demo does not crop. Measured in `results/README.md`.
