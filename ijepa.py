"""I-JEPA in one file: images in, representations out, no labels and no hand-made augmentations.

Paper: Assran et al., "Self-Supervised Learning from Images with a Joint-Embedding Predictive
Architecture", CVPR 2023. Sections, equations and tables below are those of the paper.

The idea. Hide several blocks of an image, and predict them from what is left: not their pixels,
but their *representations*, as another network sees them. That network, the target encoder, is a
slow-moving average of the one being trained: something stable to predict, which need not describe
what no context can foretell, such as the exact texture of the grass.

The algorithm, one step (Section 3; the names are those of the code):

    1. context_idx, target_idx = masks.sample(B)        M target blocks, a context without them
    2. targets     = LN(target_encoder(images))[target_idx]                 whole image, no gradient
    3. context     = encoder(images, keep=context_idx)              sees the context patches only
    4. predictions = predictor(context, context_idx, target_idx)    "what is at these places?"
    5. loss        = mean distance between predictions and targets
    6. one optimizer step on encoder and predictor
    7. target_encoder <- momentum * target_encoder + (1 - momentum) * encoder

Afterwards `target_encoder(images).mean(1)` is the representation of the images (Appendix A.1).

Letters, in every shape comment of this file:

    B  images in the batch            K  context patches per image, the same for all
    H  rows of patches, W  columns    M  target blocks per image
    N  patches per image, H * W       T  patches per target block, the same for all
    D  width of the encoder           P  width of the predictor
    S  shapes a block can take        C  channels, p  side of a patch in pixels

Where this differs from the paper (P) or from the code its authors released (R), on purpose:

    D1 (P)  Targets are LayerNormed and the loss is smooth L1, the mean over all numbers, as in R.
            The paper sums squares, without a norm; `loss="l2"` squares, but stays a mean.
    D2 (P)  Weight decay rises along a cosine, as in R; the paper says "linearly".
    D3 (R)  Blocks are placed uniformly over every position, the last row and column included, and
            so is the context block. In R the last row and column are never context nor target,
            and the context block stays in the top left corner.
    D4 (R)  Scale and aspect ratio of a block are drawn independently; R sets both from one number.
    D5 (P,R) The context has K patches whatever the batch size; what is too many is dropped at
            random. R cuts every mask of a batch to the shortest one and keeps the first patches
            in raster order: the context loses its lower part, and more so in larger batches.
    D6 (R)  Context and targets never overlap; an image whose targets leave too little is drawn
            again (which favours targets that overlap, slightly). R gives up after 20 draws and
            lets them into the context. Settings where half of the draws fail are refused.
    D7 (R)  The output weights of the branches of layer l are divided by sqrt(2 l). R means to,
            and then initializes a second time without.
    D8 (R)  Positions are evaluated for the grid at hand, so other image sizes and non-square
            images work. R interpolates, on the assumption of a class token that is not there.
    D9 (R)  Warm-up as in the paper: 15 epochs from 1e-4. R has 40 from 2e-4.
"""

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.data import default_collate

# ------------------------------------------------------------------------------- configuration

Pair = tuple[int, int]  # (rows, columns), or (height, width)
Range = tuple[float, float]  # (low, high)


