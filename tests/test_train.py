"""train.py: whole runs of a very small model, interrupted, split and broken in every way."""

import contextlib
import csv
import errno
import io
import itertools
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import data
import ijepa
import probe
import train

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    *("--img-size", "16", "--patch-size", "4", "--predictor-depth", "1", "--batch-size", "8"),
    *("--steps", "8", "--eval-images", "40", "--eval-every", "4", "--log-every", "2"),
    *("--save-every", "2"),
]
ROW = {"features": "x", "task": "y", "knn": 0.0, "linear": 0.0, "linear_std": 0.0}
HERE = ["--workers", "0", "--device", "cpu", "--no-compile"]  # says nothing about the run


def make_folder(root: Path, classes="abc", count=30, side=16) -> Path:
    """Pictures of noise, brighter from class to class."""
    rng = np.random.default_rng(0)
    for i, name in enumerate(classes):
        (root / "train" / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 100 + 50 * i, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "train" / name / f"{number:03d}.png")
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> str:
    return str(make_folder(tmp_path_factory.mktemp("pictures")))


class Killed(BaseException):
    """Ends a run as `kill -9` does: nothing handles it."""


def run(out: Path, *options: str, kill_at: int | None = None) -> None:
    """`python train.py --out OUT OPTIONS`; kill_at: the step (from 0) at whose start it dies."""
    rate = train.learning_rate

    def deadly(step, *rest):
        if step == kill_at:
            raise Killed
        return rate(step, *rest)

    argv = ["train.py", "--out", str(out), *options]
    ends = contextlib.nullcontext() if kill_at is None else pytest.raises(Killed)
    rates = mock.patch.object(train, "learning_rate", deadly)
    with mock.patch.object(sys, "argv", argv), rates, ends:
        train.main()


@pytest.fixture(autouse=True)
def without_drawing(monkeypatch):
    """Most runs need no pictures and no linear probe: they would take longer than the run."""
    monkeypatch.setattr(train.Log, "draw", lambda *_: None)
    monkeypatch.setattr(train, "draw_result", lambda *_: None)
    monkeypatch.setattr(probe, "compare", lambda *_, **__: [ROW])


@pytest.fixture(scope="module")
def reference(tmp_path_factory, pictures) -> Path:
    """The folder of an uninterrupted run of eight steps, in one process, in one batch."""
    out = tmp_path_factory.mktemp("reference") / "run"
    with mock.patch.object(train.Log, "draw"), mock.patch.object(train, "finish"):
        run(out, "--data", pictures, *SMALL, *HERE)
    return out


@pytest.fixture
def begun(tmp_path, pictures) -> Path:
    """The same run, killed at the start of its fourth step: the checkpoint is of two steps."""
    run(tmp_path / "begun", "--data", pictures, *SMALL, *HERE, kill_at=3)
    return tmp_path / "begun"


def load(out: Path, name="last.pt") -> dict:
    return torch.load(out / name, weights_only=True)


def log_of(out: Path) -> list[dict[str, str]]:
    """log.csv without the speed, the only thing that differs from run to run."""
    with open(out / "log.csv", newline="") as file:
        return [
            {k: v for k, v in row.items() if k != "images_per_s"} for row in csv.DictReader(file)
        ]


def assert_equal(ours, theirs, where="checkpoint") -> None:
    """Equal to the last bit, all the way down."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs), where
        for key in ours:
            assert_equal(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(*pair, f"{where}[{i}]")
    else:
        assert ours == theirs, where


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Bit for bit: networks, optimizer, step and log."""
    ours_, theirs_ = load(ours), load(theirs)
    for part in ("step", "model", "optimizer", "architecture", "best_knn"):
        assert_equal(ours_[part], theirs_[part], part)
    assert log_of(ours) == log_of(theirs)


def assert_close_runs(ours: Path, theirs: Path) -> None:
    """Equal to rounding. Weights by how far training has moved them, tensor by tensor."""
    ours_, theirs_ = load(ours), load(theirs)
    torch.manual_seed(0)
    start = ijepa.IJEPA(ijepa.IJEPAConfig(**theirs_["architecture"])).state_dict()
    assert ours_["step"] == theirs_["step"]
    for name, wanted in theirs_["model"].items():
        got, initial = ours_["model"][name], start[name]
        if name.endswith("qkv.bias"):  # that of the keys has no gradient but rounding
            got, wanted, initial = (x.unflatten(0, (3, -1))[[0, 2]] for x in (got, wanted, initial))
        moved = (wanted - initial).norm()
        assert (got - wanted).norm() <= 2e-3 * moved + 1e-7, name
    for a, b in zip(log_of(ours), log_of(theirs), strict=True):
        assert a["step"] == b["step"]
        for column in ("epoch", "loss", "lr", "momentum", "val_loss", "rankme", "feature_std"):
            assert bool(a[column]) == bool(b[column])
            if a[column]:
                assert float(a[column]) == pytest.approx(float(b[column]), rel=1e-4, abs=1e-6)


