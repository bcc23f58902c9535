"""ijepa.py against properties, closed forms, NumPy and the golden numbers of the released code.

Random tests have fixed seeds and bounds that pure chance passes with odds of about 10,000 to 1,
whatever the seed: if one fails after a change of the sampler, suspect the sampler.
"""

import copy
import importlib.util
import math
import os
import pickle
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from scipy import special, stats
from torch import nn
from torch.utils.data import DataLoader

import ijepa
from ijepa import (
    IJEPA,
    MODELS,
    STRATEGIES,
    IJEPAConfig,
    MaskCollator,
    Predictor,
    ViT,
    block_shapes,
    learning_rate,
    parameter_groups,
    set_rates,
    sincos_positions,
    target_momentum,
    weight_decay,
)
from probe import released_model

HERE = Path(__file__).resolve().parent
GRIDS = [(8, 8), (14, 14), (6, 10), (12, 8)]  # (rows, columns), all even for `rasterized`
CHANCE = 1e-4  # a test of pure chance fails this often


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------ masks: geometry


def bounding_boxes(idx, columns):
    """Top, left, height and width of the smallest rectangle around each (..., n) set of patches."""
    row, column = idx // columns, idx % columns
    top, left = row.amin(-1), column.amin(-1)
    return top, left, row.amax(-1) - top + 1, column.amax(-1) - left + 1


def all_distinct(idx):
    return bool((idx.sort(-1).values.diff(dim=-1) > 0).all())


def occupancy(idx, grid):
    """(B, ...) indices -> (B, rows, columns) counts of how often each patch occurs."""
    flat = idx.flatten(1)
    counts = torch.zeros(len(flat), grid[0] * grid[1], dtype=torch.float64)
    counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.float64))
    return counts.unflatten(1, grid)


def assert_valid(masks: MaskCollator, context, targets, batch_size):
    """Everything that holds for every mask of every strategy."""
    (rows, columns), patches = masks.grid, masks.num_patches
    assert context.dtype == targets.dtype == torch.int64
    assert context.shape == (batch_size, masks.context_size)
    assert targets.shape[:2] == (batch_size, masks.num_targets)
    assert masks.context_size >= 1 and targets.shape[2] >= 1
    for idx in (context, targets):
        assert idx.min() >= 0 and idx.max() < patches
    assert (context.diff(dim=1) > 0).all(), "the context is not sorted and distinct"
    hidden, seen = occupancy(targets, masks.grid), occupancy(context, masks.grid)
    assert not (hidden.bool() & seen.bool()).any(), "a patch is both context and target"
    assert all_distinct(targets)
    if masks.strategy in ("rasterized", "random"):
        assert hidden.max() == 1, "two targets share a patch"
    if masks.strategy != "random":
        _, _, height, width = bounding_boxes(targets, columns)
        assert len(height.unique()) == len(width.unique()) == 1, "targets of several shapes"
        # As many distinct patches as the box around them has, so the box is full.
        assert (height * width == targets.shape[2]).all(), "a target is not a whole rectangle"
        assert height.max() <= rows and width.max() <= columns


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("grid", GRIDS)
def test_masks_are_valid(grid, strategy):
    masks, generator = MaskCollator(grid, strategy), seeded()
    for batch_size in (1, 2, 5, 64, 500):
        assert_valid(masks, *masks.sample(batch_size, generator), batch_size)


