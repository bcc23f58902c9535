"""Measure what the README reports, and write it to results/ with date, hardware and command.

    python tests/benchmark/record.py demo      three seeds of `python train.py`: a quarter hour
    python tests/benchmark/record.py masks     cost of the mask sampler
    python tests/benchmark/record.py cifar10 FOLDER [OPTIONS]   500 steps of vit_tiny on CIFAR-10
    python tests/benchmark/record.py stream FOLDER    20 steps of vit_small/16 at 224 pixels
    python tests/benchmark/record.py probe NAME WHAT RUN [OPTIONS]   probe.py
    python tests/benchmark/record.py gpu [PEER]    all that README.md says of speed, on a GPU
    python tests/benchmark/probe_speed.py      kNN and the linear sweep
    python tests/benchmark/probe_load.py FOLDER    reading a released ViT-H/14: needs 11 GB there
    python tests/benchmark/record.py memory    memory a GPU, by formula
    python tests/benchmark/record.py readme    copy the recorded figures into README.md, and into
                                               results/cifar10.md

Nothing else should be running: times are wall time.
"""

import csv
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "results"

from probe import coming_along  # noqa: E402


def hardware() -> str:
    """The device that PyTorch computes on here."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = re.findall(r"model name\s*: (.*)", info.read_text())
        model = names[0] if names else model
    return f"{torch.get_num_threads()} cores of {model}"


def write(name: str, command: str, **figures) -> None:
    """results/<name>.json, with everything needed to repeat it."""
    record = {
        "date": date.today().isoformat(),
        "hardware": hardware(),
        "torch": str(torch.__version__),
        "command": command,
        **figures,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote results/{name}.json")


def demo(seeds=(0, 1, 2)) -> None:
    """`python train.py` as a newcomer runs it, once for each seed."""
    runs = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "train.py", "--seed", str(seed), "--out", f"{folder}/run"]
            start = time.perf_counter()
            subprocess.run(command, cwd=ROOT, check=True)
            seconds = time.perf_counter() - start
            rows = json.loads(Path(folder, "run", "result.json").read_text())
            runs.append({"seed": seed, "seconds": round(seconds, 1), "rows": rows})
            if seed == seeds[0]:
                for picture in ("result", "curves"):
                    target = RESULTS / f"demo_{picture}.png"
                    target.write_bytes(Path(folder, "run", f"{picture}.png").read_bytes())
        write("demo", "python train.py --seed S", runs=runs)


def masks() -> None:
    """Cost of the mask sampler on one thread."""
    from masks import microseconds_per_image

    cost = {grid: round(microseconds_per_image(grid, 2048, 20), 2) for grid in (8, 14, 16)}
    write("masks", "python tests/benchmark/record.py masks", microseconds_an_image=cost)


def run(*options: str) -> tuple[list[dict], float, Path]:
    """train.py with these options: the rows of its log, the seconds it took, its folder."""
    folder = Path(tempfile.mkdtemp(), "run")
    start = time.perf_counter()
    command = [sys.executable, "train.py", *options, "--out", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    seconds = time.perf_counter() - start
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file)), seconds, folder


def cifar10(folder: str, *more: str, steps: int = 500, batch_size: int = 64) -> None:
    """vit_tiny on a CPU, with further options of train.py: does it begin to learn?"""
    options = ("--model", "vit_tiny", "--batch-size", str(batch_size), "--steps", str(steps))
    options += ("--eval-every", "250", "--eval-images", "2000", *more)
    log, seconds, out = run(*options, "--data", folder)
    evaluated = [row for row in log if row["knn"]]
    names = {"val_loss": "loss", "knn": "20-NN (%)", "rankme": "RankMe"}
    before, after = (
        {label: float(row[name]) for name, label in names.items()}
        for row in (evaluated[0], evaluated[-1])
    )
    command = f"python train.py {' '.join(options)} --data FOLDER"
    write(
        "_".join(("cifar10_cpu", *more)).replace("--", ""), command,
        data=DATA_OF_CIFAR, steps=steps, batch=batch_size, options=" ".join(more),
        seconds=round(seconds), before=before, after=after,
        rows=json.loads((out / "result.json").read_text()),
    )  # fmt: skip


def stream(folder: str, steps: int = 20, batch_size: int = 16) -> None:
    """The streaming path at 224 pixels: does it run, and the loss fall?"""
    options = ("--model", "vit_small", "--batch-size", str(batch_size), "--steps", str(steps))
    options += ("--workers", "2", "--eval-every", str(steps), "--log-every", "5")
    log, seconds, _ = run(*options, "--data", folder)
    losses = [float(row["loss"]) for row in log if row["loss"]]
    command = f"python train.py {' '.join(options)} --data FOLDER"
    write("stream", command, steps=steps, seconds=round(seconds), losses=losses)


def probe(name: str, what: str, *options: str) -> None:
    """probe.py with these options: its report, without paths of this machine, and its pictures.

    `what`: of what, in words for the README.
    """
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "probe.py", *options, "--out", out]
        subprocess.run(command, cwd=ROOT, check=True)
        report = json.loads(Path(out, "probe.json").read_text())
        for picture in Path(out).glob("*.png") if name in SHOWN else ():
            (RESULTS / f"probe_{name}_{picture.name}").write_bytes(picture.read_bytes())
    first = options[0] if options[0] in coming_along() else "RUN"
    shown = [first, *(Path(word).name if "/" in word else word for word in options[1:])]
    figures = {key: report[key] for key in ("seconds", "results", "bf16")}
    data = report["pictures"] | {"name": Path(report["pictures"]["name"]).name}
    run = {key: report["checkpoint"][key] for key in ("kind", "encoder", "step", "sha256")}
    trained = report["checkpoint"]["config"] or {}
    keys = ("model", "data", "batch_size", "steps", "epochs", "lr", "momentum", "seed")
    run |= {key: trained.get(key) for key in keys}
    run["data"] = run["data"] and Path(run["data"]).name
    data["reported"] = data["reported"].replace(report["pictures"]["name"], data["name"])
    write(
        f"probe_{name}", f"python probe.py {' '.join(shown)}",
        what=what, checkpoint=run, pictures=data, **figures,
    )  # fmt: skip


def memory(images: int = 32) -> None:
    """What each model takes in each process, sharded and not, on so many of them."""
    from memory import table

    write("memory", "python tests/benchmark/record.py memory", images=images, rows=table(images))


def readme() -> None:
    """Replace what stands between the markers of README.md and others by the recorded figures."""
    for file, blocks in BLOCKS.items():
        text = (ROOT / file).read_text()
        for name, lines in blocks.items():
            block = f"<!-- {name} figures -->\n" + "\n".join(lines()) + f"\n<!-- end of {name} -->"
            pattern = rf"<!-- {name} figures -->.*?<!-- end of {name} -->"
            text = re.sub(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
        (ROOT / file).write_text(text)


def record(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def demo_lines() -> list[str]:
    """The table at the end of the demo, mean and range over the seeds."""
    demo = record("demo")
    rows = [row for run in demo["runs"] for row in run["rows"]]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    names = list(dict.fromkeys(row["features"] for row in rows))
    lines = [
        "| | " + " | ".join(f"{task}: 20-NN | {task}: linear" for task in tasks) + " |",
        "|---|" + "---|---|" * len(tasks),
    ]
    for name in names:
        cells = []
        for task in tasks:
            for column in ("knn", "linear"):
                here = [r[column] for r in rows if (r["features"], r["task"]) == (name, task)]
                cells.append(f"{statistics.mean(here):.1f} ± {statistics.stdev(here):.1f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    seconds = [run["seconds"] for run in demo["runs"]]
    lines += [
        "",
        f"Accuracy on held-out pictures in percent, mean and standard deviation over "
        f"{len(seconds)} seeds; {min(seconds):.0f} to {max(seconds):.0f} seconds on "
        f"{demo['hardware']} ({demo['date']}, torch {demo['torch']}, `{demo['command']}`).",
    ]
    return lines


def cifar10_lines() -> list[str]:
    """The run of the small encoder on CIFAR-10, without a GPU."""
    import sweep  # which takes `hardware` from here

    tag = record("weights_vit_nano_cifar10")["tag"]
    row = next(row for row in sweep.read(RESULTS / "runs.csv") if row["tag"] == tag)
    found = {name: of["class"] for name, of in json.loads(row["baselines"]).items()}
    found["trained"] = {name: json.loads(row[name])["class"] for name in ("knn", "linear")}
    lines = ["| | 20-NN | linear probe |", "|---|---|---|"]
    lines += [f"| {name} | {of['knn']:.1f} | {of['linear']:.1f} |" for name, of in found.items()]
    minutes = json.loads(row["curve"])[-1]["train_minutes"]
    lines += [
        "",
        f"Accuracy, %, on held-out training pictures, one seed; {float(row['epochs']):.0f} epochs "
        f"in {minutes:.0f} minutes of training and {float(row['minutes']):.0f} in all on "
        f"{row['hardware']}, {row['date']}. The pictures were {row['note']}.",
    ]
    return lines


def probe_lines() -> list[str]:
    """What probe.py found: a row for each recorded report, task and reader."""
    return probe_table(reports())


def probe_table(found: list[dict]) -> list[str]:
    """The rows of these reports."""
    names = ("raw pixels", "untrained", "target encoder")
    lines = [f"| encoder and task | read by | {' | '.join(names)} | how |", "|---" * 6 + "|"]
    for of in found:
        for task in dict.fromkeys(row["task"] for row in of["results"]):
            rows = {r["features"]: r["figures"] for r in of["results"] if r["task"] == task}
            for column in (c for c in rows["target encoder"] if "plain" not in c):
                cells = []
                for name in names:
                    values = rows.get(name, {}).get(column, [])
                    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                    cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "")
                how = (
                    f"`{of['command']}`: {of['pictures']['report']} pictures, {of['seconds']:.0f} s"
                )
                lines.append(f"| {of['what']}: {task} | {column} | {' | '.join(cells)} | {how} |")
    hardware = {f"{of['hardware']}, {of['date']}" for of in found}
    lines += ["", f"Accuracy, %, mean and standard deviation; {' and '.join(sorted(hardware))}."]
    return lines


def reports() -> list[dict]:
    """All that probe.py reported."""
    records = (record(path.stem) for path in sorted(RESULTS.glob("probe_*.json")))
    return [of for of in records if "results" in of]


SHOWN = ("cifar10",)  # reports whose pictures are kept too


def measured_lines() -> list[str]:
    """One row for each figure, and for what was not measured yet."""
    lines = ["| what | figure | where, when, how |", "|---|---|---|"]

    def row(what: str, figure: str, of: dict) -> None:
        how = f"{of['hardware']}, {of['date']}, `{of['command']}`"
        lines.append(f"| {what} | {figure} | {how} |")

    for name, describe in DESCRIPTIONS.items():
        for path in sorted(RESULTS.glob(f"{name}*.json")):
            of = record(path.stem)
            for what, figure in describe(of):
                row(what, figure, of)
    lines += [f"| {what} | not measured | |" for what in NOT_MEASURED]
    return lines


def faults_lines() -> list[str]:
    """What was tried against a run, how often, what happened, and what was lost."""
    lines = ["| what | how often | what happened | what was lost |", "|---|---|---|---|"]
    rows = record("faults")
    for name in FAULTS:
        if name in rows:
            r = rows[name]
            lines.append(f"| {r['what']} | {r['tried']} | {r['happened']} | {r['lost']} |")
    any_ = next(iter(rows.values()))
    dates = sorted({row["date"] for row in rows.values()})
    commands = ", ".join(f"`{name}`" for name in FAULTS if name in rows)
    lines += [
        "",
        f"`python tests/faults/run.py` with {commands}; {any_['hardware']}, torch {any_['torch']}, "
        f"{' and '.join(dates)}, `vit_nano`, runs of 20 steps unless said.",
    ]
    return lines


def memory_lines() -> list[str]:
    """Gigabytes for each model: its state in each process, and what a batch adds."""
    of = record("memory")
    pictures = f"{of['images']} pictures"
    lines = [
        "| model | trained weights | DDP on 1, 8 or 64 | FSDP on 8 | FSDP on 64 "
        f"| {pictures} | {pictures}, `--checkpoint-activations` |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in of["rows"]:
        sizes = (r["ddp"], r["fsdp"]["8"], r["fsdp"]["64"], r["activations"], r["recomputed"])
        cells = " | ".join(f"{size / 1e9:.2f} GB" for size in sizes)
        lines.append(f"| `{r['model']}` | {r['trained'] / 1e6:.0f} M | {cells} |")
    return lines


def squeezed_lines() -> list[str]:
    """Whole schedules of vit_tiny in 500 steps."""
    lines = ["| options | loss | 20-NN | RankMe | linear |", "|---|---|---|---|---|"]
    for path in sorted(RESULTS.glob("cifar10_cpu_*.json")):
        of = record(path.stem)
        linear = {row["features"]: row["linear"] for row in of["rows"]}
        cells = [f"{of['before'][x]:.3g} → {of['after'][x]:.3g}" for x in of["before"]]
        cells.append(f"{linear['untrained']:.1f} → {linear['trained']:.1f}")
        lines.append(f"| `{of['options']}` | {' | '.join(cells)} |")
    return lines


def turn_lines() -> list[str]:
    """How far runs of vit_tiny came that were stopped: each evaluation."""
    import sweep  # which takes `hardware` from here

    lines = ["| run | epochs | 20-NN | RankMe |", "|---|---|---|---|"]
    for row in sweep.read(RESULTS / "runs.csv"):
        if row["error"] and row["model"] == "vit_tiny" and row["data"].startswith("cifar"):
            for p in json.loads(row["curve"]):
                point = f"{p['epoch']:.1f} | {p['knn']:.1f} | {p['rankme']:.1f}"
                lines.append(f"| {row['tag']}, {row['error']} | {point} |")
    return lines


def momentum_lines() -> list[str]:
    """The demo with a momentum that stays, beside the demo: seed 0."""
    other = record("demo_final_momentum")
    run = next(run for run in record("demo")["runs"] if run["seed"] == other["seed"])
    lines = ["| the demo, linear probe | momentum rises to 1 | it stays |", "|---|---|---|"]
    for one, two in zip(run["rows"], other["rows"], strict=True):
        assert (one["features"], one["task"]) == (two["features"], two["task"])
        if one["features"] == "trained":
            lines.append(f"| {one['task']} | {one['linear']:.1f} | {two['linear']:.1f} |")
    return lines


def screening_lines() -> list[str]:
    """The last evaluation of each throw-away run, and its first."""
    import sweep  # which takes `hardware` from here

    rows = sweep.read(RESULTS / "cifar10_screening.csv")
    columns = ("knn", "knn_standardized", "knn_whitened", "rankme", "ridge")
    lines = [
        "| run | images | 20-NN | standardized | whitened | RankMe | ridge |",
        "|---" * 7 + "|",
    ]
    for what in dict.fromkeys(row["what"] for row in rows):
        points = [row for row in rows if row["what"] == what]
        cells = [f"{float(points[0][c]):.1f} → {float(points[-1][c]):.1f}" for c in columns]
        lines.append(f"| {what} | {int(points[-1]['images']):,} | {' | '.join(cells)} |")
    return lines


def runs_lines() -> list[str]:
    """Runs of sweep.py on CIFAR-10."""
    import sweep  # which takes `hardware` from here

    rows = [row for row in sweep.read(RESULTS / "runs.csv") if row["data"].startswith("cifar")]
    return sweep.table(rows)


def ablation_lines() -> list[str]:
    """Ablations on CIFAR-10, a table for each kind."""
    import ablations
    import sweep

    lines = []
    for common, rows in ablations.kinds(sweep.read(RESULTS / "ablations.csv")).items():
        if rows[0]["data"].startswith("cifar"):
            lines += [f"`{common}`:", "", *ablations.table(rows), ""]
    return lines[:-1]


def speed_lines() -> list[str]:
    """Rates of a whole step, where its time and its FLOPs go, streaming, start; what is missing."""
    steps = [record(path.stem) for path in sorted(RESULTS.glob("step_*.json"))]
    names = list(dict.fromkeys(r["name"] for of in steps for r in of["rows"]))
    order = {name: i for i, name in enumerate(names)}
    names.sort(key=lambda name: (name.startswith("released"), order[name]))
    lines = [f"| step, batch, machine | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for of in steps:
        width, depth = of["predictor"]
        cells = [
            f"`{of['model']}` {of['img_size']}/{of['patch_size']}, predictor {width} wide and "
            f"{depth} deep, {of['batch']}, {of['hardware']}"
        ]
        rows = {r["name"]: r for r in of["rows"]}
        for name in names:
            r = rows.get(name)
            cell = f"{r['images_per_s']:.3g}" if r else ""
            if r and "share_of_peak" in r:
                cell += f", {100 * r['share_of_peak']:.0f} %"
            cell += f", {r['memory_gb']} GB" if r and "memory_gb" in r else ""
            ratio = r.get("against released") if r else None
            cells.append(cell + (f", {ratio:.2f}" if ratio else ""))
        lines.append(f"| {' | '.join(cells)} |")
    blank = " |" * (len(names) - 1)
    there = {path.stem for path in RESULTS.glob("*.json")}
    missing = (what for name, what in SPEED_AIMS if name not in there)
    lines += [f"| {what} | not measured |{blank}" for what in missing]
    when = sorted({f"torch {of['torch']}, {of['date']}" for of in steps})
    lines += [
        "",
        "Images/s, the share of the machine's matmul rate in that number format, and the ratio to "
        f"the released code in float32. {'; '.join(when)}:",
        "",
        *(f"    {of['command']}" for of in steps),
        "",
    ]

    profiles = [record(path.stem) for path in sorted(RESULTS.glob("where_*.json"))]
    of = profiles[0]  # FLOPs are the same on all machines
    kinds = list(of["time"]["float32"])
    lines += [f"| time of a step | {' | '.join(kinds)} |", "|---" * (1 + len(kinds)) + "|"]
    for profile in profiles:
        for row, time_of in profile["time"].items():
            cells = " | ".join(f"{time_of[kind]} %" for kind in kinds)
            lines.append(f"| `{profile['model']}`, {row}, {profile['hardware']} | {cells} |")
    parts = list(of["flops"][0]["share"])
    lines += ["", f"| FLOPs of a step | predictor | GFLOP an image | {' | '.join(parts)} |"]
    lines += ["|---" * (3 + len(parts)) + "|"]
    for r in of["flops"]:
        cells = " | ".join(f"{r['share'][part]} %" for part in parts)
        what = f"`{r['model']}` {r['patches']}"
        lines.append(f"| {what} | {r['predictor']} | {r['gflop']} | {cells} |")
    lines += ["", f"`{of['command']}`; {of['hardware']}, {of['date']}.", ""]

    lines += ["| what | figure | where, when, how |", "|---|---|---|"]

    def row(what: str, figure: str, of: dict) -> None:
        how = f"{of['hardware']}, {of['date']}, `{of['command']}`"
        lines.append(f"| {what} | {figure} | {how} |")

    masks = record("masks")
    for grid, us in masks["microseconds_an_image"].items():
        row(f"drawing masks, {grid}x{grid} grid, one core", f"{us:.1f} µs an image", masks)
    of = record("decoding")
    rates, share = of["images_per_s"], of["of_bare"]
    figure = f"{rates['batches']:.0f} images/s, {100 * share['batches']:.0f} %"
    row("streaming, one core, of bare decode, crop and resize", figure, of)
    figure = f"{rates['one worker']:.0f} images/s, {100 * share['one worker']:.0f} %"
    row("the same, as it arrives from one worker process", figure, of)
    of = record("decoding_large")
    figure = f"{of['images_per_s']['batches']:.0f} images/s, {100 * of['of_bare']['batches']:.0f} %"
    row("the same, JPEGs of 12 megapixels: decoded at a fraction of their size", figure, of)
    ends = ("gradient", "first gradient"), ("step", "first step, after an evaluation")
    for path in sorted(RESULTS.glob("start_*.json")):
        of = record(path.stem)
        for key, what in ends:
            what = f"`{of['model']}`, from the command line to the {what}"
            row(what, f"{of['seconds'][key]} s", of)
    return lines


SPEED_AIMS = (  # on one H200: the file of results/ that has it, and what it is
    (
        "step_gpu_vit_huge",
        "ViT-H/14 at 224, bfloat16, one H200 (aim: 600 images/s, 50 % of the peak, 2x released); "
        "memory, with and without `--checkpoint-activations`",
    ),
    (
        "step_gpu_vit_tiny",
        "`vit_tiny` 32/4, one H200 (aim: 60,000 images/s, 20x released with its loader)",
    ),
    ("start_gpu", "`vit_tiny`, one H200: to the first compiled step (aim: under 60 s)"),
)


def gpu(peer: str = "") -> None:
    """What README.md says of speed, on a GPU: half an hour, or line by line where time is short.

    peer: a checkout of the released code. Each line writes its file in results/ when it is done.
    """
    beside = ["--peer", peer] if peer else []
    rows = "bfloat16,compiled,recomputed" + (",released bfloat16" if peer else "")
    tiny = ["--model", "vit_tiny", "--batch-size", "512", "--seconds", "4", "--turns", "4"]
    huge = ["--model", "vit_huge", "--batch-size", "256", "--seconds", "12", "--turns", "3"]
    for name, *options in (
        ["step.py", *tiny, *beside, "--out", "gpu_vit_tiny"],
        ["step.py", *huge, *beside, "--rows", rows, "--out", "gpu_vit_huge"],
        ["start.py", "--out", "start_gpu"],
        ["where.py", "--batch-size", "512", "--out", "gpu"],
        ["scaling.py", "--scans", "batch,size,model", "--seconds", "2", "--out", "gpu"],
    ):
        script = str(Path(__file__).with_name(name))
        done = subprocess.run([sys.executable, script, *options], cwd=ROOT)
        print(f"{name} {' '.join(options)}: exit code {done.returncode}", flush=True)


FAULTS = (
    "kills", "signals", "damage", "full", "equality", "machines", "pictures", "fuzz", "memory",
)  # fmt: skip
DESCRIPTIONS = {
    "stream": lambda r: [
        (
            f"`vit_small`/16, 200 ImageNet pictures streamed, {r['steps']} steps: training loss",
            f"{r['losses'][0]:.3f} -> {r['losses'][-1]:.3f} in {r['seconds']} s",
        )
    ],
    "probe_speed": lambda r: [
        (f"{name}, {r['train']:,} + {r['test']:,} features", f"{seconds:.1f} s")
        for name, seconds in r["seconds"].items()
    ],
    "probe_load": lambda r: [
        (
            f"reading a released ViT-H/14 ({r['file_gb']:.1f} GB): seconds, and peak memory after "
            "one picture",
            f"{r['load_s']:.0f} s, {r['used']['peak_gb']:.1f} GB",
        )
    ],
    "cifar10_cpu": lambda r: [
        (
            f"`vit_tiny`, {r['data']}, {r['steps']} steps of {r['batch']} {r.get('options', '')}",
            ", ".join(
                f"{name} {before:.3g} -> {r['after'][name]:.3g}"
                for name, before in r["before"].items()
            ),
        )
    ],
}
DATA_OF_CIFAR = "CIFAR-10 (JPEG copy)"  # altered pixels: 2 to 3 points less than the original
NOT_MEASURED = (
    "features of `vit_tiny` on a GPU (aim: 100,000 images/s), and all of `probe.py` on CIFAR-10",
    "`vit_tiny` on CIFAR-10, 100 epochs, one GPU",
)
BLOCKS = {
    "README.md": {
        "demo": demo_lines,
        "cifar10": cifar10_lines,
        "probe": probe_lines,
        "measured": measured_lines,
        "speed": speed_lines,
        "faults": faults_lines,
        "memory": memory_lines,
    },
    "results/cifar10.md": {
        "squeezed": squeezed_lines,
        "turn": turn_lines,
        "screening": screening_lines,
        "momentum": momentum_lines,
        "runs": runs_lines,
        "ablations": ablation_lines,
    },
}


if __name__ == "__main__":
    functions = (demo, masks, cifar10, stream, probe, memory, gpu, readme)
    commands = {f.__name__: f for f in functions}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]](*sys.argv[2:])
