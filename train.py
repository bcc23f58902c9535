"""Train I-JEPA on a laptop, on one GPU or on many.

    python train.py                                            # offline demo, a few minutes
    python train.py --model vit_tiny --data cifar10            # downloads 170 MB
    python train.py --model vit_small --data path/to/folder --img-size 96 --patch-size 8
    torchrun --nproc_per_node 8 train.py --model vit_huge      # ImageNet in data/imagenet
    python train.py --model vit_tiny --data cifar10 --resume   # continue a stopped run

Defaults that are not shown here: MODELS and MaskCollator in ijepa.py, RECIPES in train.py.

A run writes to its folder (--out): last.pt (checkpoint), log.csv, and at the end result.json,
curves.png and overview.png. It depends on seed and global batch size, not on the number of
processes, micro-batches or workers, and on a CPU a resumed run gives the same bits as an
uninterrupted one. SIGTERM and Ctrl-C save a checkpoint and stop; a second Ctrl-C stops at once.
"""

import csv
import json
import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import probe
from data import (
    NAMES,
    Distributed,
    UserError,
    atomic_write,
    distributed,
    eval_batches,
    load_dataset,
    main_process_first,
    option,
    output_folder,
    parse_args,
    run_main,
    seeded_generator,
    train_batches,
    train_val_split,
)
from ijepa import (
    IJEPA,
    MODELS,
    IJEPAConfig,
    MaskCollator,
    Range,
    learning_rate,
    parameter_groups,
    patch_grid,
    target_momentum,
    weight_decay,
)

# ------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class TrainConfig:
    """Every option of a run. None: from MODELS, RECIPES or MaskCollator, or as the help says."""

    model: str | None = option(
        None, "architecture and recipe; default: vit_nano", "model", choices=[*MODELS]
    )
    patch_size: int | None = option(None, "side of a patch in pixels", "model")
    predictor_dim: int | None = option(None, "width of the predictor (Table 14)", "model")
    predictor_depth: int | None = option(None, "layers of the predictor (Table 12)", "model")

    data: str | None = option(None, f"{', '.join(NAMES)} or a folder", "data")
    data_dir: str = option("data", "where named datasets are, or are downloaded to", "data")
    img_size: int | None = option(None, "side of the training images in pixels", "data")
    crop_scale: Range | None = option(None, "area of random crops, as a fraction", "data")

    epochs: float | None = option(None, "passes over the training images", "optimization")
    batch_size: int | None = option(None, "images per step, over all processes", "optimization")
    accum_steps: int | None = option(None, "micro-batches per step; default: 1", "optimization")
    lr: float | None = option(None, "peak learning rate", "optimization")
    warmup_epochs: float | None = option(
        None, "epochs of linear warm-up; by default at most a tenth of the run", "optimization"
    )
    weight_decay: Range | None = option(
        None, "weight decay at the start and at the end", "optimization"
    )
    momentum: Range | None = option(None, "of the EMA, at the start and at the end", "optimization")
    seed: int | None = option(
        None, "of initial weights, order, crops and masks; default: 0", "optimization"
    )

    num_targets: int | None = option(None, "target blocks (Table 10)", "masks and targets")
    target_scale: Range | None = option(
        None, "area of a target block, fraction of the grid (Table 8)", "masks and targets"
    )
    context_scale: Range | None = option(
        None, "area of the context block, fraction of the grid (Table 9)", "masks and targets"
    )
    context_size: int | None = option(None, "context patches per image", "masks and targets")
    target_norm: str | None = option(
        None, "normalization of the targets (D10)", "masks and targets", ["layer", "whiten"]
    )

    device: str | None = option(None, "cpu or cuda; default: a GPU if there is one", "hardware")
    bf16: bool | None = option(None, "bfloat16 autocast; default: on a GPU that has it", "hardware")
    compile: bool | None = option(None, "torch.compile every transformer layer", "hardware")
    workers: int | None = option(
        None, "processes that load a folder's images; default: 8 beside a GPU, or 0", "hardware"
    )

    out: str | None = option(None, "folder of the run; default: runs/<model>_<data>", "logging")
    resume: bool = option(
        False, "continue the run in --out, with its options but --device", "logging"
    )
    eval_every: float | None = option(
        None, "epochs between evaluations, on up to 15,000 images each; default: 1", "logging"
    )
    save_every: float = option(10.0, "minutes between checkpoints", "logging")
    wandb: bool | None = option(None, "log to Weights & Biases, too", "logging")


