"""What the probes cost: seconds for 50,000 + 10,000 made features of the size of CIFAR-10's.

    python tests/benchmark/probe_speed.py

The aim on two CPU cores: 20-NN at width 192 in under 5 s, and the linear sweep (2 features, 192 and
768 wide, x 2 heads x 5 rates x 2 decays x 3 seeds = 120 classifiers) in under 3 minutes.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import record

import probe


def made_features(n: int, width: int, classes: int = 10) -> tuple[Tensor, Tensor]:
    """Overlapping clouds whose directions vary as unevenly as those of real features."""
    g = torch.Generator().manual_seed(width)
    y = torch.randint(classes, (n,), generator=g)
    x = torch.randn(n, width, generator=g) + 0.2 * torch.randn(classes, width, generator=g)[y]
    return x * torch.logspace(0, -3, width), y


def seconds(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """The best of several: others may be using the machine."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time of kNN and of the linear sweep.")
    parser.add_argument("--train", type=int, default=50_000)
    parser.add_argument("--test", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)

    last, y = made_features(args.train + args.test, 192)
    four, _ = made_features(args.train + args.test, 768)
    last, four, y = last.to(device), four.to(device), y.to(device)
    n = args.train
    train, val = ({"last": last[part], "last 4": four[part]} for part in (slice(n), slice(n, None)))

    print(f"{args.train:,} + {args.test:,} features, {args.threads} threads, {device}")
    load = os.getloadavg()[0]
    jobs = {
        "20-NN, width 192": lambda: probe.knn(last[:n], y[:n], last[n:]),
        "linear sweep, 120 classifiers": lambda: probe.linear_probe(
            train, y[:n], val, y[n:], rates=(0.01, 0.03, 0.1, 0.3, 1.0), decays=(0.0, 1e-3)
        ),
        "RankMe, width 192": lambda: probe.rankme(last[:n]),
    }
    took = {}
    for name, work in jobs.items():
        took[name] = round(seconds(work, args.repeats, device), 2)
        print(f"{name:30s} {took[name]:8.2f} s", flush=True)
    record.write(
        "probe_speed", "python tests/benchmark/probe_speed.py",
        train=args.train, test=args.test, load=round(load, 1), seconds=took,
    )  # fmt: skip


if __name__ == "__main__":
    main()
