"""Fine-tune an encoder and a linear head on labeled images (Appendix A.2 and D of the paper).

    python scripts/finetune.py runs/vit_tiny_cifar10                                # all labels
    python scripts/finetune.py runs/vit_tiny_cifar10 --labels-fraction 0.01 --epochs 100

The defaults suit small models on small images. The paper's, for ViT-H on ImageNet on one GPU, with
1 % of the labels (Appendix A.2) and with all of them (Appendix D):

    --data imagenet --epochs 50 --batch-size 512 --accum-steps 16 --lr 3e-5 --weight-decay 0.4 \\
        --labels-fraction 0.01 --crop-scale 0.08 1 --bf16 --workers 8
    --data imagenet --epochs 50 --batch-size 528 --accum-steps 24 --lr 1e-4 --weight-decay 0.04 \\
        --mixup 0.8 --cutmix 1 --drop-path 0.25 --crop-scale 0.08 1 --bf16 --workers 8

The paper's learning rates are taken as they are, not per 256 images: it does not say which.
Accuracy on the validation images is printed after each epoch. The test images are evaluated once,
after the last: nothing is chosen with them. Then the folder --out holds finetune.json and
classifier.pt, whose encoder probe.py and convert.py read with --online. Augmentation: random crops,
horizontal flips and RandAugment of torchvision. Needs timm: pip install -r scripts/requirements.txt
"""

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import (
    MEAN,
    FolderDataset,
    UserError,
    atomic_write,
    distributed,
    eval_batches,
    loader_workers,
    normalize,
    option,
    output_folder,
    parse_args,
    run_main,
    seeded_generator,
)
from ijepa import ViT, learning_rate
from probe import ProbeConfig, accuracy, load_encoder, load_splits

try:
    from timm.data import Mixup
    from timm.layers import drop_path
    from timm.optim import param_groups_layer_decay
except ImportError:
    Mixup = None


@dataclass(frozen=True)
class FinetuneConfig:
    """Options of this script."""

    encoder: str = option("vit_nano_cifar10", "as for probe.py", positional=True)
    data: str | None = option(None, "dataset; default: what the encoder was trained on", "data")
    data_dir: str | None = option(None, "folder of the datasets; default: the run's", "data")
    img_size: int | None = option(None, "image side in pixels; default: the encoder's", "data")
    labels_fraction: float = option(1.0, "of the labeled training images, per class", "data")

    epochs: int = option(20, "passes over the labeled images", "optimization")
    batch_size: int = option(128, "images per step", "optimization")
    accum_steps: int = option(1, "micro-batches per step, to save memory", "optimization")
    lr: float = option(1e-3, "peak learning rate, of the head", "optimization")
    layer_decay: float = option(0.75, "each layer's lr over that of the next", "optimization")
    weight_decay: float = option(0.05, "of matrices", "optimization")
    warmup: float = option(0.1, "fraction of the run", "optimization")
    seed: int = option(0, "of everything random", "optimization")

    crop_scale: tuple[float, float] = option((0.2, 1.0), "area of crops", "regularization")
    rand_augment: bool = option(True, "RandAugment, 2 operations of magnitude 9", "regularization")
    label_smoothing: float = option(0.1, "of the targets", "regularization")
    mixup: float = option(0.0, "alpha of Mixup; 0: none", "regularization")
    cutmix: float = option(0.0, "alpha of CutMix; 0: none", "regularization")
    drop_path: float = option(0.0, "of the last layer; less in those below", "regularization")

    out: str | None = option(None, "folder of the results; default: runs/finetune_<run>", "output")
    device: str | None = option(None, "cpu, cuda or cuda:1; default: a GPU if any", "hardware")
    bf16: bool = option(False, "bfloat16 autocast", "hardware")
    workers: int | None = option(
        None, "processes that load a folder's images; default: 8 beside a GPU, or 0", "hardware"
    )