def pair(size: int | Pair) -> Pair:
    """A side as (side, side); a pair as it is."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def grid_of(img_size: int | Pair, patch_size: int) -> Pair:
    """Patches down and across an image. Raises ValueError if they do not fill it exactly."""
    height, width = pair(img_size)
    if min(height, width, patch_size) < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"{height}x{width} pixels do not divide into patches of {patch_size}")
    return height // patch_size, width // patch_size


@dataclass(frozen=True)
class IJEPAConfig:
    """The architecture: everything needed to build the three networks. Checked on construction."""

    img_size: int | Pair = 224  # pixels; the grid that the positions are scaled to
    patch_size: int = 16  # pixels
    in_chans: int = 3
    embed_dim: int = 768  # D
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0  # of the encoder; the predictor's is 4
    predictor_dim: int = 384  # P: narrow on purpose (Table 14)
    predictor_depth: int = 6  # 6 for ViT-B, 12 for L and H, 16 for G; deeper is better (Table 12)
    predictor_heads: int = 12  # as many as the encoder (Appendix A.1)
    target: str = "representation"  # or "pixels", to see what is lost (Table 7)
    target_mask: str = "output"  # or "input": the target encoder sees one block alone (Table 11)
    target_layers: int = 1  # average the last n layers; more than 1 is not in the paper
    loss: str = "smooth_l1"  # or "l2" (D1)
    norm_eps: float = 1e-6
    init_std: float = 0.02  # of all weights; narrow networks do better with 0.64 / sqrt(D)

    def __post_init__(self):
        grid_of(self.img_size, self.patch_size)
        for name, allowed in (
            ("target", ("representation", "pixels")),
            ("target_mask", ("output", "input")),
            ("loss", ("smooth_l1", "l2")),
            ("target_layers", range(1, self.depth + 1)),
        ):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} is {value!r}: choose one of {[*allowed]}")
        widths = (self.embed_dim, self.num_heads), (self.predictor_dim, self.predictor_heads)
        for dim, heads in widths:
            if min(dim, heads) < 1 or dim % 4 or dim % heads:
                raise ValueError(f"width {dim} must be divisible by 4 and by its {heads} heads")
        if self.target == "pixels" and (self.target_layers > 1 or self.target_mask == "input"):
            raise ValueError("target 'pixels' has no layers to average and no input to mask")


# ------------------------------------------ positions (as released; the paper is silent) and tokens


def sincos_positions(dim: int, grid: Pair, train_grid: Pair | None = None) -> Tensor:
    """Fixed 2-D sine-cosine positions, (N, dim) float32: half for the column, half for the row.

    A coordinate c becomes sin(c w_i) and cos(c w_i) with w_i = 10000^(-4 i / dim), i < dim / 4.
    On a grid other than `train_grid` the coordinates are scaled, patch centres onto patch centres,
    so that the picture keeps its extent (D8). Raises ValueError if 4 does not divide `dim`.
    """
    if dim % 4:
        raise ValueError(f"2-D sine-cosine positions need a width divisible by 4, not {dim}")
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))

    def encode(length: int, train_length: int) -> Tensor:
        centres = torch.arange(length, dtype=torch.float64) + 0.5
        coordinates = centres * (train_length / length) - 0.5
        angles = torch.outer(coordinates, frequencies)  # (length, dim/4)
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # (length, dim/2)

    (rows, columns), (train_rows, train_columns) = grid, train_grid or grid
    column = repeat(encode(columns, train_columns), "w d -> (h w) d", h=rows)
    row = repeat(encode(rows, train_rows), "h d -> (h w) d", w=columns)
    return torch.cat([column, row], dim=1).float()  # (N, dim)


def take(tokens: Tensor, idx: Tensor) -> Tensor:
    """The tokens at the given places: (B, N, D) and (B, K) -> (B, K, D)."""
    return tokens.gather(1, repeat(idx, "b k -> b k d", d=tokens.shape[-1]))


# ------------------------------------------------------------------- Vision Transformer (Sec. 3)


class Attention(nn.Module):
    """Multi-head self-attention: every token looks at every other one."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D) -> (B, N, D)
        qkv = rearrange(self.qkv(x), "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.num_heads)
        x = F.scaled_dot_product_attention(*qkv)  # softmax(q k^T / sqrt(d)) v: (B, h, N, D/h)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class MLP(nn.Module):
    """Two layers on each token by itself."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D) -> (B, N, D)
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """One layer: each branch reads a normalized copy of x and adds its result to x."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, norm_eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = MLP(dim, round(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D) -> (B, N, D)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def init_weights(network: nn.Module, blocks: nn.ModuleList, std: float) -> None:
    """Truncated normal weights, zero biases, and residual branches smaller with depth (D7)."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=std)
            nn.init.zeros_(module.bias)
    for layer, block in enumerate(blocks, start=1):
        block.attn.proj.weight.data.div_(math.sqrt(2 * layer))
        block.mlp.fc2.weight.data.div_(math.sqrt(2 * layer))


class PatchEmbed(nn.Module):
    """Cut the image into patches and project each to D numbers: a convolution does both."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H p, W p) -> (B, N, D)
        # Transposed in memory too, or every layer would go on with strides that are slow.
        return rearrange(self.proj(images), "b d h w -> b (h w) d").contiguous()


class ViT(nn.Module):
    """Vision Transformer without a class token: context encoder and target encoder (Section 3).

    The arguments are fields of `IJEPAConfig`; the parameters have timm's and the released names.
    """

    def __init__(
        self, img_size: int | Pair, patch_size: int, embed_dim: int, depth: int, num_heads: int,
        mlp_ratio: float = 4.0, in_chans: int = 3, norm_eps: float = 1e-6, init_std: float = 0.02,
    ):  # fmt: skip
        super().__init__()
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.grid = grid_of(img_size, patch_size)
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        # A constant, not a parameter: it is neither trained nor stored in checkpoints.
        self.register_buffer("pos_embed", sincos_positions(embed_dim, self.grid), persistent=False)
        blocks = (Block(embed_dim, num_heads, mlp_ratio, norm_eps) for _ in range(depth))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        init_weights(self, self.blocks, init_std)

    def last_layers(self, images: Tensor, n: int, keep: Tensor | None = None) -> list[Tensor]:
        """The outputs of the last n layers, each through the last norm; n = 1 is `forward`.

        Args:
            images: (B, C, H p, W p), any size that divides into patches.
            keep: (B, K) int64, the patches to look at; all of them if None.
        Returns:
            n tensors (B, K, D), or (B, N, D) without `keep`; the deepest layer comes last.
        """
        grid, positions = grid_of(images.shape[-2:], self.patch_size), self.pos_embed  # (N, D)
        if grid != self.grid:
            positions = sincos_positions(self.embed_dim, grid, self.grid).to(positions)
        x = self.patch_embed(images) + positions  # (B, N, D)
        if keep is not None:
            # After the position is added, so each patch knows its place; before the first block,
            # so nothing of the hidden patches can leak in, and they cost nothing.
            x = take(x, keep)  # (B, K, D)
        if not 1 <= n <= len(self.blocks):
            raise ValueError(f"the last {n} layers of {len(self.blocks)}: choose 1 or more of them")
        outputs = []
        for layer, block in enumerate(self.blocks, start=1):
            x = block(x)
            if layer > len(self.blocks) - n:
                outputs.append(self.norm(x))
        return outputs

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, C, H p, W p) and optionally (B, K) -> (B, N, D) or (B, K, D)."""
        return self.last_layers(images, 1, keep)[0]


class Predictor(nn.Module):
    """A narrow ViT: given the context, what are the representations at these places? (Section 3)

    Each of the M blocks is predicted by itself: context tokens and the block's mask tokens (one
    learned vector plus a position) go through the layers together, the blocks side by side in the
    batch, so that no prediction can lean on another block's tokens.
    """

    def __init__(
        self, grid: Pair, embed_dim: int, predictor_dim: int, depth: int, num_heads: int,
        out_dim: int | None = None, norm_eps: float = 1e-6, init_std: float = 0.02,
    ):  # fmt: skip
        super().__init__()
        self.predictor_embed = nn.Linear(embed_dim, predictor_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, predictor_dim))
        positions = sincos_positions(predictor_dim, grid)
        self.register_buffer("predictor_pos_embed", positions, persistent=False)
        blocks = (Block(predictor_dim, num_heads, 4.0, norm_eps) for _ in range(depth))
        self.predictor_blocks = nn.ModuleList(blocks)
        self.predictor_norm = nn.LayerNorm(predictor_dim, eps=norm_eps)
        self.predictor_proj = nn.Linear(predictor_dim, out_dim or embed_dim)
        init_weights(self, self.predictor_blocks, init_std)
        nn.init.trunc_normal_(self.mask_token, std=init_std)

    def forward(self, context: Tensor, context_idx: Tensor, target_idx: Tensor) -> Tensor:
        """(B, K, D), (B, K) and (B, M, T) -> predictions (B, M, T, D)."""
        blocks, target_size = target_idx.shape[1:]
        # The encoder has mixed content and position, so the predictor says again where each is.
        context = self.predictor_embed(context) + self.predictor_pos_embed[context_idx]  # (B, K, P)
        queries = self.mask_token + self.predictor_pos_embed[target_idx]  # (B, M, T, P)

        context = repeat(context, "b k p -> (b m) k p", m=blocks)  # a row per image and block
        queries = rearrange(queries, "b m t p -> (b m) t p")
        x = torch.cat([context, queries], dim=1)  # (B M, K+T, P)
        for block in self.predictor_blocks:
            x = block(x)
        x = self.predictor_proj(self.predictor_norm(x[:, -target_size:]))  # (B M, T, D)
        return rearrange(x, "(b m) t d -> b m t d", m=blocks)


# ---------------------------------------------------------------- masks (Sec. 3, Fig. 4, App. A.1)


# How Table 6 hides parts of an image: number and scale of the targets, scale of the context block,
# and the context's default size, as a share of the grid at most.
STRATEGIES = {
    "multiblock": (4, (0.15, 0.2), (0.85, 1.0), 0.25),  # several blocks: the method
    "rasterized": (3, (0.25, 0.25), (1.0, 1.0), 0.25),  # three quadrants from the fourth
    "block": (1, (0.6, 0.6), (1.0, 1.0), 1.0),  # one large block from the rest
    "random": (1, (0.6, 0.6), (1.0, 1.0), 1.0),  # scattered patches from the rest
}


def block_shapes(grid: Pair, scale: Range, aspect: Range, steps: int = 32) -> Tensor:
    """The shapes a block can take, (steps^2, 2) int64 rows of (height, width) in patches.

    One row for each pair of a scale (share of the grid's area) and an aspect ratio (height by
    width, relative to the grid's own), both evenly spaced over their ranges: to choose a row at
    random is to draw scale and aspect independently and uniformly (D4). Raises ValueError if a
    shape does not fit the grid.
    """

    def evenly(low: float, high: float) -> Tensor:
        return low + (high - low) * (torch.arange(steps, dtype=torch.float64) + 0.5) / steps

    s, a = torch.cartesian_prod(evenly(*scale), evenly(*aspect)).unbind(1)  # (steps^2,) each
    shapes = torch.stack([grid[0] * (s * a).sqrt(), grid[1] * (s / a).sqrt()], dim=1)
    shapes = shapes.round().clamp(min=1)
    if not (shapes <= torch.tensor(grid)).all():
        raise ValueError(
            f"blocks of scale {scale} and aspect {aspect} do not fit a grid of {grid[0]}x{grid[1]}"
        )
    return shapes.long()


class MaskCollator:
    """Draws which patches are context and which are targets, for a whole batch at once.

    Multi-block (Section 3): M rectangles, of one shape per batch, each placed at random; the
    context is a large block without the targets, reduced at random to K patches (D3 to D6). Sizes
    are equal within a batch, so that the masks are plain index tensors.

    Args:
        grid: patches, a side or (rows, columns).
        strategy: one of `STRATEGIES`; the next four default to the strategy's values.
        num_targets: M.
        target_scale, context_scale: range of a block's area, as a share of the grid.
        target_aspect: range of height by width, relative to the grid's own.
        context_size: K; by default what nine in ten draws leave, and for `multiblock` at most a
            quarter of the grid (the average that Table 6 gives).
    Raises:
        ValueError: for settings that cannot be met on this grid, with the reason.
    """

    def __init__(
        self, grid: int | Pair, strategy: str = "multiblock", num_targets: int | None = None,
        target_scale: Range | None = None, target_aspect: Range = (0.75, 1.5),
        context_scale: Range | None = None, context_size: int | None = None,
    ):  # fmt: skip
        if strategy not in STRATEGIES:
            raise ValueError(f"mask strategy {strategy!r}: choose one of {', '.join(STRATEGIES)}")
        targets, scale, context, share = STRATEGIES[strategy]
        self.strategy = strategy
        self.grid = rows, columns = pair(grid)
        self.num_patches = rows * columns
        self.num_targets = targets if num_targets is None else num_targets
        target_scale = target_scale or scale
        context_scale = context_scale or context
        if min(rows, columns, self.num_targets) < 1:
            raise ValueError(f"{self.num_targets} targets on a grid of {rows}x{columns} patches")
        ranges = {"target_scale": target_scale, "context_scale": context_scale}
        for name, (low, high) in (ranges | {"target_aspect": target_aspect}).items():
            if not 0 < low <= high <= (1 if name in ranges else math.inf):
                raise ValueError(f"{name} {low, high}: need 0 < low <= high, of a scale up to 1")

        if strategy == "rasterized":
            if rows % 2 or columns % 2 or (self.num_targets, *target_scale) != (3, 0.25, 0.25):
                raise ValueError("rasterized masks are 3 quadrants of a grid with even sides")
            self.target_shapes = torch.tensor([[rows // 2, columns // 2]])  # (S, 2)
        elif strategy == "random":  # scattered patches: only their number matters
            count = torch.linspace(*target_scale, 32, dtype=torch.float64) * self.num_patches
            count = count.round().long().clamp(min=1)
            if self.num_targets * count.max() >= self.num_patches:
                raise ValueError(f"{self.num_targets} targets of {count.max()} patches hide all")
            self.target_shapes = torch.stack([torch.ones_like(count), count], dim=1)
        else:
            self.target_shapes = block_shapes(self.grid, target_scale, target_aspect)
        self.context_shapes = block_shapes(self.grid, context_scale, (1.0, 1.0))  # (S, 2)
        self.context_size = self._choose_context_size(context_size, share)

    def _choose_context_size(self, wanted: int | None, share: float) -> int:
        """K: `wanted`, if at least half of all draws leave it; by default what 9 in 10 leave."""
        largest = max(self.target_shapes.tolist(), key=math.prod)
        _, free = self._draw(1000, largest, torch.Generator().manual_seed(0))
        spare = free.sum(1).sort().values  # what 1,000 draws leave beside the largest targets
        size = min(int(spare[100]), round(share * self.num_patches)) if wanted is None else wanted
        if not 1 <= size <= spare[500]:
            raise ValueError(
                f"a context of {size} patches beside {self.num_targets} targets of up to "
                f"{largest[0]}x{largest[1]} on a {self.grid[0]}x{self.grid[1]} grid: half of the "
                f"draws leave {spare[500]} or fewer. Lower the context size, or the targets' scale"
            )
        return size

    def _place(self, height: Tensor | int, width: Tensor | int, size: Pair, generator):
        """Top left corners of blocks, uniform over all places where they fit (D3)."""
        top, left = torch.rand(2, *size, generator=generator)
        rows, columns = self.grid
        return (top * (rows - height + 1)).long(), (left * (columns - width + 1)).long()

    def _targets(self, batch: int, height: int, width: int, generator) -> Tensor:
        """Target blocks of one shape, (B, M, T)."""
        columns, size = self.grid[1], (batch, self.num_targets)
        if self.strategy == "random":
            order = torch.rand(batch, self.num_patches, generator=generator).argsort(1)
            return order[:, : self.num_targets * width].view(*size, width)
        if self.strategy == "rasterized":
            quadrant = torch.rand(batch, 4, generator=generator).argsort(1)[:, :3]  # (B, 3)
            top, left = quadrant // 2 * height, quadrant % 2 * width
        else:
            top, left = self._place(height, width, size, generator)  # (B, M) each
        inside = torch.arange(height)[:, None] * columns + torch.arange(width)  # (h, w)
        return (top * columns + left)[..., None] + inside.flatten()  # (B, M, T)

    def _draw(self, batch: int, shape: list[int], generator) -> tuple[Tensor, Tensor]:
        """Targets (B, M, T), and the patches of the context block that they leave, (B, N) bool."""
        targets = self._targets(batch, *shape, generator)
        pick = torch.randint(len(self.context_shapes), (batch, 1), generator=generator)
        height, width = self.context_shapes[pick].unbind(-1)  # (B, 1) each
        top, left = self._place(height, width, (batch, 1), generator)
        row, column = torch.arange(self.grid[0]), torch.arange(self.grid[1])
        in_rows = (row >= top) & (row < top + height)  # (B, H)
        in_columns = (column >= left) & (column < left + width)  # (B, W)
        free = (in_rows[:, :, None] & in_columns[:, None, :]).flatten(1)  # (B, N)
        return targets, free.scatter_(1, targets.flatten(1), False)

    def sample(self, batch_size: int, generator: torch.Generator | None = None):
        """Masks for a batch: `context_idx` (B, K) and `target_idx` (B, M, T), int64, on the CPU.

        Indices count patches row by row. The same generator state gives the same masks.
        """
        pick = int(torch.randint(len(self.target_shapes), (1,), generator=generator))
        shape = self.target_shapes[pick].tolist()
        targets, free = self._draw(batch_size, shape, generator)
        for _ in range(1000):  # about half of them at the least succeed in each round
            failed = (free.sum(1) < self.context_size).nonzero()[:, 0]
            if not len(failed):
                break
            targets[failed], free[failed] = self._draw(len(failed), shape, generator)
        else:
            raise RuntimeError(f"no masks with {self.context_size} context patches in 1000 draws")
        return self._reduce(free, generator), targets

    def _reduce(self, free: Tensor, generator) -> Tensor:
        """K of the free patches, every subset equally likely: (B, N) bool -> (B, K)."""
        lottery = torch.rand(free.shape, generator=generator).masked_fill_(~free, -1.0)
        return lottery.topk(self.context_size, sorted=False).indices.sort().values

    def __call__(self, samples: list) -> tuple:
        """As a DataLoader's `collate_fn`: (collated samples, context_idx, target_idx)."""
        return default_collate(samples), *self.sample(len(samples))


# ------------------------------------------------------------------------- the method (Section 3)


class IJEPA(nn.Module):
    """Context encoder, predictor and target encoder, and the loss between them."""

    def __init__(self, config: IJEPAConfig):
        super().__init__()
        self.config = c = config
        widths = (c.embed_dim, c.depth, c.num_heads, c.mlp_ratio)
        self.encoder = ViT(c.img_size, c.patch_size, *widths, c.in_chans, c.norm_eps, c.init_std)
        widths = (c.predictor_dim, c.predictor_depth, c.predictor_heads)
        out_dim = c.patch_size**2 * c.in_chans if c.target == "pixels" else c.embed_dim
        self.predictor = Predictor(
            self.encoder.grid, c.embed_dim, *widths, out_dim, c.norm_eps, c.init_std
        )
        # Starts as a copy, then follows slowly (`update_target`); it is never trained itself.
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)

    @torch.no_grad()  # otherwise a constant output would be the easiest solution
    def targets(self, images: Tensor, target_idx: Tensor) -> Tensor:
        """What there is to predict: (B, C, H p, W p) and (B, M, T) -> (B, M, T, D).

        The target encoder sees the whole image, and blocks are cut from its *output*: each target
        knows what surrounds it (Section 3, Table 11).
        """
        blocks, n = target_idx.shape[1], self.config.target_layers
        if self.config.target == "pixels":
            p = self.config.patch_size
            layers = [rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)]
        elif self.config.target_mask == "output":
            layers = self.target_encoder.last_layers(images, n)  # each (B, N, D)
        else:  # one pass for each block, which is all that it sees (Appendix C)
            copies = images.repeat_interleave(blocks, dim=0)  # (B M, C, H p, W p)
            layers = self.target_encoder.last_layers(copies, n, keep=target_idx.flatten(0, 1))
        # Without learned scale and shift: a target cannot be made easy by making it small.
        x = torch.stack([F.layer_norm(x, x.shape[-1:]) for x in layers]).mean(0)
        if self.config.target_mask == "input":
            return rearrange(x, "(b m) t d -> b m t d", m=blocks)
        return take(x, target_idx.flatten(1)).unflatten(1, target_idx.shape[1:])  # (B, M, T, D)

    def predictions(self, images: Tensor, context_idx: Tensor, target_idx: Tensor) -> Tensor:
        """The predictor's answer from the context alone, (B, M, T, D)."""
        context = self.encoder(images, keep=context_idx)  # (B, K, D)
        return self.predictor(context, context_idx, target_idx)

    def forward(self, images: Tensor, context_idx: Tensor, target_idx: Tensor) -> Tensor:
        """The loss of Section 3, a scalar: images (B, C, H p, W p), masks (B, K) and (B, M, T)."""
        targets = self.targets(images, target_idx)
        predictions = self.predictions(images, context_idx, target_idx)
        distance = F.smooth_l1_loss if self.config.loss == "smooth_l1" else F.mse_loss
        return distance(predictions.float(), targets.float())

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """target <- momentum * target + (1 - momentum) * encoder, after each optimizer step."""
        pairs = zip(self.target_encoder.parameters(), self.encoder.parameters(), strict=True)
        for target, online in pairs:
            target.lerp_(online, 1 - momentum)