def test_a_grid_given_by_its_side_is_square():
    side, both = MaskCollator(8), MaskCollator((8, 8))
    assert side.grid == both.grid == (8, 8) and side.num_patches == 64
    for a, b in zip(side.sample(4, seeded()), both.sample(4, seeded()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("grid", GRIDS)
def test_rasterized_is_three_quadrants_predicted_from_the_fourth(grid):
    masks = MaskCollator(grid, "rasterized")
    context, targets = masks.sample(4000, seeded())
    rows, columns = grid
    # Context and targets together are every patch once: with blocks of a quarter, a partition.
    everything = torch.cat([context, targets.flatten(1)], dim=1).sort(1).values
    assert torch.equal(everything, torch.arange(rows * columns).expand_as(everything))
    for idx in (context, targets):
        top, left, height, width = bounding_boxes(idx, columns)
        assert (height == rows // 2).all() and (width == columns // 2).all()
        assert (top % (rows // 2) == 0).all() and (left % (columns // 2) == 0).all()
    # Each quadrant is the context equally often, and no place among the targets has a favourite.
    for first in (context[:, 0], targets[:, 0, 0], targets[:, 2, 0]):
        assert stats.chisquare(first.unique(return_counts=True)[1]).pvalue > CHANCE


@pytest.mark.parametrize("strategy", ["block", "random"])
@pytest.mark.parametrize("grid", GRIDS)
def test_block_and_random_hide_most_and_show_the_rest(grid, strategy):
    masks = MaskCollator(grid, strategy)
    context, targets = masks.sample(300, seeded())
    patches = grid[0] * grid[1]
    # The context is all that is left beside the largest target.
    if strategy == "random":
        sizes = [round(0.6 * patches)]
        assert targets.shape == (300, 1, sizes[0])
    else:
        shapes = block_shapes(grid, (0.6, 0.6), (0.75, 1.5))
        sizes = shapes.prod(1).tolist()
        assert targets.shape[1] == 1 and targets.shape[2] in sizes
        assert np.mean(sizes) == pytest.approx(0.6 * patches, rel=0.05)
    assert masks.context_size == patches - max(sizes)
    assert_valid(masks, context, targets, 300)


def test_random_targets_are_scattered_and_every_patch_is_as_likely():
    masks = MaskCollator(8, "random", num_targets=3, target_scale=(0.2, 0.2), target_aspect=(1, 1))
    _, targets = masks.sample(4000, seeded())
    assert targets.shape == (4000, 3, 13)  # round(0.2 * 64)
    _, _, height, width = bounding_boxes(targets, 8)
    assert (height * width > 13).all()  # never compact by chance
    for block in range(3):
        counts = occupancy(targets[:, block], (8, 8)).sum(0).flatten()
        assert subsets_pvalue(counts, 4000, 13) > CHANCE


def subsets_pvalue(counts, draws, size):
    """Chi-square for counts of items, of which `draws` subsets of `size` were drawn."""
    items, share = len(counts), size / len(counts)
    # Drawing without replacement spreads counts more evenly: hence the (items - 1) / items.
    statistic = ((counts - draws * share) ** 2).sum() / (draws * share * (1 - share))
    return stats.chi2.sf(float(statistic) * (items - 1) / items, items - 1)


# ---------------------------------------------------------------------- masks: sizes and sources


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("grid", GRIDS)
def test_deviation_d5_context_size_is_constant_whatever_the_batch(grid, strategy):
    masks, generator = MaskCollator(grid, strategy), seeded()
    sizes = {masks.sample(b, generator)[0].shape[1] for b in (1, 2, 3, 8, 64, 1000) * 3}
    assert sizes == {masks.context_size}


@pytest.mark.parametrize("grid", GRIDS)
def test_multiblock_shows_a_quarter_at_most(grid):
    patches, size = grid[0] * grid[1], MaskCollator(grid).context_size
    assert 0.2 * patches < size <= round(0.25 * patches)


@pytest.mark.parametrize("wanted", [1, 3, 17])
def test_context_size_and_number_of_targets_are_as_asked(wanted):
    masks = MaskCollator(8, context_size=wanted, num_targets=2)
    context, targets = masks.sample(50, seeded())
    assert context.shape == (50, wanted) and targets.shape[:2] == (50, 2)
    assert_valid(masks, context, targets, 50)


def test_same_generator_state_gives_the_same_masks():
    masks = MaskCollator(14)
    first, again = seeded(1), seeded(1)
    for _ in range(3):
        (c1, t1), (c2, t2) = masks.sample(16, first), masks.sample(16, again)
        assert torch.equal(c1, c2) and torch.equal(t1, t2)
    assert torch.equal(first.get_state(), again.get_state())
    other = masks.sample(16, seeded(2))
    assert not torch.equal(other[0], masks.sample(16, seeded(1))[0])


def test_a_given_generator_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    MaskCollator(8).sample(64, seeded())  # nor does construction touch it
    assert torch.equal(torch.get_rng_state(), before)


def test_without_generator_masks_follow_the_global_seed():
    masks, draws = MaskCollator(14), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(masks.sample(16))
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][0], draws[2][0])
    assert not torch.equal(draws[0][0], masks.sample(16)[0])  # and the next batch is another


@pytest.mark.parametrize("strategy", ["multiblock", "random"])
def test_masks_differ_between_images_and_between_blocks(strategy):
    masks = MaskCollator(14, strategy)
    context, targets = masks.sample(256, seeded())
    assert len(context.unique(dim=0)) == 256
    assert len(targets.flatten(1).unique(dim=0)) == 256
    if strategy == "multiblock":
        same_place = (targets[:, 0, 0] == targets[:, 1, 0]).double().mean()
        assert same_place < 0.1  # about one in 81


def test_masks_as_collate_fn():
    data = [(torch.full((3, 4, 4), float(i)), i) for i in range(16)]
    masks = MaskCollator((6, 8), context_size=5)
    (images, labels), context, targets = masks(data[:7])
    assert torch.equal(images[:, 0, 0, 0], torch.arange(7.0)) and images.shape == (7, 3, 4, 4)
    assert labels.tolist() == list(range(7))
    assert_valid(masks, context, targets, 7)


@pytest.mark.parametrize("workers", [0, 2])
def test_masks_in_a_dataloader(workers):
    data = [(torch.full((3, 4, 4), float(i)), i) for i in range(20)]
    masks = MaskCollator(8)
    batches = list(DataLoader(data, batch_size=5, collate_fn=masks, num_workers=workers))
    assert len(batches) == 4
    for start, ((images, labels), context, targets) in zip(range(0, 20, 5), batches, strict=True):
        assert labels.tolist() == list(range(start, start + 5))
        assert torch.equal(images[:, 2, 3, 3].long(), labels)
        assert_valid(masks, context, targets, 5)
    contexts = torch.cat([context for _, context, _ in batches])
    assert len(contexts.unique(dim=0)) == 20  # no two workers draw the same


# ---------------------------------------------------------------- masks: where blocks are placed


def largest_z(differences):
    """(draws, ...) independent draws whose mean should be 0: the largest |mean| / its error."""
    spread = differences.square().sum(0).sqrt()
    return float((differences.sum(0).abs() / spread.clamp(min=1e-12)).max())


def z_bound(comparisons: int) -> float:
    """|z| that the largest of so many comparisons exceeds with probability `CHANCE`."""
    return float(stats.norm.isf(CHANCE / 2 / comparisons))


def many_occupancies(masks: MaskCollator, batches=150, batch_size=64, seed=0):
    """Context and target occupancies, (draws, rows, columns) each, over many batches."""
    generator = seeded(seed)
    draws = [masks.sample(batch_size, generator) for _ in range(batches)]
    return (
        torch.cat([occupancy(idx, masks.grid) for idx in part]) for part in zip(*draws, strict=True)
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("grid", [(8, 8), (14, 14), (6, 10)])
def test_deviation_d3_every_position_is_reached_without_drift(grid, strategy):
    shown, hidden = many_occupancies(MaskCollator(grid, strategy))
    assert (hidden.sum(0) > 0).all(), "a position is never a target"
    possible = torch.ones(grid, dtype=torch.bool)
    if strategy == "block":  # the centre may be covered wherever so large a block lies
        covered = torch.ones(grid, dtype=torch.bool)
        row, column = torch.arange(grid[0])[:, None], torch.arange(grid[1])
        for height, width in block_shapes(grid, (0.6, 0.6), (0.75, 1.5)).tolist():
            covered &= (row >= grid[0] - height) & (row < height)
            covered &= (column >= grid[1] - width) & (column < width)
        possible = ~covered
    assert ((shown.sum(0) > 0) == possible).all(), "a position is never context"
    for counts in (shown, hidden):
        # Given the shapes, a mask and its mirror image are equally likely.
        for dim in (1, 2):
            assert largest_z(counts - counts.flip(dim)) < z_bound(grid[0] * grid[1])
            # All positions at once, which sees a small drift: the mean row, or column.
            place = torch.arange(grid[dim - 1], dtype=torch.float64) - (grid[dim - 1] - 1) / 2
            assert largest_z((counts.sum(3 - dim) * place).sum(1)) < z_bound(1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_and_columns_are_treated_alike(strategy):
    for counts in many_occupancies(MaskCollator(8, strategy, target_aspect=(1, 1))):
        assert largest_z(counts - counts.mT) < z_bound(64)


@pytest.mark.parametrize("grid", [(7, 10), (8, 8), (9, 5)])
def test_deviation_d3_targets_are_placed_uniformly(grid):
    # One shape, and a context so small that no draw is ever repeated: no conditions.
    masks = MaskCollator(
        grid,
        num_targets=2,
        target_scale=(0.2, 0.2),
        target_aspect=(1, 1),
        context_scale=(1, 1),
        context_size=1,
    )
    _, targets = masks.sample(40_000, seeded())
    top, left, height, width = bounding_boxes(targets, grid[1])
    height, width = height[0, 0].item(), width[0, 0].item()
    assert (height, width) == (round(grid[0] * 0.2**0.5), round(grid[1] * 0.2**0.5))
    places = (grid[0] - height + 1) * (grid[1] - width + 1)
    corner = top * (grid[1] - width + 1) + left
    for block in (0, 1):
        counts = corner[:, block].bincount(minlength=places)
        assert len(counts) == places and stats.chisquare(counts).pvalue > CHANCE
    # And each block without regard to the other, and to the next image.
    for first, second in ((corner[:, 0], corner[:, 1]), (corner[:-1, 0], corner[1:, 0])):
        pairs = (first % 5) * 5 + second % 5
        table = pairs.bincount(minlength=25).reshape(5, 5)
        assert stats.chi2_contingency(table.numpy()).pvalue > CHANCE


def test_deviation_d3_the_context_block_is_placed_uniformly_too():
    # The target is one patch, and K one less than the block has: the block is what surrounds K.
    masks = MaskCollator(
        (10, 14),
        num_targets=1,
        target_scale=(0.001, 0.001),
        context_scale=(0.5, 0.5),
        context_size=7 * 10 - 1,
    )
    context, _ = masks.sample(20_000, seeded())
    top, left, height, width = bounding_boxes(context, 14)
    assert (height == 7).all() and (width == 10).all()
    counts = (top * 5 + left).bincount(minlength=20)
    assert len(counts) == 20 and stats.chisquare(counts).pvalue > CHANCE


def test_target_coverage_is_that_of_rectangles_in_a_square():
    # How often a block covers a patch, exactly: positions that cover it, of all positions.
    masks = MaskCollator(
        (7, 10), target_scale=(0.2, 0.2), target_aspect=(1, 1), context_scale=(1, 1), context_size=1
    )
    _, targets = masks.sample(20_000, seeded())
    height, width = 3, 4

    def covered(length, size):
        return [sum(t <= i < t + size for t in range(length - size + 1)) for i in range(length)]

    share = torch.outer(torch.tensor(covered(7, height)), torch.tensor(covered(10, width))).double()
    share /= (7 - height + 1) * (10 - width + 1)
    counts = occupancy(targets, (7, 10)).sum(0)
    draws = 20_000 * 4
    z = (counts - draws * share) / (draws * share * (1 - share)).sqrt()
    assert z.abs().max() < z_bound(70)


@pytest.mark.parametrize("side", [8, 14, 16])
def test_draws_that_are_repeated_hardly_move_the_targets(side):
    # Targets that overlap leave more to the context, so to repeat the others (D6) favours the
    # centre. With the default context size a corner is covered at most a tenth less for it.
    masks = MaskCollator(side, target_scale=(0.2, 0.2), target_aspect=(1.5, 1.5))
    _, targets = masks.sample(30_000, seeded())
    _, _, height, width = bounding_boxes(targets[0, 0], side)
    corners = occupancy(targets, (side, side)).sum(0)[:: side - 1, :: side - 1]
    exact = 1 / ((side - height.item() + 1) * (side - width.item() + 1))
    assert corners.mean().item() / (30_000 * 4) == pytest.approx(exact, rel=0.1)


# ----------------------------------------------------------------- masks: the shapes of blocks


@pytest.mark.parametrize("scale, aspect", [((0.15, 0.2), (0.75, 1.5)), ((0.05, 0.4), (0.5, 2.0))])
@pytest.mark.parametrize("grid", [(64, 64), (60, 100)])
def test_deviation_d4_scale_and_aspect_are_drawn_independently(grid, scale, aspect):
    shapes = block_shapes(grid, scale, aspect)
    assert shapes.dtype == torch.int64 and shapes.shape[1] == 2
    height, width = (shapes / torch.tensor(grid)).double().T.numpy()  # as shares of the grid
    areas, aspects = height * width, height / width
    # Rounding moves a side by half a patch at most.
    half = 0.5 / np.array(grid)
    lowest, highest = (height - half[0]) * (width - half[1]), (height + half[0]) * (width + half[1])
    assert (highest >= scale[0]).all() and (lowest <= scale[1]).all()
    tallest, widest = (height + half[0]) / (width - half[1]), (height - half[0]) / (width + half[1])
    assert (tallest >= aspect[0]).all() and (widest <= aspect[1]).all()
    # The whole range of both is used, evenly: quartiles within a step and some rounding.
    for values, (low, high) in ((areas, scale), (aspects, aspect)):
        quartiles = np.quantile(values, [0.02, 0.25, 0.5, 0.75, 0.98])
        expected = low + (high - low) * np.array([0.02, 0.25, 0.5, 0.75, 0.98])
        np.testing.assert_allclose(quartiles, expected, rtol=0.04)
    # Independent: no correlation, and every quarter of one goes with every quarter of the other.
    assert abs(np.corrcoef(np.log(areas), np.log(aspects))[0, 1]) < 0.05
    table, *_ = np.histogram2d(
        areas.argsort().argsort(), aspects.argsort().argsort(), bins=4, density=False
    )
    np.testing.assert_allclose(table * 16 / len(shapes), 1.0, atol=0.3)


@pytest.mark.parametrize("grid", [(8, 8), (6, 10)])
def test_samples_use_each_shape_as_often_as_the_table_has_it(grid):
    masks, generator = MaskCollator(grid, context_size=1), seeded()
    table, rows = block_shapes(grid, (0.15, 0.2), (0.75, 1.5)).unique(dim=0, return_counts=True)
    assert len(table) >= 4
    counts = dict.fromkeys(map(tuple, table.tolist()), 0)
    for _ in range(3000):
        _, targets = masks.sample(1, generator)
        _, _, height, width = bounding_boxes(targets[0, 0], grid[1])
        counts[height.item(), width.item()] += 1
    expected = rows.double() / rows.sum() * 3000
    assert stats.chisquare(list(counts.values()), expected.numpy()).pvalue > CHANCE


def test_aspect_is_height_by_width():
    shapes = block_shapes((40, 40), (0.16, 0.16), (4.0, 4.0))
    assert shapes.unique(dim=0).tolist() == [[32, 8]]
    assert block_shapes((20, 40), (0.25, 0.25), (1.0, 1.0)).unique(dim=0).tolist() == [[10, 20]]


def test_a_block_has_at_least_one_patch():
    assert block_shapes((4, 4), (0.001, 0.001), (1.0, 1.0)).unique(dim=0).tolist() == [[1, 1]]


# ------------------------------------------------------- masks: what is dropped from the context


def test_deviation_d5_every_subset_of_the_free_patches_is_as_likely():
    # Quadrants of 2x2, of which two patches are kept: six subsets for each of four quadrants.
    masks = MaskCollator(4, "rasterized", context_size=2)
    context, _ = masks.sample(24_000, seeded())
    subsets, counts = context.unique(dim=0, return_counts=True)
    assert len(subsets) == 24
    assert stats.chisquare(counts).pvalue > CHANCE


@pytest.mark.parametrize("size", [1, 10, 30, 48])
def test_deviation_d5_each_free_patch_is_kept_as_often(size):
    masks = MaskCollator(14, "rasterized", context_size=size)
    context, _ = masks.sample(8000, seeded())
    row, column = context // 14 % 7, context % 14 % 7  # within the quadrant
    counts = (row * 7 + column).flatten().bincount(minlength=49)
    assert subsets_pvalue(counts, 8000, size) > CHANCE


@pytest.mark.parametrize("grid, batch_size", [((8, 8), 2048), ((14, 14), 2048), ((6, 10), 4)])
def test_deviation_d5_no_preference_for_the_first_of_the_free_patches(grid, batch_size):
    # The context block is the whole grid, so what no target covers is free.
    masks, generator = MaskCollator(grid, context_scale=(1, 1)), seeded()
    drift = []
    for _ in range(max(2, 1000 // batch_size)):
        context, targets = masks.sample(batch_size, generator)
        free = occupancy(targets, grid).flatten(1) == 0
        rank = free.long().cumsum(1).gather(1, context).double()  # 1 to the number of free ones
        drift.append((rank - (free.sum(1, keepdim=True) + 1) / 2).mean(1))
    assert largest_z(torch.cat(drift)) < z_bound(1)


# ----------------------------------------------------------------- masks: impossible and extreme


REFUSED = {
    "unknown strategy": ({"grid": 8, "strategy": "stripes"}, "stripes.*multiblock"),
    "empty grid": ({"grid": 0}, "0x0"),
    "no column": ({"grid": (4, 0)}, "4x0"),
    "negative grid": ({"grid": (-8, -8)}, "-8"),
    "no target": ({"grid": 8, "num_targets": 0}, "0 targets"),
    "negative targets": ({"grid": 8, "num_targets": -1}, "-1 targets"),
    "target scale upside down": ({"grid": 8, "target_scale": (0.2, 0.1)}, "target_scale"),
    "target scale zero": ({"grid": 8, "target_scale": (0.0, 0.1)}, "target_scale"),
    "target scale above one": ({"grid": 8, "target_scale": (0.5, 1.1)}, "target_scale"),
    "target scale not a number": ({"grid": 8, "target_scale": (math.nan, 0.1)}, "target_scale"),
    "context scale upside down": ({"grid": 8, "context_scale": (1.0, 0.9)}, "context_scale"),
    "context scale above one": ({"grid": 8, "context_scale": (0.9, 1.2)}, "context_scale"),
    "context scale negative": ({"grid": 8, "context_scale": (-0.1, 1.0)}, "context_scale"),
    "aspect upside down": ({"grid": 8, "target_aspect": (1.5, 0.75)}, "target_aspect"),
    "aspect zero": ({"grid": 8, "target_aspect": (0.0, 1.0)}, "target_aspect"),
    "aspect infinite": ({"grid": 8, "target_aspect": (1.0, math.inf)}, "aspect"),
    "aspect all infinite": ({"grid": 8, "target_aspect": (math.inf, math.inf)}, "aspect"),
    "aspect beyond integers": ({"grid": 8, "target_aspect": (1e40, 1e40)}, "aspect"),
    "block too wide": (
        {"grid": 8, "target_scale": (0.6, 0.6), "target_aspect": (0.1, 1)},
        "8x8",
    ),
    "block too high": ({"grid": (8, 9), "target_scale": (0.9, 1.0)}, "8x9"),
    "targets fill the grid": (
        {"grid": 8, "target_scale": (1, 1), "target_aspect": (1, 1)},
        "context",
    ),
    "too many targets": ({"grid": 8, "num_targets": 200}, "200 targets"),
    "scattered beyond the grid": ({"grid": 8, "strategy": "random", "num_targets": 2}, "targets"),
    "scattered, not divisible": ({"grid": 8, "strategy": "random", "num_targets": 3}, "targets"),
    "context too large": ({"grid": 8, "context_size": 60}, "context of 60"),
    "context beyond the grid": ({"grid": 8, "context_size": 65}, "context of 65"),
    "context empty": ({"grid": 8, "context_size": 0}, "context of 0"),
    "context negative": ({"grid": 8, "context_size": -3}, "context of -3"),
    "one patch": ({"grid": 1}, "context of 0"),
    "rasterized, odd rows": ({"grid": (7, 8), "strategy": "rasterized"}, "even"),
    "rasterized, odd columns": ({"grid": (8, 7), "strategy": "rasterized"}, "even"),
    "rasterized in four": ({"grid": 8, "strategy": "rasterized", "num_targets": 4}, "quadrants"),
    "rasterized, larger than a quadrant": (
        {"grid": 8, "strategy": "rasterized", "context_size": 17},
        "context of 17",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_impossible_masks_are_refused_with_the_reason(name):
    arguments, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason):
        MaskCollator(**arguments)


def test_block_shapes_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"4x6"):
        block_shapes((4, 6), (0.9, 0.9), (0.5, 1.0))


@pytest.mark.parametrize(
    "arguments",
    [
        {"grid": 8},
        {"grid": (5, 7), "num_targets": 3},
        {"grid": 8, "strategy": "block"},
        {"grid": 8, "strategy": "random"},
        {"grid": 12, "num_targets": 6, "target_scale": (0.05, 0.3), "target_aspect": (0.5, 2)},
    ],
    ids=str,
)
def test_deviation_d6_context_and_targets_never_overlap_even_if_pressed(arguments):
    masks = MaskCollator(**arguments)
    accepted, refused = masks.context_size, masks.num_patches
    while refused - accepted > 1:  # the largest context that is accepted
        size = (accepted + refused) // 2
        try:
            masks, accepted = MaskCollator(context_size=size, **arguments), size
        except ValueError:
            refused = size
    generator = seeded()
    assert masks.context_size == accepted > 0
    for _ in range(8):  # shapes differ from batch to batch; the largest are the hard ones
        assert_valid(masks, *masks.sample(500, generator), 500)


def ranges(low, high):
    return st.tuples(st.floats(low, high), st.floats(low, high)).map(
        lambda pair: tuple(sorted(pair))
    )


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    grid=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    strategy=st.sampled_from(sorted(STRATEGIES)),
    num_targets=st.none() | st.integers(1, 6),
    target_scale=st.none() | ranges(0.001, 0.4) | ranges(0.001, 1.0),
    context_scale=st.none() | ranges(0.5, 1.0) | ranges(0.001, 1.0),
    target_aspect=ranges(0.5, 2.0) | ranges(0.001, 1000.0),
    context_size=st.none() | st.integers(1, 30) | st.integers(1, 400),
    batch_size=st.integers(1, 9),
)
def test_any_setting_is_refused_at_once_or_gives_valid_masks(batch_size, **arguments):
    start = time.perf_counter()
    try:
        masks = MaskCollator(**arguments)
    except ValueError:
        event("refused")
    else:
        event("accepted")
        if arguments["context_size"]:
            assert masks.context_size == arguments["context_size"]
        generator = seeded()
        for _ in range(2):
            assert_valid(masks, *masks.sample(batch_size, generator), batch_size)
    assert time.perf_counter() - start < 10  # usually 0.01


@pytest.mark.parametrize("side", range(6, 21))
def test_common_grids_are_accepted(side):
    for strategy in STRATEGIES:
        if strategy != "rasterized" or side % 2 == 0:
            masks = MaskCollator((side, side), strategy)
            assert_valid(masks, *masks.sample(8, seeded()), 8)


def test_mask_benchmark_runs(capsys):
    spec = importlib.util.spec_from_file_location("mask_cost", HERE / "benchmark" / "masks.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    threads = torch.get_num_threads()
    benchmark.main(["--grids", "8", "16", "--batch-size", "16", "--repeats", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["8x8", "16x16"]
    assert all(0 < float(line.split()[1]) < 1e5 and line.endswith("us/image") for line in lines)
    assert torch.get_num_threads() == threads


# ------------------------------------------------------------------ model: against NumPy, float64


def config(**changes) -> IJEPAConfig:
    """A very small model: 16 patches of 8x8 pixels in a square of 32."""
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    small |= {"predictor_dim": 8, "predictor_depth": 2, "predictor_heads": 2}
    return IJEPAConfig(**small | changes)


def shaken(module, std=0.3):
    """The same in float64, with every parameter moved at random: no zeros, ones or copies left."""
    generator = seeded(11)
    for parameter in module.double().parameters():
        parameter.data += std * torch.randn(parameter.shape, generator=generator).double()
    return module


def small_vit(**changes) -> ViT:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    return shaken(ViT(**sizes | changes))


def small_images(*size, batch=3) -> torch.Tensor:
    return torch.randn(batch, 3, *(size or (32, 32)), generator=seeded(12)).double()


def small_masks(batch=3, context=5, blocks=3, size=2, patches=16):
    """Disjoint random context (B, K) and targets (B, M, T)."""
    order = torch.rand(batch, patches, generator=seeded(13)).argsort(1)
    targets = order[:, context : context + blocks * size].reshape(batch, blocks, size)
    return order[:, :context].sort(1).values, targets


def weights(module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


def np_layer_norm(x, eps, weight=1.0, bias=0.0):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + bias


def np_attention(x, w, heads, prefix=""):
    """One image at a time and one head at a time: x (N, D)."""
    size = x.shape[1] // heads
    query, key, value = np.split(x @ w[f"{prefix}qkv.weight"].T + w[f"{prefix}qkv.bias"], 3, axis=1)
    outputs = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = query[:, part] @ key[:, part].T / math.sqrt(size)
        scores = np.exp(scores - scores.max(1, keepdims=True))
        outputs.append(scores / scores.sum(1, keepdims=True) @ value[:, part])
    return np.concatenate(outputs, axis=1) @ w[f"{prefix}proj.weight"].T + w[f"{prefix}proj.bias"]


def np_block(x, w, heads, eps, prefix=""):
    normed = np_layer_norm(x, eps, w[f"{prefix}norm1.weight"], w[f"{prefix}norm1.bias"])
    x = x + np_attention(normed, w, heads, f"{prefix}attn.")
    normed = np_layer_norm(x, eps, w[f"{prefix}norm2.weight"], w[f"{prefix}norm2.bias"])
    hidden = normed @ w[f"{prefix}mlp.fc1.weight"].T + w[f"{prefix}mlp.fc1.bias"]
    hidden = hidden * 0.5 * (1 + special.erf(hidden / math.sqrt(2)))  # the exact GELU
    return x + hidden @ w[f"{prefix}mlp.fc2.weight"].T + w[f"{prefix}mlp.fc2.bias"]


def np_positions(dim, grid, train_grid):
    """One number at a time: the column's sines and cosines, then the row's."""
    table = np.empty((grid[0] * grid[1], dim))
    quarter = dim // 4
    for row in range(grid[0]):
        for column in range(grid[1]):
            for start, index, axis in ((0, column, 1), (2 * quarter, row, 0)):
                place = (index + 0.5) * train_grid[axis] / grid[axis] - 0.5
                for i in range(quarter):
                    angle = place / 10000 ** (i / quarter)
                    table[row * grid[1] + column, start + i] = math.sin(angle)
                    table[row * grid[1] + column, start + quarter + i] = math.cos(angle)
    return table


def np_patches(image, side):
    """(C, H, W) -> (N, C, side, side), row by row."""
    rows, columns = image.shape[1] // side, image.shape[2] // side
    return np.stack(
        [
            image[:, r * side : (r + 1) * side, c * side : (c + 1) * side]
            for r in range(rows)
            for c in range(columns)
        ]
    )


def np_vit(vit, image, heads, eps, keep=None):
    w, side = weights(vit), vit.patch_size
    kernel, bias = w["patch_embed.proj.weight"], w["patch_embed.proj.bias"]
    patches = np_patches(image, side)
    x = patches.reshape(len(patches), -1) @ kernel.reshape(len(kernel), -1).T + bias
    grid = image.shape[1] // side, image.shape[2] // side
    x = x + np_positions(len(kernel), grid, vit.grid)
    x = x if keep is None else x[keep]
    for layer in range(len(vit.blocks)):
        x = np_block(x, w, heads, eps, f"blocks.{layer}.")
    return np_layer_norm(x, eps, w["norm.weight"], w["norm.bias"])


def assert_same(actual, expected, atol=1e-10):
    actual = actual.detach().numpy() if isinstance(actual, torch.Tensor) else actual
    expected = expected.detach().numpy() if isinstance(expected, torch.Tensor) else expected
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_is_numpys(heads):
    attention = shaken(ijepa.Attention(16, heads))
    x = torch.randn(2, 7, 16, generator=seeded()).double()
    for image, output in zip(x.numpy(), attention(x), strict=True):
        assert_same(output, np_attention(image, weights(attention), heads))


@pytest.mark.parametrize("heads, ratio, eps", [(2, 4.0, 1e-6), (4, 48 / 11, 0.1)])
def test_block_is_numpys(heads, ratio, eps):
    block = shaken(ijepa.Block(16, heads, ratio, eps))
    x = torch.randn(2, 7, 16, generator=seeded()).double()
    for image, output in zip(x.numpy(), block(x), strict=True):
        assert_same(output, np_block(image, weights(block), heads, eps))


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (16, 40), (8, 8)])
@pytest.mark.parametrize("img_size", [32, (24, 40)])
def test_vit_is_numpys_at_any_image_size(img_size, size):
    vit, images = small_vit(img_size=img_size, norm_eps=0.01), small_images(*size)
    keep = torch.rand(3, size[0] * size[1] // 64, generator=seeded()).argsort(1)[:, :3]
    # Positions are stored in float32, hence 1e-5.
    for image, output in zip(images.numpy(), vit(images), strict=True):
        assert_same(output, np_vit(vit, image, 2, 0.01), atol=1e-5)
    for image, output, kept in zip(images.numpy(), vit(images, keep), keep.numpy(), strict=True):
        assert_same(output, np_vit(vit, image, 2, 0.01, kept), atol=1e-5)


def test_predictor_is_numpys():
    predictor = shaken(Predictor((4, 6), 16, 8, 2, 2, norm_eps=0.01))
    context_idx, target_idx = small_masks(patches=24)
    context = torch.randn(3, 5, 16, generator=seeded()).double()
    w, positions = weights(predictor), np_positions(8, (4, 6), (4, 6))
    output = predictor(context, context_idx, target_idx)
    assert output.shape == (3, 3, 2, 16)
    for image in range(3):
        for block in range(3):
            seen = context[image].numpy() @ w["predictor_embed.weight"].T
            seen = seen + w["predictor_embed.bias"] + positions[context_idx[image]]
            asked = w["mask_token"][0] + positions[target_idx[image, block]]
            x = np.concatenate([seen, asked])
            for layer in range(2):
                x = np_block(x, w, 2, 0.01, f"predictor_blocks.{layer}.")
            x = np_layer_norm(x, 0.01, w["predictor_norm.weight"], w["predictor_norm.bias"])[-2:]
            x = x @ w["predictor_proj.weight"].T + w["predictor_proj.bias"]
            assert_same(output[image, block], x, atol=1e-5)


# ---------------------------------------------------------------------------- model: positions


@pytest.mark.parametrize("dim", [4, 16, 96])
@pytest.mark.parametrize("grid, train", [((4, 4), None), ((3, 5), None), ((6, 7), (4, 3))])
def test_positions_are_the_formula(dim, grid, train):
    table = sincos_positions(dim, grid, train)
    assert table.dtype == torch.float32 and table.shape == (grid[0] * grid[1], dim)
    assert_same(table, np_positions(dim, grid, train or grid), atol=1e-6)


def test_deviation_d8_other_grids_keep_the_extent_of_the_picture():
    # Twice as many patches: an old centre is the midpoint of two new ones, on both axes.
    old, new = np_positions(8, (4, 6), (4, 6)), sincos_positions(8, (8, 12), (4, 6)).numpy()
    angle = np.arctan2(new[:, 0::4], new[:, 2::4])  # sines 0 and 4, cosines 2 and 6: frequency 0
    place = np.unwrap(angle.reshape(8, 12, 2)[0, :, 0])  # columns, in units of old patches
    assert_same(place, np.arange(12) / 2 - 0.25, atol=1e-5)
    place = np.unwrap(angle.reshape(8, 12, 2)[:, 0, 1])  # rows
    assert_same(place, np.arange(8) / 2 - 0.25, atol=1e-5)
    midpoints = (place[0::2] + place[1::2]) / 2
    assert_same(np.sin(midpoints), old.reshape(4, 6, 8)[:, 0, 4], atol=1e-5)


def test_deviation_d8_any_image_that_divides_works():
    vit = small_vit()
    assert vit(small_images(16, 56)).shape == (3, 2 * 7, 16)
    assert vit(small_images(64, 64)).shape == (3, 64, 16)
    assert ViT((24, 40), 8, 16, 1, 2).grid == (3, 5)


def test_positions_are_no_parameters_and_are_not_stored():
    model = IJEPA(config())
    assert not any("pos" in name for name, _ in model.named_parameters())
    assert not any("pos" in name for name in model.state_dict())


@pytest.mark.parametrize("size", [(30, 32), (32, 30), (4, 32), (33, 33)])
def test_images_that_do_not_divide_are_refused(size):
    with pytest.raises(ValueError, match=rf"{size[0]}x{size[1]}.*patches of 8"):
        ViT(size, 8, 16, 1, 2)
    with pytest.raises(ValueError, match=rf"{size[0]}x{size[1]}.*patches of 8"):
        small_vit()(small_images(*size))


def test_positions_need_a_width_divisible_by_four():
    with pytest.raises(ValueError, match="6"):
        sincos_positions(6, (2, 2))


# ------------------------------------------------------------------------- model: what sees what


def test_keeping_all_is_keeping_nothing_out():
    vit, images = small_vit(), small_images()
    everything = vit(images)
    in_order = torch.arange(16).repeat(3, 1)
    assert_same(vit(images, keep=in_order), everything, atol=1e-12)
    order = torch.rand(3, 16, generator=seeded()).argsort(1)  # any order, another for each image
    permuted = torch.stack([out[i] for out, i in zip(everything, order, strict=True)])
    assert_same(vit(images, keep=order), permuted, atol=1e-12)


def test_hidden_patches_do_not_matter_to_the_encoder():
    vit, images = small_vit(), small_images()
    keep, hidden = small_masks()
    changed = images.clone()
    for image, places in zip(changed, hidden.flatten(1), strict=True):
        for place in places.tolist():
            row, column = place // 4 * 8, place % 4 * 8
            image[:, row : row + 8, column : column + 8] = 99.0
    assert torch.equal(vit(changed, keep), vit(images, keep))
    assert (vit(changed)[0, keep[0]] - vit(images)[0, keep[0]]).abs().min() > 0


@pytest.mark.parametrize("batch", [1, 3])
def test_only_context_patches_have_a_gradient(batch):
    model = shaken(IJEPA(config()))
    images = small_images(batch=batch).requires_grad_()
    context_idx, target_idx = small_masks(batch)
    predictions = model.predictions(images, context_idx, target_idx)
    (predictions * torch.randn(predictions.shape, generator=seeded())).sum().backward()
    for image, gradient in enumerate(images.grad.numpy()):
        size = np.abs(np_patches(gradient, 8)).reshape(16, -1).max(1)
        seen = set(context_idx[image].tolist())
        assert {patch for patch in range(16) if size[patch] != 0} == seen


def test_a_block_is_predicted_alike_alone_and_in_company():
    model, images = shaken(IJEPA(config())), small_images()
    context_idx, target_idx = small_masks()
    company = model.predictions(images, context_idx, target_idx)
    for block in range(3):
        alone = model.predictions(images, context_idx, target_idx[:, block : block + 1])
        assert_same(alone[:, 0], company[:, block], atol=1e-12)
    exchanged = model.predictions(images, context_idx, target_idx.flip(1))
    assert_same(exchanged.flip(1), company, atol=1e-12)


def test_images_are_predicted_alike_alone_and_in_company():
    model, images = shaken(IJEPA(config())), small_images()
    context_idx, target_idx = small_masks()
    company = model.predictions(images, context_idx, target_idx)
    for i in range(3):
        one = slice(i, i + 1)
        alone = model.predictions(images[one], context_idx[one], target_idx[one])
        assert_same(alone[0], company[i], atol=1e-12)


def test_predictions_depend_on_places_not_on_their_order():
    model, images = shaken(IJEPA(config())), small_images()
    context_idx, target_idx = small_masks()
    predictions = model.predictions(images, context_idx, target_idx)
    assert predictions.shape == (3, 3, 2, 16)
    shuffled = model.predictions(images, context_idx.flip(1), target_idx.flip(2))
    assert_same(shuffled.flip(2), predictions, atol=1e-12)
    elsewhere = model.predictions(images, context_idx, (target_idx + 1) % 16)
    assert (elsewhere - predictions).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("count", [1, 2, 3])
def test_last_layers(count):
    vit, images = small_vit(), small_images()
    keep, _ = small_masks()
    for kept in (None, keep):
        outputs = vit.last_layers(images, count, kept)
        assert len(outputs) == count
        assert torch.equal(outputs[-1], vit(images, kept))
        for output, depth in zip(outputs, range(4 - count, 4), strict=True):
            shallow = copy.deepcopy(vit)
            shallow.blocks = shallow.blocks[:depth]
            assert torch.equal(output, shallow(images, kept))


# --------------------------------------------------------------- model: names, sizes, beginnings


def test_state_dict_names_are_timms_and_the_released_codes():
    layer = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    encoder = ["patch_embed.proj", *(f"blocks.0.{name}" for name in layer), "norm"]
    predictor = [
        "predictor_embed",
        *(f"predictor_blocks.0.{name}" for name in layer),
        "predictor_norm",
        "predictor_proj",
    ]
    names = {f"{p}.{n}" for p in ("encoder", "target_encoder") for n in encoder}
    names |= {f"predictor.{n}" for n in predictor}
    expected = {f"{n}.{kind}" for n in names for kind in ("weight", "bias")}
    model = IJEPA(config(depth=1, predictor_depth=1))
    assert set(model.state_dict()) == expected | {"predictor.mask_token"}
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert shapes["encoder.patch_embed.proj.weight"] == (16, 3, 8, 8)
    assert shapes["encoder.blocks.0.attn.qkv.weight"] == (48, 16)
    assert shapes["encoder.blocks.0.mlp.fc1.weight"] == (64, 16)
    assert shapes["predictor.mask_token"] == (1, 1, 8)
    assert shapes["predictor.predictor_proj.weight"] == (16, 8)


def test_norms_have_the_epsilon_of_the_config():
    for eps in (1e-6, 1e-3):
        changes = {} if eps == 1e-6 else {"norm_eps": eps}
        norms = [m for m in IJEPA(config(**changes)).modules() if isinstance(m, nn.LayerNorm)]
        assert len(norms) == 3 * (2 * 2 + 1) and {norm.eps for norm in norms} == {eps}


@pytest.mark.parametrize("std", [0.02, 0.1])
def test_deviation_d7_residual_branches_start_smaller_with_depth(std):
    sizes = {"embed_dim": 96, "predictor_dim": 96, "num_heads": 3, "predictor_heads": 3}
    model = IJEPA(config(**sizes, depth=5, predictor_depth=5, init_std=std))
    layer_of = re.compile(r"blocks\.(\d+)\.(attn\.proj|mlp\.fc2)\.weight$")
    rescaled = 0
    for name, parameter in model.named_parameters():
        residual = layer_of.search(name)
        if residual:
            layer = int(residual[1]) + 1
            expected = std / math.sqrt(2 * layer)
            rescaled += 1
        elif "norm" in name or name.endswith("bias"):
            assert (parameter == float(name.endswith("weight"))).all()
            continue
        else:
            expected = std
        if name != "predictor.mask_token":  # 96 numbers: too few for this
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name
    assert rescaled == 3 * 5 * 2
    assert model.predictor.mask_token.std().item() == pytest.approx(std, rel=0.3)


def test_target_encoder_starts_as_a_copy_of_its_own():
    model = IJEPA(config())
    online, target = model.encoder.state_dict(), model.target_encoder.state_dict()
    assert list(online) == list(target)
    for name in online:
        assert torch.equal(online[name], target[name])
        assert online[name].data_ptr() != target[name].data_ptr()


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"img_size": 30}, "30x30"),
        ({"img_size": (32, 20)}, "32x20"),
        ({"patch_size": 0}, "patches of 0"),
        ({"target": "labels"}, "labels"),
        ({"target_mask": "both"}, "both"),
        ({"loss": "l1"}, "l1"),
        ({"embed_dim": 18, "num_heads": 2}, "18"),
        ({"embed_dim": 16, "num_heads": 3}, "16.* 3 heads"),
        ({"predictor_dim": 10}, "10"),
        ({"predictor_dim": 8, "predictor_heads": 3}, "8.* 3 heads"),
        ({"num_heads": 0}, "0 heads"),
        ({"embed_dim": 0}, " 0 "),
        ({"target_layers": 0}, "target_layers is 0"),
        ({"target_layers": 3}, "target_layers is 3.*2"),
        ({"target": "pixels", "target_layers": 2}, "pixels"),
        ({"target": "pixels", "target_mask": "input"}, "pixels"),
    ],
    ids=str,
)
def test_impossible_architectures_are_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        config(**changes)


# ------------------------------------------------------------------------- the method: the loss


def test_targets_are_normalized_outputs_for_the_whole_image():
    model, images = shaken(IJEPA(config())), small_images()
    _, target_idx = small_masks()
    everything = np.stack([np_vit(model.target_encoder, i, 2, 1e-6) for i in images.numpy()])
    normed = np_layer_norm(everything, 1e-5)
    targets = model.targets(images, target_idx)
    assert targets.shape == (3, 3, 2, 16)
    for image in range(3):
        assert_same(targets[image], normed[image][target_idx[image]], atol=1e-4)


def test_targets_of_several_layers_are_averaged():
    model, images = shaken(IJEPA(config(depth=3, target_layers=2))), small_images()
    _, target_idx = small_masks()
    layers = model.target_encoder.last_layers(images, 3)
    normed = [np_layer_norm(x.detach().numpy(), 1e-5) for x in layers[1:]]
    targets = model.targets(images, target_idx)
    for image in range(3):
        expected = (normed[0][image] + normed[1][image]) / 2
        assert_same(targets[image], expected[target_idx[image]])


@pytest.mark.parametrize("layers", [1, 2])
def test_input_masked_targets_come_from_each_block_alone(layers):
    settings = config(target_mask="input", target_layers=layers)
    model, images = shaken(IJEPA(settings)), small_images()
    _, target_idx = small_masks()
    targets = model.targets(images, target_idx)
    assert targets.shape == (3, 3, 2, 16)
    for block in range(3):
        alone = model.target_encoder.last_layers(images, layers, keep=target_idx[:, block])
        expected = sum(np_layer_norm(x.detach().numpy(), 1e-5) for x in alone) / layers
        assert_same(targets[:, block], expected)


@pytest.mark.parametrize("size", [(32, 32), (16, 40)])
def test_pixel_targets_are_normalized_patches(size):
    model, images = shaken(IJEPA(config(target="pixels", img_size=size))), small_images(*size)
    context_idx, target_idx = small_masks(context=2, blocks=3, patches=size[0] * size[1] // 64)
    targets = model.targets(images, target_idx)
    assert targets.shape == (3, 3, 2, 8 * 8 * 3)
    assert model.predictions(images, context_idx, target_idx).shape == targets.shape
    for image in range(3):
        patches = np_patches(images[image].numpy(), 8)  # (N, C, 8, 8)
        pixels = np.moveaxis(patches, 1, 3).reshape(len(patches), -1)  # row, column, colour
        assert_same(targets[image], np_layer_norm(pixels, 1e-5)[target_idx[image]])


@pytest.mark.parametrize("loss", ["smooth_l1", "l2"])
@pytest.mark.parametrize("changes", [{}, {"target": "pixels"}, {"target_mask": "input"}], ids=str)
def test_deviation_d1_loss_is_the_mean_distance_to_normalized_targets(loss, changes):
    default = {} if loss == "smooth_l1" else {"loss": loss}
    model, images = shaken(IJEPA(config(**default, **changes))), small_images()
    context_idx, target_idx = small_masks()
    targets = model.targets(images, target_idx).numpy()
    assert_same(targets.mean(-1), 0.0 * targets[..., 0])  # LayerNormed
    assert_same(targets.std(-1), 1.0 + 0.0 * targets[..., 0], atol=1e-3)
    predictions = model.predictions(images, context_idx, target_idx).detach().numpy()
    difference = np.abs(predictions - targets)
    assert (difference < 1).any() and (difference > 1).any()
    pointwise = {"l2": difference**2}
    pointwise["smooth_l1"] = np.where(difference < 1, difference**2 / 2, difference - 0.5)
    value = model(images, context_idx, target_idx)
    assert value.shape == ()
    assert value.item() == pytest.approx(pointwise[loss].mean().item(), rel=1e-6)


def test_only_encoder_and_predictor_learn():
    model = IJEPA(config())
    assert all(not p.requires_grad for p in model.target_encoder.parameters())
    model(small_images().float(), *small_masks()).backward()
    for name, parameter in model.named_parameters():
        if name.startswith("target_encoder."):
            assert parameter.grad is None
        else:
            assert parameter.requires_grad and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("changes", [{}, {"target": "pixels"}, {"target_mask": "input"}], ids=str)
def test_targets_carry_no_gradient(changes):
    model = IJEPA(config(**changes))
    model.target_encoder.requires_grad_(True)  # even then
    images = small_images().float().requires_grad_()
    context_idx, target_idx = small_masks()
    assert not model.targets(images, target_idx).requires_grad
    model(images, context_idx, target_idx).backward()
    assert all(p.grad is None for p in model.target_encoder.parameters())
    for image, gradient in enumerate(images.grad.numpy()):  # through the context only
        size = np.abs(np_patches(gradient, 8)).reshape(16, -1).max(1)
        assert set(np.flatnonzero(size)) <= set(context_idx[image].tolist())


# ------------------------------------------------------------------- the moving average (step 7)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9, 0.996, 1.0])
def test_target_follows_in_closed_form(momentum):
    model = shaken(IJEPA(config()))  # so that the two encoders differ
    start = {n: p.clone() for n, p in model.target_encoder.named_parameters()}
    online = {n: p.detach().clone() for n, p in model.encoder.named_parameters()}
    predictor = {n: p.detach().clone() for n, p in model.predictor.named_parameters()}
    for steps in (1, 2, 3, 4, 5):
        model.update_target(momentum)
        for name, parameter in model.target_encoder.named_parameters():
            left = momentum**steps
            assert_same(parameter, left * start[name] + (1 - left) * online[name], atol=1e-12)
            if momentum in (0.0, 1.0):
                assert torch.equal(parameter, (start if momentum else online)[name])
    for network, before in ((model.encoder, online), (model.predictor, predictor)):
        for name, parameter in network.named_parameters():
            assert torch.equal(parameter, before[name])  # follows, and does not lead
    assert not any(p.requires_grad or p.grad_fn for p in model.target_encoder.parameters())


# ----------------------------------------------------------------------- schedules and optimizer


RATES = {"total": 100, "warmup": 10, "start": 1e-4, "peak": 1e-3, "final": 1e-6}


def test_learning_rate_ends_and_closed_form():
    rates = [learning_rate(step, **RATES) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4 + 0.1 * 9e-4, rel=1e-12)
    assert rates[4] == pytest.approx(5.5e-4, rel=1e-12)
    assert rates[9] == pytest.approx(1e-3, rel=1e-12)  # the last step of the warm-up
    assert rates[99] == pytest.approx(1e-6, rel=1e-9)  # the last of all
    for step in range(9, 100):
        turn = math.pi * (step - 9) / 90
        expected = 1e-6 + (1e-3 - 1e-6) * (1 + math.cos(turn)) / 2
        assert rates[step] == pytest.approx(expected, rel=1e-9)
    np.testing.assert_allclose(np.diff(rates[:10]), 9e-5, rtol=1e-9)  # linear
    assert (np.diff(rates[9:]) < 0).all()
    assert learning_rate(150, **RATES) == pytest.approx(1e-6)  # and stays there


@pytest.mark.parametrize("warmup", [0, 1, 100])
def test_learning_rate_with_extreme_warmup(warmup):
    rates = [learning_rate(step, **RATES | {"warmup": warmup}) for step in range(100)]
    assert all(1e-6 <= rate <= 1e-3 * (1 + 1e-12) for rate in rates)
    assert max(rates) == pytest.approx(1e-3, rel=1e-3)
    assert rates[99] == pytest.approx(1e-3 if warmup == 100 else 1e-6, rel=1e-9)


def test_deviation_d2_weight_decay_rises_along_a_cosine():
    decays = [weight_decay(step, 100, 0.04, 0.4) for step in range(100)]
    for step, decay in enumerate(decays):
        expected = 0.4 - 0.36 * (1 + math.cos(math.pi * (step + 1) / 100)) / 2
        assert decay == pytest.approx(expected, rel=1e-12)
    assert decays[49] == pytest.approx(0.22) and decays[99] == pytest.approx(0.4, rel=1e-12)
    assert 0.04 < decays[0] < 0.0402
    assert (np.diff(decays) > 0).all()
    assert decays[24] < 0.04 + 0.36 / 4 - 0.03  # well below the straight line
    assert weight_decay(150, 100, 0.04, 0.4) == pytest.approx(0.4)


def test_target_momentum_is_linear():
    momenta = [target_momentum(step, 100, 0.996, 1.0) for step in range(101)]
    assert momenta[0] == 0.996 and momenta[100] == 1.0
    assert momenta[50] == pytest.approx(0.998, rel=1e-12)
    np.testing.assert_allclose(np.diff(momenta), 4e-5, rtol=1e-9)


def named_groups(model):
    names = {id(p): name for name, p in model.named_parameters()}
    return [([names[id(p)] for p in group["params"]], group) for group in parameter_groups(model)]


def test_parameter_groups():
    model = IJEPA(config(depth=1, predictor_depth=1))
    (decaying, first), (still, second) = named_groups(model)
    layer = ["attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"]
    assert sorted(decaying) == sorted(
        [
            "encoder.patch_embed.proj.weight",
            *(f"encoder.blocks.0.{name}" for name in layer),
            "predictor.mask_token",
            "predictor.predictor_embed.weight",
            *(f"predictor.predictor_blocks.0.{name}" for name in layer),
            "predictor.predictor_proj.weight",
        ]
    )
    assert all(n.endswith(".bias") or re.search(r"norm\d?\.weight$", n) for n in still)
    trained = [n for n, _ in model.named_parameters() if not n.startswith("target_encoder.")]
    assert sorted(decaying + still) == sorted(trained)
    assert first["decays"] and not second["decays"] and second["weight_decay"] == 0


def test_set_rates_decays_matrices_only():
    model = shaken(IJEPA(config()))
    optimizer = torch.optim.AdamW(parameter_groups(model))
    set_rates(optimizer, lr=0.1, weight_decay=0.5)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.1, 0.5), (0.1, 0)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # without gradient, nothing but decay
    for name, parameter in model.named_parameters():
        decays = parameter.ndim > 1 and not name.startswith("target_encoder.")
        assert_same(parameter, before[name] * (0.95 if decays else 1.0), atol=1e-12)
    set_rates(optimizer, lr=0.2, weight_decay=0.0)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.2, 0), (0.2, 0)]


# --------------------------------------------------------------- the released format and numbers


@pytest.fixture(scope="module")
def golden():
    return torch.load(HERE / "golden" / "reference_steps.pt", weights_only=True)


def golden_rates(golden, step):
    """(lr, weight decay, momentum) by our schedules, from the settings of the golden run."""
    o, epoch = golden["config"]["opt"], golden["iterations_per_epoch"]
    total = int(epoch * golden["epochs"] * o["ipe_scale"])
    rate = learning_rate(step, total, o["warmup"] * epoch, o["start_lr"], o["lr"], o["final_lr"])
    decay = weight_decay(step, total, o["wd"], o["final_wd"])
    return rate, decay, target_momentum(step, total, *o["ema"])


def test_golden_schedules(golden):
    assert len(golden["schedules"]) == 15
    for step, expected in enumerate(golden["schedules"]):
        np.testing.assert_allclose(golden_rates(golden, step), expected, rtol=1e-9, atol=0)


def test_golden_steps(golden):
    model = released_model(golden["checkpoint"], num_heads=2)
    optimizer = torch.optim.AdamW(parameter_groups(model))
    parts = ("encoder", "target", "predictor")
    networks = (model.encoder, model.target_encoder, model.predictor)
    # The sums in the file include the fixed positions, which in ours are no parameters.
    buffers = [sum(b.double().sum().item() for b in net.buffers()) for net in networks]
    assert len(golden["steps"]) == 5
    for step, expected in enumerate(golden["steps"]):
        images, context_idx = expected["images"], expected["context_masks"][0]
        target_idx = torch.stack(expected["target_masks"], dim=1)
        if step == 0:
            by_block = [
                model.predictions(images, context_idx, target_idx),
                model.targets(images, target_idx),
            ]
            outputs = {
                "context_output": model.encoder(images, context_idx),
                "target_output": model.target_encoder(images),
                "prediction": by_block[0].transpose(0, 1).flatten(0, 1),
                "targets": by_block[1].transpose(0, 1).flatten(0, 1),
            }
            for name, output in outputs.items():
                assert output.shape == expected[name].shape
                assert_same(output, expected[name], atol=1e-5)
        lr, decay, momentum = golden_rates(golden, step)
        given_rates = [expected[name] for name in ("lr", "weight_decay", "momentum")]
        np.testing.assert_allclose([lr, decay, momentum], given_rates, rtol=1e-9)
        set_rates(optimizer, lr, decay)
        loss = model(images, context_idx, target_idx)
        optimizer.zero_grad()
        loss.backward()
        assert loss.item() == pytest.approx(expected["loss"], abs=1e-6, rel=0)
        for network, part in ((model.encoder, "encoder"), (model.predictor, "predictor")):
            norms = {name: p.grad.norm().item() for name, p in network.named_parameters()}
            given_norms = expected[f"{part}_grad_norms"]
            assert {name for name in given_norms if "pos_embed" not in name} == set(norms)
            for name, norm in norms.items():
                assert norm == pytest.approx(given_norms[name], rel=1e-4), name
        optimizer.step()
        model.update_target(momentum)
        for part, network, fixed in zip(parts, networks, buffers, strict=True):
            total = sum(p.detach().double().sum().item() for p in network.parameters())
            # Without the positions: a smaller number, so a stricter test.
            assert total == pytest.approx(expected[f"{part}_sum_after"] - fixed, rel=1e-5), part


def test_released_model_reads_the_sizes_from_the_tensors(golden):
    c = released_model(golden["checkpoint"], num_heads=2).config
    sizes = (c.img_size, c.patch_size, c.in_chans, c.embed_dim, c.depth, c.num_heads, c.mlp_ratio)
    assert sizes == (32, 4, 3, 32, 2, 2, 4.0)
    assert (c.predictor_dim, c.predictor_depth, c.predictor_heads) == (16, 2, 2)
    assert (c.norm_eps, c.loss, c.target) == (1e-6, "smooth_l1", "representation")


@pytest.mark.parametrize("source", ["dict", "path", "string"])
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_released_model_path_or_dict_with_and_without_prefix(golden, tmp_path, source, prefix):
    checkpoint = {
        part: {prefix + name.removeprefix("module."): t for name, t in state.items()}
        if part in ("encoder", "predictor", "target_encoder")
        else state
        for part, state in golden["checkpoint"].items()
    }
    path = tmp_path / "released.pth.tar"
    torch.save(checkpoint, path)
    given_as = {"dict": checkpoint, "path": path, "string": str(path)}[source]
    model = released_model(given_as, num_heads=2)
    for part in ("encoder", "predictor", "target_encoder"):
        stored = golden["checkpoint"][part]
        state = getattr(model, part).state_dict()
        assert len(state) == sum("pos_embed" not in name for name in stored)
        for name, tensor in state.items():
            assert torch.equal(tensor, stored[f"module.{name}"])
            assert tensor.data_ptr() != stored[f"module.{name}"].data_ptr()
    assert not any(p.requires_grad for p in model.target_encoder.parameters())


def released(model: IJEPA) -> dict:
    """A model as the released code would store it."""
    checkpoint = {}
    for part, positions in (
        ("encoder", "pos_embed"),
        ("predictor", "predictor_pos_embed"),
        ("target_encoder", "pos_embed"),
    ):
        network = getattr(model, part)
        checkpoint[part] = {f"module.{name}": t for name, t in network.state_dict().items()}
        checkpoint[part][f"module.{positions}"] = getattr(network, positions)[None]
    return checkpoint


@pytest.mark.parametrize("width, heads", [(192, 3), (384, 6), (768, 12), (1024, 16), (1280, 16)])
def test_released_model_knows_the_heads_of_released_widths(width, heads):
    sizes = {
        "embed_dim": width,
        "num_heads": heads,
        "predictor_dim": 48 * 4,
        "predictor_heads": heads,
    }
    model = IJEPA(config(**sizes, depth=1, predictor_depth=1))
    loaded = released_model(released(model))
    assert loaded.config.num_heads == loaded.config.predictor_heads == heads
    assert loaded.encoder.blocks[0].attn.num_heads == heads


@pytest.mark.parametrize("width, hidden", [(16, 64), (44, 60), (176, 768)])
def test_released_model_reads_any_mlp_ratio(width, hidden):
    sizes = {"embed_dim": width, "mlp_ratio": hidden / width + 1e-6, "predictor_dim": 16}
    model = IJEPA(config(**sizes, depth=1, num_heads=4, predictor_heads=4))
    assert model.encoder.blocks[0].mlp.fc1.out_features == hidden
    loaded = released_model(released(model), num_heads=4)
    images = small_images().float()
    assert torch.equal(loaded.encoder(images), model.encoder(images))


def without(part, name=None):
    def change(checkpoint):
        del (checkpoint[part] if name else checkpoint)[name or part]

    return change


def extra_weight(checkpoint):
    checkpoint["encoder"]["module.cls_token"] = torch.zeros(1, 1, 32)


def wrong_shape(checkpoint):
    checkpoint["encoder"]["module.norm.bias"] = torch.zeros(31)


def learned_positions(checkpoint):
    checkpoint["target_encoder"]["module.pos_embed"] += 0.1


def other_grid(checkpoint):
    checkpoint["encoder"]["module.pos_embed"] = torch.zeros(1, 60, 32)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(without("encoder"), id="no encoder"),
        pytest.param(without("predictor"), id="no predictor"),
        pytest.param(without("target_encoder"), id="no target encoder"),
        pytest.param(without("encoder", "module.patch_embed.proj.weight"), id="no patch embedding"),
        pytest.param(without("encoder", "module.pos_embed"), id="no positions"),
        pytest.param(without("predictor", "module.mask_token"), id="no mask token"),
        pytest.param(without("encoder", "module.blocks.1.mlp.fc2.bias"), id="no bias"),
        extra_weight,
        wrong_shape,
        learned_positions,
        other_grid,
    ],
)
def test_incomplete_or_other_checkpoints_are_refused(golden, damage):
    checkpoint = copy.deepcopy(golden["checkpoint"])
    damage(checkpoint)
    with pytest.raises(ValueError):
        released_model(checkpoint, num_heads=2)


@pytest.mark.parametrize("content", ["text", "nothing", "half", "tensor", "list", "other dict"])
def test_a_file_that_is_no_checkpoint_is_refused(golden, tmp_path, content):
    path = tmp_path / "file.pt"
    objects = {"tensor": torch.zeros(3), "list": [1, 2], "other dict": {"model": {}}}
    torch.save(objects.get(content, golden["checkpoint"]), path)
    raw = {"text": b"not a checkpoint", "nothing": b"", "half": path.read_bytes()[:100_000]}
    path.write_bytes(raw.get(content, path.read_bytes()))
    with pytest.raises(ValueError):
        released_model(path, num_heads=2)


@pytest.mark.parametrize("heads, reason", [(None, "width 32.*num_heads"), (5, "5 heads")])
def test_released_model_needs_heads_that_fit(golden, heads, reason):
    with pytest.raises(ValueError, match=reason):
        released_model(golden["checkpoint"], num_heads=heads)


class Malicious:
    """Makes a folder when unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("kind", ["torch.save", "old torch.save", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_does_not_run(golden, tmp_path, kind):
    harm, path = tmp_path / "harm", tmp_path / "file.pt"
    checkpoint = golden["checkpoint"] | {"epoch": Malicious(harm)}
    with open(path, "wb") as file:
        if kind == "pickle":
            pickle.dump(Malicious(harm), file)
        else:
            torch.save(checkpoint, file, _use_new_zipfile_serialization=kind == "torch.save")
    # torch's own error for code in a file, or ours for no checkpoint.
    with pytest.raises((ValueError, RuntimeError, pickle.UnpicklingError)):
        released_model(path, num_heads=2)
    assert not harm.exists()
    if kind == "pickle":  # the trap is one: whoever opens the file without care makes the folder
        pickle.loads(path.read_bytes())
        assert harm.exists()


# ------------------------------------------------------------------------------- models, recipes

PAPER = {  # width, depth, heads, predictor depth, patch, hidden, million parameters (encoder)
    "vit_base": (768, 12, 12, 6, 16, 3072, 86),
    "vit_large": (1024, 24, 16, 12, 16, 4096, 303),
    "vit_huge": (1280, 32, 16, 12, 14, 5120, 630),
    "vit_giant": (1408, 40, 16, 16, 16, 6144, 1010),
}


def test_model_names():
    small = {"vit_nano", "vit_tiny", "vit_small"}
    assert set(MODELS) == small | set(PAPER)


@pytest.mark.parametrize("name", PAPER)
def test_models_are_the_papers(name):
    width, depth, heads, predictor_depth, patch, hidden, millions = PAPER[name]
    c, recipe = MODELS[name].config, MODELS[name].recipe
    with torch.device("meta"):
        model = IJEPA(c)
    encoder, predictor = model.encoder, model.predictor
    assert (c.img_size, c.patch_size, c.in_chans) == (224, patch, 3)
    assert tuple(encoder.patch_embed.proj.weight.shape) == (width, 3, patch, patch)
    assert len(encoder.blocks) == depth
    assert {block.attn.num_heads for block in encoder.blocks} == {heads}
    assert {block.mlp.fc1.out_features for block in encoder.blocks} == {hidden}
    assert len(predictor.predictor_blocks) == predictor_depth
    assert {block.attn.num_heads for block in predictor.predictor_blocks} == {heads}
    assert predictor.mask_token.shape[-1] == 384
    parameters = sum(p.numel() for p in encoder.parameters())
    assert parameters == pytest.approx(millions * 1e6, rel=0.01)
    assert (c.target, c.target_mask, c.target_layers) == ("representation", "output", 1)
    # Appendix A.1.
    assert (recipe.data, recipe.batch_size, recipe.warmup_epochs) == ("imagenet", 2048, 15)
    assert (recipe.start_lr, recipe.lr, recipe.final_lr) == (1e-4, 1e-3, 1e-6)
    assert (recipe.weight_decay, recipe.final_weight_decay) == (0.04, 0.4)
    assert (recipe.momentum, recipe.final_momentum) == (0.996, 1.0)


@pytest.mark.parametrize("name, epochs", [("vit_base", 600), ("vit_large", 600), ("vit_huge", 300)])
def test_epochs_are_those_of_table_1(name, epochs):
    assert MODELS[name].recipe.epochs == epochs


@pytest.mark.parametrize("name, width, heads", [("vit_tiny", 192, 3), ("vit_small", 384, 6)])
def test_small_models_are_those_of_the_released_code(name, width, heads):
    c, recipe = MODELS[name].config, MODELS[name].recipe
    assert recipe.data == "cifar10"
    assert (c.embed_dim, c.depth, c.num_heads, c.mlp_ratio) == (width, 12, heads, 4.0)


def model_inputs(c: IJEPAConfig, batch=2):
    masks = MaskCollator(c.img_size // c.patch_size)
    images = torch.randn(batch, c.in_chans, c.img_size, c.img_size, generator=seeded())
    return images, *masks.sample(batch, seeded())


@pytest.mark.parametrize("name", MODELS)
def test_every_model_fits_together(name):
    c = MODELS[name].config
    images, context_idx, target_idx = (x.to("meta") for x in model_inputs(c))
    with torch.device("meta"):  # shapes only: nothing is computed
        model = IJEPA(c)
        predictions = model.predictions(images, context_idx, target_idx)
        assert predictions.shape == (*target_idx.shape, c.embed_dim)
        assert model.targets(images, target_idx).shape == predictions.shape


def test_nano_runs_and_its_recipe_needs_no_download():
    c, recipe = MODELS["vit_nano"]
    assert recipe.data == "shapes"
    loss = IJEPA(c)(*model_inputs(c))
    assert math.isfinite(loss.item()) and loss.item() > 0


@pytest.mark.parametrize("name", MODELS)
def test_default_masks_fit_every_model(name):
    c = MODELS[name].config
    grid = c.img_size // c.patch_size
    assert MaskCollator(grid).context_size > grid * grid / 5


# ------------------------------------------------------------------------------------ deviations


def test_deviation_d9_warm_up_as_in_the_paper():
    for name in ("vit_base", "vit_large", "vit_huge", "vit_giant"):
        recipe = MODELS[name].recipe
        assert (recipe.warmup_epochs, recipe.start_lr, recipe.lr) == (15, 1e-4, 1e-3)


def test_every_deviation_in_the_docstring_has_a_test():
    numbered = set(re.findall(r"^ +D(\d+) \([PR]", ijepa.__doc__, flags=re.MULTILINE))
    tested = {m[1] for name in globals() if (m := re.match(r"test_deviation_d(\d+)_", name))}
    assert numbered == tested and len(numbered) >= 8
