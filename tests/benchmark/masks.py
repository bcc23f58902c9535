"""What masks cost: microseconds an image, on one thread.

    python tests/benchmark/masks.py

The aim is at most 5 us an image on an 8x8 grid and at most 20 us on 16x16, at batch 2,048.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ijepa import MaskCollator


def microseconds_per_image(grid: int, batch_size: int, repeats: int) -> float:
    """The median over `repeats` batches of the time that one takes, divided by its images."""
    masks, generator, times = MaskCollator(grid), torch.Generator().manual_seed(0), []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        masks.sample(batch_size, generator)  # warm up
        for _ in range(repeats):
            start = time.perf_counter()
            masks.sample(batch_size, generator)
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return statistics.median(times) / batch_size * 1e6


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time of the mask sampler on one thread.")
    parser.add_argument("--grids", type=int, nargs="+", default=[8, 14, 16])
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args(argv)
    for grid in args.grids:
        cost = microseconds_per_image(grid, args.batch_size, args.repeats)
        print(f"{grid:2d}x{grid:<2d}  {cost:6.1f} us/image")


if __name__ == "__main__":
    main()