# ------------------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def full(tmp_path_factory, pictures) -> types.SimpleNamespace:
    """A run of 40 steps with all that it draws and says."""
    out = tmp_path_factory.mktemp("full") / "deep" / "run"
    options = [*SMALL, "--steps", "40", "--eval-every", "10", "--warmup-epochs", "1"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        run(out, "--data", pictures, *options, *HERE)
    return types.SimpleNamespace(out=out, said=said.getvalue(), log=log_of(out), last=load(out))


def test_the_loss_falls(full):
    losses = [float(row["loss"]) for row in full.log if row["loss"]]
    assert len(losses) == 20
    assert np.mean(losses[-5:]) < 0.75 * losses[0]
    held_out = [float(row["val_loss"]) for row in full.log if row["val_loss"]]
    assert held_out[-1] < 0.75 * held_out[0]


def test_the_log_has_a_line_every_few_steps_and_for_each_evaluation(full):
    with open(full.out / "log.csv", newline="") as file:
        columns = csv.DictReader(file).fieldnames
    assert columns == [
        *("step", "epoch", "loss", "lr", "weight_decay", "momentum", "images_per_s"),
        *("val_loss", "knn", "rankme", "feature_std"),
    ]
    assert [int(row["step"]) for row in full.log] == list(range(0, 41, 2))
    evaluated = [int(row["step"]) for row in full.log if row["knn"]]
    assert evaluated == [0, 10, 20, 30, 40]
    for row in full.log:
        assert float(row["epoch"]) == pytest.approx(int(row["step"]) * 8 / 81, rel=1e-5)
        assert bool(row["knn"]) == bool(row["val_loss"]) == bool(row["rankme"])
    assert 0 <= float(full.log[-1]["knn"]) <= 100 and 1 <= float(full.log[-1]["rankme"]) <= 9


def test_the_log_has_the_rates_of_the_schedules(full):
    recipe, total = ijepa.MODELS["vit_nano"].recipe, 40
    warmup = round(total * 1 / recipe.epochs)
    config = full.last["config"]
    for row in full.log[1:]:
        step = int(row["step"]) - 1  # the rates of the last step before the line
        lr = ijepa.learning_rate(step, total, warmup, recipe.start_lr, recipe.lr, recipe.final_lr)
        decay = ijepa.weight_decay(step, total, recipe.weight_decay, recipe.final_weight_decay)
        momentum = ijepa.target_momentum(step, total, recipe.momentum, recipe.final_momentum)
        wanted = {"lr": lr, "weight_decay": decay, "momentum": momentum}
        assert {k: float(row[k]) for k in wanted} == pytest.approx(wanted, rel=1e-5)
    assert config["warmup_epochs"] == 1 and config["lr"] == recipe.lr
    groups = full.last["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == [pytest.approx(recipe.final_lr)] * 2
    decays = [group["weight_decay"] for group in groups]
    assert decays == [pytest.approx(recipe.final_weight_decay), 0]


@pytest.mark.parametrize("name", ["curves.png", "result.png"])
def test_pictures_are_drawn(full, name):
    with Image.open(full.out / name) as picture:
        picture.load()
    assert min(picture.size) > 300
    assert np.array(picture.convert("L")).std() > 5  # not blank


def test_the_table_at_the_end(full):
    rows = json.loads((full.out / "result.json").read_text())
    assert [(row["features"], row["task"]) for row in rows] == [
        ("raw pixels", "class"),
        ("untrained", "class"),
        ("trained", "class"),
    ]
    assert all(0 <= row[key] <= 100 for row in rows for key in ("knn", "linear", "chance"))
    lines = full.said[full.said.index("Accuracy on held-out pictures") :].splitlines()
    for row, line in zip(rows, lines[2:5], strict=True):
        assert line.startswith(row["features"])
        assert f"{row['knn']:.1f}" in line and f"{row['linear']:.1f}" in line


def test_it_says_what_it_will_do_before_the_first_step(full):
    before = full.said[: full.said.index("step      0")]
    size = sum(p.numel() for k, p in full.last["model"].items() if k.startswith("encoder.")) / 1e6
    positions = full.last["model"].get("encoder.pos_embed", torch.empty(0)).numel() / 1e6
    for words in (
        f"vit_nano: {size - positions:.2f} M parameters",
        "81 to train on, 9 held out, in memory, 16 pixels",
        "multiblock on 4x4 patches",
        "CPU, float32, not compiled",
        "batch    8 pictures = 1 process(es) x 1 micro-batch(es) x 8",
        "40 steps (4.0 epochs), seed 0",
        "time     about",
    ):
        assert words in before
    assert "meant for GPUs" not in full.said


def test_what_is_in_a_checkpoint(full, pictures):
    last = full.last
    assert last["step"] == 40
    assert last["config"]["data"] == pictures and last["config"]["steps"] == 40
    model = ijepa.IJEPA(ijepa.IJEPAConfig(**last["architecture"]))
    model.load_state_dict(last["model"])  # strict
    networks = {name.split(".")[0] for name in last["model"]}
    assert networks == {"encoder", "predictor", "target_encoder"}
    assert all(x.dtype == torch.float32 for x in last["model"].values())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(last["optimizer"]["state"]) == len(trained)
    assert torch.equal(last["random_state"], last["random_state"].byte())
    assert last["versions"]["torch"] == torch.__version__
    assert last["versions"]["python"] == sys.version.split()[0]
    knn = [float(row["knn"]) for row in full.log if row["knn"]]
    assert last["best_knn"] == pytest.approx(max(knn), rel=1e-5)
    assert load(full.out, "best.pt")["step"] == 10 * knn.index(max(knn))
    assert not list(full.out.glob("*.tmp"))
    assert_equal(probe.read_checkpoint(full.out / "last.pt")["model"], last["model"])


def test_the_untrained_encoder_of_the_table_is_the_one_it_started_from(
    tmp_path, pictures, monkeypatch
):
    compared = {}
    monkeypatch.setattr(
        train.Evaluation, "compare", lambda _, encoders: compared.update(encoders) or [ROW]
    )
    run(tmp_path / "a", "--data", pictures, *SMALL, *HERE, "--seed", "3", kill_at=0)
    run(tmp_path / "b", "--data", pictures, *SMALL, *HERE, "--seed", "3", "--steps", "2")
    for name, step in (("untrained", tmp_path / "a"), ("trained", tmp_path / "b")):
        for key, tensor in compared[name].state_dict().items():
            assert torch.equal(tensor, load(step)["model"][f"target_encoder.{key}"]), name


def test_pictures_held_out_are_not_trained_on(tmp_path, pictures, monkeypatch):
    plans, evaluations = [], []
    plan, init = train.Plan, train.Evaluation.__init__

    def watched(self, *args):
        init(self, *args)
        evaluations.append(self)

    monkeypatch.setattr(train, "Plan", lambda **kw: plans.append(plan(**kw)) or plans[-1])
    monkeypatch.setattr(train.Evaluation, "__init__", watched)
    run(tmp_path / "run", "--data", pictures, *SMALL, *HERE, kill_at=0)
    trained, evaluation = set(plans[0].index.tolist()), evaluations[0]
    assert len(trained) == 81
    assert set(evaluation.query_index.tolist()) == set(range(90)) - trained
    assert set(evaluation.bank_index.tolist()) <= trained


# ------------------------------------------------------------- a function of seed and batch size


@pytest.mark.parametrize("kill_at", [3, 4, 7])
def test_an_interrupted_run_equals_the_uninterrupted_one_bit_for_bit(
    tmp_path, pictures, reference, kill_at
):
    options = ["--data", pictures, *SMALL, *HERE]
    run(tmp_path / "run", *options, kill_at=kill_at)
    assert load(tmp_path / "run")["step"] == kill_at // 2 * 2
    run(tmp_path / "run", *options, "--resume")
    assert_same_run(tmp_path / "run", reference)


def test_a_run_interrupted_before_its_first_steps_are_saved(tmp_path, pictures, reference):
    options = ["--data", pictures, *SMALL, *HERE]
    run(tmp_path / "run", *options, kill_at=1)
    run(tmp_path / "run", *options, "--resume")
    assert_same_run(tmp_path / "run", reference)


def test_a_run_interrupted_twice_and_killed_while_logging(tmp_path, pictures, reference):
    options = ["--data", pictures, *SMALL, *HERE]
    run(tmp_path / "run", *options, kill_at=3)
    with open(tmp_path / "run" / "log.csv", "a") as file:  # the line was out, the checkpoint not
        file.write("4,0.4,9,9,9,9,9,9,9,9,9\n")
    run(tmp_path / "run", *options, "--resume", kill_at=6)
    run(tmp_path / "run", *options, "--resume")
    assert_same_run(tmp_path / "run", reference)


def test_options_need_not_be_repeated_to_resume(begun, reference):
    run(begun, "--resume", *HERE)
    assert_same_run(begun, reference)


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(tmp_path, pictures, reference):
    shutil.copytree(reference, tmp_path / "run")
    run(tmp_path / "run", "--data", pictures, *SMALL, *HERE, "--resume")
    assert_same_run(tmp_path / "run", reference)


def test_a_killed_process_leaves_a_run_that_can_be_resumed(tmp_path, pictures, reference):
    out, options = tmp_path / "run", ["--data", pictures, *SMALL, *HERE]
    command = [sys.executable, str(ROOT / "train.py"), "--out", str(out), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=said, stderr=said)
        try:
            end = time.monotonic() + 100
            while time.monotonic() < end and process.poll() is None:
                with contextlib.suppress(OSError):
                    if len(log_of(out)) >= 3:  # steps 0, 2 and 4
                        break
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
        finally:
            process.kill()
            process.wait()
    assert load(out)["step"] in (2, 4, 6, 8), (tmp_path / "said").read_text()
    assert load(out)["step"] < 8, "too late to kill it"
    run(out, *options, "--resume")
    assert_same_run(out, reference)


def test_four_micro_batches_equal_one_batch(tmp_path, pictures, reference):
    run(tmp_path / "run", "--data", pictures, *SMALL, *HERE, "--accum-steps", "4")
    assert_close_runs(tmp_path / "run", reference)


def test_evaluating_saving_and_logging_change_nothing(tmp_path, pictures, reference):
    options = ["--eval-every", "3", "--eval-images", "60", "--save-every", "5", "--log-every", "1"]
    run(tmp_path / "run", "--data", pictures, *SMALL, *HERE, *options)
    for part in ("model", "optimizer"):
        assert_equal(load(tmp_path / "run")[part], load(reference)[part])


@pytest.mark.parametrize("seed, same", [("0", True), ("1", False)])
def test_the_seed_decides(tmp_path, pictures, reference, seed, same):
    torch.manual_seed(int(time.time()))  # of the process, it does not
    run(tmp_path / "run", "--data", pictures, *SMALL, *HERE, "--seed", seed)
    ours, theirs = load(tmp_path / "run")["model"], load(reference)["model"]
    name = "encoder.blocks.3.mlp.fc1.weight"
    assert torch.equal(ours[name], theirs[name]) == same
    if same:
        assert_same_run(tmp_path / "run", reference)


def test_a_stream_of_pictures_trains_and_resumes_too(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(data, "IN_MEMORY_SIDE", 8)
    options = ["--data", pictures, *SMALL, "--steps", "4", "--device", "cpu", "--no-compile"]
    run(tmp_path / "a", *options, "--workers", "0")
    run(tmp_path / "b", *options, "--workers", "2", kill_at=3)
    run(tmp_path / "b", *options, "--workers", "0", "--resume")
    assert_same_run(tmp_path / "b", tmp_path / "a")


WORKER = """
import shutil, sys
sys.path.insert(0, {root!r})
import torch, torch.distributed as dist
import train
torch.set_num_threads(1)
join, leave = dist.init_process_group, dist.destroy_process_group
dist.init_process_group = lambda *a, **kw: dist.is_initialized() or join(*a, **kw)
dist.destroy_process_group = lambda: None  # one group for all runs: to join again takes a new port
train.Log.draw = lambda *_: None
save = train.save

def keep(path, state):
    save(path, state)
    if path.name == "last.pt":
        shutil.copy(path, path.with_name("step%d.pt" % state["step"]))

train.save = keep
for argv in {runs!r}:
    sys.argv = ["train.py", *argv]
    train.main()
leave()
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, pictures) -> Path:
    """Runs in two processes: `whole`, and `taken over` from one process at its second step."""
    folder = tmp_path_factory.mktemp("two")
    options = ["--data", pictures, *SMALL, *HERE]
    with mock.patch.object(train.Log, "draw"), mock.patch.object(train, "finish"):
        run(folder / "taken over", *options, kill_at=3)
    runs = [
        ["--out", str(folder / "whole"), *options],
        ["--out", str(folder / "taken over"), *options, "--resume", "--accum-steps", "2"],
    ]
    (folder / "worker.py").write_text(WORKER.format(root=str(ROOT), runs=runs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(folder / "worker.py")]
    with open(folder / "said", "w") as said, open(folder / "errors", "w") as errors:
        process = subprocess.Popen(command, stdout=said, stderr=errors, start_new_session=True)
        try:
            code = process.wait(timeout=100)
        finally:  # its processes too, whatever happened
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert code == 0, (folder / "errors").read_text()[-3000:]
    return folder


def test_two_processes_equal_one(two_processes, reference):
    assert_close_runs(two_processes / "whole", reference)
    assert log_of(two_processes / "whole")[-1]["knn"]
    said = (two_processes / "said").read_text()
    assert said.count("2 process(es) x 1 micro-batch(es) x 4") == 1  # one of them speaks
    assert said.count("Accuracy on held-out pictures") == 2
    assert {path.name for path in (two_processes / "whole").iterdir()} >= {
        *("best.pt", "last.pt", "log.csv", "result.json", "result.png")
    }


def test_two_processes_take_over_from_one(two_processes, reference):
    assert_close_runs(two_processes / "taken over", reference)


def test_one_process_takes_over_from_two(tmp_path, two_processes, pictures, reference):
    shutil.copytree(two_processes / "whole", tmp_path / "run")
    shutil.move(tmp_path / "run" / "step4.pt", tmp_path / "run" / "last.pt")
    run(tmp_path / "run", "--data", pictures, *SMALL, *HERE, "--resume", "--accum-steps", "4")
    assert_close_runs(tmp_path / "run", reference)


def test_the_target_follows_once_per_optimizer_step(tmp_path, pictures, monkeypatch):
    update, seen = ijepa.IJEPA.update_target, []

    def watched(self, momentum):
        before = self.target_encoder.patch_embed.proj.weight.clone()
        update(self, momentum)
        wanted = before.lerp(self.encoder.patch_embed.proj.weight, 1 - momentum)
        torch.testing.assert_close(self.target_encoder.patch_embed.proj.weight, wanted)
        seen.append((momentum, before, self.target_encoder.patch_embed.proj.weight.clone()))

    monkeypatch.setattr(ijepa.IJEPA, "update_target", watched)
    options = ["--steps", "4", "--accum-steps", "4", "--momentum", "0.9"]
    run(tmp_path / "run", "--data", pictures, *SMALL, *HERE, *options)
    assert [momentum for momentum, *_ in seen] == pytest.approx([0.9, 0.925, 0.95, 0.975])
    for (*_, after), (_, before, _) in itertools.pairwise(seen):
        assert torch.equal(after, before)  # and nothing else changes it


def test_bf16_autocast_runs_and_stays_close(tmp_path, pictures, reference):
    run(tmp_path / "run", "--data", pictures, *SMALL, *HERE, "--bf16")
    losses = [[float(row["loss"]) for row in log_of(out) if row["loss"]]
              for out in (tmp_path / "run", reference)]  # fmt: skip
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert all(x.dtype == torch.float32 for x in load(tmp_path / "run")["model"].values())
    for state in load(tmp_path / "run")["optimizer"]["state"].values():
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32


# --------------------------------------------------------------------------------- best.pt


def script_knn(monkeypatch, accuracies: list[float]) -> None:
    """Evaluations find these accuracies, one after the other."""
    coming = iter(accuracies)
    monkeypatch.setattr(
        train.Evaluation,
        "__call__",
        lambda *_: {"val_loss": 1.0, "knn": next(coming), "rankme": 2.0, "feature_std": 0.1},
    )


def test_best_pt_is_that_of_the_best_knn(tmp_path, pictures, monkeypatch):
    script_knn(monkeypatch, [10, 30, 20, 30, 25])
    run(tmp_path / "run", "--data", pictures, *SMALL, *HERE, "--eval-every", "2")
    assert load(tmp_path / "run", "best.pt")["step"] == 2
    assert load(tmp_path / "run", "best.pt")["best_knn"] == 30
    assert load(tmp_path / "run")["step"] == 8 and load(tmp_path / "run")["best_knn"] == 30


@pytest.mark.parametrize("later, best", [([20, 25], 2), ([20, 31], 8)])
def test_a_resumed_run_knows_its_best(tmp_path, pictures, monkeypatch, later, best):
    options = ["--data", pictures, *SMALL, *HERE, "--eval-every", "2"]
    script_knn(monkeypatch, [10, 30, 20, *later])
    run(tmp_path / "run", *options, kill_at=5)
    run(tmp_path / "run", *options, "--resume")
    assert load(tmp_path / "run", "best.pt")["step"] == best


def test_best_pt_is_right_also_if_killed_between_the_two_checkpoints(
    tmp_path, pictures, monkeypatch
):
    options = ["--data", pictures, *SMALL, *HERE, "--eval-every", "2"]
    save, names = train.save, []

    def deadly(path, state):
        if len(names) == 3:  # of the two checkpoints at step 2 only one gets written
            raise Killed
        names.append(path.name)
        save(path, state)

    accuracies = {0: 10, 2: 30, 4: 20, 6: 25, 8: 25}
    for resumed in (False, True):
        steps = [
            step for step in accuracies if not resumed or step > load(tmp_path / "run")["step"]
        ]
        script_knn(monkeypatch, [accuracies[step] for step in steps])
        if resumed:
            run(tmp_path / "run", *options, "--resume")
        else:
            with mock.patch.object(train, "save", deadly), pytest.raises(Killed):
                run(tmp_path / "run", *options)
    best = load(tmp_path / "run", "best.pt")
    assert (best["step"], best["best_knn"]) == (2, 30)


# ----------------------------------------------------------------- checkpoints and a full disk


@pytest.mark.parametrize("what", ["torch.save", "os.fsync", "os.replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device")])
def test_a_checkpoint_that_cannot_be_written_leaves_the_previous_one(
    tmp_path, monkeypatch, what, error
):
    path = tmp_path / "last.pt"
    train.save(path, {"step": 1})

    def fail(*args):
        raise error

    module, name = what.split(".")
    monkeypatch.setattr({"torch": torch, "os": os}[module], name, fail)
    with pytest.raises(data.UserError, match=r"last.pt .*No space left.*previous one is still"):
        train.save(path, {"step": 2})
    monkeypatch.undo()
    assert load(tmp_path) == {"step": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]


@contextlib.contextmanager
def no_file_larger_than(size: int):
    """What a full disk does to large files."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_space_for_a_checkpoint_ends_the_run_and_keeps_the_previous(begun, pictures, capsys):
    before = (begun / "last.pt").read_bytes()
    with no_file_larger_than(1_000_000):
        message = fails(capsys, "--out", begun, "--data", pictures, *SMALL, *HERE, "--resume")
    assert "last.pt could not be written" in message and "previous one is still there" in message
    assert (begun / "last.pt").read_bytes() == before
    assert not list(begun.glob("*.tmp"))


@pytest.mark.parametrize(
    "name",
    ["log.csv", "result.json.tmp"],
)
def test_no_space_for_another_file_is_one_line_too(tmp_path, pictures, capsys, monkeypatch, name):
    out, save = tmp_path / "run", train.save

    def then_full(path, state):
        save(path, state)
        if state["step"] == 2:
            (out / name).unlink(missing_ok=True)
            (out / name).symlink_to("/dev/full")

    monkeypatch.setattr(train, "save", then_full)
    message = fails(capsys, "--out", out, "--data", pictures, *SMALL, *HERE, "--steps", "4")
    assert "No space left" in message and str(out) in message
    assert load(out)["step"] >= 2


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(
    tmp_path, pictures, capsys, monkeypatch
):
    rate = train.learning_rate
    monkeypatch.setattr(
        train, "learning_rate", lambda step, *rest: 1e30 if step == 4 else rate(step, *rest)
    )
    message = fails(capsys, "--out", tmp_path / "run", "--data", pictures, *SMALL, *HERE)
    assert re.search(r"the loss is (nan|inf) at step 6\b", message) and "--lr" in message
    assert load(tmp_path / "run")["step"] == 4
    assert all(x.isfinite().all() for x in load(tmp_path / "run")["model"].values())
    assert [row["step"] for row in log_of(tmp_path / "run")] == ["0", "2", "4"]


def test_an_error_during_a_run_has_a_line_of_its_own(tmp_path, pictures, capsys):
    argv = ["train.py", "--out", str(tmp_path / "run"), "--data", pictures, *SMALL, *HERE]
    argv += ["--lr", "1e30", "--start-lr", "1e30"]
    with mock.patch.object(sys, "argv", argv), pytest.raises(SystemExit):
        data.run_script(train.main)
    last = capsys.readouterr().err.split("\n")[-2]
    assert last.startswith("train.py: error: the loss is nan at step 2:")


def test_weights_that_break_in_the_step_before_an_evaluation(
    tmp_path, pictures, capsys, monkeypatch
):
    rate = train.learning_rate
    monkeypatch.setattr(
        train, "learning_rate", lambda step, *rest: 1e30 if step == 3 else rate(step, *rest)
    )
    message = fails(capsys, "--out", tmp_path / "run", "--data", pictures, *SMALL, *HERE)
    assert "finite" in message and "4" in message
    assert load(tmp_path / "run")["step"] == 2


# ----------------------------------------------------------------------- what users get wrong


def fails(capsys, *options) -> str:
    """Run the script; it must end with exit code 2 and one line, without a traceback."""
    capsys.readouterr()
    argv = ["train.py", *map(str, options)]
    with mock.patch.object(sys, "argv", argv), pytest.raises(SystemExit) as caught:
        data.run_script(train.main)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    bar, _, message = said.partition("train.py: error: ")
    assert "Traceback" not in said
    assert message.endswith("\n") and message.count("\n") == 1
    bar = [text for text in re.split(r"[\r\n]", bar.replace("\x1b[A", "")) if text.strip()]
    assert all("steps/s" in text for text in bar)  # beside the progress bar there is nothing else
    return message


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}


IMPOSSIBLE = [
    (["--model", "vit_nanno"], r"--model: invalid choice: 'vit_nanno'.*vit_nano"),
    (["--masks", "stripes"], r"--masks: invalid choice: 'stripes'.*multiblock"),
    (["--learning-rate", "1"], r"unrecognized arguments: --learning-rate"),
    (["--lr", "fast"], r"--lr: invalid float value: 'fast'"),
    (["--data", "cifar11"], r"cifar11 is neither a folder nor one of shapes"),
    (["--batch-size", "8", "--accum-steps", "3"], r"batch of 8 does not divide into 1 .* x 3"),
    (["--img-size", "18"], r"18x18 pixels do not divide into patches of 4"),
    (["--num-targets", "16", "--target-scale", "0.5", "0.5"], r"context.*targets"),
    (["--context-size", "16"], r"context of 16 patches"),
    (["--target-scale", "0.9", "0.1"], r"target_scale.*low <= high"),
    (["--predictor-dim", "50"], r"width 50 must be divisible"),
    (["--target-layers", "7"], r"target_layers is 7"),
    (["--steps", "0"], r"--steps is 0: it must be at least 1"),
    (["--epochs", "-1"], r"--epochs is -1: it must be at least 1"),
    (["--log-every", "0"], r"--log-every is 0: it must be at least 1"),
]


@pytest.mark.parametrize("options, message", IMPOSSIBLE, ids=lambda x: " ".join(x)[:40])
def test_impossible_options_are_refused_before_anything_is_written(
    tmp_path, pictures, capsys, options, message
):
    out = tmp_path / "run"
    said = fails(capsys, "--out", out, "--data", pictures, *SMALL, *HERE, *options)
    assert re.search(message, said)
    assert not out.exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--device", "gpu"],
        ["--workers", "-1"],
        ["--eval-every", "-1"],
        ["--eval-images", "-5"],
    ],
    ids=" ".join,
)
def test_values_out_of_range_are_refused(tmp_path, pictures, capsys, monkeypatch, options):
    monkeypatch.setattr(data, "IN_MEMORY_SIDE", 8)  # streamed: where workers matter
    options = [*SMALL, *HERE, "--steps", "2", *options]
    said = fails(capsys, "--out", tmp_path / "run", "--data", pictures, *options)
    assert options[-2].removeprefix("--") in said


