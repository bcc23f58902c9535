"""Train I-JEPA, on a laptop or on many GPUs.

    python train.py                                           # five minutes on two CPU cores
    python train.py --model vit_tiny --data cifar10           # one GPU
    python train.py --model vit_small --data path/to/folder --img-size 224 --patch-size 16
    torchrun --nproc_per_node 8 train.py --model vit_huge     # ImageNet in data/imagenet
    python train.py --model vit_tiny --data cifar10 --resume  # go on where that run stopped

A run lives in its folder (--out): last.pt and the one before it, previous.pt, best.pt, log.csv,
curves.png, and at the end result.json and result.png. It is a function of the seed and the batch
size: processes, accumulation steps and workers may differ, also when it is resumed. SIGTERM and
Ctrl-C save it and end it after the step in hand; a second one ends it at once.
"""

import contextlib
import csv
import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import probe
from data import (
    NAMED,
    Batch,
    Folder,
    Pictures,
    Place,
    Plan,
    StoppedError,
    UserError,
    autocast,
    bf16_pays,
    cores,
    default_sizes,
    eval_batches,
    fits,
    generator_for,
    hold_out,
    listing,
    load_data,
    main_first,
    option,
    parse_options,
    placed,
    run_script,
    train_batches,
    whole_file,
    writing,
)
from ijepa import (
    IJEPA,
    MODELS,
    STRATEGIES,
    IJEPAConfig,
    MaskCollator,
    Range,
    Recipe,
    grid_of,
    learning_rate,
    parameter_groups,
    set_rates,
    target_momentum,
    weight_decay,
)

# ------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class TrainConfig:
    """All that defines a run. What is None here comes from the model's recipe."""

    model: str = option("vit_nano", "which model, and which recipe", MODELS)
    data: str | None = option(None, f"{', '.join(NAMED)}, or a folder with train/<class>/")
    data_dir: str = option("data", "where named sets are, or are downloaded to")
    out: str | None = option(None, "the run's folder (default: runs/<model>_<data>)")
    resume: bool = option(False, "go on with the run in --out; its options need not be repeated")
    auto_resume: bool = option(False, "--resume if there is a run in --out, otherwise start it")
    seed: int = option(0, "of everything random")

    epochs: int | None = option(None, "passes over the training pictures")
    steps: int | None = option(None, "optimizer steps, instead of --epochs")
    batch_size: int | None = option(None, "pictures an optimizer step, over all GPUs")
    accum_steps: int = option(1, "split each batch, to save memory; changes nothing else")
    lr: float | None = option(None, "peak; more for larger batches, but less than in proportion")
    start_lr: float | None = option(None, "at the start of the warm-up")
    final_lr: float | None = option(None, "at the end")
    warmup_epochs: float | None = option(None, "of the learning rate; a fraction is fine")
    weight_decay: float | None = option(None, "at the start")
    final_weight_decay: float | None = option(None, "at the end")
    momentum: float | None = option(None, "of the target encoder; lower it for short runs")
    final_momentum: float | None = option(
        None, "at the end; 1 in long runs, as --momentum in one of a few thousand steps"
    )

    img_size: int | None = option(None, "pixels; by default what suits the pictures")
    patch_size: int | None = option(None, "pixels")
    predictor_dim: int | None = option(None, "width of the predictor (Table 14)")
    predictor_depth: int | None = option(None, "its layers (Table 12)")
    target: str | None = option(None, "what to predict (Table 7)", ("representation", "pixels"))
    target_mask: str | None = option(None, "where targets are cut (Table 11)", ("output", "input"))
    target_layers: int | None = option(None, "average the targets over the last n layers")
    loss: str | None = option(None, "smooth L1 as released, or squared L2", ("smooth_l1", "l2"))
    init_std: float | None = option(None, "of the initial weights")

    masks: str = option("multiblock", "masking strategy (Table 6)", STRATEGIES)
    num_targets: int | None = option(None, "target blocks a picture (Table 10)")
    target_scale: Range | None = option(None, "their share of the picture (Table 8)")
    target_aspect: Range = option((0.75, 1.5), "their height by width")
    context_scale: Range | None = option(None, "the context block's share (Table 9)")
    context_size: int | None = option(None, "context patches a picture")

    crop_scale: Range | None = option(None, "share of the picture in a random crop; 1 1: none")
    flip: bool | None = option(None, "mirror half of the pictures")
    clutter: float = option(1.0, "how busy the pictures of --data shapes are")

    bf16: bool | None = option(None, "autocast to bfloat16 (default: where it pays)")
    compile: bool | None = option(None, "torch.compile each layer (default: on a GPU)")
    graphs: bool = option(False, "CUDA graphs: for a small model that one GPU waits for")
    shard: bool = option(False, "weights and optimizer state in parts, one a process (FSDP2)")
    checkpoint_activations: bool = option(False, "compute them twice: less memory, more time")
    workers: int | None = option(None, "processes that decode pictures (default: one a core)")
    device: str | None = option(None, "cuda or cpu (default: a GPU if there is one)")
    timeout: float = option(120.0, "minutes that processes wait for one that does not answer")
    eval_every: int | None = option(None, "steps between evaluations (default: ten a run)")
    eval_images: int | None = option(
        None, "to look for neighbours among (default: 50000; on a CPU 5000, or 2000 if wide)"
    )
    save_every: int = option(1000, "steps between checkpoints, beside those at evaluations")
    log_every: int = option(10, "steps between lines of log.csv")
    wandb: bool = option(False, "log to Weights & Biases as well")


# These may change when a run is resumed: they change what is computed by rounding at most.
FREE = {
    "data_dir", "out", "resume", "auto_resume", "accum_steps", "bf16", "compile", "graphs",
    "workers", "device", "shard", "checkpoint_activations", "timeout", "eval_every", "eval_images",
    "save_every", "log_every", "wandb",
}  # fmt: skip