@dataclass(frozen=True)
class Recipe:
    """What a model trains with by default: the paper's values (Appendix A.1; epochs: Table 1)."""

    data: str = "imagenet"
    crop_scale: Range = (0.3, 1.0)  # as released
    flip: bool = False  # as released
    epochs: float = 600
    batch_size: int = 2048
    accum_steps: int = 1
    lr: float = 1e-3
    warmup_epochs: float = 15  # (D9)
    weight_decay: Range = (0.04, 0.4)
    momentum: Range = (0.996, 1.0)
    start_lr: float = 0.1  # of the peak, as is `final_lr`
    final_lr: float = 0.001
    beta2: float = 0.999  # of AdamW
    eval_every: float = 1  # epochs


# Ours, for 32-pixel images (results/README.md).
NANO_RECIPE = Recipe(
    "textures", flip=True, epochs=15, batch_size=24, warmup_epochs=1, momentum=(0.998, 1.0),
    final_lr=0.01, beta2=0.98,
)  # fmt: skip
TINY_RECIPE = replace(NANO_RECIPE, data="cifar10", epochs=20, batch_size=48, lr=5e-4)
RECIPES = {
    "vit_nano": NANO_RECIPE,
    "vit_mini": replace(NANO_RECIPE, data="cifar10", epochs=24),
    "vit_tiny": TINY_RECIPE,
    "vit_small": TINY_RECIPE,  # not tried
    "vit_huge": Recipe(epochs=300),
}  # the other models: Recipe()
# Of --data textures. In so short a run a rising momentum learns less (results/README.md).
DEMO = {"epochs": 2, "warmup_epochs": 0.1, "crop_scale": (1.0, 1.0), "momentum": (0.998, 0.998)}


def resolve(config: TrainConfig) -> tuple[TrainConfig, IJEPAConfig, Recipe]:
    """Fill in the recipe's values. Raises UserError if options contradict each other."""
    config = replace(config, model=config.model or "vit_nano", seed=config.seed or 0)
    recipe = RECIPES.get(config.model, Recipe())
    data = config.data or recipe.data
    if data == "textures":
        recipe = replace(recipe, **DEMO)
    fill = {f.name for f in fields(Recipe)} & {f.name for f in fields(TrainConfig)}
    given = {name: value for name, value in asdict(config).items() if value is not None}
    config = replace(config, **{name: given.get(name, getattr(recipe, name)) for name in fill})
    if "warmup_epochs" not in given:
        config = replace(config, warmup_epochs=min(recipe.warmup_epochs, config.epochs / 10))
    config = replace(config, out=config.out or f"runs/{config.model}_{Path(data).name}")
    overrides = {f.name for f in fields(IJEPAConfig)} & given.keys()  # of the architecture
    low, high = config.crop_scale
    for wrong, message in (
        (min(config.batch_size, config.accum_steps) < 1, "--batch-size, --accum-steps start at 1"),
        (not 0 < low <= high <= 1, "--crop-scale is within 0 to 1, the smaller number first"),
        (not all(0 <= m <= 1 for m in config.momentum), "--momentum is within 0 to 1"),
        (
            not all(0 <= n < math.inf for n in (config.epochs, config.warmup_epochs, config.lr)),
            "--epochs, --warmup-epochs and --lr are numbers of 0 or more",
        ),
        (config.warmup_epochs > config.epochs, "--warmup-epochs is longer than --epochs"),
        (not config.eval_every > 0, "--eval-every is above 0 epochs"),
        ((config.workers or 0) < 0, "--workers starts at 0"),
    ):
        if wrong:
            raise UserError(message)
    try:
        architecture = replace(MODELS[config.model], **{name: given[name] for name in overrides})
        make_masks(config, architecture)  # only to refuse a grid that is too small
    except ValueError as error:
        raise UserError(str(error)) from error
    if architecture.target_norm == "whiten" and config.batch_size < 2:
        raise UserError("--batch-size 1: whitened targets need two images, or --target-norm layer")
    return config, architecture, recipe


# ------------------------------------------------------------------------------------ training

EVAL_IMAGES = 10_000  # training images that k-NN and linear probes learn from, at most
LOG_STEPS = 10  # steps between rows of log.csv; a run saves and stops only here or at evaluations


