"""Streamed pictures: images/s of one core, against decoding and resizing them and nothing else.

    python tests/benchmark/stream.py FOLDER              a folder with train/<class>/<picture>
    python tests/benchmark/stream.py FOLDER --out decoding

`bare`: open, decode, crop, resize, with Pillow, the same crops, one thread. `batches`: what a
worker process does for training, whole micro-batches with masks. `one worker`: the same as the
training loop gets it, through a process of its own. All take turns. `waited`: for what share of a
step the loop waits for pictures if a GPU's step takes a tenth longer than to load a batch: 0 is all
of it hidden.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import record  # noqa: E402

import data  # noqa: E402
from data import Folder, Plan, option, parse_options, run_script  # noqa: E402
from ijepa import MaskCollator  # noqa: E402


@dataclass(frozen=True)
class StreamConfig:
    """Which pictures."""

    folder: str = option("data/imagenet", "train/<class>/<picture>", positional=True)
    img_size: int = option(224, "pixels")
    batch_size: int = option(32, "pictures")
    batches: int = option(6, "in a turn")
    turns: int = option(5, "between which the ways alternate")
    out: str | None = option(None, "write results/<out>.json")


def bare(crops: list[tuple[Path, tuple]], size: int) -> int:
    """Decode, crop and resize one batch of files and boxes; how many they are."""
    for path, box in crops:
        with Image.open(path) as picture:
            crop = picture.convert("RGB").crop(box)
        np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR))
    return len(crops)


def boxes(folder: Folder, plan: Plan, step: int) -> list[tuple[Path, tuple]]:
    """Files and crops of a step."""
    index, crops, *_ = data.draw_step(plan, step)
    found = []
    for i, number in enumerate(index.tolist()):
        with Image.open(folder.files[number]) as picture:
            width, height = picture.size
        box = crops[i : i + 1].boxes(height, width, plan.crop_scale)
        top, left, h, w = box[0].tolist()
        found.append((folder.files[number], (left, top, left + w, top + h)))
    return found


def rate(take: Callable[[int], int], steps: range) -> float:
    """Images/s."""
    start = time.perf_counter()
    return sum(take(step) for step in steps) / (time.perf_counter() - start)


@mock.patch.object(data, "normalize", lambda images: images)  # which a GPU does meanwhile
def measure(config: StreamConfig) -> dict:
    """Rates of the three ways, and how much of a step is waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    files, labels, classes = data.scan_folder(Path(config.folder), "train")
    folder = Folder(files, {"class": labels}, {"class": classes}, config.img_size)
    masks = MaskCollator(config.img_size // 16)
    plan = Plan(0, torch.arange(len(folder)), config.batch_size, 1, masks)
    steps = range(config.batches)
    crops = [boxes(folder, plan, step) for step in steps]
    worker = data._Stream(folder, plan)
    endless = data.train_batches(folder, plan, range(10**6), workers=1)
    ways = {
        "bare": lambda step: bare(crops[step], folder.img_size),
        "batches": lambda step: len(worker[step, 0][0]),
        "one worker": lambda _: len(next(endless).images),
    }
    found = {name: [] for name in ways}
    for take in ways.values():
        take(0)
    for _ in range(config.turns):
        for name, take in ways.items():
            if name == "one worker":  # what it had made ahead while others ran does not count
                for _ in range(3):
                    take(0)
            found[name].append(rate(take, steps))
    median = {name: statistics.median(rates) for name, rates in found.items()}

    step_s = config.batch_size / median["one worker"] * 1.1
    waited = 0.0
    for _ in steps:
        time.sleep(step_s)  # the GPU at work
        start = time.perf_counter()
        next(endless)
        waited += time.perf_counter() - start
    endless.close()
    torch.set_num_threads(threads)
    return {
        "images": len(folder),
        "images_per_s": {name: round(x, 1) for name, x in median.items()},
        "of_bare": {name: round(x / median["bare"], 3) for name, x in median.items()},
        "waited": round(waited / (step_s * len(steps)), 3),
    }


def main() -> None:
    config, _ = parse_options(StreamConfig, __doc__)
    found = measure(config)
    for name, value in found["images_per_s"].items():
        print(f"{name:12} {value:8.1f} images/s  {100 * found['of_bare'][name]:5.1f} % of bare")
    print(f"waited for {100 * found['waited']:.1f} % of a step that takes a tenth longer")
    if config.out:
        words = ["FOLDER" if word == config.folder else word for word in sys.argv[1:]]
        command = " ".join(["python tests/benchmark/stream.py", *words])
        record.write(config.out, command, **found)


if __name__ == "__main__":
    run_script(main)