# What is out of bounds for sure: to be refused in a line, not by hours or by the last of memory.
BOUNDS = {
    "epochs": (1, 10**6), "steps": (1, 10**8), "batch_size": (1, 2**20), "accum_steps": (1, 2**20),
    "lr": (0, math.inf), "start_lr": (0, math.inf), "final_lr": (0, math.inf),
    "warmup_epochs": (0, 10**6), "weight_decay": (0, 100), "final_weight_decay": (0, 100),
    "momentum": (0, 1), "final_momentum": (0, 1), "seed": (0, 2**63 - 1), "img_size": (1, 4096),
    "patch_size": (1, 4096), "predictor_dim": (1, 2**14), "predictor_depth": (0, 1000),
    "num_targets": (1, 64), "init_std": (0, 100), "clutter": (0, 100), "workers": (0, 1000),
    "timeout": (0.001, 10**5), "eval_every": (1, 10**9), "eval_images": (1, 10**7),
    "save_every": (1, 10**9), "log_every": (1, 10**9),
}  # fmt: skip
MOST_PATCHES = 2**14  # a picture of 2048 pixels in patches of 16


def configure(argv: list[str] | None = None) -> tuple[TrainConfig, IJEPAConfig, dict | None]:
    """Command line -> complete configuration, architecture, and the checkpoint to resume from."""
    config, given = parse_options(TrainConfig, __doc__, argv)
    checkpoint = None
    if config.resume or (config.auto_resume and _begun(_out(config))):
        config, checkpoint = _resume(config, given)
    recipe = MODELS[config.model].recipe
    filled = {"data": config.data or recipe.data, "out": str(_out(config))}
    for field in dataclasses.fields(Recipe):
        if getattr(config, field.name) is None:
            filled[field.name] = getattr(recipe, field.name)
    if config.epochs is not None and config.warmup_epochs is None:
        filled["warmup_epochs"] = recipe.warmup_epochs * config.epochs / recipe.epochs
    config = dataclasses.replace(config, **filled)
    if "clutter" in given and config.data != "shapes":
        raise UserError(f"--clutter is for --data shapes, not for {config.data}")
    if not 0 < config.crop_scale[0] <= config.crop_scale[1] <= 1:
        raise UserError("--crop-scale takes two shares of the picture, 0 < low <= high <= 1")
    for name, (least, most) in BOUNDS.items():
        if (value := getattr(config, name)) is not None and not least <= value <= most:
            raise UserError(
                f"--{name.replace('_', '-')} is {value}: it must be at least {least}"
                + (f" and at most {most}" if most < math.inf else "")
            )
    if {"epochs", "steps"} <= given:
        raise UserError("--epochs and --steps contradict each other: give one")
    try:
        if checkpoint is not None:
            architecture = IJEPAConfig(**checkpoint["architecture"])
        else:
            architecture = _architecture(config)
        rows, columns = grid_of(architecture.img_size, architecture.patch_size)
    except ValueError as error:
        raise UserError(str(error)) from error
    if rows * columns > MOST_PATCHES:
        raise UserError(
            f"{rows}x{columns} patches a picture are more than {MOST_PATCHES}: choose a smaller "
            "--img-size, or a larger --patch-size"
        )
    return config, architecture, checkpoint


def _out(config: TrainConfig) -> Path:
    """The run's folder."""
    data = config.data or MODELS[config.model].recipe.data
    return Path(config.out or f"runs/{config.model}_{Path(data).name}")


def _begun(out: Path) -> bool:
    """Whether a folder holds a run: a checkpoint of whichever kind."""
    return any(os.path.exists(out / name) for name in ("last.pt", "previous.pt", "best.pt"))


def read_last(out: Path) -> dict:
    """The last checkpoint of a run, or the one before if that is damaged or was being replaced.

    Returns it with its path as `path`. Raises UserError if neither can be used, with what can.
    """
    failures = []
    for path in (out / "last.pt", out / "previous.pt"):
        try:
            return probe.read_checkpoint(path) | {"path": path}
        except UserError as error:
            if path.exists():
                failures.append(str(error))
    best = out / "best.pt"
    offer = f"copy {best} to {out / 'last.pt'} to go on from there" if best.exists() else ""
    if not failures:
        what = offer or "leave out --resume to start"
        raise UserError(f"--resume: there is no {out / 'last.pt'} to go on from ({what})")
    raise UserError("; ".join(failures + [offer] * bool(offer)))


