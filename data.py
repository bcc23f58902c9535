"""Data: datasets in, batches out, and the few helpers that every script needs.

Everything random in a training step (which images, crops, flips and masks) is a function of the
run's seed and of the step. It is drawn for the whole batch, and each process takes its slice. So
the number of processes, accumulation steps and workers does not change what a run sees, and a run
that resumes needs to know its step only.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import math
import os
import signal
import sys
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2.functional import pil_to_tensor, resize

# ---------------------------------------------------------------------------------- datasets


@dataclass
class MemoryDataset:
    """Images in memory."""

    images: Tensor  # (N, 3, S, S) uint8
    labels: Tensor  # (N,) int64, -1 where there is no label
    classes: list[str]
    damaged: dict[str, str] = field(default_factory=dict)  # stays empty

    img_size = property(lambda self: self.images.shape[-1])

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, indices: Iterable[int]) -> Tensor:
        """The whole images, (n, 3, S, S) uint8."""
        return self.images[torch.as_tensor(indices)]


class FolderDataset:
    """Images in `<folder>/<class>/`, decoded on demand. Raises UserError if there are none.

    A damaged file is replaced by the next readable one of its class, whatever its split.
    """

    def __init__(self, folder: str | Path, img_size: int):
        try:
            found = datasets.ImageFolder(folder)
        except OSError as error:
            raise UserError(f"{error}: expected {folder}/<class>/<image>.jpg") from error
        # An array, because each worker process would come to copy a list of a million strings.
        self.paths = np.array([path for path, _ in found.samples])
        self.labels, self.classes = torch.tensor(found.targets), found.classes
        self.img_size, self.decode = img_size, found.loader
        self.damaged: dict[str, str] = {}  # path -> error, found in this process
        self.reported: set[str] = set()

    def __len__(self) -> int:
        return len(self.labels)

    def open(self, index: int) -> Image.Image:
        """Image `index` in RGB, or the next readable image of its class."""
        for i in range(index, index + len(self)):
            i %= len(self)
            if self.labels[i] == self.labels[index]:
                path = str(self.paths[i])
                try:
                    return self.decode(path)
                except Exception as error:  # decoders raise almost anything on damaged files
                    self.damaged[path] = f"{type(error).__name__}: {error}"
        raise UserError(f"no readable image in class {self.classes[self.labels[index]]}")

    def load(self, indices: Iterable[int]) -> Tensor:
        """The centers of the images, resized; (n, 3, S, S) uint8."""
        # Evaluation on ImageNet takes the central 224 pixels of 256; small images are taken whole.
        margin = 1 / 16 if self.img_size >= 224 else 0.0
        size, bilinear = (self.img_size, self.img_size), Image.Resampling.BILINEAR
        images = (ImageOps.fit(self.open(int(i)), size, bilinear, margin) for i in indices)
        return torch.stack([pil_to_tensor(image) for image in images])

    def load_crop(self, index: int, scale: tuple[float, float], seed: int) -> Tensor:
        """A random resized crop that is a function of the seed; (3, S, S) uint8."""
        image = self.open(index)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            top, left, h, w = RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3])
        crop, size = image.crop((left, top, left + w, top + h)), (self.img_size, self.img_size)
        return pil_to_tensor(crop.resize(size, Image.Resampling.BILINEAR))

    def report(self, damaged: dict[str, str]) -> None:
        """Name each damaged file once. Raises UserError if they are more than 1 % of all."""
        for path in sorted(damaged.keys() - self.reported):
            print(f"skipped damaged image {path} ({damaged[path]})", file=sys.stderr)
        self.reported |= damaged.keys()
        if len(self.reported) > 0.01 * len(self):
            count = f"{len(self.reported)} of {len(self)} images are damaged, more than 1 %"
            raise UserError(f"{count}: remove or repair {min(self.reported)} and the others")


Dataset = MemoryDataset | FolderDataset
NAMES = ("textures", "cifar10", "cifar100", "stl10", "imagenet")


def load_dataset(name: str, split: str, img_size: int, data_dir: str = "data") -> Dataset:
    """Load the "train" or the "test" split of a dataset.

    Args:
        name: one of `NAMES`, or a folder with train/<class>/ and test/<class>/ or val/<class>/.
        img_size: side in pixels. A folder whose first image has this size, 64 or less, is loaded
            into memory; from other folders, images are cropped as they are needed.
        data_dir: where named datasets are, or are downloaded to.
    Raises:
        UserError: if there is no such dataset, or it cannot be downloaded.
    """
    if name == "textures":
        return textures_dataset(split, img_size)
    if name in ("cifar10", "cifar100", "stl10"):
        return _download(name, split, data_dir, img_size)
    root = Path(data_dir, "imagenet") if name == "imagenet" else Path(name)
    if not root.is_dir():
        names = ", ".join(NAMES)
        raise UserError(f"--data {name}: there is no folder {root}; named datasets are {names}")
    folder = root / "val" if split == "test" and not (root / "test").is_dir() else root / split
    dataset = FolderDataset(folder, img_size)
    if dataset.open(0).size == (img_size, img_size) and img_size <= 64:  # decode small images once
        images = dataset.load(range(len(dataset)))
        dataset.report(dataset.damaged)
        dataset = MemoryDataset(images, dataset.labels, dataset.classes)
    if split == "test" and dataset.classes != datasets.folder.find_classes(root / "train")[0]:
        raise UserError(f"{folder} and {root / 'train'} have different classes")
    return dataset


def _download(name: str, split: str, data_dir: str, img_size: int) -> MemoryDataset:
    """CIFAR-10, CIFAR-100 or STL-10 by torchvision, into memory."""
    try:
        if name == "stl10":
            part = "train+unlabeled" if split == "train" else "test"
            source = datasets.STL10(data_dir, part, download=True)
            images, labels = torch.from_numpy(source.data), torch.from_numpy(source.labels)
        else:
            cifar = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
            source = cifar(data_dir, split == "train", download=True)
            images = torch.from_numpy(source.data).permute(0, 3, 1, 2)
            labels = torch.tensor(source.targets)
    except (OSError, RuntimeError) as error:
        message = f"{name} is not in {data_dir} and could not be downloaded ({error})"
        raise UserError(f"{message}; --data textures needs no download") from error
    return MemoryDataset(_resize(images, img_size), labels.long(), source.classes)


def _resize(images: Tensor, size: int) -> Tensor:
    """(N, 3, S, S) uint8 to another side, in parts: all at once would take many gigabytes."""
    if size == images.shape[-1]:
        return images.contiguous()
    resized = torch.empty(len(images), 3, size, size, dtype=torch.uint8)
    for part, result in zip(images.split(1000), resized.split(1000), strict=True):
        result.copy_(resize(part, [size, size]))
    return resized


def train_val_split(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Indices for training and for validation: 5,000 labeled images, or a tenth if that is less.

    The split does not depend on the run's seed. Otherwise an encoder trained with one seed could be
    evaluated on its own training images with another.
    """
    # With another key, the included weights would have seen the validation images of their folder.
    order = torch.randperm(len(dataset), generator=seeded_generator("hold out"))
    labeled = dataset.labels[order] >= 0
    order = torch.cat([order[labeled], order[~labeled]])
    n = min(5000, int(labeled.sum()) // 10)
    if n == 0:
        raise UserError("fewer than 10 labeled images: there would be none for validation")
    return order[n:], order[:n]


# ------------------------------------------------------------------------------------- crops

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, used for all data, as the released models expect
STD = (0.229, 0.224, 0.225)


def normalize(images: Tensor) -> Tensor:
    """uint8 (B, 3, S, S) to float32 of about zero mean and unit variance."""
    mean, std = _mean_std(images.device)
    return (images.float() / 255 - mean) / std


@lru_cache  # to copy them to a GPU for each batch would wait for the step before
def _mean_std(device: torch.device) -> list[Tensor]:
    return [torch.tensor(x, device=device).view(3, 1, 1) for x in (MEAN, STD)]


def random_crop_boxes(batch: int, scale: tuple[float, float], generator) -> Tensor:
    """Random crops of square images, distributed as those of torchvision's RandomResizedCrop.

    scale: range of the crop's area as a fraction of the image.
    Returns (B, 4) float32: top, left, height, width as fractions of the image's side.
    """
    area, ratio, position = torch.rand(3, batch, 10, generator=generator)
    area = scale[0] + (scale[1] - scale[0]) * area  # (B, 10): ten attempts for each crop
    ratio = torch.exp(math.log(4 / 3) * (2 * ratio - 1))  # 3/4 to 4/3, uniform in the logarithm
    size = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], dim=-1)  # (B, 10, 2)
    fits = (size <= 1).all(-1)  # (B, 10)
    size = size[torch.arange(batch), fits.int().argmax(1)]  # (B, 2): the first that fits
    size[~fits.any(1)] = 1.0  # or else the whole image
    return torch.cat([position[:, :2] * (1 - size), size], dim=1)