def no_train(root):
    (root / "training" / "a").mkdir(parents=True)
    return r"has no folder train/"


def no_pictures(root):
    (root / "train" / "a").mkdir(parents=True)
    return r"no pictures under"


def one_class(root):
    make_folder(root, "a", 3)
    return r"pictures of one class only"


def too_few(root):
    make_folder(root, "ab", 5)
    return r"too few"


@pytest.mark.parametrize("problem", [no_train, no_pictures, one_class, too_few])
def test_folders_that_cannot_be_used(tmp_path, capsys, problem):
    root = tmp_path / "my pictures"
    message = problem(root)
    said = fails(capsys, "--out", tmp_path / "run", "--data", root, *SMALL, *HERE)
    assert re.search(message, said) and (str(root) in said or problem is too_few)
    assert not (tmp_path / "run").exists()


def test_imagenet_absent(tmp_path, capsys):
    options = ["--model", "vit_small", "--data", "imagenet", "--data-dir", tmp_path / "sets"]
    said = fails(capsys, "--out", tmp_path / "run", *options, *HERE)
    assert str(tmp_path / "sets" / "imagenet") in said and "--data shapes" in said
    assert not (tmp_path / "run").exists()


def test_no_network_for_a_download(tmp_path, capsys, monkeypatch):
    import torchvision

    def fail(*args, **kwargs):
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail)
    options = ["--data", "cifar10", "--data-dir", tmp_path / "sets", *SMALL, *HERE]
    said = fails(capsys, "--out", tmp_path / "run", *options)
    assert "name resolution" in said and "--data shapes needs no download" in said