def train(
    config: TrainConfig, world: Distributed,
    method: type[IJEPA] = IJEPA, collator: Callable[..., MaskCollator] = MaskCollator,
    name: str = "I-JEPA",
) -> int:  # fmt: skip
    """One run, from the options to the final evaluation. Returns the exit code of the process.

    `scripts/ablations.py` passes other classes than the method's, and a name for them.
    """
    config, checkpoint = resume(config, name) if config.resume else (config, None)
    config, architecture, recipe = resolve(config)
    if config.bf16 is None:
        config = replace(config, bf16=world.bf16)
    out, device = Path(config.out), world.device
    if checkpoint is None and (out / "last.pt").exists():
        raise UserError(f"{out} already holds a run: add --resume, or choose another --out")

    with main_process_first(world):  # it may download
        dataset = load_dataset(config.data, "train", architecture.img_size, config.data_dir)
    train_idx, _ = train_val_split(dataset)
    masks = make_masks(config, architecture, collator)
    epoch_steps = len(train_idx) / config.batch_size
    total_steps = round(config.epochs * epoch_steps)
    eval_steps = max(1, round(min(config.eval_every, config.epochs) * epoch_steps))
    start_step = checkpoint["step"] if checkpoint else 0
    if total_steps < 1:
        raise UserError(f"--epochs {config.epochs} is less than one batch of {config.batch_size}")

    torch.manual_seed(config.seed)
    model = method(architecture).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model), betas=(0.9, recipe.beta2), fused=True)
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    del checkpoint  # of a large model, many gigabytes in each process
    if config.compile:
        compile_layers(model)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.bf16)
    ddp = model
    if world.world_size > 1:
        ddp = DistributedDataParallel(model)

    steps = range(start_step, total_steps)
    batches = train_batches(
        dataset, train_idx, masks, steps, batch_size=config.batch_size,
        accum_steps=config.accum_steps, seed=config.seed, crop_scale=config.crop_scale,
        flip=recipe.flip, rank=world.rank, world_size=world.world_size, device=device,
        workers=config.workers,
    )  # fmt: skip
    validation = Validation(dataset, device, config.workers, config.bf16)
    if world.is_main:
        log = Log(out, start_step, config)
        print(describe(config, model, len(train_idx), steps, device), flush=True)
    stop = StopSignal()
    losses = []
    logged = saved = time.monotonic()

    for step in tqdm(steps, "training", disable=not world.is_main, leave=False, mininterval=1):
        lr, wd, momentum = schedules(config, recipe, step, total_steps, epoch_steps)
        for group in optimizer.param_groups:
            group.update(lr=lr, weight_decay=wd if group["decays"] else 0.0)

        for micro_step in range(config.accum_steps):
            images, context_idx, target_idx = next(batches)
            ddp.require_backward_grad_sync = micro_step == config.accum_steps - 1  # once per step
            with autocast:
                loss = ddp(images, context_idx, target_idx) / config.accum_steps
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.update_target(momentum)

        done = step + 1
        evaluate = done % eval_steps == 0 or done == total_steps
        if done % LOG_STEPS and not evaluate:
            continue
        num_steps = len(losses) / config.accum_steps
        loss, stopping = world.mean(torch.stack(losses).sum() / num_steps, stop.number > 0)
        losses.clear()
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {done}: start again with a lower --lr")
        if world.is_main:
            now = time.monotonic()
            row = {"step": done, "epoch": done / epoch_steps, "loss": loss, "lr": lr,
                   "weight_decay": wd, "momentum": momentum,
                   "images_per_second": num_steps * config.batch_size / (now - logged)}  # fmt: skip
            if evaluate:
                row |= validation.metrics(model, masks)
            log.add(row)
            if evaluate or stopping or now - saved > 60 * config.save_every:
                save(out / "last.pt", name, config, done, model, optimizer)
                saved = now
            logged = time.monotonic()
        if stopping:
            if world.is_main:
                print(f"stopped at step {done} of {total_steps}: continue with --resume")
            return 128 + (stop.number or signal.SIGTERM)
    stop.restore()
    if world.is_main:
        finish(log, config, architecture, model, validation, masks)
    return 0


def compile_layers(model: IJEPA) -> None:
    """torch.compile, layer by layer, because all layers of a network share one compilation."""
    blocks = (*model.encoder.blocks, *model.target_encoder.blocks)
    for layer in (*blocks, *model.predictor.predictor_blocks):
        layer.compile()


