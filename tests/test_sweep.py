"""Lists of runs, and what is measured beside them: tests/benchmark/sweep.py and its neighbours."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
BENCHMARK = ROOT / "tests" / "benchmark"
sys.path.insert(0, str(BENCHMARK))

import ablations  # noqa: E402
import geometry  # noqa: E402
import sweep  # noqa: E402
from released_masks import ReleasedMasks, first_of_each  # noqa: E402

from data import UserError  # noqa: E402
from ijepa import MaskCollator  # noqa: E402

TINY = "--batch-size 8 --eval-images 40 --eval-every 2 --steps 4 --log-every 1 --predictor-depth 1"
TINY += " --device cpu --workers 0"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of 80 dark or light pictures of noise."""
    root = tmp_path_factory.mktemp("pictures") / "noise"
    for label, low in (("dark", 0), ("light", 100)):
        (root / "train" / label).mkdir(parents=True)
        for i in range(40):
            pixels = np.random.default_rng(i).integers(low, low + 100, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(root / "train" / label / f"{i}.png")
    return root


def command(script: str, *words: str) -> list[str]:
    return [sys.executable, str(BENCHMARK / script), *words]


@pytest.fixture
def start(monkeypatch, capsys):
    """A function that runs the main of a script here: what it printed."""

    def begin(module, *words: str) -> str:
        monkeypatch.setattr(sys, "argv", [module.__file__, *words])
        module.main()
        return capsys.readouterr().out

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return begin


def lines_of(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_list_leaves_a_line_for_each_run_also_for_one_that_fails_and_runs_none_twice(
    tmp_path, pictures, start
):
    listed = tmp_path / "list.txt"
    listed.write_text(
        "# two that work, and between them one that does not\n\n"
        "fails: --batch-size 7 --accum-steps 2   # 7 do not divide\n"
        "works: --lr 2e-3\n"
    )
    out, keep = tmp_path / "new" / "runs.csv", tmp_path / "kept"
    words = (str(listed), "--options", f"--data {pictures} {TINY}", "--out", str(out))
    words += ("--note", "noise, of course", "--keep", str(keep))

    shown = start(sweep, *words, "--minutes", "0")
    assert not out.exists()
    assert [line.split(":")[0] for line in shown.splitlines()] == ["fails", "works"]

    start(sweep, *words, "--minutes", "5")
    failed, worked = lines_of(out)
    assert list(worked) == list(sweep.COLUMNS)
    assert str(tmp_path) not in out.read_text() and str(pictures) not in out.read_text()

    assert failed["error"].endswith("(exit code 2)") and "does not divide" in failed["error"]
    assert "\n" not in failed["error"] and failed["linear"] == "" and failed["steps"] == "0"
    assert json.loads(failed["config"])["batch_size"] == 7

    # What is in the line is what is in the run's folder.
    folder = keep / "works_seed0"
    result = json.loads((folder / "result.json").read_text())
    log = lines_of(folder / "log.csv")
    trained = {row["task"]: row for row in result if row["features"] == "trained"}
    for name in ("knn", "linear"):
        found = json.loads(worked[name])
        assert found == {"class": pytest.approx(trained["class"][name], abs=0.01)}
    assert set(json.loads(worked["baselines"])) == {"raw pixels", "untrained"}
    assert worked["loss"] == log[-1]["loss"] and worked["rankme"] == log[-1]["rankme"]
    assert (worked["steps"], worked["seed"], worked["error"]) == ("4", "0", "")
    assert (worked["tag"], worked["note"]) == ("works", "noise, of course")
    assert (worked["data"], worked["model"]) == ("noise", "vit_nano")
    assert worked["command"] == (
        f"python train.py --data FOLDER {TINY.replace('=', ' ')} --seed 0 --lr 2e-3"
    )
    assert worked["device"].startswith("CPU, float32") and worked["torch"] == torch.__version__
    config = json.loads(worked["config"])
    saved = torch.load(folder / "last.pt", weights_only=True)
    assert config["lr"] == saved["config"]["lr"] == 2e-3
    assert config["architecture"] == json.loads(json.dumps(saved["architecture"]))
    assert not {"out", "data_dir", "resume"} & set(config)

    curve = json.loads(worked["curve"])
    assert [point["step"] for point in curve] == [0, 2, 4]
    evaluated = [row for row in log if row["knn"]]
    assert [point["knn"] for point in curve] == [float(row["knn"]) for row in evaluated]
    minutes = [point["minutes"] for point in curve]
    assert 0 < minutes[0] <= minutes[1] <= minutes[2] <= float(worked["minutes"]) < 5
    rates = [8 / float(row["images_per_s"]) / 60 for row in log if row["images_per_s"]]
    assert curve[-1]["train_minutes"] == pytest.approx(sum(rates), abs=1e-3)
    assert curve[0]["train_minutes"] == 0

    again = start(sweep, *words, "--minutes", "5")
    assert again == "1 failed before: --again repeats them\n"
    assert lines_of(out) == [failed, worked]

    start(sweep, *words, "--minutes", "5", "--again")
    assert [row["tag"] for row in lines_of(out)] == ["fails", "works", "fails"]
    assert not (keep / "works_seed0_2").exists()
    assert sweep.free_folder(keep, sweep.Run("works", 0, ())) == keep / "works_seed0_2"


def test_ablations_run_each_command_once_and_name_all_rows_that_it_is(tmp_path, pictures, start):
    out = tmp_path / "ablations.csv"
    words = ("--tables", "masks", "--steps", "2", "--data", str(pictures), "--out", str(out))
    words += ("--options", TINY.replace(" --steps 4", ""))

    shown = start(ablations, *words, "--minutes", "0").splitlines()
    assert not out.exists() and len(shown) == 2
    tags, commands = zip(*(line.split(": ", 1) for line in shown), strict=True)
    assert tags[0].split("; ") == [
        "6 multiblock", "7 representation", "8 0.15-0.2", "9 0.85-1.0", "10 4", "11 output",
        "12 full", "14 narrow", "masks ours",
    ]  # fmt: skip
    assert tags[1] == "masks released" and "released_masks.py --model" in commands[1]

    start(ablations, *words, "--minutes", "5")
    rows = lines_of(out)
    assert [(row["tag"], row["command"]) for row in rows] == list(zip(tags, commands, strict=True))
    assert {sweep.common_options(row["command"]) for row in rows} == {
        sweep.common_options(commands[0])
    }
    for row in rows:
        assert row["error"] == "" and 0 <= json.loads(row["linear"])["class"] <= 100
    # The same seed and the same network, but other masks: another loss.
    assert rows[0]["loss"] != rows[1]["loss"]

    assert start(ablations, *words, "--minutes", "5") == ""  # nothing left to do
    assert lines_of(out) == rows


def test_ablations_are_the_rows_of_the_paper_and_the_masks():
    found = [(table, setting) for table, setting, _ in ablations.rows("vit_nano")]
    paper = [(row["table"], row["setting"]) for row in lines_of(ROOT / "results" / "paper.csv")]
    assert found == [*paper, ("masks", "ours"), ("masks", "released")]
    runs = ablations.runs(ablations.AblationConfig(seeds=3))
    assert len({run.command for run in runs}) == len(runs) == 3 * 22
    for table, setting in found:
        assert sum(ablations.is_row(run.tag, table, setting) for run in runs) == 3
    some = ablations.runs(ablations.AblationConfig(tables="10"))
    assert [run.tag.split("; ")[-1] for run in some] == ["10 1", "10 2", "10 3", "masks ours"]
    for grid in (6, 8):  # of vit_nano on shapes, of vit_tiny on CIFAR-10: all can be drawn
        for run in runs:
            options = shlex.split(run.command)
            config = sweep.train.configure(options[2:])[0]
            kind = ReleasedMasks if "released" in options[1] else MaskCollator
            names = ("num_targets", "target_scale", "context_scale")
            kind(grid, config.masks, **{name: getattr(config, name) for name in names})


def test_chance_is_what_is_left_of_seeds_that_move_all_rows_alike():
    """Of runs made up: a level for each row, a shift for each seed, and noise of a known size."""
    random = np.random.default_rng(0)
    levels, shifts = random.normal(50, 10, 400), random.normal(0, 5, 3)
    noise = random.normal(0, 1.7, (400, 3))
    runs = [
        {seed: level + shifts[seed] + of[seed] for seed in range(3)}
        for level, of in zip(levels, noise, strict=True)
    ]
    assert abs(ablations.chance(runs) - 1.7) < 0.1
    # The mean of the differences, seed by seed, and two standard errors of it.
    ahead, least = ablations.difference({0: 3.0, 1: 5.0, 2: 9.0}, {0: 1.0, 2: 1.0}, 1.7)
    assert (ahead, least) == (5.0, pytest.approx(2 * np.hypot(1.7, 1.7) / 2**0.5))
    assert least == ablations.least_gap(1.7, 2) > ablations.least_gap(1.7, 3)
    for runs in ([], [{0: 1.0}, {0: 2.0}], [{0: 1.0, 1: 2.0}, {2: 2.0}]):
        assert ablations.chance(runs) is None
    assert ablations.difference({0: 3.0}, {0: 1.0}, None) == (2.0, float("inf"))


def test_ablations_show_a_table_of_each_kind_of_runs(tmp_path, start):
    """Two kinds, two seeds: the row that is 10 points behind is told apart, the next one is not."""

    def line(words: str, seed: int, tag: str, linear: float, **more) -> dict:
        row = dict.fromkeys(sweep.COLUMNS, "")
        row |= {"command": f"python train.py {words} --seed {seed}", "seed": seed, "tag": tag}
        row |= {"linear": json.dumps({"a": linear, "b": linear + 2})}
        row |= {"knn": json.dumps({"a": 30.0, "b": 30.0})}
        found = {"raw pixels": 20, "untrained": 25}
        tables = {name: {t: {"knn": x, "linear": x} for t in "ab"} for name, x in found.items()}
        row |= {"baselines": json.dumps(tables), "config": json.dumps({"model": "vit_nano"})}
        return row | more

    ours = "6 multiblock; 7 representation; masks ours"
    figures = {ours: (50, 53), "7 pixels": (40, 44), "6 random": (50.2, 52.0)}
    for tag, both in figures.items():
        for seed, linear in enumerate(both):
            sweep.add(tmp_path / "x.csv", line("--model a --steps 5", seed, tag, linear))
    sweep.add(tmp_path / "x.csv", line("--model a --steps 9", 0, ours, 60.0))
    sweep.add(tmp_path / "x.csv", line("--model a --steps 9", 1, ours, 90.0, error="no memory"))
    said = start(ablations, "--show", "--out", str(tmp_path / "x.csv"))
    first, second = said.split("`--model a --steps 9`: 1 runs")
    assert first.startswith("`--model a --steps 5`: 6 runs\n")
    assert "| | untrained | | 25.0 | 25.0 | | |" in first
    assert "| 7 | pixels | 2 | 30.0 ± 0.0 | 43.0 ± 2.8 | +0.0 | -9.5 |" in first
    assert "| 6 | random | 2 | 30.0 ± 0.0 | 52.1 ± 1.3 | +0.0 | -0.4 (undecided) |" in first
    assert "| masks | ours | 2 | 30.0 ± 0.0 | 52.5 ± 2.1 |  |  |" in first
    assert "| masks | ours | 1 | 30.0 | 61.0 |  |  |" in second and "to tell" not in second
    assert "With 2 seeds it takes" in first and "With 3 seeds" not in first
    # Two folders look alike in commands: they are two kinds all the same.
    both = [line("--model a --data FOLDER", 0, ours, 60.0, data=name) for name in ("cats", "dogs")]
    assert [*ablations.kinds(both)] == ["--model a --data cats", "--model a --data dogs"]


def test_ablations_without_a_limit_or_with_unknown_tables_say_so(start):
    for words, said in (((), "--minutes"), (("--minutes", "0", "--tables", "5"), "not \\['5'\\]")):
        with pytest.raises(UserError, match=said):
            start(ablations, *words)


ENDLESS = "endless: --steps 100000 --eval-every 100000 --save-every 100000"


PATIENT = """
import signal, sys, time
from pathlib import Path

out = Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir()
print("device   a slow one, float32")
print("step      0  loss    -    held out 0.5000")
header = "step,epoch,loss,lr,weight_decay,momentum,images_per_s,val_loss,knn,rankme,feature_std"
rows = "0,0.0,,,,,,0.5,10.0,3.0,0.1", "6,0.5,0.4,1,1,1,8.0,,,,"
(out / "log.csv").write_text("".join(row + "\\n" for row in (header, *rows)))

def end(number, _):
    print("saved", file=sys.stderr)
    sys.exit(143)

signal.signal(signal.SIGTERM, end)
time.sleep(60)
"""


def test_the_time_limit_ends_a_run_which_leaves_how_far_it_came(tmp_path):
    """A stand-in for train.py; that train.py saves itself then is tested in test_train.py."""
    (tmp_path / "patient.py").write_text(PATIENT)
    run = sweep.Run("patient", 0, (str(tmp_path / "patient.py"),))
    row, number = sweep.measure(run, {"batch_size": 8}, 2.0, tmp_path / "run")
    assert number == 0 and row["error"] == "stopped by the time limit after 0.0 minutes"
    assert (row["steps"], row["epochs"], row["loss"]) == ("6", "0.5", "0.4") and "linear" not in row
    assert row["device"] == "a slow one, float32"
    (point,) = json.loads(row["curve"])
    assert (point["step"], point["val_loss"], point["knn"]) == (0, 0.5, 10.0)
    assert 0 <= point["minutes"] <= row["minutes"] and 1.9 < 60 * row["minutes"] < 30
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as before


def test_a_signal_ends_the_list_once_the_run_in_hand_has_left_its_line(tmp_path, pictures):
    listed, out = tmp_path / "list.txt", tmp_path / "runs.csv"
    listed.write_text(ENDLESS + "\nnext:\n")
    options = f"--data {pictures} --batch-size 8 --workers 0"
    words = (str(listed), "--options", options, "--minutes", "5", "--out", str(out))
    keep = tmp_path / "kept"
    process = subprocess.Popen(
        command("sweep.py", *words, "--keep", str(keep)),
        env=dict(os.environ, OMP_NUM_THREADS="1"), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    log = keep / "endless_seed0" / "log.csv"
    until = time.monotonic() + 60
    while time.monotonic() < until and not (log.exists() and len(lines_of(log)) > 1):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and said.count("\n") == 1, said
    (row,) = lines_of(out)
    assert row["error"].startswith("stopped by SIGTERM after") and int(row["steps"]) > 0
    assert (keep / "endless_seed0" / "last.pt").is_file()


def test_what_would_not_end_in_time_is_not_started(tmp_path, pictures, capsys, monkeypatch):
    def took(minutes: float):
        def measured(run, config, seconds, folder):
            started.append(run.tag)
            return {"tag": run.tag, "command": run.command, "seed": 0, "error": ""} | {
                "minutes": minutes
            }, 0

        return measured

    started: list[str] = []
    words = [("long", ["--steps", "9"]), ("long too", ["--steps", "9", "--lr", "1"]), ("other", [])]
    runs = sweep.make_runs(words, ["--data", str(pictures)], 1)
    monkeypatch.setattr(sweep, "measure", took(3.0))
    sweep.sweep(runs, 2.0, tmp_path / "runs.csv")  # nothing is known about the first of a kind
    assert started == ["long", "other"]
    assert "1 not started: 2 minutes are too few" in capsys.readouterr().out
    sweep.sweep(runs, 2.0, tmp_path / "runs.csv")  # nor is it next time
    assert started == ["long", "other"]
    sweep.sweep(runs, 4.0, tmp_path / "runs.csv")
    assert started == ["long", "other", "long too"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("--lr 1\n", "line 1: expected NAME: OPTIONS"),
        ("# nothing\n", "no configurations"),
        ("a:\nb: --lrr 1\n", "b: unrecognized arguments: --lrr 1"),
        ("a: --seed 3\n", "a: --seed is given by this script"),
        ("a: --out=here\n", "a: --out is given by this script"),
        ("a: other.py\n", "a: there is no other.py"),
    ],
)
def test_a_list_with_a_mistake_is_refused_before_anything_runs(tmp_path, text, said):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UserError, match=said):
        runs = sweep.make_runs(sweep.read_list(tmp_path / "list.txt"), [], 1)
        sweep.sweep(runs, 1.0, tmp_path / "runs.csv")
    assert not (tmp_path / "runs.csv").exists()


@pytest.mark.parametrize("path", sorted((BENCHMARK / "lists").glob("*.txt")), ids=lambda p: p.stem)
def test_the_command_at_the_head_of_a_list_is_one_that_train_py_takes(path, monkeypatch):
    text = path.read_text().replace("\\\n#", " ")
    (line,) = (line for line in text.splitlines() if "tests/benchmark/sweep.py" in line)
    words = shlex.split(line.partition("python ")[2])
    assert words[:2] == ["tests/benchmark/sweep.py", str(path.relative_to(ROOT))]
    options = shlex.split(words[words.index("--options") + 1])
    options = ["cifar10" if word == "FOLDER" else word for word in options]
    runs = sweep.make_runs(sweep.read_list(path), options, 2)
    assert len({run.command for run in runs}) == len(runs) >= 2
    configs = [sweep.configuration(run) for run in runs]
    assert len({json.dumps(config) for config in configs}) == len(runs)  # no two are the same
    assert {config["model"] for config in configs} == {"_".join(path.stem.split("_")[:2])}
    for config in configs:  # all masks can be drawn
        names = ("num_targets", "target_scale", "context_scale", "context_size")
        MaskCollator(8, config["masks"], **{name: config[name] for name in names})


def test_seeds_are_the_outer_loop_and_paths_are_not_shown():
    runs = sweep.make_runs([("a", ["--lr=1"]), ("b", [])], ["--data=/some/where"], 2)
    assert [(run.tag, run.seed) for run in runs] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert runs[0].words == ("train.py", "--data", "/some/where", "--seed", "0", "--lr", "1")
    assert runs[0].command == "python train.py --data FOLDER --seed 0 --lr 1"
    assert sweep.common_options(runs[0].command) == "--data FOLDER"


def test_the_table_has_mean_and_spread_over_seeds_and_the_failures():
    def row(seed: int, knn: float, linear: float, **more) -> dict:
        curve = json.dumps([{"knn": 30.0, "rankme": 9.0}, {"knn": knn, "rankme": 4.0}])
        row = {"tag": "a", "command": f"python train.py --lr 1 --seed {seed} --flip", "data": "d"}
        row |= {"minutes": "2", "loss": "0.25", "curve": curve, "note": "", "error": ""}
        return row | {"linear": json.dumps({"class": linear})} | more

    failed = row(0, 0, 0, tag="b", command="python train.py --seed 0", error="no memory")
    rows = [row(0, 20, 50.0), row(1, 22, 54.0), row(2, 99, 99, error="stopped"), failed]
    assert sweep.table(rows)[2:] == [
        "| a | 2 | 2.0 | 0.250 | 30.0 → 21.0 | 9.0 → 4.0 | class 52.0 ± 2.8 | `--lr 1 --flip` |",
        "| b | 0 | | no memory | | | |  |",
    ]


def test_the_curves_are_those_of_finished_runs_of_one_machine(tmp_path, monkeypatch):
    def line(tag, seed, knn, hardware="a GPU", error=""):
        curve = [{"train_minutes": i * 2.0, "knn": value} for i, value in enumerate(knn)]
        linear = {"class": knn[-1] + 5} if not error else {}
        row = {"tag": tag, "seed": str(seed), "hardware": hardware, "error": error}
        return row | {"curve": json.dumps(curve), "linear": json.dumps(linear)}

    drawn, subplots = [], sweep.probe.plt_subplots
    monkeypatch.setattr(
        sweep.probe, "plt_subplots", lambda *a, **k: drawn.append(subplots(*a, **k)) or drawn[-1]
    )
    rows = [
        line("base", 0, [30, 40, 50]),
        line("base", 1, [31, 41, 52]),
        line("other", 0, [30, 60]),
    ]
    failed = line("base", 2, [30], error="no memory")
    sweep.draw_curves([*rows, failed], tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] > 500
    lines = [of for of in drawn[0][1].get_lines() if of.get_marker() != "*"]
    assert [[*of.get_ydata()] for of in lines] == [[30, 40, 50], [31, 41, 52], [30, 60]]
    assert [*lines[0].get_xdata()] == [0, 2, 4]
    colours = [of.get_color() for of in lines]
    assert colours[0] == colours[1] != colours[2]
    stars = [of.get_ydata()[0] for of in drawn[0][1].get_lines() if of.get_marker() == "*"]
    assert stars == [55, 57, 65]
    assert [t.get_text() for t in drawn[0][1].get_legend().get_texts()] == ["base", "other"]
    for wrong in ([*rows, line("base", 3, [1], "a laptop")], [failed]):
        with pytest.raises(UserError, match="machines"):
            sweep.draw_curves(wrong, tmp_path / "other.png")
    assert not (tmp_path / "other.png").exists()


def test_lines_added_at_once_are_whole(tmp_path):
    """Eight writers, a long line each time: none is torn, and there is one header."""
    path = tmp_path / "runs.csv"

    def write(number: int) -> None:
        for i in range(20):
            sweep.add(path, {"tag": f"{number} {i}", "curve": f"{number}" * 20_000})

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = sweep.read(path)
    assert sorted(row["tag"] for row in rows) == sorted(
        f"{n} {i}" for n in range(8) for i in range(20)
    )
    assert all(set(row["curve"]) == {row["tag"][0]} for row in rows)


def test_a_torn_line_and_a_file_of_others_are_refused(tmp_path):
    sweep.add(tmp_path / "runs.csv", {"tag": "a"})
    with open(tmp_path / "runs.csv", "a") as file:
        file.write("torn,in the")
    with pytest.raises(UserError, match="line 3: not whole"):
        sweep.read(tmp_path / "runs.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    runs = sweep.make_runs([("a", [])], [], 1)
    with pytest.raises(UserError, match="other columns"):
        sweep.sweep(runs, 1.0, tmp_path / "other.csv")


# ------------------------------------------------------------------ the released sampler's errors


@pytest.mark.parametrize("grid", [6, 8, 14, (6, 8)])
def test_released_masks_never_reach_the_last_row_and_column_and_ours_do(grid):
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    for sampler, reached in ((ReleasedMasks(grid), False), (MaskCollator(grid), True)):
        generator, seen = torch.Generator().manual_seed(0), set()
        for _ in range(20):
            context, targets = sampler.sample(64, generator)
            seen |= set(context.flatten().tolist()) | set(targets.flatten().tolist())
        edge = {i for i in range(rows * columns) if i // columns == rows - 1}
        edge |= {i for i in range(rows * columns) if i % columns == columns - 1}
        assert edge <= seen if reached else not edge & seen
        assert seen >= set(range(rows * columns)) - edge


@pytest.mark.parametrize(("grid", "large"), [(14, 5), (8, 2)])
def test_one_number_for_scale_and_aspect_gives_few_shapes(grid, large):
    """5 at 14x14; 2 at 8x8, where the released sampler refuses those of up to 10 patches."""
    shapes = {tuple(shape) for shape in ReleasedMasks(grid).target_shapes.tolist()}
    assert len({shape for shape in shapes if shape[0] * shape[1] > 10}) == large
    for u in np.linspace(0, 1, 1001):  # from the formulas: scale and aspect, of the same u
        scale, aspect = 0.15 + 0.05 * u, 0.75 + 0.75 * u
        side = grid * np.array([(scale * aspect) ** 0.5, (scale / aspect) ** 0.5])
        near = np.abs(side % 1 - 0.5) < 0.02  # where rounding turns, steps of 1/32 may miss one
        assert near.any() or tuple(side.round().astype(int)) in shapes


def test_the_cut_keeps_the_first_patches_of_each_context_as_plain_loops_do():
    free = torch.rand(50, 36, generator=torch.Generator().manual_seed(0)) < 0.4
    contexts = [[i for i in range(36) if row[i]] for row in free.tolist()]
    shortest = min(map(len, contexts))
    assert first_of_each(free).tolist() == [context[:shortest] for context in contexts]


def sampled(sampler: MaskCollator, batch_size: int, draws: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [sampler.sample(batch_size, generator)[0] for _ in range(draws)]


def test_the_released_context_shrinks_with_the_batch_and_loses_its_lower_half():
    """82 of 196 patches are left in one picture, 50 in batches of 128: measured elsewhere."""
    released = ReleasedMasks(14)
    for batch_size, patches in ((1, 82), (128, 50)):
        sizes = [context.shape[1] for context in sampled(released, batch_size, 60)]
        assert abs(sum(sizes) / len(sizes) - patches) < 5
    upper, ours = (
        torch.cat([(context < 98).flatten().float() for context in sampled(of, 128, 20)]).mean()
        for of in (released, MaskCollator(14))
    )
    assert upper > 0.75 and abs(ours - 0.5) < 0.05


def test_released_masks_are_masks():
    context, targets = ReleasedMasks(8).sample(64, torch.Generator().manual_seed(0))
    assert context.shape[0] == 64 and targets.shape[:2] == (64, 4)
    for seen, blocks in zip(context.tolist(), targets.flatten(1).tolist(), strict=True):
        assert not set(seen) & set(blocks) and seen == sorted(set(seen))
    for wrong in ({"strategy": "random"}, {"context_size": 5}):
        with pytest.raises(ValueError, match="released sampler"):
            ReleasedMasks(8, **wrong)


# ------------------------------------------------------------------ what fills a representation


def test_share_of_variance_is_that_of_scikit_learn_and_whitened_features_are_white():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="tests/requirements.txt")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 3, generator=generator)
    y = x @ torch.randn(3, 8, generator=generator) + 2 * torch.randn(500, 8, generator=generator)
    y[:, 0] *= 100  # the largest variance counts most
    fitted = linear_model.LinearRegression().fit(x, y).predict(x)
    rest = ((y.numpy() - fitted) ** 2).sum() / ((y - y.mean(0)) ** 2).sum().item()
    assert geometry.explained(x, y) == pytest.approx(1 - rest, abs=1e-5)

    white, others = geometry.whiten(y, y[:100])
    np.testing.assert_allclose(np.cov(white.numpy().T), np.eye(8), atol=1e-3)
    np.testing.assert_allclose(others, white[:100], atol=1e-4)