def test_no_gpu(tmp_path, pictures, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = ["--data", pictures, *SMALL, "--device", "cuda"]
    assert "no GPU" in fails(capsys, "--out", tmp_path / "run", *options)


def test_out_below_a_file(tmp_path, pictures, capsys):
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "run"
    said = fails(capsys, "--out", out, "--data", pictures, *SMALL, *HERE)
    assert f"{out} could not be written" in said
    assert (tmp_path / "file").read_text() == "in the way"


def test_out_is_a_file(tmp_path, pictures, capsys):
    (tmp_path / "file").write_text("in the way")
    said = fails(capsys, "--out", tmp_path / "file", "--data", pictures, *SMALL, *HERE)
    assert str(tmp_path / "file") in said
    assert (tmp_path / "file").read_text() == "in the way"


def test_an_existing_run_is_refused_and_left_alone(begun, pictures, capsys):
    before = snapshot(begun)
    said = fails(capsys, "--out", begun, "--data", pictures, *SMALL, *HERE)
    assert str(begun) in said and "--resume" in said and "--out" in said
    assert snapshot(begun) == before


@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_nothing_to_resume(tmp_path, pictures, capsys, kind):
    out = tmp_path / "run"
    if kind == "empty":
        out.mkdir()
    said = fails(capsys, "--out", out, "--data", pictures, *SMALL, *HERE, "--resume")
    assert f"no {out / 'last.pt'}" in said and "leave out --resume" in said
    assert out.exists() == (kind == "empty")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "vit_tiny"], r"has model vit_nano, not vit_tiny"),
        (["--img-size", "32"], r"has img_size 16, not 32"),
        (["--predictor-depth", "2"], r"has predictor_depth 1, not 2"),
        (["--lr", "0.5"], r"has lr [\d.e-]+, not 0.5"),
        (["--steps", "9"], r"has steps 8, not 9"),
        (["--batch-size", "16"], r"has batch_size 8, not 16"),
        (["--seed", "1"], r"has seed 0, not 1"),
        (["--data", "shapes"], r"has data .*pictures.*, not shapes"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_options_that_contradict_the_run_are_refused(reference, capsys, options, message):
    before = snapshot(reference)
    said = fails(capsys, "--out", reference, "--resume", *HERE, *options)
    assert re.search(message, said) and str(reference) in said
    assert snapshot(reference) == before


def test_resume_with_pictures_of_another_size_keeps_the_architecture(tmp_path, capsys):
    root, out = make_folder(tmp_path / "pictures"), tmp_path / "run"
    options = ["--data", str(root), *SMALL[4:], *HERE]  # sizes that suit the pictures: 32, 4
    run(out, *options, kill_at=0)
    before = load(out)["architecture"]
    assert before["patch_size"] == 4
    shutil.rmtree(root)
    make_folder(root, side=50)  # for a new run it would be 96, 8
    data.default_sizes.cache_clear()  # a new process
    data.scan_folder.cache_clear()
    run(out, *options, "--resume")
    assert load(out)["architecture"] == before


def test_resume_with_another_number_of_pictures_is_refused(tmp_path, capsys):
    root, out = make_folder(tmp_path / "pictures"), tmp_path / "run"
    options = ["--data", str(root), *SMALL, *HERE]
    run(out, *options, kill_at=0)
    next((root / "train").rglob("*.png")).unlink()
    data.scan_folder.cache_clear()  # a new process
    said = fails(capsys, "--out", out, *options, "--resume")
    assert re.search(r"89 pictures.* 90", said) and str(out) in said


@pytest.mark.parametrize("kept", [0, 1, 3, 100, 0.1, 0.5, 0.9, -1000, -1])
def test_truncated_checkpoints_are_refused(tmp_path, reference, capsys, kept):
    content = (reference / "last.pt").read_bytes()
    kept = int(kept * len(content)) if isinstance(kept, float) else kept
    (tmp_path / "last.pt").write_bytes(content[:kept])
    said = fails(capsys, "--out", tmp_path, "--resume", *HERE)
    assert f"{tmp_path / 'last.pt'} is no checkpoint, or is truncated or damaged" in said
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize(
    "content",
    [
        b"hello, I am a text file\n",
        b"a text file\n",
        b"Just a text file\n",
        b"training notes\n",
        b"\x89PNG\r\n\x1a\n",
        b"PK\x03\x04 not really",
        pickle.dumps({"format": "other"}),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, capsys, content):
    (tmp_path / "last.pt").write_bytes(content)
    said = fails(capsys, "--out", tmp_path, "--resume", *HERE)
    assert f"{tmp_path / 'last.pt'} is no checkpoint" in said
    assert (tmp_path / "last.pt").read_bytes() == content


class Trap:
    """Unpickled, it creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("write", ["pickle", "torch.save"])
def test_a_checkpoint_that_would_run_code_does_not(tmp_path, capsys, write):
    state = {"format": probe.CHECKPOINT_FORMAT, "config": Trap(tmp_path / "trapped")}
    if write == "pickle":
        (tmp_path / "last.pt").write_bytes(pickle.dumps(state))
    else:
        torch.save(state, tmp_path / "last.pt")
    assert "is no checkpoint" in fails(capsys, "--out", tmp_path, "--resume", *HERE)
    assert not (tmp_path / "trapped").exists()


def test_other_checkpoints_are_refused(tmp_path, capsys):
    torch.save({"encoder": {}, "predictor": {}}, tmp_path / "last.pt")
    said = fails(capsys, "--out", tmp_path, "--resume", *HERE)
    assert f"{tmp_path / 'last.pt'} is no checkpoint of train.py" in said


def test_a_process_ends_with_exit_code_2_and_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--data", "nowhere", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"train\.py: error: --data nowhere is neither .*\n", done.stderr)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------ configuration, W&B


@pytest.mark.parametrize("name", ijepa.MODELS)
def test_defaults_are_those_of_the_models_recipe(name, monkeypatch):
    config, architecture, checkpoint = train.configure(["--model", name])
    model = ijepa.MODELS[name]
    assert checkpoint is None and architecture == model.config
    for field in ("data", "batch_size", "epochs", "warmup_epochs", "lr", "momentum", "crop_scale"):
        assert getattr(config, field) == getattr(model.recipe, field)
    assert config.out == f"runs/{name}_{model.recipe.data}"


def test_the_data_of_the_models():
    data_of = {name: model.recipe.data for name, model in ijepa.MODELS.items()}
    assert data_of.pop("vit_nano") == "shapes"
    assert data_of.pop("vit_tiny") == data_of.pop("vit_small") == "cifar10"
    assert set(data_of.values()) == {"imagenet"} and len(data_of) == 4


def test_the_warmup_is_a_share_of_the_epochs_unless_given():
    recipe = ijepa.MODELS["vit_tiny"].recipe
    config, *_ = train.configure(["--model", "vit_tiny", "--epochs", "20"])
    assert config.warmup_epochs == pytest.approx(20 * recipe.warmup_epochs / recipe.epochs)
    config, *_ = train.configure(["--model", "vit_tiny", "--epochs", "20", "--warmup-epochs", "3"])
    assert config.warmup_epochs == 3


def test_sizes_follow_the_pictures_and_options_come_first(tmp_path):
    root = make_folder(tmp_path / "large", "ab", 2, side=200)
    options = ["--model", "vit_tiny", "--data", str(root)]
    _, architecture, _ = train.configure(options)
    assert (architecture.img_size, architecture.patch_size) == (224, 16)
    changes = ["--patch-size", "8", "--img-size", "64", "--predictor-dim", "48", "--loss", "l2"]
    _, architecture, _ = train.configure([*options, *changes])
    assert (architecture.img_size, architecture.patch_size) == (64, 8)
    assert (architecture.predictor_dim, architecture.loss) == (48, "l2")


@pytest.mark.parametrize("seconds, warned", [(20_000.0, True), (1.0, False)])
def test_a_run_that_would_take_days_on_a_cpu_says_so(
    tmp_path, pictures, capsys, monkeypatch, seconds, warned
):
    monkeypatch.setattr(train, "step_seconds", lambda *_: seconds)
    run(tmp_path / "run", "--data", pictures, *SMALL, *HERE, kill_at=0)
    said = capsys.readouterr().out
    assert ("about 44.4 hours" in said) == warned
    assert ("meant for GPUs" in said and "--model vit_nano" in said) == warned


def test_step_seconds_leave_no_trace(tmp_path, pictures, monkeypatch, reference):
    monkeypatch.setattr(train, "step_seconds", lambda *_: 1.0)
    run(tmp_path / "run", "--data", pictures, *SMALL, *HERE)
    assert_same_run(tmp_path / "run", reference)


def test_wandb_without_the_package(tmp_path, pictures, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    options = ["--out", tmp_path / "run", "--data", pictures, *SMALL, *HERE, "--wandb"]
    assert "pip install wandb" in fails(capsys, *options)


def test_wandb_without_the_package_leaves_nothing_behind(tmp_path, pictures, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    options = ["--data", pictures, *SMALL, *HERE, "--steps", "2"]
    fails(capsys, "--out", tmp_path / "run", *options, "--wandb")
    run(tmp_path / "run", *options)


class FakeWandb(types.SimpleNamespace):
    """Remembers what it is told."""

    def __init__(self):
        super().__init__(started=[], logged=[], files=[], artifacts=[], finished=0)
        artifact = types.SimpleNamespace(add_file=self.files.append)
        self.Artifact = lambda name, type: artifact

    def init(self, **kwargs):
        self.started.append(kwargs)
        return self

    def log(self, values, step):
        self.logged.append((step, dict(values)))

    def log_artifact(self, artifact):
        self.artifacts.append(artifact)

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb_run(tmp_path, pictures, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run(tmp_path / "run", "--data", pictures, *SMALL, *HERE, "--wandb")
    return fake, tmp_path / "run"


def test_wandb_gets_losses_rates_evaluations_and_the_best_checkpoint(wandb_run):
    fake, out = wandb_run
    assert fake.started[0]["config"]["batch_size"] == 8
    steps = [step for step, _ in fake.logged]
    assert steps == sorted(steps)  # it drops what comes late
    training = {step: values for step, values in fake.logged if "Train Loss" in values}
    assert list(training) == [2, 4, 6, 8]
    for row in log_of(out):
        if row["loss"]:
            values = training[int(row["step"])]
            assert values["Train Loss"] == pytest.approx(float(row["loss"]), rel=1e-5)
            assert values["Epoch"] == pytest.approx(float(row["epoch"]), rel=1e-5)
            assert values["lr"] == pytest.approx(float(row["lr"]), rel=1e-5)
    evaluations = {step: values["knn"] for step, values in fake.logged if "knn" in values}
    logged = {int(r["step"]): pytest.approx(float(r["knn"])) for r in log_of(out) if r["knn"]}
    assert evaluations == logged and list(logged) == [0, 4, 8]
    assert fake.files == [str(out / "best.pt")] and len(fake.artifacts) == 1
    assert fake.finished == 1


def test_wandb_gets_numbers_only(wandb_run):
    for _, values in wandb_run[0].logged:
        assert all(isinstance(value, int | float) for value in values.values())


def test_wandb_is_not_imported_unless_asked_for(reference, monkeypatch, tmp_path, pictures):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run(tmp_path / "run", "--data", pictures, *SMALL, *HERE)
    assert_same_run(tmp_path / "run", reference)


@pytest.mark.parametrize(
    "seconds, words",
    [(5, "5 seconds"), (119, "119 seconds"), (150, "2.5 minutes"), (7200, "2.0 hours")],
)
def test_durations_in_words(seconds, words):
    assert train.duration(seconds) == words
