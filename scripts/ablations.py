"""Ablations of the paper (Tables 6, 7, 10 and 11) at a small scale: a run per row and seed.

    python scripts/ablations.py --data cifar10 --epochs 15 --seeds 0 1
    python scripts/ablations.py --data cifar10 --epochs 15 --only pixels random

A row replaces the loss, the targets or the masks of the method by a class of this file, or changes
an option of `train.py`. Runs are in runs/ablations. A finished run is not repeated and a stopped
one resumes, so the command can be given again after an interruption. The table is also written to
runs/ablations/ablations.csv.
"""

import csv
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's files

from data import Distributed, UserError, atomic_write, distributed, option, parse_args, run_main
from ijepa import IJEPA, MODELS, IJEPAConfig, MaskCollator, Range, gather_tokens, init_weights
from probe import load_checkpoint
from train import TrainConfig, train

# ------------------------------------------------------------------------------- losses and targets


class L2Loss(IJEPA):
    """The paper's distance (Section 3), averaged over all elements (D1)."""

    def distance(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(predictions, targets)


class PixelTargets(IJEPA):
    """Predict pixels instead of representations (Table 7).

    Each patch is normalized as in MAE; the paper does not say.
    """

    def __init__(self, config: IJEPAConfig):
        super().__init__(replace(config, target_norm="layer"))  # nothing to whiten
        pixels = config.patch_size**2 * config.in_chans
        self.predictor.predictor_proj = nn.Linear(config.predictor_dim, pixels)
        init_weights(self.predictor.predictor_proj, config.init)

    @torch.no_grad()
    def targets(self, images: Tensor, target_idx: Tensor) -> Tensor:
        """(B, C, H p, W p) and (B, M, T) -> (B, M, T, p p C)."""
        p, num_targets = self.config.patch_size, target_idx.shape[1]
        x = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)  # (B, N, p p C)
        x = gather_tokens(F.layer_norm(x, x.shape[-1:]), target_idx.flatten(1))
        return rearrange(x, "b (m t) d -> b m t d", m=num_targets)


class InputMasking(IJEPA):
    """The target encoder sees one block alone, instead of the whole image (Table 11)."""

    def __init__(self, config: IJEPAConfig):
        super().__init__(replace(config, target_norm="layer"))  # whitening needs whole images

    @torch.no_grad()
    def targets(self, images: Tensor, target_idx: Tensor) -> Tensor:
        """(B, C, H p, W p) and (B, M, T) -> (B, M, T, D)."""
        num_targets = target_idx.shape[1]
        images = images.repeat_interleave(num_targets, dim=0)  # (B M, C, H p, W p)
        x = self.target_encoder(images, keep=target_idx.flatten(0, 1))  # (B M, T, D)
        return rearrange(self.target_norm(x), "(b m) t d -> b m t d", m=num_targets)


# ---------------------------------------------------------------------------------- masks (Table 6)


class RandomMasks(MaskCollator):
    """Each target is a set of scattered patches; the context is drawn from the rest."""

    def _target_shapes(self, scale: Range, aspect: Range) -> Tensor:
        count = (torch.linspace(*scale, 32, dtype=torch.float64) * self.num_patches).round().long()
        if self.num_targets * count.max() >= self.num_patches:
            raise ValueError(f"{self.num_targets} random targets of this scale leave no context")
        return torch.stack([torch.ones_like(count), count.clamp(min=1)], dim=1)

    def _targets(self, batch: int, height: int, width: int, generator) -> Tensor:
        order = torch.rand(batch, self.num_patches, generator=generator).argsort(1)
        return order[:, : self.num_targets * width].view(batch, self.num_targets, width)