# ------------------------------------------------------------ schedules and optimizer (App. A.1)
# Functions of the step alone, counted from 0, so that resuming needs only the step.


def cosine(start: float, end: float, progress: float) -> float:
    """From `start` to `end` along half a cosine, as `progress` goes from 0 to 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def learning_rate(step: int, total: int, warmup: int, start: float, peak: float, final: float):
    """Linear from `start` to `peak` over `warmup` steps, then along a cosine to `final`."""
    done = step + 1  # the last step of the warm-up runs at the peak, the last of all at the end
    if done < warmup:
        return start + (peak - start) * done / warmup
    return cosine(peak, final, (done - warmup) / max(1, total - warmup))


def weight_decay(step: int, total: int, start: float, end: float) -> float:
    """Along a cosine from `start` to `end` (D2)."""
    return cosine(start, end, (step + 1) / total)


def target_momentum(step: int, total: int, start: float, end: float) -> float:
    """Linear from `start` to `end`, where the target encoder stops moving."""
    return start + (end - start) * step / total


def parameter_groups(model: IJEPA) -> list[dict]:
    """For AdamW: matrices and the mask token decay, biases and norms do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "decays": True},
        {"params": [p for p in trained if p.ndim == 1], "decays": False, "weight_decay": 0.0},
    ]


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Learning rate and weight decay of the coming step."""
    for group in optimizer.param_groups:
        group.update(lr=lr, weight_decay=weight_decay if group["decays"] else 0.0)


# --------------------------------------------------------------------------- models and recipes


@dataclass(frozen=True)
class Recipe:
    """How a model is trained unless told otherwise. Defaults: Appendix A.1, epochs of Table 1."""

    data: str = "imagenet"
    batch_size: int = 2048  # images per optimizer step
    epochs: int = 300
    warmup_epochs: float = 15
    start_lr: float = 1e-4
    lr: float = 1e-3
    final_lr: float = 1e-6
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    momentum: float = 0.996  # of the target encoder
    final_momentum: float = 1.0
    crop_scale: tuple[float, float] = (0.3, 1.0)  # random resized crops; no flip, as released
    flip: bool = False


class Model(NamedTuple):
    config: IJEPAConfig
    recipe: Recipe


def _model(img, patch, dim, depth, heads, p_dim, p_depth, recipe, **more) -> Model:
    predictor = {"predictor_dim": p_dim, "predictor_depth": p_depth, "predictor_heads": heads}
    return Model(IJEPAConfig(img, patch, 3, dim, depth, heads, **predictor, **more), recipe)


# Not from a paper: our own.
_NANO = Recipe("shapes", 64, 5, 0.25, final_lr=1e-5, final_weight_decay=0.04,
               momentum=0.997, crop_scale=(1.0, 1.0), flip=True)  # fmt: skip
_CIFAR = Recipe("cifar10", batch_size=512)

MODELS = {
    #                  image patch     D layers heads    P layers
    "vit_nano": _model(48, 8, 96, 4, 3, 48, 2, _NANO, init_std=0.06),
    "vit_tiny": _model(32, 4, 192, 12, 3, 96, 4, _CIFAR, init_std=0.046),
    "vit_small": _model(32, 4, 384, 12, 6, 192, 6, _CIFAR, init_std=0.033),
    "vit_base": _model(224, 16, 768, 12, 12, 384, 6, Recipe(epochs=600)),
    "vit_large": _model(224, 16, 1024, 24, 16, 384, 12, Recipe(epochs=600)),
    "vit_huge": _model(224, 14, 1280, 32, 16, 384, 12, Recipe(epochs=300)),
    # The paper trains it on ImageNet-22k, as long as 600 epochs of ImageNet-1k (Table 5).
    "vit_giant": _model(224, 16, 1408, 40, 16, 384, 16, Recipe(epochs=600), mlp_ratio=48 / 11),
}
