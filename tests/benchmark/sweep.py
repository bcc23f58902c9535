"""Runs of train.py one after another within a time limit, and a line of a CSV after each.

    python tests/benchmark/sweep.py LIST --minutes 25                one seed of each configuration
    python tests/benchmark/sweep.py LIST --minutes 25 --seeds 3      all with seed 0 first, then 1
    python tests/benchmark/sweep.py LIST --minutes 0                 show the commands, run nothing
    python tests/benchmark/sweep.py LIST --minutes 9 --options "--data FOLDER" --keep runs/sweep
    python tests/benchmark/sweep.py --show                           what is in results/runs.csv
    python tests/benchmark/sweep.py LIST --curves FILE.png           accuracy against minutes

LIST is a text file with a line for each configuration: a name, and options of train.py.

    # what this list is for
    base:
    faster: --lr 2e-3
    released masks: tests/benchmark/released_masks.py --lr 2e-3    # a script with these options

All lines are checked before the first is run. A run that fails leaves a line that says why, and
the next one starts. A run is not started if it would not end in time, going by the longest one of
its kind on this hardware; what is running when time is up, or at SIGTERM or Ctrl-C, is told to save
itself and leaves a line as well. What has a line is not run again: a list that was stopped goes on
where it was. Two processes may add to one file, but would run the same list twice.

The columns:

    tag         its name in the list
    command     what was run; FOLDER stands for a path of this machine
    seed, model, data    `data` is the name of the set or of its folder
    note        --note: for example, which copy of the pictures
    steps, epochs        how far it came: optimizer steps, passes over the training pictures
    minutes     wall time of the whole process: data, compilation, training, evaluation, probes
    loss        training loss, mean over the steps of the log's last line
    val_loss, rankme     at the last evaluation
    knn, linear          accuracy (%) of the trained target encoder on held-out pictures at the end,
                by task: JSON, {"kind": 92.1, ...}. Never on test data
    baselines   the same for raw pixels and the untrained encoder: {"untrained": {"kind": ...
    curve       the evaluations: a JSON list of {step, epoch, minutes, train_minutes, loss,
                val_loss, knn, rankme, feature_std}. `minutes`: since the process began, with all
                that is in it; `train_minutes`: the steps alone, without compilation and evaluation
    config      the full configuration, JSON, with `architecture`
    device      device, precision and compilation, as train.py says
    hardware, torch, date    where, with what, and when it began
    error       empty, or one line: why it ended early. Figures are then those before the end
"""

import csv
import dataclasses
import fcntl
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from record import hardware  # noqa: E402

import probe  # noqa: E402
import train  # noqa: E402
from data import (  # noqa: E402
    StoppedError,
    UserError,
    option,
    parse_options,
    run_script,
    whole_file,
    writing,
)

COLUMNS = (
    "tag", "command", "seed", "model", "data", "note", "steps", "epochs", "minutes", "loss",
    "val_loss", "rankme", "knn", "linear", "baselines", "curve", "config", "device", "hardware",
    "torch", "date", "error",
)  # fmt: skip
OURS = ("--seed", "--out", "--resume", "--auto-resume")  # given by this script
KIND = ("model", "data", "epochs", "steps", "batch_size", "eval_every", "eval_images")
GRACE = 60  # seconds for a run to save itself


@dataclass(frozen=True)
class SweepConfig:
    """Which list, for how long, and where to."""

    file: str | None = option(None, "the list, see above", positional=True)
    minutes: float | None = option(None, "for all of it; 0: show the commands, run nothing")
    seeds: int = option(1, "0, 1, ...: all lines with the first before any with the second")
    options: str = option("", "options of train.py for every line, in quotation marks")
    out: str = option("results/runs.csv", "the file to add to")
    keep: str | None = option(None, "a folder for the runs' folders (default: removed)")
    note: str = option("", "what else to say of these runs, such as which copy of the pictures")
    again: bool = option(False, "repeat what failed or was stopped")
    show: bool = option(False, "print the lines of --out as a table, seeds together; run nothing")
    curves: str | None = option(
        None, "a picture of the runs of LIST that are in --out; run nothing"
    )


@dataclass(frozen=True)
class Run:
    """A line of the CSV to be."""

    tag: str
    seed: int
    words: tuple[str, ...]  # the script in this project, and its options

    @property
    def command(self) -> str:
        """As it is shown: without paths of this machine."""
        words = list(self.words)
        for i, word in enumerate(words[:-1]):
            if word in ("--data", "--data-dir") and Path(words[i + 1]).name != words[i + 1]:
                words[i + 1] = "FOLDER"
        return shlex.join(["python", *words])


