"""Pictures: where they come from, in which order they are seen, how they are cropped.

Everything random in a training step (which pictures, which crops, which masks) is a function of
the run's seed and the number of the step, drawn for the whole batch by everyone who needs a part
of it. So the number of processes, accumulation steps and workers changes who does the work and
not what is done, and to resume a run is to know its step.

Two kinds of sets: `Pictures` are decoded once and kept as uint8, on the GPU if there is one, and
cropped there in one go; a `Folder` is too large for that and streams through worker processes.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import signal
import stat
import sys
import threading
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader
from tqdm import tqdm

from ijepa import MaskCollator

# ---------------------------------------------------------------------- what both scripts share


class UserError(Exception):
    """Something the user can put right. Scripts print it in one line and end with exit code 2."""


class StoppedError(Exception):
    """A signal ended the run once it was saved. Scripts end with the exit code of that signal."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


def fits(value, hint) -> bool:
    """Whether a value read from a file is of a field's type, and finite if it is a number."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        same = isinstance(value, tuple) and len(value) == len(parts)
        return same and all(map(fits, value, parts))
    if parts:  # X | None
        return any(fits(value, part) for part in parts)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint


def option(default, help: str, choices: Iterable[str] | None = None, positional: bool = False):
    """A field of a configuration that is also an option of the command line, or an argument."""
    metadata = {"help": help, "choices": choices, "positional": positional}
    return dataclasses.field(default=default, metadata=metadata)


def parse_options(cls: type, description: str, argv: list[str] | None = None):
    """The command line as an instance of the dataclass `cls`, and the names given explicitly.

    Field `batch_size: int` becomes `--batch-size`, `bf16: bool` becomes `--bf16/--no-bf16`, a
    tuple takes as many values as it has, and `X | None` means that the default depends on others.
    """

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(f"{message} (--help lists all options)")

    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kinds = [kind for kind in typing.get_args(hints[field.name]) if kind is not type(None)]
        kind = kinds[0] if type(None) in typing.get_args(hints[field.name]) else hints[field.name]
        shown = "" if field.default is None else f" (default: {field.default})"
        kwargs = {"help": field.metadata["help"] + shown, "default": argparse.SUPPRESS}
        if kind is bool:
            kwargs["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is tuple:
            kwargs |= {"type": float, "nargs": len(typing.get_args(kind)), "metavar": "X"}
        else:
            kwargs |= {"type": kind, "choices": field.metadata["choices"]}
            kwargs |= {} if field.metadata["choices"] else {"metavar": kind.__name__.upper()}
        if field.metadata["positional"]:
            kwargs["metavar"] = field.name.upper()
            parser.add_argument(field.name, nargs="?", **kwargs)
        else:
            parser.add_argument("--" + field.name.replace("_", "-"), **kwargs)
    given = vars(parser.parse_args(argv))
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    return cls(**given), set(given)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main: a UserError becomes one line on stderr and exit code 2.

    A signal gives the exit code that shells expect: 128 and its number.
    """
    try:
        main()
    except StoppedError as stopped:
        print(f"{Path(sys.argv[0]).name}: {stopped}", file=sys.stderr)
        sys.exit(128 + stopped.number)
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        print(
            f"{Path(sys.argv[0]).name}: error: {one_line(error)} It decoded pictures: if memory "
            "ran out, lower --workers",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted: --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)  # what shells expect after Ctrl-C


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write `path` into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} could not be written: {error}") from error