def check_fields(path: Path, values: dict) -> dict:
    """What a checkpoint says of fields of `TrainConfig`; UserError unless their types are right."""
    hints = typing.get_type_hints(TrainConfig)
    for name, value in values.items():
        field = TrainConfig.__dataclass_fields__.get(name)
        choices = field and field.metadata["choices"]
        if (field and not fits(value, hints[name])) or (choices and value not in (None, *choices)):
            raise UserError(
                f"{path} is no checkpoint of train.py: its configuration has {name} {value!r}"
            )
    return {name: value for name, value in values.items() if name in hints}


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict, path: Path) -> None:
    """The state of AdamW from a checkpoint, and nothing but that: all else is set here.

    Raises UserError if it is not that of these parameters.
    """
    kind = UserError(f"{path} is no checkpoint of train.py: its optimizer state does not fit")
    state = saved.get("state")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not isinstance(state, dict) or set(state) not in (set(), set(range(len(parameters)))):
        raise kind
    for i, values in sorted(state.items()):
        shapes = {"step": (), "exp_avg": parameters[i].shape, "exp_avg_sq": parameters[i].shape}
        if (
            not isinstance(values, dict)
            or {name: getattr(value, "shape", None) for name, value in values.items()} != shapes
        ):
            raise kind
    for i, values in sorted(state.items()):
        p = parameters[i]
        if sharded(p):  # each process takes its part
            from torch.distributed.tensor import distribute_tensor

            for name in ("exp_avg", "exp_avg_sq"):
                full = values[name].to(p.device)
                values[name] = distribute_tensor(full, p.device_mesh, p.placements)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def _resume(config: TrainConfig, given: set[str]) -> tuple[TrainConfig, dict]:
    """The configuration of the run in --out; options that would change the run are refused."""
    out = _out(config)
    checkpoint = read_last(out)
    path = checkpoint["path"]
    saved = check_fields(path, checkpoint["config"])
    # Nothing is written where a file says, only where the command line does: --out, --data-dir.
    data_dir = saved.pop("data_dir", config.data_dir)
    downloads = saved.get("data") in NAMED and saved.get("data") != "shapes"
    if downloads and data_dir != config.data_dir:
        raise UserError(
            f"--resume: the run in {out} has its pictures in {data_dir}: if that is "
            f"right, add --data-dir {data_dir}"
        )
    saved["data_dir"] = config.data_dir
    for name in sorted(given - FREE):
        if getattr(config, name) != saved.get(name):
            raise UserError(
                f"--resume: the run in {out} has {name} {saved.get(name)}, not "
                f"{getattr(config, name)}: leave the option out, or start another run with --out"
            )
    changed = {name: getattr(config, name) for name in FREE & given}
    return TrainConfig(**saved | changed | {"out": str(out)}), checkpoint


def _architecture(config: TrainConfig) -> IJEPAConfig:
    """The model's configuration with what the command line changes; ValueError if impossible."""
    model = MODELS[config.model]
    changes = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(IJEPAConfig)
        if getattr(config, field.name, None) is not None
    }
    if config.data != model.recipe.data:  # other pictures, other sizes, unless they are given
        size, patch = default_sizes(config.data, config.data_dir)
        if size != model.config.img_size:
            changes = {"img_size": size, "patch_size": patch} | changes
    return dataclasses.replace(model.config, **changes)


# ------------------------------------------------------------------------------- is it learning?