def read_list(path: Path) -> list[tuple[str, list[str]]]:
    """The lines of a list: name, and words of the command after `python`, or after train.py."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a list of configurations: {error}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        line = line.partition("#")[0].strip()
        tag, colon, options = line.partition(":")
        if line and (not colon or line.startswith("--")):
            raise UserError(f"{path}, line {number}: expected NAME: OPTIONS, not {line}")
        if line:
            found.append((tag.strip(), shlex.split(options)))
    if not found:
        raise UserError(f"{path} has no configurations: a line for each, NAME: OPTIONS")
    return found


def make_runs(lines: Iterable[tuple[str, list[str]]], common: list[str], seeds: int) -> list[Run]:
    """All lines with seed 0, then all with seed 1, and so on.

    Args:
        lines: name and words of each; the first word may be a script other than train.py.
        common: options of all lines. They come first, so that a line may overrule them.
    """
    runs = []
    for seed in range(seeds):
        for tag, words in lines:
            named = bool(words) and not words[0].startswith("--")
            script, options = (words[0], words[1:]) if named else ("train.py", words)
            words = [script, *common, "--seed", str(seed), *options]
            # `--data=x` is two words, too, so that there is one place where a path can be.
            parts = (word.split("=", 1) if word.startswith("--") else [word] for word in words)
            words = tuple(part for word in parts for part in word)
            for name in OURS:
                if words.count(name) != (name == "--seed"):
                    raise UserError(f"{tag}: {name} is given by this script: leave it out")
            runs.append(Run(tag, seed, words))
    return runs


def common_options(command: str) -> str:
    """What all lines of a list share: the command between the script and --seed."""
    return command.partition(" --seed ")[0].split(" ", 2)[2]


def configuration(run: Run) -> dict:
    """The full configuration of a run, without paths. Raises UserError if train.py would."""
    if not (ROOT / run.words[0]).is_file():
        raise UserError(f"{run.tag}: there is no {run.words[0]} in this project")
    try:
        config, architecture, _ = train.configure(list(run.words[1:]))
    except UserError as error:
        raise UserError(f"{run.tag}: {error}") from error
    found = dataclasses.asdict(config) | {"data": Path(config.data).name}
    for name in ("out", "data_dir", "resume", "auto_resume"):
        del found[name]
    return found | {"architecture": dataclasses.asdict(architecture)}


def kind(config: dict) -> tuple:
    """Runs of a kind take about as long: model, pictures, steps, batch, evaluations."""
    sizes = config["architecture"]["img_size"], config["architecture"]["patch_size"]
    return (*(config[name] for name in KIND), *sizes)


def read(path: Path) -> list[dict]:
    """The lines of a CSV file; none if there is no file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        rows = []
        for row in reader:
            if None in row or None in row.values():
                raise UserError(f"{path}, line {reader.line_num}: not whole; remove that line")
            rows.append(row)
    return rows


