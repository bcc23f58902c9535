"""The paper's own linear probe (Appendix A.2): random crops, batch norm and linear, LARS.

    python scripts/lars_probe.py runs/vit_tiny_cifar10
    python scripts/lars_probe.py vit_huge.safetensors --data imagenet --batch-size 16384 \\
        --accum-steps 64 --epochs 50 --bf16 --workers 8

`probe.py` fits features of whole images by L-BFGS, which takes seconds. This script is slower,
because it encodes fresh random crops in every epoch, but its figures compare with the paper's.
(The paper also tries heads without batch norm and takes the best; they are left out.)
One head per feature (last layer, last four concatenated), learning rate and weight decay learns
from the same crops. The validation images choose among them; the test images are evaluated once.
Needs timm: pip install -r scripts/requirements.txt
"""

import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import UserError, distributed, option, parse_args, run_main, train_batches
from ijepa import ViT
from probe import ProbeConfig, accuracy, extract_features, extract_splits, load_encoder, load_splits

try:
    from timm.optim import Lars
except ImportError:
    Lars = None

# The paper sweeps 0.001, 0.01 and 0.05 per 256 images; these are their values at its batch of
# 16,384. The last is ours, for narrow encoders. LARS moves weights by a fraction of their norm, so
# the number of steps matters, not the batch: a batch that gives 78 steps per epoch suits, as there.
LRS = (0.064, 0.64, 3.2, 32.0)
WEIGHT_DECAYS = (0.0005, 0.0)
FEATURES = {"last layer": lambda x: x[:, -1], "last 4 layers": lambda x: x.flatten(1)}


@dataclass(frozen=True)
class LarsConfig:
    """Options of this script."""

    encoder: str = option("vit_nano_cifar10", "as for probe.py", positional=True)
    data: str | None = option(None, "dataset; default: what the encoder was trained on")
    data_dir: str | None = option(None, "folder of the datasets; default: the run's")
    img_size: int | None = option(None, "image side in pixels; default: the encoder's")
    train_images: int | None = option(None, "labeled images to learn from; default: all")
    epochs: int = option(20, "passes over the training images; the paper's: 50")
    batch_size: int = option(512, "images per step; the paper's: 16384")
    accum_steps: int = option(1, "parts in which a batch is encoded, to save memory")
    seed: int = option(0, "of order, crops and initial heads")
    device: str | None = option(None, "cpu, cuda or cuda:1; default: a GPU if there is one")
    bf16: bool = option(False, "compute features in bfloat16")
    workers: int | None = option(
        None, "processes that load a folder's images; default: 8 beside a GPU, or 0"
    )


class Head(nn.Module):
    """Batch norm without scale and shift, a linear layer, and its optimizer."""

    def __init__(self, feature: str, dim: int, num_classes: int, lr: float, weight_decay: float):
        super().__init__()
        self.select, self.lr = FEATURES[feature], lr
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.01)  # as in MAE
        nn.init.zeros_(self.linear.bias)
        # The trust ratio is for matrices only; timm applies it without weight decay if asked.
        groups = [
            {"params": [self.linear.weight], "weight_decay": weight_decay, "always_adapt": True},
            {"params": [self.linear.bias]},
        ]
        self.optimizer = Lars(groups, lr, momentum=0.9)

    def forward(self, features: Tensor) -> Tensor:  # (n, L, D) -> (n, classes)
        return self.linear(self.norm(self.select(features)))

    def step(self, features: Tensor, labels: Tensor, lr_scale: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr_scale * self.lr
        self.optimizer.zero_grad()
        F.cross_entropy(self(features), labels).backward()
        self.optimizer.step()


def train_heads(
    encoder: ViT, split: tuple, num_classes: int, config: LarsConfig, device
) -> dict[tuple, Head]:
    """Heads by (feature, lr, weight decay). The lr falls to a tenth after each 30 % of the run."""
    (dataset, indices), layers = split, min(4, len(encoder.blocks))
    dims = [encoder.config.embed_dim, layers * encoder.config.embed_dim]
    torch.manual_seed(config.seed)
    heads = {
        (name, lr, wd): Head(name, dim, num_classes, lr, wd).to(device)
        for (name, dim), lr, wd in product(zip(FEATURES, dims, strict=True), LRS, WEIGHT_DECAYS)
    }
    total_steps = config.epochs * len(indices) // config.batch_size
    batches = train_batches(
        dataset, indices, None, range(total_steps), batch_size=config.batch_size,
        accum_steps=config.accum_steps, seed=config.seed, crop_scale=(0.08, 1.0), flip=True,
        device=device, workers=config.workers,
    )  # fmt: skip
    for step in tqdm(range(total_steps), "LARS", leave=False, mininterval=1):
        features, labels = [], []
        for _ in range(config.accum_steps):
            images, y = next(batches)
            features.append(extract_features(encoder, [images], bf16=config.bf16).to(device))
            labels.append(y)
        x, y = torch.cat(features), torch.cat(labels)  # (B, L, D), (B,)
        for head in heads.values():
            head.step(x, y, 0.1 ** (10 * step // (3 * total_steps)))
    return heads


def main() -> None:
    config = parse_args(LarsConfig, __doc__)
    if Lars is None:
        raise UserError("this script needs timm: pip install -r scripts/requirements.txt")
    encoder, architecture, info = load_encoder(config.encoder)
    if min(config.epochs, config.accum_steps) < 1:
        raise UserError("--epochs and --accum-steps start at 1")
    if config.batch_size == 1:
        raise UserError("--batch-size 1: batch norm needs two images")
    names = ("encoder", "data", "data_dir", "img_size", "train_images", "batch_size", "workers")
    probe_config = ProbeConfig(**{name: getattr(config, name) for name in names})
    splits = load_splits(probe_config, architecture, info)
    dataset, indices = splits["train"]
    if config.batch_size > len(indices):
        raise UserError(f"--batch-size {config.batch_size} exceeds {len(indices)} labeled images")
    print(f"linear probe by LARS: {info['file']}, {len(indices):,} labeled training images")
    with distributed(config.device, alone=True) as process:
        device = process.device
        encoder.to(device)
        heads = train_heads(encoder, splits.pop("train"), len(dataset.classes), config, device)
        batch_size = config.batch_size // config.accum_steps
        features = extract_splits(splits, encoder, device, config.bf16, batch_size, config.workers)

    def score(head: Head, split: str) -> float:
        x, y = features[split]
        with torch.no_grad():
            return 100 * accuracy(head.cpu().eval()(x).argmax(1), y)

    for name in FEATURES:
        best = max((key for key in heads if key[0] == name), key=lambda k: score(heads[k], "val"))
        val, test = (score(heads[best], split) for split in ("val", "test"))
        print(f"{name}: validation {val:.1f} %, test {test:.1f} % (lr {best[1]}, wd {best[2]})")


if __name__ == "__main__":
    run_main(main)