class Evaluation:
    """The figures that tell learning from collapse, on pictures that training never sees."""

    def __init__(
        self, config: TrainConfig, data: Pictures | Folder, place: Place, workers: int,
        width: int, bf16: bool,
    ):  # fmt: skip
        self.data, self.place, self.workers, self.bf16 = data, place, workers, bf16
        self.train_index, self.val_index = hold_out(data)
        if len(self.val_index) < 4:
            raise UserError(f"{len(data)} labelled pictures are too few: evaluation needs 40")
        few = 5_000 if width < 192 else 2_000  # or it would take longer than training
        limit = config.eval_images or (few if place.device.type == "cpu" else 50_000)
        labelled = self.labels(self.train_index) >= 0
        self.bank_index = self.train_index[labelled][:limit]  # neighbours are among these
        self.query_index = self.val_index[: max(4, limit // 2)]
        self.k = min(20, len(self.bank_index))

    def labels(self, index: Tensor, task: str | None = None) -> Tensor:
        """(n,) labels of a task, the set's first one by default."""
        return self.data.labels[task or next(iter(self.data.labels))][index]

    def batches(self, index: Tensor, batch_size: int = 500) -> Iterator[Tensor]:
        return eval_batches(self.data, index, batch_size, self.place.device, self.workers)

    def features(self, encoder, index: Tensor) -> Tensor:
        """Pooled features (n, D), on the CPU of every process."""
        return probe.shared_features(
            encoder, self.data, index, self.place, workers=self.workers, bf16=self.bf16,
            everywhere=True,
        )  # fmt: skip

    @torch.no_grad()
    def loss(self, model: IJEPA, masks: MaskCollator) -> float:
        """Mean loss over held-out pictures, with masks that are the same at every evaluation."""
        index = self.query_index[:1024]
        drawn = masks.sample(len(index), _fixed())
        total = torch.zeros((), dtype=torch.float64)
        parts = zip(index.split(256), *(idx.split(256) for idx in drawn), strict=True)
        mine = list(parts)[self.place.rank :: self.place.world_size]
        if mine:
            batches = self.batches(torch.cat([part for part, *_ in mine]), 256)
            for images, (part, *idx) in zip(batches, mine, strict=True):
                with autocast(images.device, self.bf16):
                    loss = model(images, *(x.to(images.device) for x in idx))
                total += loss.double().cpu() * len(part)
        if self.place.world_size > 1:
            total = total.to(self.place.device)
            dist.all_reduce(total)
        return float(total) / len(index)

    def __call__(self, model: IJEPA, masks: MaskCollator) -> dict[str, float]:
        """Held-out loss, and of the target encoder: kNN accuracy, RankMe and feature spread."""
        bank = self.features(model.target_encoder, self.bank_index)
        queries = self.features(model.target_encoder, self.query_index)
        prediction = probe.knn(bank, self.labels(self.bank_index), queries, k=self.k)
        correct = prediction.weighted == self.labels(self.query_index)
        return {
            "val_loss": self.loss(model, masks),
            "knn": 100 * correct.double().mean().item(),
            "rankme": probe.rankme(queries),
            "feature_std": probe.feature_std(queries),
        }

    def compare(self, encoders: dict[str, torch.nn.Module]) -> list[dict]:
        """kNN and linear probe of raw pixels and of each encoder, on held-out pictures.

        Half of them choose the probe's settings, the other half give the figures.
        """
        choose, report = self.query_index[::2], self.query_index[1::2]
        parts = (self.bank_index, choose, report)
        pixels = [torch.cat([probe.pixels(x) for x in self.batches(i)]) for i in parts]
        features = {"raw pixels": pixels}
        for name, encoder in encoders.items():
            features[name] = [self.features(encoder, i) for i in parts]
        labels = {task: [self.labels(i, task) for i in parts] for task in self.data.labels}
        return probe.compare(features, labels, k=self.k)


def _fixed() -> torch.Generator:
    return generator_for("evaluation")


# ------------------------------------------------------------------------------ what a run leaves


def save(path: Path, state: dict) -> None:
    """Write a checkpoint so that at every moment either the old or the new one is there, whole.

    The last.pt of before becomes previous.pt: disks and networks damage files after the fact, too.
    """
    previous = path.with_name("previous.pt") if path.name == "last.pt" else None
    path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have removed it in mid-run
    with whole_file(path, previous) as temporary:
        torch.save(state, temporary)


COLUMNS = (
    "step", "epoch", "loss", "lr", "weight_decay", "momentum", "images_per_s",
    "val_loss", "knn", "rankme", "feature_std",
)  # fmt: skip


class Log:
    """log.csv, a line every few steps and one for each evaluation, and the curves drawn from it."""

    def __init__(self, out: Path, first_step: int):
        self.path = out / "log.csv"
        self.rows = []
        if self.path.exists():  # what was logged after the checkpoint will be logged again
            with open(self.path, newline="", errors="replace") as file:
                rows = [row for row in csv.DictReader(file) if set(row) == set(COLUMNS)]
            whole = [row for row in rows if None not in row.values() and row["step"].isdecimal()]
            self.rows = [row for row in whole if int(row["step"]) <= first_step]
        self._write()

    def _write(self) -> None:
        with (
            whole_file(self.path) as temporary,
            open(temporary, "w", newline="") as file,
        ):
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)

    def add(self, **row) -> None:
        row = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
        self.rows.append(row)
        if not self.path.exists():  # somebody removed it in mid-run
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write()
            return
        with writing(self.path), open(self.path, "a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a column, where it has a value."""
        rows = [row for row in self.rows if row.get(name) not in (None, "")]
        return [int(row["step"]) for row in rows], [float(row[name]) for row in rows]

    def draw(self, path: Path) -> None:
        """The four curves to look at together: a falling loss alone may be a collapse."""
        figure, axes = probe.plt_subplots(1, 4, figsize=(16, 3.6), layout="constrained")
        panels = (
            ("Loss", ("loss", "val_loss"), ("training", "held out")),
            ("20-NN accuracy, held out (%)", ("knn",), ("",)),
            ("RankMe (effective dimensions)", ("rankme",), ("",)),
            ("Feature spread", ("feature_std",), ("",)),
        )
        for axis, (title, names, labels) in zip(axes, panels, strict=True):
            for name, label, style in zip(names, labels, ("-", "o-"), strict=False):
                style = style if len(names) > 1 else "o-"
                axis.plot(*self.column(name), style, label=label, markersize=4)
            axis.set(title=title, xlabel="step")
            axis.grid(alpha=0.3)
            if len(names) > 1:
                axis.legend()
        with whole_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110)


def draw_result(
    path: Path, model: IJEPA, evaluation: Evaluation, masks: MaskCollator, columns: int = 8
) -> None:
    """Pictures with their context and targets, and their nearest neighbours, by class name."""
    queries = evaluation.query_index[:4]
    bank = evaluation.bank_index
    found = probe.knn(
        evaluation.features(model.target_encoder, bank),
        evaluation.labels(bank),
        evaluation.features(model.target_encoder, queries),
        k=min(columns - 1, len(bank)),
    )
    if not evaluation.place.main:
        return
    grid, patch = model.encoder.grid, model.encoder.patch_size
    context_idx, target_idx = masks.sample(len(queries), _fixed())
    pictures = evaluation.data.centre(queries).cpu()
    figure, axes = probe.plt_subplots(
        8, columns, figsize=(1.5 * columns, 13.4), layout="constrained"
    )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], frame_on=False)

    def show(axis, picture: Tensor, seen: Tensor | None = None, title: str = "") -> None:
        shown = picture.permute(1, 2, 0).float() / 255
        if seen is not None:  # what is hidden is grey
            visible = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
            visible[seen] = True
            visible = visible.view(grid).repeat_interleave(patch, 0).repeat_interleave(patch, 1)
            shown = torch.where(visible[..., None], shown, torch.full_like(shown, 0.75))
        axis.imshow(shown.numpy(), interpolation="nearest")
        axis.set_title(title[:16], fontsize=11)

    for row, picture in enumerate(pictures):
        show(axes[row, 0], picture, title="picture" if row == 0 else "")
        show(axes[row, 1], picture, context_idx[row], "context" if row == 0 else "")
        for i, block in enumerate(target_idx[row][: columns - 2]):
            show(axes[row, 2 + i], picture, block, f"target {i + 1}" if row == 0 else "")
    names = next(iter(evaluation.data.classes.values()))
    for row, (query, neighbours) in enumerate(zip(queries, bank[found.neighbours], strict=True)):
        shown = torch.cat([query[None], neighbours])
        pictures = evaluation.data.centre(shown).cpu()
        for i, label in enumerate(evaluation.labels(shown).tolist()):
            title = f"{names[label]}:" if i == 0 else names[label]
            show(axes[4 + row, i], pictures[i], title=title)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


# ------------------------------------------------------------------------------ when it must end


