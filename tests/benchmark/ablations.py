"""The paper's Tables 6 to 14 in small: a run for each row, and a line in results/ablations.csv.

    python tests/benchmark/ablations.py --minutes 60                          vit_nano on shapes
    python tests/benchmark/ablations.py --minutes 600 --model vit_tiny --data cifar10 --steps 10000
    python tests/benchmark/ablations.py --minutes 60 --tables 6,7 --seeds 3
    python tests/benchmark/ablations.py --minutes 0                           show the commands

Each line is written when its run is done, and rows that are there are not run again: what was
stopped goes on where it was. Rows with the same options, such as the default that stands in eight
tables, are run once.
"""

import csv
import json
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data import UserError, option, parse_options, run_script, writing  # noqa: E402
from ijepa import MODELS  # noqa: E402

COLUMNS = ("table", "setting", "seed", "knn", "linear", "data", "model", "steps", "command")


@dataclass(frozen=True)
class AblationConfig:
    """Which rows, of which model, for how long."""

    minutes: float | None = option(None, "start no run that would end after this; 0: none")
    model: str = option("vit_nano", "which model", MODELS)
    data: str = option("shapes", "which pictures, as for train.py")
    steps: int = option(500, "of each run")
    seeds: int = option(1, "0, 1, ...: all rows with the first before any with the second")
    tables: str = option("6,7,8,9,10,11,12,13,14", "which tables")
    out: str = option("results/ablations.csv", "the file to add to")
    options: str = option("", "further options of train.py for every run, in quotation marks")


def rows(model: str) -> list[tuple[int, str, list[str]]]:
    """Table, setting and options of train.py for each row; settings as in results/paper.csv."""
    config = MODELS[model].config
    found = [(6, name, ["--masks", name]) for name in ("rasterized", "block", "random")]
    found.insert(0, (6, "multiblock", []))
    found += [(7, "representation", []), (7, "pixels", ["--target", "pixels"])]
    for low, high in ((0.075, 0.2), (0.1, 0.2), (0.125, 0.2), (0.15, 0.2), (0.2, 0.25), (0.2, 0.3)):
        scale = ["--target-scale", str(low), str(high)] if (low, high) != (0.15, 0.2) else []
        found.append((8, f"{low}-{high}", scale))
    for low in (0.4, 0.65, 0.75, 0.85):
        scale = ["--context-scale", str(low), "1.0"] if low != 0.85 else []
        found.append((9, f"{low}-1.0", scale))
    for count in (1, 2, 3, 4):
        found.append((10, str(count), ["--num-targets", str(count)] if count != 4 else []))
    found += [(11, "output", []), (11, "input", ["--target-mask", "input"])]
    half = str(max(1, config.predictor_depth // 2))
    found += [(12, "half", ["--predictor-depth", half]), (12, "full", [])]
    for setting, final in (("rising", "0.4"), ("fixed", "0.05")):
        start = "0.04" if setting == "rising" else "0.05"
        found.append((13, setting, ["--weight-decay", start, "--final-weight-decay", final]))
    found += [(14, "narrow", []), (14, "wide", ["--predictor-dim", str(config.embed_dim)])]
    return found


def commands(config: AblationConfig) -> list[dict]:
    """What there is to run, in order: table, setting, seed, data, model, steps, command."""
    try:
        tables = {int(table) for table in config.tables.split(",")}
    except ValueError as error:
        raise UserError(f"--tables {config.tables}: give numbers, such as 6,7") from error
    if unknown := tables - set(range(6, 15)):
        raise UserError(f"--tables {config.tables}: there are 6 to 14, not {min(unknown)}")
    found = []
    for seed in range(config.seeds):
        for table, setting, options in rows(config.model):
            if table in tables:
                shown = "FOLDER" if Path(config.data).name != config.data else config.data
                words = ["python", "train.py", "--model", config.model, "--data", shown]
                words += ["--steps", str(config.steps), "--seed", str(seed), *options]
                words += shlex.split(config.options)
                row = {"table": str(table), "setting": setting, "seed": str(seed)}
                row |= {"data": Path(config.data).name, "model": config.model}
                row |= {"steps": str(config.steps), "command": shlex.join(words)}
                found.append(row)
    return found


def read(path: Path) -> list[dict]:
    """The lines of a CSV file; none if there is no file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def add(path: Path, row: dict) -> None:
    """One line at the end of the file."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with open(path, "a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(row)


def measure(command: str, data: str) -> dict[str, float]:
    """Run it: 20-NN and linear probe of the trained encoder on the first task, in percent."""
    with tempfile.TemporaryDirectory() as folder:
        words = [data if word == "FOLDER" else word for word in shlex.split(command)]
        words = [sys.executable, *words[1:], "--out", f"{folder}/run"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{command} failed: {done.stderr.strip().splitlines()[-1]}")
        found = json.loads(Path(folder, "run", "result.json").read_text())
    row = next(row for row in found if row["features"] == "trained")
    return {name: round(row[name], 2) for name in ("knn", "linear")}


def main() -> None:
    config, _ = parse_options(AblationConfig, __doc__)
    if config.minutes is None:
        raise UserError("for how long? Give --minutes, 0 to see the commands only")
    out, start, longest = ROOT / config.out, time.perf_counter(), 0.0
    key = ("table", "setting", "seed", "command")
    for row in commands(config):
        there = {tuple(old[name] for name in key): old for old in read(out)}
        if tuple(row[name] for name in key) in there:
            continue
        print(f"Table {row['table']}, {row['setting']}: {row['command']}", flush=True)
        same = [old for old in there.values() if old["command"] == row["command"]]
        if same:
            figures = {name: same[0][name] for name in ("knn", "linear")}
        else:
            begin = time.perf_counter()
            if begin - start + longest >= 60 * config.minutes:
                if config.minutes:
                    print(f"stopped: {config.minutes:g} minutes would not do for one more")
                    return
                continue
            figures = measure(row["command"], config.data)
            longest = max(longest, time.perf_counter() - begin)
        add(out, row | figures)
        print(f"    20-NN {figures['knn']} %, linear {figures['linear']} %", flush=True)


if __name__ == "__main__":
    run_script(main)