def schedules(config: TrainConfig, recipe: Recipe, step: int, total_steps: int, epoch_steps: float):
    """Learning rate, weight decay and EMA momentum of a step."""
    warmup_steps = round(config.warmup_epochs * epoch_steps)
    start_lr, final_lr = config.lr * recipe.start_lr, config.lr * recipe.final_lr
    return (
        learning_rate(step, total_steps, warmup_steps, start_lr, config.lr, final_lr),
        weight_decay(step, total_steps, *config.weight_decay),
        target_momentum(step, total_steps, *config.momentum),
    )


# ------------------------------------------------------------------- checking, resuming, saving


def make_masks(config: TrainConfig, architecture: IJEPAConfig, collator=MaskCollator):
    """The collator of a run. Raises ValueError if the grid of patches is too small for it."""
    names = ("num_targets", "target_scale", "context_scale", "context_size")
    given = {name: value for name in names if (value := getattr(config, name)) is not None}
    return collator(patch_grid(architecture.img_size, architecture.patch_size), **given)


FREE = {  # options that may change when a run resumes, because they do not change the result
    "out", "resume", "data_dir", "accum_steps", "device", "compile", "workers", "save_every",
    "wandb",
}  # fmt: skip


def resume(config: TrainConfig, name: str) -> tuple[TrainConfig, dict]:
    """The saved options of the run in --out, and its checkpoint.

    Raises UserError if there is no readable checkpoint, or if an option contradicts it.
    """
    out = config.out or resolve(config)[0].out
    if not Path(out, "last.pt").exists():
        raise UserError(
            f"{out}/last.pt does not exist: leave out --resume, or name the run by --out"
        )
    checkpoint = probe.load_checkpoint(Path(out, "last.pt"))
    try:
        saved, saved_name = TrainConfig(**checkpoint["config"]), checkpoint["name"]
    except (TypeError, KeyError) as error:
        message = f"{out} was trained by another version of train.py ({error})"
        raise UserError(f"{message}: start a new run in another --out") from error
    if saved_name != name:
        raise UserError(f"{out} is a run of scripts/ablations.py: resume it there")
    defaults = TrainConfig()
    for field in fields(TrainConfig):
        given, value = getattr(config, field.name), getattr(saved, field.name)
        if field.name not in FREE and given not in (getattr(defaults, field.name), value):
            raise UserError(
                f"{out} was trained with {field.name} {value}, not {given}: leave the option out, "
                "or start a new run in another --out"
            )
    changed = {n: v for n in FREE if (v := getattr(config, n)) != getattr(defaults, n)}
    return replace(saved, **changed | {"out": out, "resume": True}), checkpoint


