"""The paper's ablations at a small scale: one training run per row and seed, one table.

    python scripts/ablations.py --data cifar10 --epochs 15 --seeds 0 1
    python scripts/ablations.py --data cifar10 --epochs 15 --only pixels random

Runs are in runs/ablations. A finished run is not repeated and a stopped one resumes, so the command
can be given again after an interruption. The table is also written to runs/ablations/ablations.csv.
"""

import csv
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's files

from data import UserError, atomic_write, option, parse_args, run_main

ROOT = Path(__file__).resolve().parents[1]

ROWS = {  # options of train.py that differ from the method
    "I-JEPA": [],
    "pixels": ["--target", "pixels"],  # Table 7
    "rasterized": ["--masks", "rasterized"],  # Table 6
    "block": ["--masks", "block"],
    "random": ["--masks", "random"],
    "1 target": ["--num-targets", "1"],  # Table 10
    "2 targets": ["--num-targets", "2"],
    "3 targets": ["--num-targets", "3"],
    "input mask": ["--target-mask", "input"],  # Table 11
    "layer norm": ["--target-norm", "layer"],  # ours: targets not whitened (D10)
}


@dataclass(frozen=True)
class AblationsConfig:
    """Options of this script."""

    data: str = option("cifar10", "dataset or folder, as for train.py")
    data_dir: str = option("data", "folder of the named datasets")
    model: str = option("vit_nano", "model of train.py")
    epochs: float = option(15.0, "epochs of every run")
    seeds: tuple[int, ...] = option((0, 1), "one run of each row per seed")
    only: tuple[str, ...] = option((), "these rows; default: all")
    out: str = option("runs/ablations", "folder of the runs")


def train_once(config: AblationsConfig, name: str, seed: int) -> dict:
    """Train one row with one seed, or read its result: accuracies of the trained encoder."""
    out = Path(config.out, f"{name.replace(' ', '_')}_seed{seed}")
    if not (out / "result.json").exists():
        command = [sys.executable, str(ROOT / "train.py"), "--out", str(out)]
        if (out / "last.pt").exists():
            command += ["--resume"]
        else:
            command += ["--model", config.model, "--data", config.data, "--seed", str(seed)]
            command += ["--data-dir", config.data_dir, "--epochs", str(config.epochs), *ROWS[name]]
        print("+", *command, flush=True)
        if subprocess.run(command).returncode:
            raise UserError(f"the run {out} failed, see above; give the same command to resume")
    rows = json.loads((out / "result.json").read_text())["rows"]
    return next(row for row in rows if row["name"] == "trained")


def main() -> None:
    config = parse_args(AblationsConfig, __doc__)
    names = config.only or tuple(ROWS)
    if unknown := set(names) - ROWS.keys():
        raise UserError(f"no row {sorted(unknown)}: choose from {', '.join(ROWS)}")
    results = []
    for seed in config.seeds:
        for name in names:
            row = train_once(config, name, seed)
            metrics = {key: f"{row[key]:.4f}" for key in ("knn", "linear", "linear_4", "rankme")}
            results.append({"row": name, "seed": seed, "epochs": config.epochs} | metrics)
    with atomic_write(Path(config.out, "ablations.csv")) as temporary, temporary.open("w") as file:
        writer = csv.DictWriter(file, results[0])
        writer.writeheader()
        writer.writerows(results)
    print(
        f"{'':12}{'20-NN':>8}{'linear':>8}{'last 4':>8}   validation accuracy, %, mean over seeds"
    )
    for name in names:
        rows = [row for row in results if row["row"] == name]
        means = [sum(float(r[k]) for r in rows) / len(rows) for k in ("knn", "linear", "linear_4")]
        print(f"{name:12}" + "".join(f"{100 * mean:8.1f}" for mean in means))


if __name__ == "__main__":
    run_main(main)