class RasterizedMasks(MaskCollator):
    """Three quadrants of the image are predicted from the fourth."""

    def _target_shapes(self, scale: Range, aspect: Range) -> Tensor:
        if any(side % 2 for side in self.grid) or self.num_targets != 3:
            raise ValueError("rasterized masks are 3 quadrants of a grid with even sides")
        return torch.tensor([[self.grid[0] // 2, self.grid[1] // 2]])

    def _targets(self, batch: int, height: int, width: int, generator) -> Tensor:
        quadrant = torch.rand(batch, 4, generator=generator).argsort(1)[:, :3]  # (B, 3)
        return self._block_patches(quadrant // 2 * height, quadrant % 2 * width, height, width)


ONE_TARGET = {"num_targets": 1, "target_scale": (0.6, 0.6), "max_context": 1.0}
WHOLE = {"context_scale": (1.0, 1.0)}  # the context block is the whole image, minus the targets
STRATEGIES = {
    "multiblock": MaskCollator,
    "rasterized": partial(RasterizedMasks, num_targets=3, **WHOLE),
    "block": partial(MaskCollator, **ONE_TARGET, **WHOLE),
    "random": partial(RandomMasks, **ONE_TARGET, **WHOLE),
}

# ----------------------------------------------------------------------------------- runs and table


@dataclass(frozen=True)
class Row:
    """How a run differs from the method."""

    method: type[IJEPA] = IJEPA
    collator: Callable[..., MaskCollator] = MaskCollator
    options: dict = field(default_factory=dict)  # of train.py


# "pixels" and "input mask" do without whitening: compare them with "layer norm", too. On a grid of
# 8x8 the context has 16 patches beside one to three targets, and 14 beside four.
ROWS = {
    "I-JEPA": Row(),
    "pixels": Row(PixelTargets),
    "rasterized": Row(collator=STRATEGIES["rasterized"]),
    "block": Row(collator=STRATEGIES["block"]),
    "random": Row(collator=STRATEGIES["random"]),
    "1 target": Row(options={"num_targets": 1}),  # Table 10
    "2 targets": Row(options={"num_targets": 2}),
    "3 targets": Row(options={"num_targets": 3}),
    "input mask": Row(InputMasking),
    "L2 loss": Row(L2Loss),
    "layer norm": Row(options={"target_norm": "layer"}),  # ours: targets not whitened (D10)
}


@dataclass(frozen=True)
class AblationsConfig:
    """Options of this script."""

    data: str = option("cifar10", "dataset or folder, as for train.py")
    data_dir: str = option("data", "folder of the named datasets")
    model: str = option("vit_nano", "model of train.py", choices=[*MODELS])
    epochs: float = option(15.0, "epochs of every run")
    seeds: tuple[int, ...] = option((0, 1), "one run of each row per seed")
    only: tuple[str, ...] = option((), "these rows; default: all")
    out: str = option("runs/ablations", "folder of the runs")


def run_folder(config: AblationsConfig, name: str, seed: int) -> Path:
    return Path(config.out, f"{name.replace(' ', '_')}_seed{seed}")


def train_once(config: AblationsConfig, name: str, seed: int, world: Distributed) -> None:
    """Train one row with one seed, unless its result exists."""
    out, row = run_folder(config, name, seed), ROWS[name]
    done, stopped = (out / "result.json").exists(), (out / "last.pt").exists()
    run = TrainConfig(
        model=config.model, data=config.data, data_dir=config.data_dir, epochs=config.epochs,
        seed=seed, out=str(out), resume=stopped, **row.options,
    )  # fmt: skip
    if done or stopped:
        file = json.loads((out / "result.json").read_text()) if done else None
        saved = (file or load_checkpoint(out / "last.pt"))["config"]
        for key in ("model", "data", "epochs"):
            if saved[key] != getattr(run, key):
                raise UserError(f"{out} was trained with {key} {saved[key]}: choose another --out")
    if done:
        return
    if code := train(run, world, row.method, row.collator, name):
        sys.exit(code)  # stopped by a signal


def read_result(config: AblationsConfig, name: str, seed: int) -> dict:
    """A row of the table: accuracies of the trained encoder, as fractions."""
    rows = json.loads((run_folder(config, name, seed) / "result.json").read_text())["rows"]
    trained = next(row for row in rows if row["name"] == "trained")
    metrics = {key: f"{trained[key]:.4f}" for key in ("knn", "linear", "linear_4", "rankme")}
    return {"row": name, "seed": seed, "epochs": config.epochs} | metrics


def main() -> None:
    config = parse_args(AblationsConfig, __doc__)
    names = config.only or tuple(ROWS)
    if unknown := set(names) - ROWS.keys():
        raise UserError(f"no row {sorted(unknown)}: choose from {', '.join(ROWS)}")
    runs = [(name, seed) for seed in config.seeds for name in names]
    with distributed() as world:
        for name, seed in runs:
            train_once(config, name, seed, world)
        if not world.is_main:
            return
    results = [read_result(config, name, seed) for name, seed in runs]
    path = Path(config.out, "ablations.csv")
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, results[0])
        writer.writeheader()
        writer.writerows(results)
    print(
        f"{'':12}{'20-NN':>8}{'linear':>8}{'last 4':>8}   validation accuracy, %, mean over seeds"
    )
    for name in names:
        rows = [row for row in results if row["row"] == name]
        means = [sum(float(r[k]) for r in rows) / len(rows) for k in ("knn", "linear", "linear_4")]
        print(f"{name:12}" + "".join(f"{100 * mean:8.1f}" for mean in means))


if __name__ == "__main__":
    run_main(main)