def save(path: Path, name: str, config, step: int, model, optimizer) -> None:
    """Write a checkpoint; `path` is replaced only when it is complete."""
    state = {
        "name": name,
        "config": asdict(config),
        "architecture": asdict(model.config),
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    with atomic_write(path) as temporary:
        torch.save(state, temporary)


class StopSignal:
    """SIGTERM or Ctrl-C asks the run to save and stop; Ctrl-C after that stops it at once."""

    def __init__(self):
        self.number = 0
        self.previous = {
            number: signal.signal(number, self._request)
            for number in (signal.SIGTERM, signal.SIGINT)
        }

    def restore(self) -> None:
        """After the last step, when everything is saved: a signal stops the process at once."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, _) -> None:
        self.number = number
        print(f"stopping within {LOG_STEPS} steps; Ctrl-C to stop at once", file=sys.stderr)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # A second one comes from torchrun, if a scheduler signals it and this process.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


# ------------------------------------------------------------------------ evaluation and logging


class Validation:
    """What the target encoder has learned, measured on validation images (see `probe.py`)."""

    def __init__(self, dataset, device: torch.device, workers: int | None, bf16: bool):
        self.splits = probe.make_splits(dataset, train_images=EVAL_IMAGES)
        self.num_classes = len(dataset.classes)
        self.device, self.workers, self.bf16 = device, workers, bf16

    def features(self, encoder) -> probe.Features:
        options = {"bf16": self.bf16, "workers": self.workers}
        return probe.extract_splits(self.splits, encoder, self.device, **options)

    def metrics(self, model: IJEPA, masks: MaskCollator) -> dict[str, float]:
        """During training: 20-NN, RankMe, feature std, and the loss with fixed masks."""
        features = self.features(model.target_encoder)
        row = {"val_loss": self.loss(model, masks)}
        return row | probe.monitor(features, self.num_classes, self.device)

    @torch.no_grad()
    def loss(self, model: IJEPA, masks: MaskCollator) -> float:
        dataset, indices = self.splits["val"]
        total, generator = 0.0, seeded_generator("validation masks")
        model.eval()  # validation images must not enter the statistics of `Whitening`
        for images in eval_batches(dataset, indices, self.device, workers=self.workers):
            masks_idx = (idx.to(self.device) for idx in masks.sample(len(images), generator))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                total += model(images, *masks_idx).item() * len(images)
        model.train()
        return total / len(indices)


class Log:
    """log.csv, a row per LOG_STEPS steps and per evaluation; Weights & Biases on request."""

    COLUMNS = (
        "step", "epoch", "loss", "lr", "weight_decay", "momentum", "images_per_second",
        "val_loss", "knn", "rankme", "feature_std",
    )  # fmt: skip

    def __init__(self, out: Path, start_step: int, config: TrainConfig):
        self.path, self.rows = output_folder(out) / "log.csv", []
        if start_step and self.path.exists():  # steps after the checkpoint run again
            with self.path.open() as file:
                self.rows = [r for r in csv.DictReader(file) if int(r["step"]) <= start_step]
        with atomic_write(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        self.wandb = start_wandb(config) if config.wandb else None

    def add(self, row: dict) -> None:
        self.rows.append(row)
        try:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.COLUMNS).writerow(row)
        except OSError as error:
            raise UserError(f"{self.path} could not be written: {error}") from error
        if self.wandb:
            self.wandb.log(row, step=row["step"])
        if "knn" in row:
            names = ("step", "loss", "val_loss", "knn", "rankme", "feature_std")
            tqdm.write("  ".join(f"{name} {row[name]:.4g}" for name in names))


def start_wandb(config: TrainConfig):
    """A Weights & Biases run. Raises UserError if the package is missing."""
    try:
        import wandb
    except ImportError as error:
        raise UserError("--wandb needs the package: pip install wandb") from error
    return wandb.init(project="ijepa", name=config.out, config=asdict(config))


def describe(config: TrainConfig, model: IJEPA, num_images: int, steps: range, device) -> str:
    count = sum(p.numel() for p in model.encoder.parameters())
    size, patch = model.config.img_size, model.config.patch_size
    return (
        f"{config.model}, encoder of {count / 1e6:.1f} M parameters, on {num_images:,} images of "
        f"{config.data}, {size} pixels in patches of {patch}; steps {steps.start} to {steps.stop}, "
        f"batch {config.batch_size}, {device}; output in {config.out}"
    )


def finish(log: Log, config: TrainConfig, architecture, model: IJEPA, validation, masks) -> None:
    """Print the table of the run; write it to result.json, and curves.png and overview.png."""
    out = log.path.parent
    probe.draw_curves(out / "curves.png", log.rows)
    encoders = {
        "pixels": None,
        "untrained": probe.untrained_encoder(architecture, config.seed).to(validation.device),
        "trained": model.target_encoder,
    }
    features = {name: validation.features(encoder) for name, encoder in encoders.items()}
    rows = [
        {"name": name} | probe.evaluate(x, validation.num_classes, validation.device)
        for name, x in features.items()
    ]
    count = len(features["trained"]["train"][0])
    print(
        f"\nValidation accuracy in %; k-NN and linear probes learn from {count:,} training images"
    )
    print(probe.format_table(rows))
    with atomic_write(out / "result.json") as temporary:
        result = {"config": asdict(config), "train_images": count, "rows": rows}
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    last_layer = {split: x[:, -1] for split, (x, _) in features["trained"].items()}
    _, neighbors = probe.nearest(last_layer["train"], last_layer["val"])
    probe.draw_neighbors(out / "overview.png", validation.splits, "val", neighbors, masks)
    print(f"\nWrote result.json, curves.png and overview.png to {out}")


def main() -> None:
    config = parse_args(TrainConfig, __doc__)
    with distributed(config.device) as world:
        code = train(config, world)
    sys.exit(code)  # after the other processes have left, too


if __name__ == "__main__":
    run_main(main)