class Classifier(nn.Module):
    """An encoder with stochastic depth, and a linear head on the mean of its patch tokens."""

    def __init__(self, encoder: ViT, num_classes: int, max_drop: float = 0.0):
        super().__init__()
        self.encoder = encoder.requires_grad_(True)
        self.head = nn.Linear(encoder.config.embed_dim, num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        probabilities = torch.linspace(0, max_drop, len(encoder.blocks)).tolist()
        for block, p in zip(encoder.blocks, probabilities, strict=True):

            def drop(branch, _, output, p=p):  # of some images the branch is left out
                return drop_path(output, p, branch.training)

            block.attn.register_forward_hook(drop)
            block.mlp.register_forward_hook(drop)

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, S, S) -> (B, classes)
        return self.head(self.encoder(images).mean(1))

    def group_matcher(self, coarse: bool = False) -> dict:
        """The layers, for timm. What does not match, norm and head, is the last layer."""
        return {"stem": r"encoder\.patch_embed", "blocks": r"encoder\.blocks\.(\d+)"}


class AugmentedImages(Dataset):
    """Training images after a random crop, horizontal flip and RandAugment: uint8, label."""

    def __init__(self, dataset, indices: Tensor, crop_scale, rand_augment: bool):
        self.dataset, self.indices, self.crop_scale = dataset, indices, crop_scale
        self.crop = v2.RandomResizedCrop(dataset.img_size, crop_scale)
        augment = [v2.RandomHorizontalFlip()]
        if rand_augment:  # gray where an image is rotated or moved away
            gray = [round(255 * x) for x in MEAN]
            augment.append(v2.RandAugment(2, 9, num_magnitude_bins=11, fill=gray))  # 9 of 10
        self.augment = v2.Compose(augment)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        index = int(self.indices[i])
        if isinstance(self.dataset, FolderDataset):  # crop at full resolution
            seed = int(torch.randint(2**62, ()))
            image = self.dataset.load_crop(index, self.crop_scale, seed)
        else:
            image = self.crop(self.dataset.load([index])[0])
        return self.augment(image), self.dataset.labels[index]

    def collate(self, samples: list) -> tuple[list[Tensor], dict[str, str]]:
        """A batch, and the damaged images that this process has met."""
        return default_collate(samples), self.dataset.damaged


def select_fraction(labels: Tensor, indices: Tensor, fraction: float, seed: int) -> Tensor:
    """A random fraction of the `indices` of each class, at least one image."""
    generator, selected = seeded_generator("labels fraction", seed), []
    for c in labels[indices].unique():
        members = indices[labels[indices] == c]
        order = torch.randperm(len(members), generator=generator)
        selected.append(members[order[: max(1, round(fraction * len(members)))]])
    return torch.cat(selected)


@torch.no_grad()
def evaluate(model: Classifier, split: tuple, config: FinetuneConfig, device) -> float:
    """Accuracy in [0, 1] on a split (dataset, indices)."""
    model.eval()
    (dataset, indices), predicted = split, []
    batch_size = config.batch_size // config.accum_steps
    for images in eval_batches(dataset, indices, device, batch_size, config.workers):
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            predicted.append(model(images).argmax(1).cpu())
    return accuracy(torch.cat(predicted), dataset.labels[indices])


def finetune(model: Classifier, splits: dict, config: FinetuneConfig, device) -> list[dict]:
    """Train the model; one row per epoch. Raises UserError if the loss is not finite."""
    dataset, indices = splits["train"]
    images = AugmentedImages(dataset, indices, config.crop_scale, config.rand_augment)
    loader = DataLoader(
        images, config.batch_size, shuffle=True, drop_last=True, collate_fn=images.collate,
        num_workers=loader_workers(config.workers, dataset, device),
        generator=torch.Generator().manual_seed(config.seed),
    )  # fmt: skip
    mixup, smoothing = None, config.label_smoothing
    if config.mixup or config.cutmix:  # then it also smooths the labels
        classes = model.head.out_features
        mixup = Mixup(config.mixup, config.cutmix, label_smoothing=smoothing, num_classes=classes)
        smoothing = 0.0
    groups = param_groups_layer_decay(model, config.weight_decay, layer_decay=config.layer_decay)
    optimizer = torch.optim.AdamW(groups, config.lr)
    total_steps = config.epochs * len(loader)
    warmup = round(config.warmup * total_steps)
    rows, step = [], 0

    for epoch in range(1, config.epochs + 1):
        model.train()
        losses = []
        for batch, damaged in tqdm(loader, f"epoch {epoch}", leave=False, mininterval=1):
            if damaged:
                dataset.report(damaged)
            lr = learning_rate(step, total_steps, warmup, 0.0, config.lr, 0.001 * config.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            micro_batches = (x.to(device).chunk(config.accum_steps) for x in batch)
            for x, y in zip(*micro_batches, strict=True):
                x = normalize(x)
                if mixup:
                    x, y = mixup(x, y)
                with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
                    logits = model(x)
                loss = F.cross_entropy(logits.float(), y, label_smoothing=smoothing)
                (loss / config.accum_steps).backward()
                losses.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
        loss = float(torch.stack(losses).mean())
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} in epoch {epoch}: use a lower --lr")
        val = evaluate(model, splits["val"], config, device)
        rows.append({"epoch": epoch, "loss": loss, "val": val})
        print(f"epoch {epoch}  loss {loss:.3f}  validation {100 * val:.1f} %", flush=True)
    return rows