def crop_resize(images: Tensor, boxes: Tensor, flip: Tensor) -> Tensor:
    """Crop, resize to the image's own size and flip a whole batch at once, on its device.

    Args:
        images: (B, 3, S, S) float32.
        boxes: (B, 4) top, left, height, width as fractions of S; flip: (B,) bool.
    Returns:
        (B, 3, S, S) float32, equal to bilinear F.interpolate of each crop.
    """
    s = images.shape[-1]
    centers = (torch.arange(s, device=images.device) + 0.5) / s  # of the output's pixels
    start, size = s * boxes[:, :2, None], s * boxes[:, 2:, None]  # (B, 2, 1), in pixels
    pixel = start + size * centers - 0.5  # (B, 2, S): rows and columns to sample
    pixel = pixel.clamp(start, start + size - 1)  # nothing from outside the crop
    y, x = ((pixel + 0.5) * (2 / s) - 1).unbind(1)  # (B, S) each, in the units of grid_sample
    x = torch.where(flip[:, None], x.flip(1), x)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


# ----------------------------------------------------------------------------------- batches


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, n: int) -> Tensor:
    return torch.randperm(n, generator=seeded_generator(seed, "order", epoch))


@dataclass
class _BatchDataset(torch.utils.data.Dataset):
    """Loads the images of a batch, in worker processes: (indices, crop seeds, more tensors)."""

    dataset: Dataset
    crop_scale: tuple[float, float] = (1.0, 1.0)

    def __getitem__(self, batch: list[Tensor]) -> tuple[list[Tensor], dict[str, str]]:
        indices, seeds, *rest = batch
        if isinstance(self.dataset, MemoryDataset) or self.crop_scale == (1, 1):
            images = self.dataset.load(indices)
        else:
            pairs = zip(indices.tolist(), seeds.tolist(), strict=True)
            images = [self.dataset.load_crop(i, self.crop_scale, seed) for i, seed in pairs]
            images = torch.stack(images)
        return [images, *rest], self.dataset.damaged

    def loaded(self, batches: Iterable[list[Tensor]], device, workers: int | None):
        """The images and the other tensors of each batch, on the device."""
        pin = torch.device(device).type == "cuda"
        workers = loader_workers(workers, self.dataset, device)
        loader = DataLoader(  # without a batch size, because an item is a batch already
            self, None, sampler=batches, num_workers=workers, pin_memory=pin,
            worker_init_fn=_leave_signals, generator=torch.Generator(),  # not the global one
        )  # fmt: skip
        for tensors, damaged in loader:
            if damaged:
                self.dataset.report(damaged)
            yield [x.to(device, non_blocking=True) for x in tensors]


