"""How the rate of training changes with batch, image size, model and number of processes.

    python tests/benchmark/scaling.py --out cpu          a quarter of an hour on two cores
    python tests/benchmark/scaling.py --scans batch,size --out h200
    python tests/benchmark/scaling.py --draw             results/scaling.png from what was measured

Writes results/scaling_<out>.json after each point, so that what was stopped leaves what it has;
points that are there are not measured again.
"""

import csv
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import record  # noqa: E402
import step  # noqa: E402

import probe  # noqa: E402
from data import UserError, option, parse_options, run_script, whole_file  # noqa: E402
from ijepa import MODELS  # noqa: E402

SIZES = ((32, 4), (96, 8), (224, 16), (448, 16))  # pixels of an image, and of a patch
SCANS = {
    "batch": "pictures a step (vit_tiny 32/4)",
    "size": "pixels a side (vit_tiny; patches of 4, 8, 16, 16)",
    "model": "million weights of the encoder (224/16)",
    "processes": "processes that share the cores (vit_nano)",
}


@dataclass(frozen=True)
class ScalingConfig:
    """What to measure."""

    scans: str = option(",".join(SCANS), "which")
    device: str | None = option(None, "cuda or cpu (default: a GPU if there is one)")
    seconds: float = option(6.0, "a point takes")
    most_weights: float = option(900e6, "of an encoder: larger ones are left out")
    peer: str | None = option(None, "a checkout of the released code, as a further line")
    out: str | None = option(None, "write results/scaling_<out>.json")
    draw: bool = option(False, "draw the picture only")


def points(config: ScalingConfig, cuda: bool) -> Iterator[tuple[str, float, dict]]:
    """Scan, place on its axis, and the options of step.py."""
    for batch in (64, 256, 1024, 4096) if cuda else (4, 16, 64, 256):
        yield "batch", batch, {"model": "vit_tiny", "batch_size": batch}
    for size, patch in SIZES:
        options = {"model": "vit_tiny", "img_size": size, "patch_size": patch}
        tokens = (size // patch) ** 2
        yield "size", size, options | {"batch_size": 65_536 // tokens if cuda else 4096 // tokens}
    for name, (c, _) in MODELS.items():
        weights = c.depth * c.embed_dim**2 * (4 + 2 * c.mlp_ratio)
        if name != "vit_nano" and weights <= config.most_weights:
            options = {"model": name, "img_size": 224, "patch_size": 16}
            few = {"vit_tiny": 16, "vit_small": 8, "vit_base": 4}.get(name, 2)
            yield "model", weights / 1e6, options | {"batch_size": 128 if cuda else few}


def processes(count: int, steps: int = 80) -> dict[str, float]:
    """Rate of train.py itself on so many processes of a CPU, by gloo."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        words += ["--nproc_per_node", str(count), "train.py", "--device", "cpu"]
        words += ["--steps", str(steps), "--batch-size", "128", "--eval-every", str(steps)]
        words += ["--eval-images", "100", "--out", f"{folder}/run"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{' '.join(words)} failed: {done.stderr.strip().splitlines()[-1]}")
        with open(Path(folder, "run", "log.csv"), newline="") as file:
            rates = [float(row["images_per_s"]) for row in csv.DictReader(file) if row["loss"]]
    return {"float32": round(statistics.median(rates[1:]), 1)}


def measure(config: ScalingConfig) -> None:
    """All points that are not there yet."""
    cuda = (config.device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda"
    wanted = config.scans.split(",")
    if unknown := set(wanted) - set(SCANS):
        raise UserError(f"--scans: no {', '.join(sorted(unknown))}: there are {', '.join(SCANS)}")
    path = record.RESULTS / f"scaling_{config.out}.json"
    there = json.loads(path.read_text())["points"] if config.out and path.exists() else []
    lines = ["compiled", "bfloat16"] if cuda else ["float32", "bfloat16"]
    lines += ["released bfloat16" if cuda else "released"] if config.peer else []
    todo = [point for point in points(config, cuda) if point[0] in wanted]
    if "processes" in wanted and not cuda:
        todo += [("processes", count, {}) for count in (1, 2, 4)]
    for scan, x, options in todo:
        if any((point["scan"], point["x"]) == (scan, x) for point in there):
            continue
        if scan == "processes":
            rates = processes(x)
        else:
            asked = step.StepConfig(
                **options, device=config.device, rows=",".join(lines), peer=config.peer,
                seconds=config.seconds, turns=3,
            )  # fmt: skip
            rows = step.measure(step.prepare(asked))
            rates = {row["name"]: row["images_per_s"] for row in rows}
        print(f"{scan:10} {x:8.4g}  {rates}", flush=True)
        there.append({"scan": scan, "x": x, "options": options, "images_per_s": rates})
        if config.out:
            command = f"python tests/benchmark/scaling.py --out {config.out}"
            record.write(f"scaling_{config.out}", command, points=there)


def draw() -> None:
    """Every scaling_*.json in one picture: a panel for each scan, a line for each way to train."""
    figure, axes = probe.plt_subplots(1, 4, figsize=(17, 4.2), layout="constrained")
    styles = {"float32": "o-", "bfloat16": "s--", "compiled": "D-", "released": "^:"}
    places: dict[str, set[float]] = {scan: set() for scan in SCANS}  # of the ticks, of all files
    for path in sorted(record.RESULTS.glob("scaling_*.json")):
        of = json.loads(path.read_text())
        for axis, (scan, label) in zip(axes, SCANS.items(), strict=True):
            here = sorted((p for p in of["points"] if p["scan"] == scan), key=lambda p: p["x"])
            for name in dict.fromkeys(name for p in here for name in p["images_per_s"]):
                line = [(p["x"], p["images_per_s"][name]) for p in here]
                axis.plot(
                    *zip(*line, strict=True), styles[name.split()[0]],
                    label=f"{name}, {of['hardware']}",
                )  # fmt: skip
            places[scan] |= {p["x"] for p in here}
            axis.set(xscale="log", yscale="log", xlabel=label, ylabel="images/s")
            axis.set_xticks(sorted(places[scan]), [f"{x:.3g}" for x in sorted(places[scan])])
            axis.minorticks_off()
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        if axis is axes[-1]:
            axis.set(yscale="linear", ylim=(0, None))
            continue
        low, high = axis.get_ylim()
        ticks = [m * 10**e for e in range(-2, 7) for m in (1, 2, 5) if low <= m * 10**e <= high]
        axis.set_yticks(ticks)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4)
    with whole_file(record.RESULTS / "scaling.png") as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def main() -> None:
    config, _ = parse_options(ScalingConfig, __doc__)
    if not config.draw:
        measure(config)
    if config.draw or config.out:
        draw()


if __name__ == "__main__":
    run_script(main)