class Signals:
    """SIGTERM and Ctrl-C: the first asks for a run to be saved and left, a second ends it at once.

    Of several processes each may get one, at different moments: they agree on the step to stop at.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, place: Place, timeout: float):
        self.received = 0
        self.pending = None
        self.group = None
        if place.world_size > 1:  # gloo: numbers on the CPU, for which no GPU has to be waited for
            patience = timedelta(minutes=timeout)
            self.group = dist.new_group(backend="gloo", timeout=patience)

    def __enter__(self) -> "Signals":
        self.before = {number: signal.signal(number, self._note) for number in self.NUMBERS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        self.received = number
        for number in self.NUMBERS:
            signal.signal(number, signal.SIG_DFL)

    def agreed(self) -> int:
        """The number of a signal that any process has received, 0 if none; once a step, by all.

        Among processes the answer is one step late: they exchange it while the step goes on.
        """
        if self.group is None:
            return self.received
        flag = torch.tensor(self.received)
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, self.group, async_op=True)
        before, self.pending = self.pending, (flag, work)
        if before is None:
            return 0
        before[1].wait()
        return int(before[0])


# ------------------------------------------------------------- the same numbers in less time
# What each of these brings, and what it was measured on, is in the README under Speed.


def layers(model: IJEPA) -> Iterator[torch.nn.Module]:
    """Every layer of the three networks."""
    networks = model.encoder.blocks, model.predictor.predictor_blocks, model.target_encoder.blocks
    return itertools.chain(*networks)


def compile_layers(model: IJEPA) -> None:
    """torch.compile, a layer at a time.

    Layers of one network are the same code on the same shapes and are compiled once, so that deep
    models start as soon as shallow ones. The predictor's sequences are as long as the blocks that
    were drawn for a batch: it is compiled for all lengths.
    """
    # Otherwise DistributedDataParallel has every layer cut in pieces, to send gradients early.
    torch._dynamo.config.optimize_ddp = False
    # All layers are one function to PyTorch, which would take the second length, the context's, for
    # a sign that lengths vary.
    for layer in (*model.encoder.blocks, *model.target_encoder.blocks):
        layer.compile(dynamic=False)
    for layer in model.predictor.predictor_blocks:
        layer.compile()


class Graphs:
    """Forward and backward of a micro-batch as CUDA graphs, one for each number of target patches.

    A GPU is handed a graph as a whole; otherwise a small model makes it wait for Python, which
    starts its kernels one by one. The graphs work on tensors of their own: batches are copied into
    them, and gradients are added up in the places that they had when the graphs were made, so
    `zero_grad` must keep them.
    """

    def __init__(self, run: Callable[[Batch], Tensor], parameters: list[Tensor]):
        self.run, self.parameters = run, parameters
        self.pool = torch.cuda.graph_pool_handle()
        self.made: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Batch, Tensor]] = {}
        for p in parameters:
            p.grad = torch.zeros_like(p)

    def __call__(self, batch: Batch) -> Tensor:
        """What `run` returns for this batch; its gradients are added."""
        shape = batch.target_idx.shape
        if shape not in self.made:
            self.made[shape] = self._make(batch)
        graph, static, loss = self.made[shape]
        for name in ("images", "context_idx", "target_idx"):
            getattr(static, name).copy_(getattr(batch, name))
        graph.replay()
        return loss.clone()

    def _make(self, batch: Batch) -> tuple[torch.cuda.CUDAGraph, Batch, Tensor]:
        """Run a few times for what is made once (compiled code, workspaces), then record."""
        static = Batch(*(x.clone() for x in vars(batch).values()))
        before = [p.grad.clone() for p in self.parameters]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.run(static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Not "global": the thread that draws the next batch may ask for pinned memory meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            loss = self.run(static)
        for p, gradient in zip(self.parameters, before, strict=True):
            p.grad.copy_(gradient)
        return graph, static, loss


# ---------------------------------------------------------------------- a model that is too large


def checkpoint_activations(model: IJEPA) -> None:
    """Keep the input of each layer only, and compute what is inside again for the gradient."""
    for block in (*model.encoder.blocks, *model.predictor.predictor_blocks):
        block.forward = partial(
            torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False
        )


def shard(model: IJEPA, place: Place) -> None:
    """Keep a part of each weight in each process, and put a layer together while it is at work.

    So are gradients and optimizer state; the target encoder is cut in the same way, so that its
    moving average is local. The numbers are those of DistributedDataParallel, to rounding.
    """
    from torch.distributed.fsdp import fully_shard  # here: it takes more than a second

    mesh = dist.device_mesh.init_device_mesh(place.device.type, (place.world_size,))
    for layer in layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def sharded(x) -> bool:
    """Whether this is a DTensor, a tensor of which each process has a part."""
    return hasattr(x, "full_tensor")


def local(x: Tensor) -> Tensor:
    """The part of a tensor that is in this process: all of it, unless it is sharded."""
    return x.to_local() if sharded(x) else x


def whole(tree, keep: bool):
    """A state with its sharded tensors gathered on the CPU, where `keep` is true; by all."""
    if sharded(tree):
        full = tree.full_tensor()
        return full.cpu() if keep else None
    if isinstance(tree, dict):
        return {key: whole(value, keep) for key, value in tree.items()}
    return tree


def whole_model(model: IJEPA, architecture: IJEPAConfig) -> IJEPA:
    """The networks with all of their weights in this process: `model` itself, unless sharded."""
    state = model.state_dict()
    if not any(sharded(x) for x in state.values()):
        return model
    with torch.device("meta"):
        plain = IJEPA(architecture)
    plain.load_state_dict({name: x.full_tensor() for name, x in state.items()}, assign=True)
    for name, constant in model.named_buffers():  # positions, which are not part of the state
        owner, _, leaf = name.rpartition(".")
        setattr(plain.get_submodule(owner), leaf, constant)
    return plain


def gathered(values: list[Tensor], place: Place) -> Tensor:
    """Numbers of all processes, on the CPU: a list of n scalars -> (processes, n)."""
    mine = torch.stack(values)
    if place.world_size == 1:
        return mine[None].cpu()
    everyone = [torch.empty_like(mine) for _ in range(place.world_size)]
    dist.all_gather(everyone, mine)
    return torch.stack(everyone).cpu()


def largest(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    """The largest absolute number among weights and optimizer state here; NaN if there is one."""
    states = (x for state in optimizer.state.values() for x in state.values() if x.ndim)
    numbers = [local(x.detach()) for x in (*model.parameters(), *states)]
    return torch.stack(torch._foreach_norm([x for x in numbers if x.numel()], torch.inf)).max()


# -------------------------------------------------------------------------------------- the run


def describe(config, model: IJEPA, data, plan: Plan, place: Place, total: int, how: str) -> str:
    """What is about to happen, in a few lines."""
    size = sum(p.numel() for p in model.encoder.parameters()) / 1e6
    predictor = sum(p.numel() for p in model.predictor.parameters()) / 1e6
    rows, columns = model.encoder.grid
    where = torch.cuda.get_device_name() if place.device.type == "cuda" else "CPU"
    kind = "in memory" if isinstance(data, Pictures) else "streamed from disk"
    masks = plan.masks
    split = f"{place.world_size} process(es) x {config.accum_steps} micro-batch(es)"
    return "\n".join(
        (
            f"model    {config.model}: {size:.2f} M parameters, and {predictor:.2f} M to predict",
            f"pictures {config.data}: {len(plan.index)} to train on, "
            f"{len(data) - len(plan.index)} held out, {kind}, {model.config.img_size} pixels",
            f"masks    {masks.strategy} on {rows}x{columns} patches: context {masks.context_size}, "
            f"{masks.num_targets} target(s)",
            f"device   {where}, {how}",
            f"batch    {config.batch_size} pictures = {split} x {plan.micro_batch}",
            f"run      {total} steps ({total * config.batch_size / len(plan.index):.1f} epochs), "
            f"seed {config.seed}, in {config.out}",
        )
    )


def step_seconds(run_micro, batch: Batch, place: Place, accum_steps: int, weights: int) -> float:
    """Measured time of an optimizer step; on a CPU from a few pictures, of which all cost alike."""
    scale = 1.0
    if place.device.type == "cpu":
        few = min(len(batch.images), 64 if weights < 50e6 else 2)
        scale = len(batch.images) / few
        batch = Batch(*(x[:few] for x in vars(batch).values()))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run_micro(batch).item()  # .item() waits for the device
        times.append(time.perf_counter() - start)
    return min(times) * scale * accum_steps


def duration(seconds: float) -> str:
    """Seconds in words that one can plan by."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def train(config: TrainConfig, architecture: IJEPAConfig, checkpoint: dict | None) -> None:
    """Run from the first step, or from the checkpoint's, to the last, and say what was learned."""
    with placed(config.device, config.timeout) as place:
        number = _train(config, architecture, checkpoint, place)
    if number:
        raise StoppedError(
            f"stopped by {signal.Signals(number).name} and saved: --resume goes on", number
        )