def loader_workers(workers: int | None, dataset: Dataset, device) -> int:
    """`workers`; if None, 8 for a folder beside a GPU, otherwise 0."""
    if workers is not None:
        return workers
    beside_gpu = torch.device(device).type == "cuda"
    return 8 if beside_gpu and isinstance(dataset, FolderDataset) else 0


def _leave_signals(_: int) -> None:
    """Ctrl-C and torchrun signal a whole process group; only the main one is to stop."""
    if hasattr(os, "setsid"):
        os.setsid()
        # Schedulers signal every process. This one has a minute left, in which the main one saves.
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
    else:  # Windows
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def train_batches(
    dataset: Dataset, indices: Tensor, masks, steps: range, *, batch_size: int,
    accum_steps: int = 1, seed: int = 0, crop_scale: tuple[float, float] = (0.3, 1.0),
    flip: bool = False, rank: int = 0, world_size: int = 1, device="cpu", workers: int | None = 0,
) -> Iterator[list[Tensor]]:  # fmt: skip
    """The batches of this process, `accum_steps` for each step, on the device.

    Args:
        indices: (N,) int64, the images to train on.
        masks: MaskCollator, or None to train a classifier.
        batch_size: images per step, over all processes and accumulation steps.
        crop_scale: range of a crop's fraction of the image area. (1, 1): no cropping.
        flip: horizontal flip, p = 0.5.
        workers: processes that load images; None: as `loader_workers` says.
    Returns:
        An iterator over images (b, 3, S, S) float32, normalized; then context_idx (b, K) and
        target_idx (b, M, T), or labels (b,) without masks.
    Raises:
        UserError: at once if the batch cannot be divided; later if more than 1 % of the images are
            damaged.
    """
    n, parts = len(indices), accum_steps * world_size
    if batch_size % parts:
        message = f"--batch-size {batch_size} is not a multiple of {parts}: choose"
        raise UserError(f"{message} a multiple of {parts}, processes times --accum-steps")

    def batches() -> Iterator[list[Tensor]]:
        for step in steps:
            # Draw the whole batch. Its images are the next ones in a sequence of shuffled epochs.
            start, end = step * batch_size, (step + 1) * batch_size
            epochs = range(start // n, (end - 1) // n + 1)
            order = torch.cat([_epoch_order(seed, epoch, n) for epoch in epochs])
            index = indices[order[start - epochs[0] * n : end - epochs[0] * n]]
            generator = seeded_generator(seed, "crop", step)
            boxes = random_crop_boxes(batch_size, crop_scale, generator)
            if isinstance(dataset, FolderDataset):  # whose images are cropped as they are loaded
                boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(batch_size, 1)
            flips = (torch.rand(batch_size, generator=generator) < 0.5) & flip
            seeds = torch.randint(2**62, (batch_size,), generator=generator)
            targets = [dataset.labels[index]]
            if masks is not None:
                targets = masks.sample(batch_size, seeded_generator(seed, "masks", step))
            # Split it, and take the slices of this process.
            batch = [index, seeds, boxes, flips, *targets]
            slices = zip(*(x.split(batch_size // parts) for x in batch), strict=True)
            yield from list(slices)[rank::world_size]

    loaded = _BatchDataset(dataset, crop_scale).loaded(batches(), device, workers)
    return (
        [crop_resize(normalize(images), boxes, flips), *targets]
        for images, boxes, flips, *targets in loaded
    )


def eval_batches(
    dataset: Dataset, indices, device="cpu", batch_size: int = 100, workers: int | None = 0
) -> Iterator[Tensor]:
    """The whole images of `indices` in order: (b, 3, S, S) float32, normalized.

    Few at a time, because evaluations during training share its memory.
    """
    chunks = torch.as_tensor(indices).split(batch_size)
    batches = ([chunk, chunk] for chunk in chunks)  # nothing is random, so seeds are not used
    for (images,) in _BatchDataset(dataset).loaded(batches, device, workers):
        yield normalize(images)


# ------------------------------------------------------------------------- the demo's dataset

TEXTURES = {  # of two tones, repeated every 8 pixels
    "bars": "######## ######## ........ ........ ######## ######## ........ ........",
    "stripes": "##..##.. ##..##.. ##..##.. ##..##.. ##..##.. ##..##.. ##..##.. ##..##..",
    "diagonals": "####.... .####... ..####.. ...####. ....#### #....### ##....## ###....#",
    "checks": "####.... ####.... ####.... ####.... ....#### ....#### ....#### ....####",
    "dots": "........ .##..##. .##..##. ........ ........ .##..##. .##..##. ........",
    "zigzag": "##....## ###..### .######. ..####.. ...##... ........ ........ #......#",
    "windows": "######## ######## ##...... ##...... ##...... ##...... ##...... ##......",
    "bricks": "######## #....... #....... #....... ######## ....#... ....#... ....#...",
}


def draw_textures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Discs with one of eight textures, in random colors, uneven light and noise.

    The texture is the class. Light, colors and noise change from image to image and hide it from a
    comparison of pixels.

    Returns:
        Images (count, 3, 32, 32) uint8 and labels (count,) int64.
    """
    size, generator = 32, seeded_generator(seed, "textures")

    def uniform(*shape: int) -> Tensor:  # -1 to 1
        return 2 * torch.rand(count, *shape, generator=generator) - 1

    tiles = torch.tensor([[c == "#" for c in t.replace(" ", "")] for t in TEXTURES.values()])
    tiles = 2.0 * tiles.view(-1, 8, 8) - 1  # (8 textures, 8, 8)
    labels = torch.randint(len(tiles), (count,), generator=generator)
    pixel = torch.arange(size)
    offset = torch.randint(8, (2, count, 1), generator=generator)
    row, column = (pixel + offset) % 8  # (count, size) each
    texture = tiles[labels[:, None, None], row[:, :, None], column[:, None, :]]
    texture = texture * 0.12 * uniform(1, 1).sign()  # either tone may be the lighter one

    diameter = 0.7 + 0.2 * uniform(1)  # as fractions of the image's side
    center = 0.5 + 0.5 * (1 - diameter) * uniform(2)
    y, x = (((pixel + 0.5) / size - center[:, :, None]) / (diameter / 2)[:, :, None]).unbind(1)
    disc = (y[:, :, None] ** 2 + x[:, None, :] ** 2 < 1)[:, None]  # (count, 1, size, size)

    color, background = 0.15 * uniform(3, 1, 1), 0.15 * uniform(3, 1, 1)
    light = F.interpolate(uniform(1, 4, 4), size=(size, size), mode="bilinear")
    noise = uniform(3, size, size) + uniform(1, size, size)
    images = 0.5 + disc * (texture[:, None] + color) + background + 0.5 * light + 0.15 * noise
    return (255 * images).round().clamp(0, 255).to(torch.uint8), labels


def textures_dataset(split: str, size: int) -> MemoryDataset:
    """25,000 images to train on, or 5,000 others to test on."""
    count, seed = (25_000, 0) if split == "train" else (5_000, 1)
    images, labels = draw_textures(count, seed)
    return MemoryDataset(_resize(images, size), labels, list(TEXTURES))


# ------------------------------------------------------------ command line, files, processes


class UserError(Exception):
    """A mistake that the user can correct. The message says what is wrong and what to do."""


def run_main(main: Callable[[], None]) -> None:
    """Call `main`. What a user can mend becomes one line and exit code 2, Ctrl-C exit code 130."""
    try:
        return main()
    except UserError as error:
        # One line, also of an error in a loader process, which comes with its traceback.
        message = str(error).strip().splitlines()[-1].removeprefix("data.UserError: ")
    except torch.OutOfMemoryError:
        advice = "lower --batch-size or --train-images, or raise --accum-steps"
        message = f"GPU memory is full: {advice}"
    except torch.linalg.LinAlgError as error:  # of `Whitening`; on some devices, from NaN
        advice = "if the loss is not finite, start again with a lower --lr"
        message = f"{str(error).splitlines()[0]}: {advice}"
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def option(default, help: str, group: str | None = None, choices=None, positional: bool = False):
    """A dataclass field that `parse_args` turns into a command-line option."""
    metadata = {"help": help, "group": group, "choices": choices, "positional": positional}
    return field(default=default, metadata=metadata)


def parse_args(cls: type, description: str, argv: list[str] | None = None):
    """Parse the command line into the dataclass `cls`, whose fields are made with `option`.

    `batch_size: int` becomes `--batch-size`, `flip: bool` becomes `--flip/--no-flip`, a tuple takes
    one value per element. A wrong option prints one line and exits with code 2.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=description, formatter_class=formatter, allow_abbrev=False
    )
    # In one line: argparse would print the usage of all options as well.
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message} (see --help)\n")
    groups, types = {None: parser}, typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        group, kind = f.metadata["group"], types[f.name]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        if type(None) in typing.get_args(kind):  # X | None
            kind = typing.get_args(kind)[0]
        shown = "" if f.default is None else f" (default: {f.default})"
        kwargs = {"help": (f.metadata["help"] + shown).replace("%", "%%"), "default": f.default}
        if kind is bool:
            kwargs["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is tuple:
            elements = typing.get_args(kind)
            nargs = "+" if ... in elements else len(elements)
            kwargs |= {"type": elements[0], "nargs": nargs}
        else:
            kwargs |= {"type": kind, "choices": f.metadata["choices"]}
        if f.metadata["positional"]:
            groups[group].add_argument(f.name, nargs="?", **kwargs)
        else:
            groups[group].add_argument("--" + f.name.replace("_", "-"), **kwargs)
    values = vars(parser.parse_args(argv)).items()
    return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values})


def seeded_generator(*key) -> torch.Generator:
    """A CPU generator that is a function of the key alone, e.g. (seed, "masks", step)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def output_folder(path: str | Path) -> Path:
    """Create a folder. Raises UserError if that cannot be done."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path} cannot be created: {error.strerror}") from error
    return Path(path)


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary path, which replaces `path` on success and is removed on failure."""
    temporary = Path(f"{path}.tmp")
    try:
        yield temporary
        temporary.chmod(0o644)  # safetensors writes files that only their owner can read
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        raise UserError(f"{path} could not be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class Distributed:
    """This process among all processes of a run, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def bf16(self) -> bool:
        """Whether the device is a GPU with bfloat16 arithmetic."""
        cuda = self.device.type == "cuda"
        return cuda and torch.cuda.is_bf16_supported(including_emulation=False)

    def mean(self, *values) -> list[float]:
        """The averages of some numbers over all processes."""
        values = torch.stack([torch.as_tensor(v, device=self.device).float() for v in values])
        if self.world_size > 1:
            dist.all_reduce(values)
        return (values / self.world_size).tolist()