@contextlib.contextmanager
def whole_file(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """Write to the path that this gives: `path` is replaced once all is on the disk, or not at all.

    What was there before is kept as `previous`, if that is given. Raises UserError, and leaves what
    was there, if writing fails.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        kept = "the previous one is still there" if path.exists() else "there was none before"
        raise UserError(f"{path} could not be written ({error}); {kept}") from error


def one_line(error: Exception) -> str:
    """What an exception says, in a line."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def progress(items: Iterable, what: str, unit: str) -> tqdm:
    """A bar that disappears when done; in a log file, a line now and then."""
    interval = 0.2 if sys.stderr.isatty() else 30
    return tqdm(items, what, leave=False, unit=unit, mininterval=interval, delay=2)


def generator_for(*key) -> torch.Generator:
    """A random generator that depends on the key alone: seed, purpose, number of the step."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


# -------------------------------------------------------------------------------- where it runs


@dataclass(frozen=True)
class Place:
    """This process among the others, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


@contextlib.contextmanager
def placed(device: str | None, timeout: float = 120) -> Iterator[Place]:
    """Join the other processes, if `torchrun` started this one, and leave them at the end.

    They wait for one another for `timeout` minutes: while the main process downloads, reads a
    million files, or saves. A process that hangs is noticed after that, and not before.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", kind):
        raise UserError(f"--device {kind}: choose cpu or cuda")
    if kind.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here; leave the option out")
    if world_size == 1:
        if kind.startswith("cuda:"):
            torch.cuda.set_device(kind)
        yield Place(0, 1, torch.device(kind))
        return
    if kind.startswith("cuda:"):
        raise UserError(f"--device {kind}: torchrun gives each process a GPU; leave the option out")
    gpu = None
    if kind.startswith("cuda"):
        gpu = torch.device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(gpu)
    patience = timedelta(minutes=timeout)
    dist.init_process_group("nccl" if gpu else "gloo", timeout=patience, device_id=gpu)
    try:
        yield Place(rank, world_size, gpu or torch.device("cpu"))
    except RuntimeError as error:
        # What gloo and NCCL say when a process is gone or does not answer: no type tells it.
        if not re.search(r"(?i)timed? ?out|clos(ed|ure)|reset by peer|broken pipe", str(error)):
            raise
        raise UserError(
            f"process {rank} of {world_size}: another one has ended, or has not answered for "
            f"{timeout:g} minutes (--timeout); one that does not say this hangs ({one_line(error)})"
        ) from error
    # Neither after an error: they would wait for the others. Without the first, a process that
    # leaves last was seen to wait for them in the second (gloo, torch 2.6).
    dist.barrier()
    dist.destroy_process_group()


def cores() -> int:
    """Cores of this machine for each of its processes."""
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return max(1, len(affinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def main_first(place: Place, function):
    """Call `function` everywhere, on the main process before the others: it may download files."""
    if place.world_size > 1 and not place.main:
        dist.barrier()
    result = function()
    if place.world_size > 1 and place.main:
        dist.barrier()
    return result


def bf16_pays(embed_dim: int, device: torch.device) -> bool:
    """Whether the device has bfloat16 instructions, and the model is wide enough to gain by them.

    On two CPU cores `vit_tiny` (192 wide) trains 2.4 times as fast, `vit_nano` (96) 1.4 times; it
    stays in float32, so that the demo gives the same figures on every machine.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return embed_dim >= 192 and ("avx512_bf16" in flags or "amx_bf16" in flags)


class _AttentionFormula(TorchFunctionMode):
    """Attention as two matrix products and a softmax in between, instead of one fused kernel."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention and not kwargs:
            q, k, v = args  # (B, h, N, d) each
            return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v
        return function(*args, **kwargs or {})


@contextlib.contextmanager
def autocast(device: torch.device, bf16: bool) -> Iterator[None]:
    """bfloat16 autocast, if asked for.

    On a CPU that takes attention apart, too: PyTorch's fused kernel for CPUs is slower in bfloat16
    than the products that it consists of, several times so for the gradient (README, Speed).
    """
    apart = bf16 and device.type == "cpu"
    with (
        torch.autocast(device.type, torch.bfloat16, enabled=bf16),
        _AttentionFormula() if apart else contextlib.nullcontext(),
    ):
        yield


# ------------------------------------------------------------------------------------- crops

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, for every set: what the released models expect
STD = (0.229, 0.224, 0.225)


@lru_cache
def _moments(device: torch.device) -> tuple[Tensor, Tensor]:  # once: a copy to a GPU waits for it
    return tuple(torch.tensor(x, device=device).view(3, 1, 1) for x in (MEAN, STD))


def normalize(pictures: Tensor) -> Tensor:
    """uint8 (B, 3, S, S) to float32 with about zero mean and unit variance."""
    mean, std = _moments(pictures.device)
    return (pictures.contiguous().float() / 255 - mean) / std


@dataclass(frozen=True)
class CropRandomness:
    """The numbers behind B random crops, drawn before anyone knows how large the pictures are."""

    tries: Tensor  # (B, 10, 2) uniform: area and aspect ratio, ten chances to fit
    place: Tensor  # (B, 2) uniform: top, left
    flip: Tensor  # (B,) bool

    @staticmethod
    def draw(batch: int, flip: bool, generator: torch.Generator) -> "CropRandomness":
        tries = torch.rand(batch, 10, 2, generator=generator)
        place = torch.rand(batch, 2, generator=generator)
        return CropRandomness(tries, place, (torch.rand(batch, generator=generator) < 0.5) & flip)

    def __getitem__(self, part: slice) -> "CropRandomness":
        return CropRandomness(self.tries[part], self.place[part], self.flip[part])

    def boxes(self, height, width, scale: tuple[float, float]) -> Tensor:
        """Crops of pictures of (B,) heights and widths: (B, 4) int64 of top, left, height, width.

        A share of the area in `scale` and an aspect ratio in (3/4, 4/3), uniform in its logarithm;
        where ten tries do not fit, the largest centred crop of an allowed aspect ratio. This is
        the distribution of torchvision's RandomResizedCrop.
        """
        # In NumPy, whose calls cost less than PyTorch's: workers ask for one picture at a time.
        tries, place = self.tries.numpy(), self.place.numpy()
        height, width = (np.asarray(side).reshape(-1) for side in (height, width))  # (B,) each
        area = (height * width).astype(np.float32)
        low, high = math.log(3 / 4), math.log(4 / 3)
        wanted = area[:, None] * (scale[0] + (scale[1] - scale[0]) * tries[..., 0])
        ratio = np.exp(low + (high - low) * tries[..., 1])  # (B, 10)
        w = np.sqrt(wanted * ratio).round().astype(np.int64)
        h = np.sqrt(wanted / ratio).round().astype(np.int64)
        fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
        row, first = np.arange(len(w)), fits.argmax(1)  # the first try that fits
        h, w = h[row, first], w[row, first]
        top = (place[:, 0] * (height - h + 1)).astype(np.int64)
        left = (place[:, 1] * (width - w + 1)).astype(np.int64)
        none = ~fits[row, first]
        if none.any():
            # Only pictures far from square, for which torchvision centres a crop of the nearest
            # aspect ratio allowed.
            h = np.where(none, np.minimum(height, (width / (3 / 4)).round().astype(np.int64)), h)
            w = np.where(none, np.minimum(width, (height * (4 / 3)).round().astype(np.int64)), w)
            top = np.where(none, (height - h) // 2, top)
            left = np.where(none, (width - w) // 2, left)
        return torch.from_numpy(np.stack([top, left, h, w], axis=1))


def crop_resize(pictures: Tensor, boxes: Tensor, flip: Tensor, size: int) -> Tensor:
    """Crop, resize (bilinear) and flip a batch at once, on its device.

    Args:
        pictures: (B, 3, H, W) float32.
        boxes: (B, 4) top, left, height, width in pixels; flip: (B,) bool; size: S in pixels.
    Returns:
        (B, 3, S, S) float32, each equal to F.interpolate of its crop (no antialiasing, which
        enlarging does not need; pictures are stored at the size that training uses).
    """
    height, width = pictures.shape[-2:]
    top, left, h, w = boxes.to(pictures.device, torch.float32).unbind(1)
    centres = (torch.arange(size, device=pictures.device) + 0.5) / size  # (S,)

    def coordinates(start: Tensor, extent: Tensor, length: int) -> Tensor:  # (B, S), in [-1, 1]
        pixels = start[:, None] + extent[:, None] * centres - 0.5
        pixels = pixels.clamp(start[:, None], (start + extent - 1)[:, None])  # within the crop
        return (pixels + 0.5) * (2 / length) - 1

    x, y = coordinates(left, w, width), coordinates(top, h, height)
    x = torch.where(flip.to(x.device)[:, None], x.flip(1), x)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)  # (B,S,S,2)
    return F.grid_sample(pictures, grid, align_corners=False, padding_mode="border")


# ---------------------------------------------------------------------------- sets of pictures


class Files(Sequence):
    """Paths below a folder, in one array: a million objects would be copied into every worker."""

    def __init__(self, root: Path, paths: Iterable[Path]):
        skip = len(os.fsencode(root)) + 1
        self.root, self.names = root, np.array([os.fsencode(path)[skip:] for path in paths])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Path:
        return self.root / os.fsdecode(self.names[index])


@dataclass
class Pictures:
    """A set in memory: decoded once, square, uint8, on the GPU if there is one."""

    images: Tensor  # (n, 3, S, S) uint8
    labels: dict[str, Tensor]  # task -> (n,) int64; -1 where a picture has no label
    classes: dict[str, list[str]]  # task -> names; the first task is the main one
    files: Files | None = None  # where they come from, if from a folder

    img_size = property(lambda self: self.images.shape[-1])

    def __len__(self) -> int:
        return len(self.images)

    def centre(self, index: Tensor, broken: set[str] | None = None) -> Tensor:
        """The pictures as evaluation sees them: whole, (B, 3, S, S) uint8. None is broken."""
        return self.images[index.to(self.images.device)]

    def open(self, index: int, broken: set[str], least: int | None = None) -> Image.Image:
        """Picture `index`, for worker processes, as `Folder.open`; none is broken, none smaller."""
        return to_picture(self.images[index])


@dataclass
class Folder:
    """A set on disk, `<root>/<class>/<picture>`, decoded when needed by worker processes."""

    files: Files
    labels: dict[str, Tensor]
    classes: dict[str, list[str]]
    img_size: int

    def __len__(self) -> int:
        return len(self.files)

    def open(self, index: int, broken: set[str], least: int | None = None) -> Image.Image:
        """Picture `index`, or the next readable one with its labels; others join `broken`.

        least: pixels of the shorter side that will do; see `open_picture`.
        """
        for candidate in self._alike(index):
            path = self.files[candidate]
            try:
                return open_picture(path, least)
            except Exception as error:  # decoders raise almost anything on damaged files
                broken.add(f"{path} ({type(error).__name__}: {error})")
        raise UserError(f"neither {self.files[index]} nor any picture with its labels can be read")

    def _alike(self, index: int) -> Iterator[int]:
        """`index`, then the others with the same labels, in order."""
        yield index
        alike = torch.ones(len(self), dtype=torch.bool)
        for labels in self.labels.values():
            alike &= labels == labels[index]
        numbers = alike.nonzero()[:, 0].roll(-int(alike[: index + 1].sum()))
        yield from numbers[:-1].tolist()

    def centre(self, index: Tensor, broken: set[str] | None = None) -> Tensor:
        """As evaluation sees them: shorter side to 8/7 of S, centre crop of S; (B, 3, S, S)."""
        broken = set() if broken is None else broken
        images = memory_for(len(index), self.img_size)
        for i, number in enumerate(index.tolist()):
            picture = self.open(number, broken, math.ceil(self.img_size * 8 / 7))
            images[i] = centre_crop(picture, self.img_size, 8 / 7)
        return images


def _opened(path: Path) -> Image.Image:
    """A picture file, not decoded yet.

    Raises OSError for what is no file (a pipe would be waited for), DecompressionBombError or
    DecompressionBombWarning above 89 million pixels, and what decoders raise.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("not a regular file")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(path)


def open_picture(path: Path, least: int | None = None) -> Image.Image:
    """A picture file as RGB, the right way up, 8 of 16 bits; of an animation the first picture.

    least: a JPEG may be decoded at a half, a quarter or an eighth of its size, which takes much
        less time, as long as its shorter side keeps so many pixels. Decoders average over whole
        pixels for that, as resizing would.
    Raises almost anything if it is damaged; see `_opened`.
    """
    with _opened(path) as picture:
        if least is not None:
            picture.draft(None, (least, least))
        ImageOps.exif_transpose(picture, in_place=True)
        if picture.mode.startswith("I"):  # 16 bits, which convert() would clip to white
            picture = Image.fromarray((np.array(picture) // 256).clip(0, 255).astype(np.uint8))
        picture.load()  # the file is closed here
        return picture if picture.mode == "RGB" else picture.convert("RGB")


def to_tensor(picture: Image.Image) -> Tensor:
    """(3, H, W) uint8, in Pillow's order of memory."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def memory_for(count: int, size: int) -> Tensor:
    """For so many square pictures, (count, 3, S, S) uint8, in Pillow's order of memory."""
    images = torch.empty(count, size, size, 3, dtype=torch.uint8)
    if torch.utils.data.get_worker_info() is not None:
        images.share_memory_()  # here at once, and not by copying when the batch is sent
    return images.permute(0, 3, 1, 2)


def to_picture(image: Tensor) -> Image.Image:
    """From (3, H, W) uint8."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def centre_crop(picture: Image.Image, size: int, enlarge: float = 1.0) -> Tensor:
    """The centre of a picture whose shorter side becomes `enlarge * size`; (3, size, size)."""
    side = min(picture.size) / enlarge
    left, top = (picture.width - side) / 2, (picture.height - side) / 2
    box = (left, top, left + side, top + side)
    return to_tensor(picture.resize((size, size), Image.Resampling.BILINEAR, box=box))


def hold_out(pictures: Pictures | Folder) -> tuple[Tensor, Tensor]:
    """Indices to train on, and those held out for every choice: 5,000, or a tenth if fewer.

    The same for every run: a seed that changes with the run would leak between runs.
    """
    labelled = next(iter(pictures.labels.values())) >= 0
    order = torch.randperm(len(pictures), generator=generator_for("hold out"))
    order = torch.cat([order[labelled[order]], order[~labelled[order]]])
    held = min(5000, int(labelled.sum()) // 10)
    return order[held:], order[:held]  # in random order, so that any first part is a fair sample


# ------------------------------------------------------------------------------- sets by name

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".gif", ".tif", ".tiff"}
NAMED = ("shapes", "cifar10", "cifar100", "stl10", "clevr", "imagenet")
IN_MEMORY_SIDE = 128  # pixels: folders of pictures no larger than this are kept in memory,
IN_MEMORY_BYTES = 4e9  # unless they need more than this


@lru_cache  # a million files take a while
def scan_folder(root: Path, part: str) -> tuple[Files, Tensor, list[str]]:
    """Files, labels (n,) and class names of `<root>/<part>/<class>/<picture>`."""
    folder = root / part
    if part == "test" and not folder.is_dir():
        folder = root / "val"
    if not folder.is_dir():
        raise UserError(f"{root} has no folder {part}/: expected {root / part}/<class>/<picture>")
    paths, labels = [], []
    try:
        classes = sorted(f.name for f in folder.iterdir() if f.is_dir() and f.name[0] != ".")
        for label, name in enumerate(classes):
            found = (f for f in (folder / name).rglob("*") if f.suffix.lower() in PICTURE_SUFFIXES)
            paths += sorted(found)
            labels += [label] * (len(paths) - len(labels))
    except OSError as error:
        raise UserError(f"{folder} cannot be listed: {error}") from error
    files = Files(folder, paths)
    if not paths:
        raise UserError(f"no pictures under {folder}: expected {folder}/<class>/<picture>.jpg")
    if len(set(labels)) < 2:
        raise UserError(f"{folder} has pictures of one class only: evaluation needs at least two")
    return files, torch.tensor(labels), classes


def data_root(name: str, data_dir: str) -> Path:
    """The folder behind `--data`: a path, or `imagenet` in the data folder."""
    root = Path(data_dir) / "imagenet" if name == "imagenet" else Path(name)
    if name == "imagenet" and not root.is_dir():
        raise UserError(
            f"ImageNet is not at {root}: put its train/<wnid>/*.JPEG and val/<wnid>/*.JPEG there, "
            "or try --data cifar10 (downloads 170 MB) or --data shapes (needs nothing)"
        )
    if not os.path.isdir(root):  # Path.is_dir() raises for names that are too long
        raise UserError(f"--data {name} is neither a folder nor one of {', '.join(NAMED)}")
    return root


@lru_cache
def default_sizes(name: str, data_dir: str) -> tuple[int, int]:
    """Picture and patch size in pixels that suit a set: small pictures get small patches."""
    if name == "shapes":
        return 48, 8
    if name in ("cifar10", "cifar100"):
        return 32, 4
    if name == "stl10":
        return 96, 8
    if name == "clevr":
        return 224, 16
    largest = largest_side(data_root(name, data_dir))
    return (32, 4) if largest <= 40 else (96, 8) if largest <= IN_MEMORY_SIDE else (224, 16)


def largest_side(root: Path, samples: int = 64) -> int:
    """The largest side in pixels among a sample of the training pictures of a folder."""
    files, _, _ = scan_folder(root, "train")
    largest = 0
    for index in range(0, len(files), max(1, len(files) // samples)):
        try:
            with _opened(files[index]) as picture:
                largest = max(largest, *picture.size)
        except Exception:
            continue  # reading the set will report and count it
    return largest


def load_data(
    name: str,
    part: str = "train",
    data_dir: str = "data",
    img_size: int | None = None,
    device: str | torch.device = "cpu",
    **shapes,
) -> Pictures | Folder:
    """A set of pictures, its `train` or its `test` part.

    Args:
        name: one of `NAMED`, or a folder with `train/<class>/` and `val/` or `test/`.
        data_dir: where named sets are, or are downloaded to.
        img_size: side in pixels; by default what suits the set.
        device: where sets that fit in memory are kept.
        shapes: for the built-in pictures, `count` and `clutter`.
    Raises:
        UserError: if it cannot be had, with what to do.
    """
    img_size = img_size or default_sizes(name, data_dir)[0]
    if name == "shapes":
        return _shapes(part, img_size, device, **shapes)
    if name in ("cifar10", "cifar100", "stl10"):
        return _torchvision(name, part, data_dir, img_size, device)
    if name == "clevr":
        return _clevr(part, data_dir, img_size)
    root = data_root(name, data_dir)
    files, labels, classes = scan_folder(root, part)
    if part != "train" and classes != scan_folder(root, "train")[2]:
        raise UserError(f"the {part} pictures and {root / 'train'} have different classes")
    folder = Folder(files, {"class": labels}, {"class": classes}, img_size)
    large = img_size > IN_MEMORY_SIDE or len(files) * 3 * img_size**2 > IN_MEMORY_BYTES
    if large or largest_side(root) > IN_MEMORY_SIDE:
        return folder
    broken: set[str] = set()
    images = torch.empty(len(files), 3, img_size, img_size, dtype=torch.uint8)
    for i in progress(range(len(files)), f"reading {root.name}/{part}", " pictures"):
        images[i] = centre_crop(folder.open(i, broken), img_size)
    report_broken(broken, set(), len(files))
    return Pictures(images.to(device), folder.labels, folder.classes, files)


def report_broken(new: set[str], known: set[str], total: int) -> set[str]:
    """Name pictures that cannot be read, and return all known; above 1 % is a UserError."""
    for line in sorted(new - known):
        tqdm.write(f"replaced a picture that cannot be read: {line}", file=sys.stderr)
    known = known | new
    if len(known) > 0.01 * total:
        raise UserError(
            f"{len(known)} of {total} pictures cannot be read, more than 1 %: one is "
            f"{max(known)}. Remove or repair them"
        )
    return known


def has_test(name: str, data_dir: str = "data") -> bool:
    """Whether a set comes with a test part: folders may have none."""
    if name in NAMED and name != "imagenet":
        return True
    root = data_root(name, data_dir)
    return (root / "test").is_dir() or (root / "val").is_dir()


def fingerprint(data: "Pictures | Folder") -> str:
    """A short name of these very pictures: other pixels, or other files or dates, have another."""
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(data, Pictures):
        for images in data.images.split(10_000):
            digest.update(images.cpu().numpy().tobytes())
    else:
        for path in data.files:
            stat = path.stat()
            digest.update(repr((str(path), stat.st_size, stat.st_mtime_ns)).encode())
    return digest.hexdigest()


def listing(data: "Pictures | Folder") -> str:
    """A short name of which pictures these are, wherever their folder is: files and labels."""
    digest = hashlib.blake2b(digest_size=16)
    if data.files is not None:
        digest.update(b"\0".join(data.files.names.tolist()))
    for labels in data.labels.values():
        digest.update(labels.numpy().tobytes())
    return digest.hexdigest()


# The distance of the nearest object in six steps, as in the Visual Task Adaptation Benchmark
# (Zhai et al. 2019), which the paper's Clevr/Dist goes by.
CLEVR_DISTANCES = torch.tensor([8.0, 8.5, 9.0, 9.5, 10.0], dtype=torch.float64)
CLEVR_CLASSES = {
    "count": [str(n) for n in range(3, 11)],
    "distance": ["to 8", "to 8.5", "to 9", "to 9.5", "to 10", "beyond"],
}


def _clevr(part: str, data_dir: str, img_size: int) -> Folder:
    """CLEVR (Johnson et al. 2017): how many objects there are, and how far the nearest is."""
    from torchvision.datasets import CLEVRClassification

    split = "train" if part == "train" else "val"  # its test part has no labels
    root = Path(data_dir) / "clevr" / "CLEVR_v1.0"
    try:
        CLEVRClassification(data_dir, split, download=True)  # 18 GB, once
        with open(root / "scenes" / f"CLEVR_{split}_scenes.json") as file:
            scenes = sorted(json.load(file)["scenes"], key=lambda scene: scene["image_filename"])
        nearest = [min(o["pixel_coords"][2] for o in scene["objects"]) for scene in scenes]
        counts = torch.tensor([len(scene["objects"]) for scene in scenes])
        folder = root / "images" / split
        files = Files(folder, (folder / scene["image_filename"] for scene in scenes))
    except (OSError, RuntimeError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"clevr is not in {data_dir} and could not be downloaded, or is damaged ({error!r}). "
            f"Remove {root.parent}, or unpack CLEVR_v1.0.zip there; --data shapes has such tasks"
        ) from error
    if not len(files) or counts.min() < 3 or counts.max() > 10:
        raise UserError(f"{root}: expected scenes of 3 to 10 objects")
    distances = torch.bucketize(torch.tensor(nearest, dtype=torch.float64), CLEVR_DISTANCES)
    return Folder(files, {"count": counts - 3, "distance": distances}, CLEVR_CLASSES, img_size)


def _torchvision(name: str, part: str, data_dir: str, img_size: int, device) -> Pictures:
    from torchvision import datasets

    try:
        if name == "stl10":
            split = "train+unlabeled" if part == "train" else "test"
            source = datasets.STL10(data_dir, split, download=True)
            images, labels = torch.from_numpy(source.data), torch.from_numpy(source.labels)
        else:
            kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
            source = kind(data_dir, train=part == "train", download=True)
            images = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()
            labels = torch.tensor(source.targets)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{name} is not in {data_dir} and could not be downloaded ({error}). "
            "--data shapes needs no download; a folder with train/<class>/ and test/<class>/ works"
        ) from error
    if img_size != images.shape[-1]:
        images = torch.cat([resize(chunk, img_size) for chunk in images.split(1000)])
    return Pictures(images.to(device), {"class": labels.long()}, {"class": source.classes})


def resize(images: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) uint8 to (B, 3, size, size) uint8, bilinear, antialiased."""
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)


# ----------------------------------------------------------------------------- built-in shapes

# A kind is an outline and the pattern of its surface: a tile of 8x8, `#` in one of the object's two
# tones, `.` in the other. Which of the two is the lighter one is random.
TILES = {
    "flag": "######## ######## ........ ........ ######## ######## ........ ........",
    "curtain": "##..##.. ##..##.. ##..##.. ##..##.. ##..##.. ##..##.. ##..##.. ##..##..",
    "ramp": "####.... .####... ..####.. ...####. ....#### #....### ##....## ###....#",
    "board": "####.... ####.... ####.... ####.... ....#### ....#### ....#### ....####",
    "sponge": "........ .##..##. .##..##. ........ ........ .##..##. .##..##. ........",
    "waves": "##....## ###..### .######. ..####.. ...##... ........ ........ #......#",
    "window": "######## ######## ##...... ##...... ##...... ##...... ##...... ##......",
    "wall": "######## #....... #....... #....... ######## ....#... ....#... ....#...",
}
SHAPES_CLASSES = {
    "kind": list(TILES),  # what the nearest object is
    "count": ["1", "2", "3", "4"],  # how many objects there are
    "near": ["far", "middle", "near", "very near"],  # how near the nearest is
}
SHAPES_COUNT = {"train": 25_000, "test": 5_000}
STENCIL = 64  # side of an outline, in cells


@lru_cache
def _tables() -> tuple[Tensor, Tensor]:
    """Patterns (8 kinds, 8, 8) and outlines with an empty rim (8 kinds, 66, 66), uint8, flat."""
    tiles = [[c == "#" for c in tile.replace(" ", "")] for tile in TILES.values()]
    u = (torch.arange(STENCIL) + 0.5) / STENCIL * 2 - 1  # -1 to 1
    y, x = torch.meshgrid(u, u, indexing="ij")
    a, b, r, angle = x.abs(), y.abs(), x.hypot(y), torch.atan2(x, -y)
    outlines = [
        r < 1,  # disc
        torch.maximum(a, b) < 0.9,  # square
        a < (y + 1) / 2,  # triangle
        a + b < 1,  # diamond
        r < 0.72 + 0.26 * torch.cos(5 * angle),  # flower
        torch.minimum(a, b) < 0.45,  # cross
        torch.maximum(0.866 * a + 0.5 * b, b) < 0.9,  # hexagon
        b < 0.7,  # oblong
    ]
    outlines = F.pad(torch.stack(outlines).to(torch.uint8), (1, 1, 1, 1))
    return torch.tensor(tiles, dtype=torch.uint8).flatten(), outlines.flatten()


def _scramble(x: Tensor) -> Tensor:
    """The finalizer of splitmix64 (Steele et al. 2014) on int64: neighbours in, noise out."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def draw_shapes(
    seed: int, index: Tensor, img_size: int = 48, clutter: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Pictures of one to four patterned objects in dappled light, and three labels for each.

    Picture i is a function of the seed and of i alone, whatever batch it is drawn in: its random
    numbers are not drawn one after the other but computed, by scrambling (seed, i, which one).

    Args:
        seed: which set.
        index: (B,) int64, which pictures of it.
        img_size: side S in pixels. Patterns keep their period, objects grow with the picture.
        clutter: strength of what hides the objects: patches of light, tints and film grain.
    Returns:
        Pictures (B, 3, S, S) uint8, and for each task of `SHAPES_CLASSES` labels (B,) int64.
    """
    b, s, kinds, slots = len(index), img_size, len(TILES), len(SHAPES_CLASSES["count"])
    tiles, outlines = _tables()
    key = _scramble(index * 0x10001 + _scramble(torch.tensor(seed)))  # (B,)

    def bits(stream: int, n: int) -> Tensor:  # (B, n) int64
        return _scramble(_scramble(key + stream)[:, None] + torch.arange(n) * -0x61C8864680B583EB)

    def uniform(stream: int, n: int, low: float = 0.0, high: float = 1.0) -> Tensor:  # (B, n)
        return low + (high - low) * ((bits(stream, n) >> 40) & 0xFFFFFF).float() / 2**24

    def lookup(table: Tensor, row: Tensor, column: Tensor) -> Tensor:  # two (B, S) -> (B, S, S)
        places = row[:, :, None] + column[:, None, :]
        return table.index_select(0, places.flatten()).view(b, s, s)  # much faster than table[...]

    others, nearness = uniform(0, 2).unbind(1)
    others = (others * slots).long()  # objects beside the nearest: 0 to 3
    nearest_size = 0.5 + 0.35 * nearness  # share of the picture's side
    corner = uniform(1, 4).argsort(1)  # those behind are in different corners
    pixel = torch.arange(s)
    # Colours of the background and of two tones of each object: greys with a little tint.
    palette = 0.5 + uniform(2, 3 * (1 + 2 * slots), -0.02, 0.02).view(b, 3, -1)

    # Which colour of the palette each pixel has; 0 is the background.
    canvas = torch.zeros(b, s, s, dtype=torch.uint8)
    for slot in range(slots):
        u = uniform(10 + slot, 8)
        kind = (u[:, 0] * kinds).long()
        if slot == 0:
            nearest_kind, size = kind, nearest_size
            centre = 0.5 + (u[:, 1:3] - 0.5) * (1.1 - size[:, None])  # mostly inside
        else:
            size = nearest_size * (0.5 + 0.4 * u[:, 3])  # further away: smaller
            place = torch.stack([corner[:, slot] // 2, corner[:, slot] % 2], dim=1)
            centre = 0.2 + 0.6 * place + 0.2 * (u[:, 1:3] - 0.5)
        centre = centre + 9 * (slot > others)[:, None]  # not in this picture: far outside it
        # The cells of the outline on which the picture's rows and columns fall, or its empty rim.
        cells = ((pixel + 0.5) / s - centre[..., None]) / size[:, None, None] + 0.5  # (B, 2, S)
        row, column = (cells * STENCIL + 1).clamp_(0, STENCIL + 1).long().unbind(1)  # (B, S) each
        row = (kind[:, None] * (STENCIL + 2) + row) * (STENCIL + 2)
        inside = lookup(outlines, row, column)  # (B, S, S), 0 or 1
        # Patterns begin at a pixel divisible by 4: one of four places within a patch.
        row, column = ((pixel + 4 * (2 * u[:, 4:6, None]).long()) % 8).unbind(1)  # (B, S) each
        first = 2 * (slots - slot) - 1  # nearer objects have larger numbers
        tone = lookup(tiles, (kind[:, None] * 8 + row) * 8, column) + first  # (B, S, S)
        canvas = torch.maximum(canvas, inside * tone)  # and so cover those behind
        contrast = torch.where(u[:, 6] < 0.5, 0.125, -0.125)[:, None]
        brightness = 0.05 * (u[:, 7:] - 0.5)
        palette[:, :, first] += brightness - contrast
        palette[:, :, first + 1] += brightness + contrast
    pictures = palette.gather(2, canvas.flatten(1).long()[:, None].expand(-1, 3, -1))
    pictures = pictures.view(b, 3, s, s)

    # Dappled light with a tint, and film grain: nuisances.
    light = uniform(3, 4 * 8 * 8, -clutter, clutter).view(b, 4, 8, 8)
    light = 0.5 * light[:, 3:] + 0.15 * light[:, :3]
    pictures += F.interpolate(light, size=(s, s), mode="bilinear")
    grain = bits(4, s * s).view(torch.int16).view(b, s, s, 4).permute(0, 3, 1, 2)
    pictures += (0.15 * grain[:, 3:] + 0.1 * grain[:, :3]) * (clutter / 2**15)
    labels = {"kind": nearest_kind, "count": others, "near": (nearness * 4).long()}
    return pictures.mul_(255).round_().clamp_(0, 255).to(torch.uint8), labels


def _shapes(part: str, img_size: int, device, count: int | None = None, clutter: float = 1.0):
    count = count or SHAPES_COUNT[part]
    first = 0 if part == "train" else 2**32  # other pictures of the same world
    drawn = [
        draw_shapes(0, index, img_size, clutter)
        for index in progress(torch.arange(first, first + count).split(128), "drawing", " x 128")
    ]
    images = torch.cat([images for images, _ in drawn])
    labels = {task: torch.cat([labels[task] for _, labels in drawn]) for task in SHAPES_CLASSES}
    return Pictures(images.to(device), labels, SHAPES_CLASSES)


# -------------------------------------------------------------------------- a training step


@dataclass(frozen=True, eq=False)  # hashed by identity, for the cache of `draw_step`
class Plan:
    """What the steps of a run draw, and which part of it this process works on."""

    seed: int
    index: Tensor  # (n,) of the pictures to train on
    batch_size: int  # pictures an optimizer step, over all processes
    accum_steps: int
    masks: MaskCollator | None  # None: to train a classifier, which sees whole pictures
    crop_scale: tuple[float, float] = (0.3, 1.0)
    flip: bool = False
    rank: int = 0
    world_size: int = 1
    # What else is done to a picture, with random numbers from PyTorch's generator on the CPU.
    augment: Callable[[Image.Image], Image.Image] | None = None

    @property
    def micro_batch(self) -> int:
        return self.batch_size // (self.accum_steps * self.world_size)


@dataclass
class Batch:
    """One micro-batch on its way to the model."""

    images: Tensor  # (b, 3, S, S): float32, normalized
    context_idx: Tensor  # (b, K), or (b, 0) without masks
    target_idx: Tensor  # (b, M, T), or (b, 0, 0)
    index: Tensor  # (b,) which pictures of the set, on the CPU


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, n: int) -> Tensor:
    """The order of one epoch, (n,)."""
    return torch.randperm(n, generator=generator_for(seed, "order", epoch))


@lru_cache(maxsize=2)
def draw_step(plan: Plan, step: int) -> tuple[Tensor, CropRandomness, Tensor, Tensor]:
    """Pictures (B,), crops and masks of one step, for the whole batch: the same for everyone."""
    n, first = len(plan.index), step * plan.batch_size
    places = torch.arange(first, first + plan.batch_size)  # in the endless sequence of epochs
    chosen = torch.empty_like(places)
    for epoch in range(int(places[0]) // n, int(places[-1]) // n + 1):
        here = places // n == epoch
        chosen[here] = epoch_order(plan.seed, epoch, n)[places[here] % n]
    crops = CropRandomness.draw(plan.batch_size, plan.flip, generator_for(plan.seed, "crop", step))
    if plan.masks is None:
        empty = torch.empty(plan.batch_size, 0, dtype=torch.int64)
        return plan.index[chosen], crops, empty, empty[..., None]
    masks = plan.masks.sample(plan.batch_size, generator_for(plan.seed, "masks", step))
    return plan.index[chosen], crops, *masks


def share(plan: Plan, micro: int) -> slice:
    """Which places of the batch are this process's micro-batch number `micro`."""
    first = (micro * plan.world_size + plan.rank) * plan.micro_batch
    return slice(first, first + plan.micro_batch)


class _Stream(torch.utils.data.Dataset):
    """Micro-batches, decoded, cropped, augmented and masked by a worker process."""

    def __init__(self, data: Pictures | Folder, plan: Plan):
        self.data, self.plan = data, plan

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor, set[str]]:
        step, micro = key
        index, crops, context_idx, target_idx = draw_step(self.plan, step)
        part = share(self.plan, micro)
        index, crops, size = index[part], crops[part], self.data.img_size
        images, broken = memory_for(len(index), size), set()
        # What the smallest crop of the narrowest kind needs, so that none is enlarged.
        least = math.ceil(size / math.sqrt(self.plan.crop_scale[0] * 3 / 4))
        for i, number in enumerate(index.tolist()):
            picture = self.data.open(number, broken, least)
            if self.plan.crop_scale == (1.0, 1.0):
                images[i] = centre_crop(picture, size)
            else:
                width, height = picture.size
                box = crops[i : i + 1].boxes(height, width, self.plan.crop_scale)
                top, left, h, w = box[0].tolist()
                picture = picture.crop((left, top, left + w, top + h))
                images[i] = to_tensor(picture.resize((size, size), Image.Resampling.BILINEAR))
            if crops.flip[i]:
                images[i] = images[i].flip(-1)
            if self.plan.augment is not None:
                key = (self.plan.seed, "augment", step, part.start + i)
                with torch.random.fork_rng(devices=[]):  # whoever draws, and after what else
                    torch.default_generator.manual_seed(generator_for(*key).initial_seed())
                    images[i] = to_tensor(self.plan.augment(to_picture(images[i])))
        return images, context_idx[part], target_idx[part], index, broken


def train_batches(
    data: Pictures | Folder,
    plan: Plan,
    steps: range,
    device: str | torch.device = "cpu",
    workers: int = 0,
) -> Iterator[Batch]:
    """The micro-batches of this process for the given steps, `accum_steps` for each.

    In memory: indices, crops and masks are drawn one step ahead in a thread, pictures are cropped
    on the device. On disk, or to augment: `workers` processes do that. Raises UserError when more
    than 1 % of a folder's pictures cannot be read.
    """
    keys = ((step, micro) for step in steps for micro in range(plan.accum_steps))
    if isinstance(data, Pictures):
        if plan.augment is None:
            yield from _from_memory(data, plan, keys, device)
            return
        data = dataclasses.replace(data, images=data.images.cpu())  # for the workers
    loader = DataLoader(
        _Stream(data, plan),
        sampler=keys,
        batch_size=None,  # a worker makes a whole micro-batch
        num_workers=workers,
        worker_init_fn=_only_parent_signals,
        pin_memory=torch.device(device).type == "cuda",
    )
    broken: set[str] = set()
    for images, context_idx, target_idx, index, new in _loaded(loader):
        broken = report_broken(new, broken, len(data))
        images, context_idx, target_idx = (
            x.to(device, non_blocking=True) for x in (images, context_idx, target_idx)
        )
        yield Batch(normalize(images), context_idx, target_idx, index)


def _only_parent_signals(_: int) -> None:
    """For worker processes: a terminal or Slurm signals them too, but the parent decides.

    Where the system does not tell who sent a SIGTERM (macOS), it ends the worker as before.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait_for_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            continue
        os._exit(0)

    threading.Thread(target=wait_for_parent, daemon=True).start()


def _loaded(loader: DataLoader) -> Iterator[tuple]:
    """What a loader gives. It puts a worker's traceback into the message of a UserError: undone."""
    try:
        yield from loader
    except UserError as error:
        raise UserError(str(error).splitlines()[-1].removeprefix("data.UserError: ")) from error
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        raise UserError(
            "no room in /dev/shm for the batches of worker processes: give the container more of "
            "it (docker run --ipc=host), or lower --workers"
        ) from error


def _from_memory(data: Pictures, plan: Plan, keys: Iterator, device) -> Iterator[Batch]:
    size = data.images.shape[-1]

    def prepare(key: tuple[int, int]) -> tuple[Tensor, ...]:
        index, crops, context_idx, target_idx = draw_step(plan, key[0])
        part = share(plan, key[1])
        index, crops = index[part], crops[part]
        side = torch.full_like(index, size)
        boxes = crops.boxes(side, side, plan.crop_scale)
        prepared = (index, boxes, crops.flip, context_idx[part], target_idx[part])
        pin = torch.device(device).type == "cuda"
        return tuple(x.pin_memory() if pin else x for x in prepared)

    with ThreadPoolExecutor(max_workers=1) as thread:
        coming = [thread.submit(prepare, key) for key in itertools.islice(keys, 1)]
        while coming:
            prepared = coming.pop().result()
            coming = [thread.submit(prepare, key) for key in itertools.islice(keys, 1)]
            index, boxes, flip, context_idx, target_idx = (
                x.to(device, non_blocking=True) for x in prepared
            )
            images = normalize(data.centre(index))
            if plan.crop_scale != (1.0, 1.0) or plan.flip:
                images = crop_resize(images, boxes, flip, size)
            yield Batch(images, context_idx, target_idx, prepared[0])


def eval_batches(
    data: Pictures | Folder,
    index: Tensor,
    batch_size: int = 500,
    device: str | torch.device = "cpu",
    workers: int = 0,
    size: int | None = None,
) -> Iterator[Tensor]:
    """The pictures `index`, as evaluation sees them: float32 (b, 3, S, S), normalized.

    Those in memory are enlarged to `size`, for encoders that were made for larger ones.
    """
    parts = index.split(batch_size) if len(index) else ()
    if isinstance(data, Pictures):
        for part in parts:
            yield enlarge(normalize(data.centre(part).to(device)), size)
        return
    broken: set[str] = set()
    loader = DataLoader(
        _Centres(data),
        sampler=parts,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_only_parent_signals,
        pin_memory=torch.device(device).type == "cuda",
    )
    for images, new in _loaded(loader):
        broken = report_broken(new, broken, len(data))
        yield normalize(images.to(device, non_blocking=True))


def enlarge(images: Tensor, size: int | None) -> Tensor:
    """(B, C, S, S) to (B, C, size, size), bicubic; as they are, if they have that size or None."""
    if size in (None, images.shape[-1]):
        return images
    return F.interpolate(images, (size, size), mode="bicubic", align_corners=False)


class _Centres(torch.utils.data.Dataset):
    """For worker processes: `centre` under the name that DataLoader calls."""

    def __init__(self, data: Folder):
        self.data = data

    def __getitem__(self, index: Tensor) -> tuple[Tensor, set[str]]:
        broken: set[str] = set()
        return self.data.centre(index, broken), broken
