"""From the command line to the first step of training: seconds, `vit_tiny` on CIFAR-10.

    python tests/benchmark/start.py
    python tests/benchmark/start.py --out start_h200

CIFAR-10 is noise here, in the files of the original. `gradient`: until the first batch has gone
forward and backward (compiled, on a GPU). `step`: until the first step of the optimizer, after the
untrained encoder has been evaluated for the first row of the log. The first of `--turns` starts
may have to read PyTorch from disk; the median is reported.
"""

import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import record  # noqa: E402

from data import UserError, option, parse_options, run_script  # noqa: E402

# What runs in the new process: train.py, with a clock at two places, and ended at the second.
RUNNER = """
import time
begin = time.perf_counter()
import json, os, sys
import torch, torchvision
torchvision.datasets.CIFAR10._check_integrity = lambda _: True
torchvision.datasets.cifar.check_integrity = lambda *_: True
import train
seconds = {}
measure = train.step_seconds
def first_gradient(*arguments):
    arguments[0](arguments[1]).item()
    seconds.setdefault("gradient", time.perf_counter() - begin)
    return measure(*arguments)
train.step_seconds = first_gradient
class Clock(torch.optim.AdamW):
    def step(self, *arguments):
        super().step(*arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds["step"] = time.perf_counter() - begin
        print("SECONDS", json.dumps(seconds), flush=True)
        os._exit(0)
torch.optim.AdamW = Clock
train.main()
"""


@dataclass(frozen=True)
class StartConfig:
    """How often."""

    turns: int = option(3, "starts")
    model: str = option("vit_tiny", "which model")
    out: str | None = option(None, "write results/<out>.json")


def fake_cifar(root: Path) -> None:
    """50,000 + 10,000 pictures of noise in the files of CIFAR-10."""
    folder, rng = root / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        pixels = rng.integers(0, 256, (10_000, 3072), dtype=np.uint8)
        part = {"data": pixels, "labels": rng.integers(0, 10, 10_000).tolist()}
        (folder / name).write_bytes(pickle.dumps(part))
    names = {"label_names": [str(i) for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))


def measure(config: StartConfig) -> list[dict]:
    """Seconds to the first gradient and to the first step, of each start."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        fake_cifar(Path(folder, "data"))
        for turn in range(config.turns):
            words = [sys.executable, "-c", RUNNER, "--model", config.model, "--data", "cifar10"]
            words += ["--data-dir", f"{folder}/data", "--out", f"{folder}/run{turn}"]
            # What is compiled is compiled anew.
            fresh = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/compiled{turn}"}
            done = subprocess.run(words, cwd=ROOT, env=fresh, capture_output=True, text=True)
            lines = [line for line in done.stdout.splitlines() if line.startswith("SECONDS")]
            if not lines:
                raise UserError(f"train.py did not take a step: {done.stderr.strip()[-300:]}")
            found.append(json.loads(lines[0].removeprefix("SECONDS ")))
    return found


def main() -> None:
    config, _ = parse_options(StartConfig, __doc__)
    found = measure(config)
    median = {key: round(statistics.median(x[key] for x in found), 1) for key in found[0]}
    print(f"first gradient after {median['gradient']} s, first step after {median['step']} s")
    if config.out:
        command = f"python tests/benchmark/start.py --out {config.out}"
        record.write(config.out, command, model=config.model, seconds=median, starts=found)


if __name__ == "__main__":
    run_script(main)