@contextlib.contextmanager
def distributed(device: str | None = None, alone: bool = False) -> Iterator[Distributed]:
    """Join the process group if torchrun started this process, and leave it at the end.

    device: cpu, cuda or cuda:N; by default cuda if there is a GPU. Raises UserError otherwise, and
    if a script that works `alone` was started by torchrun.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise UserError(f"--device {device}: choose cpu, or cuda where PyTorch finds a GPU")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if alone and world_size > 1:
        raise UserError("this script runs in one process: start it with python, not with torchrun")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if device != "cpu":
        try:
            torch.cuda.set_device(device)
        except (RuntimeError, ValueError) as error:
            count = torch.cuda.device_count()
            raise UserError(f"{device}: PyTorch finds {count} GPUs, from cuda:0 on") from error
    if world_size > 1:  # the others wait while the main process downloads, evaluates or saves
        backend = "gloo" if device == "cpu" else "nccl"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    yield Distributed(rank, world_size, torch.device(device))
    if world_size > 1:  # not after an error, where this would wait for the others
        dist.barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def main_process_first(process: Distributed) -> Iterator[None]:
    """Let the main process run the body before the others, so that only one downloads."""
    if process.world_size > 1 and not process.is_main:
        dist.barrier()
    yield
    if process.world_size > 1 and process.is_main:
        dist.barrier()