def _train(
    config: TrainConfig, architecture: IJEPAConfig, checkpoint: dict | None, place: Place
) -> int:
    """Returns the number of the signal that ended the run, or 0."""
    say = tqdm.write if place.main else (lambda *_: None)
    cuda = place.device.type == "cuda"
    bf16 = bf16_pays(architecture.embed_dim, place.device) if config.bf16 is None else config.bf16
    # Checkpointing takes the place of a layer's forward pass, which is what would be compiled.
    compiled = config.compile
    if compiled is None:
        compiled = cuda and not config.shard and not config.checkpoint_activations
    fresh = checkpoint is None
    if cuda:
        torch.set_float32_matmul_precision("high")
    out = Path(config.out)
    best, last = out / "best.pt", out / "last.pt"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: choose a folder")
    if fresh and _begun(out):
        raise UserError(
            f"{out} holds a run: add --resume to go on with it, or choose another folder with --out"
        )

    # What can be refused is refused before anything large is read or built.
    if config.shard and place.world_size == 1:
        raise UserError("--shard cuts a model into parts for several processes: use torchrun")
    if config.shard and not cuda and not hasattr(torch.cpu.Stream, "record_event"):
        raise UserError(f"--shard on a CPU needs a newer PyTorch than {torch.__version__}")
    compilers = os.environ.get("CC"), shutil.which("gcc"), shutil.which("clang")
    if compiled and cuda and not any(compilers):
        raise UserError("torch.compile needs a C compiler: install gcc, or add --no-compile")
    if config.graphs and (not cuda or place.world_size > 1 or config.checkpoint_activations):
        raise UserError(
            "--graphs is for one process on a GPU, without --checkpoint-activations: leave it out"
        )
    parts = place.world_size * config.accum_steps
    if config.batch_size % parts:
        raise UserError(
            f"a batch of {config.batch_size} does not divide into {place.world_size} process(es) "
            f"x {config.accum_steps} micro-batch(es)"
        )
    try:
        masks = MaskCollator(
            grid_of(architecture.img_size, architecture.patch_size),
            config.masks,
            num_targets=config.num_targets,
            target_scale=config.target_scale,
            target_aspect=config.target_aspect,
            context_scale=config.context_scale,
            context_size=config.context_size,
        )
    except ValueError as error:
        raise UserError(str(error)) from error

    # The pictures.
    shapes = {"clutter": config.clutter} if config.data == "shapes" else {}
    data = main_first(
        place,
        lambda: load_data(
            config.data, "train", config.data_dir, architecture.img_size, place.device, **shapes
        ),
    )
    workers = cores() if config.workers is None else config.workers
    evaluation = Evaluation(config, data, place, workers, architecture.embed_dim, bf16)
    plan = Plan(
        seed=config.seed,
        index=evaluation.train_index,
        batch_size=config.batch_size,
        accum_steps=config.accum_steps,
        masks=masks,
        crop_scale=config.crop_scale,
        flip=config.flip,
        rank=place.rank,
        world_size=place.world_size,
    )
    pictures = len(plan.index)
    total = config.steps or math.ceil(config.epochs * pictures / config.batch_size)
    warmup = round(total * config.warmup_epochs / config.epochs)
    eval_every = config.eval_every or math.ceil(total / 10)

    # The model, whose initial weights depend on the seed alone; and what a checkpoint brings.
    torch.manual_seed(config.seed)
    model = IJEPA(architecture)
    first, best_knn, unlogged, files, read_from = 0, -1.0, [], listing(data), last
    if checkpoint is not None:
        read_from = checkpoint["path"]
        if checkpoint["pictures"] != len(data):
            raise UserError(
                f"--resume: {config.data} has {len(data)} pictures, but the run in {out} began "
                f"with {checkpoint['pictures']}: put the same pictures there"
            )
        if checkpoint.get("listing", files) != files:
            raise UserError(
                f"--resume: {config.data} has as many pictures as when the run in {out} began, but "
                "other files or labels: put the same pictures there"
            )
        model.load_state_dict(checkpoint["model"])
        first, best_knn = checkpoint["step"], checkpoint["best_knn"]
        unlogged = checkpoint["unlogged"]
        if read_from != last:
            damaged = ", which is kept as damaged.pt" if last.exists() else ""
            say(f"last.pt is missing or damaged{damaged}: going on from {read_from}, step {first}")
    model.to(place.device)
    if config.checkpoint_activations:
        checkpoint_activations(model)
    if compiled:
        compile_layers(model)
    if config.shard:
        shard(model, place)
    optimizer = torch.optim.AdamW(parameter_groups(model), fused=cuda)
    if checkpoint is not None:
        load_optimizer(optimizer, checkpoint["optimizer"], read_from)
        checkpoint.clear()  # as large as the run itself
    run = start_wandb(config) if config.wandb and place.main else None
    if place.main:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            for leftover in out.glob("*.tmp"):  # of a process killed while it wrote
                leftover.unlink()
            if not fresh and read_from != last and last.exists():
                os.replace(last, out / "damaged.pt")  # lest it become the next previous.pt
        log = Log(out, -1 if fresh else first)
    wrapped = model
    if place.world_size > 1 and not config.shard:
        # Positions are constants: there is nothing to keep equal.
        constants = [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, constants)
        wrapped = DistributedDataParallel(
            model, device_ids=[place.device] if cuda else None, gradient_as_bucket_view=True
        )

    def eager() -> contextlib.AbstractContextManager:
        """For evaluations, whose shapes would all be compiled again."""
        return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()

    def forward_backward(batch: Batch) -> Tensor:
        with autocast(place.device, bf16):
            loss = wrapped(batch.images, batch.context_idx, batch.target_idx)
        (loss / config.accum_steps).backward()
        return loss.detach() / config.accum_steps

    add_gradients = forward_backward
    if config.graphs:
        add_gradients = Graphs(add_gradients, [p for p in model.parameters() if p.requires_grad])

    def run_micro(batch: Batch, sync: bool = True) -> Tensor:
        """Forward and backward of one micro-batch; gradients add up over the micro-batches."""
        no_sync = contextlib.nullcontext() if sync or wrapped is model else wrapped.no_sync()
        if config.shard:
            model.set_requires_gradient_sync(sync)
        with no_sync:
            return add_gradients(batch)

    def check_weights(step: int) -> None:
        """Refuse to keep what is broken: the loss would show it only in the next step."""
        bad = ~gathered([largest(model, optimizer)], place)[:, 0].isfinite()
        if bad.any():
            raise UserError(
                f"weights or optimizer state are not finite after step {step}: stopped. {last} is "
                "from before; try a lower --lr"
            )

    def state(step: int, unlogged: list[float]) -> dict:
        """A checkpoint, the same whatever the processes; they all have to ask for it."""
        return {
            "format": probe.CHECKPOINT_FORMAT,
            "config": dataclasses.asdict(config),
            "architecture": dataclasses.asdict(architecture),
            "model": whole(model.state_dict(), place.main),
            "optimizer": whole(optimizer.state_dict(), place.main),
            "pictures": len(data),
            "listing": files,
            "step": step,
            "best_knn": best_knn,
            "unlogged": unlogged,  # losses since the last line of the log
            "random_state": torch.get_rng_state(),
            "versions": {"python": sys.version.split()[0], "torch": str(torch.__version__)},
        }

    def evaluate(step: int, row: dict) -> None:
        nonlocal best_knn
        try:
            with eager():
                figures = evaluation(whole_model(model, architecture), masks)
        except ValueError as error:
            raise UserError(f"after step {step}: {error}. {last} is from before") from error
        epoch = step * config.batch_size / pictures
        improved = figures["knn"] > best_knn
        best_knn = max(best_knn, figures["knn"])
        now = state(step, [])
        if place.main:
            log.add(step=step, epoch=epoch, **row, **figures)
            log.draw(out / "curves.png")
            if improved:  # first, since last.pt will say that it has been saved
                save(best, now)
            save(last, now)
            if run:
                names = {"Epoch": epoch, "Validation Loss": figures["val_loss"]}
                run.log(names | figures, step=step)
        say(
            f"step {step:6d}  loss {row.get('loss', math.nan):6.4f}  held out "
            f"{figures['val_loss']:6.4f}  {evaluation.k}-NN {figures['knn']:4.1f} %  RankMe "
            f"{figures['rankme']:5.1f}  spread {figures['feature_std']:.4f}".replace(
                "nan", "   -  "
            )
        )

    how = f"{'bfloat16 autocast' if bf16 else 'float32'}, {'' if compiled else 'not '}compiled"
    say(describe(config, model, data, plan, place, total, how))
    batches = train_batches(data, plan, range(first, total), place.device, workers)
    coming = next(batches, None)
    if coming is not None:
        weights = sum(p.numel() for p in model.parameters())
        seconds = step_seconds(run_micro, coming, place, config.accum_steps, weights)
        optimizer.zero_grad(set_to_none=not config.graphs)
        left = seconds * (total - first)
        say(f"time     about {duration(left)} ({config.batch_size / seconds:.0f} pictures/s)")
        if not cuda and left > 86400:
            say(
                "That is long: this recipe is meant for GPUs. On a CPU try `python train.py`, "
                "or --model vit_nano, or a shorter run with --steps 500."
            )
    if fresh:
        evaluate(0, {})

    # The loop: rates, forward and backward, optimizer, moving average.
    # Losses since the last line of the log, on the device.
    losses = list(torch.tensor(unlogged, device=place.device))
    since = time.perf_counter()
    bar = tqdm(
        total=total, initial=first, disable=not place.main, unit=" steps", dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )  # fmt: skip
    with bar, Signals(place, config.timeout) as signals:
        for step in range(first, total):
            if number := signals.agreed():
                recent = mean_losses(losses, step, place, last)
                check_weights(step)
                now = state(step, recent)
                if place.main:
                    save(last, now)
                if place.world_size > 1:
                    dist.barrier()  # or torchrun would end the one that saves
                return number
            lr = learning_rate(step, total, warmup, config.start_lr, config.lr, config.final_lr)
            decay = weight_decay(step, total, config.weight_decay, config.final_weight_decay)
            momentum = target_momentum(step, total, config.momentum, config.final_momentum)
            set_rates(optimizer, lr, decay)
            loss = torch.zeros((), device=place.device)
            for micro in range(config.accum_steps):
                loss += run_micro(coming, sync=micro == config.accum_steps - 1)
                coming = next(batches, None)
            optimizer.step()
            optimizer.zero_grad(set_to_none=not config.graphs)
            model.update_target(momentum)
            losses.append(loss)
            bar.update()

            done = step + 1
            at_eval = done % eval_every == 0 or done == total
            at_save = done % config.save_every == 0
            if done % config.log_every == 0 or at_eval or at_save:
                # Only here does the host wait for the device.
                recent = mean_losses(losses, done, place, last)
                if at_eval or at_save:
                    check_weights(done)
                rate = len(losses) * config.batch_size / (time.perf_counter() - since)
                row = {
                    "loss": sum(recent) / len(recent),
                    "lr": lr,
                    "weight_decay": decay,
                    "momentum": momentum,
                    "images_per_s": rate,
                }
                bar.set_postfix_str(f"loss {row['loss']:.4f}, {rate:.0f} pictures/s")
                epoch = done * config.batch_size / pictures
                if run:
                    run.log({"Epoch": epoch, "Train Loss": row["loss"], **row}, step=done)
                now = state(done, []) if at_save and not at_eval else None
                if at_eval:
                    evaluate(done, row)
                elif place.main:
                    log.add(step=done, epoch=epoch, **row)
                    if at_save:
                        save(last, now)
                losses, since = [], time.perf_counter()
    model = whole_model(model, architecture)
    with eager():
        finish(config, architecture, model, evaluation, masks, place, out, run)
    return 0