def main() -> None:
    config = parse_args(FinetuneConfig, __doc__)
    if Mixup is None:
        raise UserError("this script needs timm: pip install -r scripts/requirements.txt")
    if min(config.epochs, config.accum_steps) < 1 or config.seed < 0:
        raise UserError("--epochs and --accum-steps start at 1, --seed at 0")
    if min(config.lr, config.weight_decay, config.mixup, config.cutmix) < 0:
        raise UserError("--lr, --weight-decay, --mixup and --cutmix start at 0")
    names = ("labels_fraction", "layer_decay", "warmup", "label_smoothing", "drop_path")
    if not all(0 <= getattr(config, name) <= 1 for name in names):
        raise UserError(f"{', '.join(names)} are within 0 to 1")
    if not 0 < config.crop_scale[0] <= config.crop_scale[1] <= 1:
        raise UserError("--crop-scale is within 0 to 1, the smaller number first")
    if config.batch_size % (2 * config.accum_steps):  # Mixup mixes pairs
        raise UserError(f"--batch-size must be a multiple of {2 * config.accum_steps}")
    encoder, architecture, info = load_encoder(config.encoder)
    names = ("encoder", "data", "data_dir", "img_size", "batch_size", "workers")
    probe_config = ProbeConfig(**{name: getattr(config, name) for name in names})
    splits = load_splits(probe_config, architecture, info)
    dataset, indices = splits["train"]
    indices = select_fraction(dataset.labels, indices, config.labels_fraction, config.seed)
    splits["train"] = (dataset, indices)
    sizes = {name: len(idx) for name, (_, idx) in splits.items()}
    if config.batch_size > sizes["train"]:
        raise UserError(f"--batch-size {config.batch_size} exceeds {sizes['train']} labeled images")
    folder = Path(info["file"]).resolve().parent
    out = output_folder(config.out or f"runs/finetune_{folder.name}")
    if (out / "classifier.pt").exists():
        raise UserError(f"{out} already holds a classifier.pt: choose another --out")
    print(f"fine-tuning {info['file']} on {sizes['train']:,} labeled images")

    torch.manual_seed(config.seed)
    np.random.seed(config.seed)  # timm's Mixup draws from NumPy
    with distributed(config.device, alone=True) as process:
        device = process.device
        model = Classifier(encoder, len(dataset.classes), config.drop_path).to(device)
        rows = finetune(model, splits, config, device)
        test = evaluate(model, splits["test"], config, device)
    val = rows[-1]["val"]
    print(f"validation {100 * val:.1f} %, test {100 * test:.1f} % ({sizes['test']:,} images)")
    result = {"options": asdict(config), "encoder": info, "images": sizes, "epochs": rows}
    with atomic_write(out / "finetune.json") as temporary:
        temporary.write_text(json.dumps(result | {"val": val, "test": test}, indent=1) + "\n")
    data = config.data or info["train_config"]["data"]
    state = {
        "config": info["train_config"] | {"data": data, "img_size": dataset.img_size},
        "architecture": asdict(architecture),
        "step": info["step"],
        "model": model.state_dict(),
        "classes": dataset.classes,
    }
    with atomic_write(out / "classifier.pt") as temporary:
        torch.save(state, temporary)
    print(f"Wrote finetune.json and classifier.pt to {out}")


if __name__ == "__main__":
    run_main(main)