def add(path: Path, row: dict) -> None:
    """One line at the end of the file, in one piece whoever else adds to it."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
            if file.seek(0, os.SEEK_END) == 0:
                writer.writeheader()
            writer.writerow(row)
            file.write(text.getvalue().encode())


def measure(run: Run, config: dict, seconds: float, folder: Path) -> tuple[dict, int]:
    """Run it for so many seconds at most: its line, and the signal that ended it, or 0.

    Args:
        folder: the run's folder to be.
    """
    words = [sys.executable, str(ROOT / run.words[0]), *run.words[1:], "--out", str(folder)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}  # to see evaluations when they are done
    began, minutes, device, stopped = time.perf_counter(), {}, "", []
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
            start_new_session=True,  # Ctrl-C comes through this process, once
        ) as process,
    ):  # fmt: skip

        def stop(number: int = 0, _=None) -> None:
            if not stopped:
                stopped.append(number)
                process.terminate()

        timers = [threading.Timer(seconds, stop), threading.Timer(seconds + GRACE, process.kill)]
        before = {number: signal.signal(number, stop) for number in train.Signals.NUMBERS}
        try:
            for timer in timers:
                timer.start()
            for line in process.stdout:
                if found := re.match(r"step +(\d+) ", line):
                    minutes[int(found[1])] = (time.perf_counter() - began) / 60
                device = device or "".join(re.findall(r"^device +(.*)", line))
            process.wait()
        finally:
            for timer in timers:
                timer.cancel()
            for number, handler in before.items():
                signal.signal(number, handler)
            process.kill()  # nothing, if it has ended
        took = (time.perf_counter() - began) / 60
        errors.seek(0)
        said = re.split(r"[\r\n]+", errors.read().strip())[-1]
    error, number = "", stopped[0] if stopped else 0
    if process.returncode:
        error = said.replace(str(folder), "RUN").replace(str(ROOT), ".") or "ended"
        for word, shown in zip(run.words, shlex.split(run.command)[1:], strict=True):
            error = error if word == shown else error.replace(word, shown)
        error += f" (exit code {process.returncode})"
        if stopped:
            why = signal.Signals(number).name if number else "the time limit"
            error = f"stopped by {why} after {took:.1f} minutes"
    row = {"tag": run.tag, "command": run.command, "seed": run.seed, "device": device}
    row |= {"minutes": round(took, 3), "error": error}
    return row | figures(folder, config["batch_size"], minutes), number


def figures(folder: Path, batch_size: int, minutes: dict[int, float]) -> dict:
    """The columns that come from a run's folder, as far as it has come.

    Args:
        minutes: when the evaluation after a step was done.
    """
    there = (folder / "log.csv").exists()
    log = train.Log(folder, sys.maxsize).rows if there else []  # without a line cut in the middle
    spent, step, curve = 0.0, 0, []
    for row in log:
        if row["images_per_s"]:
            spent += (int(row["step"]) - step) * batch_size / float(row["images_per_s"]) / 60
            step = int(row["step"])
        if row["val_loss"]:
            names = ("epoch", "loss", "val_loss", "knn", "rankme", "feature_std")
            point = {name: float(row[name]) if row[name] else None for name in names}
            when = minutes.get(int(row["step"]))
            times = {"minutes": when and round(when, 3), "train_minutes": round(spent, 3)}
            curve.append({"step": int(row["step"])} | times | point)
    found = {"steps": 0, "epochs": 0, "curve": json.dumps(curve)}
    if log:
        found |= {"steps": log[-1]["step"], "epochs": log[-1]["epoch"], "loss": log[-1]["loss"]}
    if curve:
        found |= {name: curve[-1][name] for name in ("val_loss", "rankme")}
    if not (folder / "result.json").exists():
        return found
    tables: dict[str, dict] = {}
    for row in json.loads((folder / "result.json").read_text()):
        accuracies = {name: round(row[name], 2) for name in ("knn", "linear")}
        tables.setdefault(row["features"], {})[row["task"]] = accuracies
    trained = tables.pop("trained")
    for name in ("knn", "linear"):
        found[name] = json.dumps({task: of[name] for task, of in trained.items()})
    return found | {"baselines": json.dumps(tables)}


def free_folder(keep: Path, run: Run) -> Path:
    """A folder for a run that is not there yet: named after its tag and seed."""
    name = re.sub(r"[^A-Za-z0-9.]+", "_", run.tag).strip("_")[:60] + f"_seed{run.seed}"
    folder, number = keep / name, 1
    while folder.exists():
        number += 1
        folder = keep / f"{name}_{number}"
    return folder


def sweep(
    runs: list[Run], minutes: float, out: Path, keep: Path | None = None, note: str = "",
    again: bool = False,
) -> None:  # fmt: skip
    """Run what has no line yet, and add one after each. The arguments are those of SweepConfig."""
    deadline = time.perf_counter() + 60 * minutes
    configs = [configuration(run) for run in runs]
    rows = read(out)
    if rows and set(rows[0]) != set(COLUMNS):
        raise UserError(f"{out} has other columns than this script writes: choose another --out")
    where, late, failed = hardware(), 0, 0
    for run, config in zip(runs, configs, strict=True):
        rows = read(out)
        same = [r for r in rows if (r["command"], r["data"]) == (run.command, config["data"])]
        if same and not (again and all(row["error"] for row in same)):
            failed += all(row["error"] for row in same)
            continue
        print(f"{run.tag}: {run.command}", flush=True)
        if not minutes:
            continue
        alike = [r for r in rows if r["hardware"] == where]
        alike = [r for r in alike if kind(json.loads(r["config"])) == kind(config)]
        left = deadline - time.perf_counter()
        if left <= 60 * max((float(row["minutes"]) for row in alike), default=0):
            late += 1
            print("    not started: it would not end in time", flush=True)
            continue
        row = {"model": config["model"], "data": config["data"], "note": note, "hardware": where}
        row |= {"torch": str(torch.__version__), "date": date.today().isoformat()}
        with tempfile.TemporaryDirectory() as temporary:
            folder = free_folder(keep, run) if keep else Path(temporary, "run")
            measured, number = measure(run, config, left, folder)
        add(out, row | measured | {"config": json.dumps(config)})
        said = f"20-NN {measured.get('knn')}, linear {measured.get('linear')}"
        print(f"    {measured['minutes']:.1f} minutes, {measured['error'] or said}", flush=True)
        if number:
            name = signal.Signals(number).name
            raise StoppedError(f"stopped by {name}: the same command goes on", number)
    if late:
        print(f"{late} not started: {minutes:g} minutes are too few")
    if failed:
        print(f"{failed} failed before: --again repeats them")


def table(rows: list[dict]) -> list[str]:
    """What runs have reached, in Markdown: a row for each command, mean and spread over its seeds.

    20-NN and RankMe go from the first evaluation to the last, accuracies are in percent.
    """
    lines = [
        "| run | seeds | minutes | loss | 20-NN | RankMe | linear probe | options |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        command = re.sub(r" --seed \d+", "", row["command"])
        groups.setdefault((command, row["data"], row["note"]), []).append(row)
    for (command, *_), group in groups.items():
        done = [row for row in group if not row["error"]]
        options = command.removeprefix("python train.py").strip()
        options = options and f"`{options}`"
        if not done:
            lines.append(f"| {group[-1]['tag']} | 0 | | {group[-1]['error']} | | | | {options} |")
            continue
        curves = [json.loads(row["curve"]) for row in done]

        def mean(values: Iterable[float]) -> float:
            return probe.mean_std(list(values))[0]

        cells = [done[0]["tag"], str(len(done)), f"{mean(float(r['minutes']) for r in done):.1f}"]
        cells.append(f"{mean(float(row['loss']) for row in done):.3f}")
        for name in ("knn", "rankme"):
            ends = (mean(curve[i][name] for curve in curves) for i in (0, -1))
            cells.append(" → ".join(f"{end:.1f}" for end in ends))
        found = [json.loads(row["linear"]) for row in done]
        of = {task: probe.mean_std([linear[task] for linear in found]) for task in found[0]}
        spread = {task: f" ± {std:.1f}" if len(done) > 1 else "" for task, (_, std) in of.items()}
        cells.append(", ".join(f"{task} {of[task][0]:.1f}{spread[task]}" for task in of))
        lines.append(f"| {' | '.join([*cells, options])} |")
    return lines


def draw_curves(rows: list[dict], path: Path) -> None:
    """20-NN against minutes of training, a line for each finished run, one colour for all seeds.

    A star is the linear probe at the end. Times of different machines do not compare: one machine.
    """
    rows = [row for row in rows if not row["error"]]
    machines = sorted({row["hardware"] for row in rows})
    if len(machines) != 1:
        raise UserError(f"no picture of {len(machines)} machines: choose finished runs of one")
    figure, axes = probe.plt_subplots(figsize=(8, 4.5), layout="constrained")
    tags = list(dict.fromkeys(row["tag"] for row in rows))
    for number, tag in enumerate(tags):
        colour, style = f"C{number}", ("-", "--")[number // 10 % 2]  # there are ten colours
        for i, row in enumerate(row for row in rows if row["tag"] == tag):
            points = json.loads(row["curve"])
            minutes, knn = ([point[name] for point in points] for name in ("train_minutes", "knn"))
            axes.plot(minutes, knn, style, color=colour, label=None if i else tag)
            linear = next(iter(json.loads(row["linear"]).values()))  # of the task that 20-NN is of
            axes.plot(minutes[-1], linear, "*", color=colour, markersize=10)
    axes.set(
        xlabel=f"minutes of training, {machines[0]}",
        ylabel="20-NN (lines), linear probe (stars): %, held out",
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def main() -> None:
    config, _ = parse_options(SweepConfig, __doc__)
    if config.curves is not None:
        tags = {tag for tag, _ in read_list(Path(config.file))} if config.file else None
        rows = read(Path(config.out))
        rows = [row for row in rows if tags is None or row["tag"] in tags]
        draw_curves(rows, Path(config.curves))
        return
    if config.show:
        print("\n".join(table(read(Path(config.out)))))
        return
    if config.file is None or config.minutes is None:
        raise UserError("which list, for how long? Give a file, and --minutes, 0 to see commands")
    runs = make_runs(read_list(Path(config.file)), shlex.split(config.options), config.seeds)
    keep = None if config.keep is None else Path(config.keep)
    sweep(runs, config.minutes, Path(config.out), keep, config.note, config.again)


if __name__ == "__main__":
    run_script(main)