def mean_losses(losses: list[Tensor], done: int, place: Place, last: Path) -> list[float]:
    """The losses of the steps up to `done`, over all processes; UserError if one is not finite."""
    if not losses:
        return []
    recent = gathered(losses, place)  # (processes, steps)
    bad = (~recent.isfinite()).T.nonzero()  # rows of (step, process), in order
    if len(bad):
        step, rank = bad[0].tolist()
        where = f" in process {rank} of {place.world_size}" if place.world_size > 1 else ""
        raise UserError(
            f"the loss is {recent[rank, step]} at step {done - len(losses) + step + 1}{where}: "
            f"stopped. {last} is from before; try a lower --lr"
        )
    return recent.mean(0).tolist()


def start_wandb(config: TrainConfig):
    """A Weights & Biases run; WANDB_MODE=offline works without a network."""
    try:
        import wandb
    except ImportError as error:
        raise UserError("--wandb needs the package wandb: pip install wandb") from error
    return wandb.init(project="ijepa", config=dataclasses.asdict(config), dir=config.out)


def finish(config, architecture, model, evaluation, masks, place, out: Path, run) -> None:
    """The table and the picture at the end."""
    torch.manual_seed(config.seed)
    untrained = IJEPA(architecture).target_encoder.to(place.device)
    rows = evaluation.compare({"untrained": untrained, "trained": model.target_encoder})
    draw_result(out / "result.png", model, evaluation, masks)
    if not place.main:
        return
    with whole_file(out / "result.json") as temporary:
        temporary.write_text(json.dumps(rows, indent=1) + "\n")
    tqdm.write("\nAccuracy on held-out pictures, %\n" + probe.format_table(rows))
    tqdm.write(f"\ncurves: {out / 'curves.png'}   pictures: {out / 'result.png'}")
    if run:
        import wandb

        artifact = wandb.Artifact("ijepa_best_model", type="model")
        artifact.add_file(str(out / "best.pt"))
        run.log_artifact(artifact)
        run.finish()


def main() -> None:
    train(*configure())


if __name__ == "__main__":
    run_script(main)
