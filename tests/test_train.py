"""Whole runs of a very small model: interrupted, resumed, divided over processes, and refused."""

import csv
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import data
import probe
import train
from ijepa import IJEPA, MODELS, MaskCollator

SCRIPT = Path(train.__file__)
# 4 x 4 patches, 81 training and 9 validation images: 30 steps, evaluated at 8, 16, 24 and 30.
SMALL = """
    --img-size 16 --context-size 4 --predictor-depth 1 --batch-size 8 --epochs 2.96 --lr 1e-3
    --warmup-epochs 1 --weight-decay 0.04 0.1 --momentum 0.99 1 --crop-scale 0.3 1
    --eval-every 0.8 --device cpu
""".split()  # noqa: SIM905
STEPS, EVALUATED, LOGGED = 30, [8, 16, 24, 30], [8, 10, 16, 20, 24, 30]
COLUMNS = ["step", "epoch", "loss", "lr", "weight_decay", "momentum", "images_per_second"]
MEASURED = ["val_loss", "knn", "rankme", "feature_std"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    """A folder of noise in three classes of different brightness."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i, name in enumerate("abc"):
        (root / "train" / name).mkdir(parents=True)
        for number in range(30):
            pixels = rng.integers(0, 100 + 50 * i, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "train" / name / f"{number:02}.jpg")
    return str(root)


@pytest.fixture(autouse=True)
def signal_handlers():
    """Runs in this process change them."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


class Killed(BaseException):
    """Ends a run in this process at once, as SIGKILL does."""


def kill():
    raise Killed


def run(*options, at: tuple = (None, None), finish=False) -> None:
    """`python train.py options` in this process.

    at: (step, function to call at its start). finish: evaluate at the end, which takes seconds.
    """
    learning_rate, (stop_step, act) = train.learning_rate, at

    def hooked(step, *rest):
        if step == stop_step:
            act()
        return learning_rate(step, *rest)

    argv = [str(SCRIPT), *map(str, options)]
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(train, "learning_rate", hooked),
        nullcontext() if finish else mock.patch.object(train, "finish"),
        pytest.raises(SystemExit) as exit,
    ):
        data.run_main(train.main)
    if exit.value.code:
        raise exit.value


def load(out: Path) -> dict:
    return torch.load(out / "last.pt", weights_only=True)


def log_of(out: Path) -> list[dict[str, str]]:
    """log.csv without the speed."""
    with open(out / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert float(row.pop("images_per_second")) > 0
    return rows


def assert_equal(ours, theirs, where="checkpoint") -> None:
    """Equal to the last bit, at every depth."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs), where
        for key in ours:
            assert_equal(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(*pair, f"{where}[{i}]")
    else:
        assert ours == theirs, where


def assert_same_run(ours: Path, theirs: Path) -> None:
    a, b = load(ours), load(theirs)
    for part in ("step", "model", "optimizer", "architecture"):
        assert_equal(a[part], b[part], part)
    assert log_of(ours) == log_of(theirs)
    assert not list(ours.glob("*.tmp"))


def assert_close_run(ours: Path, theirs: Path) -> None:
    """Equal but for rounding; weights relative to how far training has moved them."""
    a, b = load(ours), load(theirs)
    torch.manual_seed(b["config"]["seed"])
    start = IJEPA(replace(MODELS["vit_nano"], **b["architecture"])).state_dict()
    assert a["step"] == b["step"]
    assert_close_weights(a["model"], b["model"], start)
    for mine, row in zip(log_of(ours), log_of(theirs), strict=True):
        assert mine["step"] == row["step"]
        for column in ("epoch", "loss", "lr", "momentum", "val_loss", "rankme", "feature_std"):
            assert bool(mine[column]) == bool(row[column])
            if row[column]:
                assert float(mine[column]) == pytest.approx(float(row[column]), rel=1e-3)


def assert_close_weights(ours: dict, theirs: dict, start: dict) -> None:
    for name, value in theirs.items():
        values = [ours[name], value, start[name]]
        if name.endswith("qkv.bias"):  # that of the keys has no gradient but rounding
            values = [x.unflatten(0, (3, -1))[[0, 2]] for x in values]
        mine, value, initial = (x.double() for x in values)
        assert (mine - value).norm() <= 0.01 * (value - initial).norm() + 1e-7, name


@pytest.fixture(scope="module")
def reference(tmp_path_factory, images) -> types.SimpleNamespace:
    """An uninterrupted run, with its final evaluation and what it prints."""
    out, printed = tmp_path_factory.mktemp("runs") / "deep" / "reference", io.StringIO()
    with redirect_stdout(printed):
        run("--data", images, *SMALL, "--out", out, finish=True)
    return types.SimpleNamespace(out=out, printed=printed.getvalue(), rows=log_of(out))


# ---------------------------------------------------------------------------------- a whole run


def test_log_has_every_row_and_column(reference):
    header = (reference.out / "log.csv").read_text().splitlines()[0]
    assert header.split(",") == COLUMNS + MEASURED
    assert [int(row["step"]) for row in reference.rows] == LOGGED
    for row in reference.rows:
        evaluated = int(row["step"]) in EVALUATED
        assert [bool(row[name]) for name in MEASURED] == [evaluated] * 4
        assert float(row["epoch"]) == pytest.approx(int(row["step"]) * 8 / 81)
        assert not evaluated or 0 <= float(row["knn"]) <= 1 <= float(row["rankme"]) <= 9


def schedule(done: int) -> dict[str, float]:
    """Of a run with the options SMALL, at its step number `done`, counted from 1."""
    recipe, warmup = train.RECIPES["vit_nano"], round(81 / 8)
    start, final = 1e-3 * recipe.start_lr, 1e-3 * recipe.final_lr
    progress = (done - warmup) / (STEPS - warmup)
    lr = final + (1e-3 - final) * (1 + np.cos(np.pi * progress)) / 2
    return {
        "lr": start + (1e-3 - start) * done / warmup if done < warmup else lr,
        "weight_decay": 0.1 - 0.06 * (1 + np.cos(np.pi * done / STEPS)) / 2,
        "momentum": 0.99 + 0.01 * (done - 1) / STEPS,
    }


def test_run_equals_a_loop_written_by_hand(reference, images):
    dataset = data.load_dataset(images, "train", img_size=16)
    batches = data.train_batches(
        dataset, data.train_val_split(dataset)[0], MaskCollator(4, context_size=4), range(STEPS),
        batch_size=8, crop_scale=(0.3, 1.0), flip=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = IJEPA(replace(MODELS["vit_nano"], img_size=16, predictor_depth=1))
    start = {name: x.clone() for name, x in model.state_dict().items()}
    weights = [*model.encoder.parameters(), *model.predictor.parameters()]
    groups = [[p for p in weights if (p.ndim > 1) == decays] for decays in (True, False)]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], betas=(0.9, 0.98))
    for done, batch in enumerate(batches, start=1):
        now = schedule(done)
        for group, decay in zip(optimizer.param_groups, (now["weight_decay"], 0.0), strict=True):
            group.update(lr=now["lr"], weight_decay=decay)
        optimizer.zero_grad()
        model(*batch).backward()
        optimizer.step()
        pairs = zip(model.target_encoder.parameters(), model.encoder.parameters(), strict=True)
        for target, online in pairs:
            target.data = now["momentum"] * target + (1 - now["momentum"]) * online.data
        model.target_norm.update()
    assert done == STEPS
    assert_close_weights(load(reference.out)["model"], model.state_dict(), start)


def test_log_follows_the_schedules(reference):
    for row in reference.rows:
        expected = schedule(int(row["step"]))
        assert {name: float(row[name]) for name in expected} == pytest.approx(expected)
    final = 1e-3 * train.RECIPES["vit_nano"].final_lr
    groups = load(reference.out)["optimizer"]["param_groups"]
    decays = [(group["lr"], group["weight_decay"]) for group in groups]
    assert decays == [pytest.approx((final, decay)) for decay in (0.1, 0)]


def test_final_table_equals_the_probe(reference, images):
    encoder, architecture, info = probe.load_encoder(str(reference.out))
    assert info["step"] == STEPS
    dataset = data.load_dataset(images, "train", img_size=16)
    splits = probe.make_splits(dataset, train_images=train.EVAL_IMAGES)
    encoders = {"pixels": None, "untrained": probe.untrained_encoder(architecture)}
    rows = [
        {"name": name} | probe.evaluate(probe.extract_splits(splits, network), 3)
        for name, network in (encoders | {"trained": encoder}).items()
    ]
    result = json.loads((reference.out / "result.json").read_text())
    assert result["train_images"] == 81
    assert result["rows"] == rows
    assert probe.format_table(rows) in reference.printed
    assert "learn from 81 training images" in reference.printed
    assert rows[2]["knn"] == float(reference.rows[-1]["knn"])


def test_untrained_encoder_is_where_training_starts():
    torch.manual_seed(3)
    start = IJEPA(MODELS["vit_nano"]).target_encoder.state_dict()
    assert_equal(start, probe.untrained_encoder(MODELS["vit_nano"], 3).state_dict())


def test_figures_are_drawn(reference):
    for name in ("curves.png", "overview.png"):
        assert np.array(Image.open(reference.out / name).convert("L")).std() > 5


def test_description_comes_before_training(reference, images):
    count = sum(p.numel() for p in probe.load_encoder(str(reference.out))[0].parameters())
    first, model = reference.printed.splitlines()[0], f"vit_nano, encoder of {count / 1e6:.1f} M"
    for words in (model, "81 images", images, "16 pixels in patches of 4", "steps 0 to 30", "cpu"):
        assert words in first


def test_loss_falls_on_textures(tmp_path, monkeypatch):
    textures = data.MemoryDataset(*data.draw_textures(400, 0), list(data.TEXTURES))
    monkeypatch.setattr(data, "textures_dataset", lambda split, size: textures)
    options = (
        "--epochs 3 --predictor-depth 1 --batch-size 24 --warmup-epochs 1 --momentum 0.99 0.99"
    )
    run(*options.split(), "--device", "cpu", "--out", tmp_path / "run")
    loss = [float(row["val_loss"]) for row in log_of(tmp_path / "run") if row["val_loss"]]
    assert loss[-1] < 0.95 * loss[0]


def test_recipes_of_the_paper():
    config, architecture, recipe = train.resolve(train.TrainConfig("vit_huge"))
    assert architecture == MODELS["vit_huge"] and config.data == "imagenet"
    assert (config.epochs, config.batch_size) == (300, 2048)
    assert train.resolve(train.TrainConfig("vit_large"))[0].epochs == 600
    schedule = [
        train.schedules(config, recipe, step=step, total_steps=1000, epoch_steps=10)
        for step in (0, 149, 999)
    ]
    assert schedule[0] == pytest.approx((1e-4, 0.04, 0.996), rel=0.07)
    assert schedule[1][0] == pytest.approx(1e-3)
    assert schedule[2] == pytest.approx((1e-6, 0.4, 1.0), rel=1e-3)


def test_options_replace_the_recipe(images):
    options = train.TrainConfig("vit_tiny", data=images, patch_size=8, context_size=3, lr=0.0)
    config, architecture, _ = train.resolve(options)
    assert (config.lr, config.context_size) == (0.0, 3)
    assert config.epochs == train.RECIPES["vit_tiny"].epochs
    assert architecture == replace(MODELS["vit_tiny"], patch_size=8)
    assert config.out == f"runs/vit_tiny_{Path(images).name}"
    options = replace(options, num_targets=2, target_scale=(0.2, 0.3), context_scale=(0.5, 0.6))
    ours = vars(train.make_masks(options, architecture))
    theirs = MaskCollator(
        4, num_targets=2, target_scale=(0.2, 0.3), context_scale=(0.5, 0.6), context_size=3
    )
    assert all(np.array_equal(ours[name], value) for name, value in vars(theirs).items())
    assert config.warmup_epochs == train.RECIPES["vit_tiny"].warmup_epochs
    assert train.resolve(replace(options, epochs=4))[0].warmup_epochs == 0.4  # a tenth
    assert train.resolve(train.TrainConfig())[0].epochs == train.DEMO["epochs"]


# ----------------------------------------------------------------------- interrupted and resumed


def test_resumed_run_is_bitwise_the_same(tmp_path, images, reference):
    with pytest.raises(Killed):
        run("--data", images, *SMALL, "--out", tmp_path / "run", at=(12, kill))
    assert load(tmp_path / "run")["step"] == 8  # but log.csv has a row of step 10
    torch.manual_seed(99)
    run("--out", tmp_path / "run", "--resume", "--workers", 1)
    assert_same_run(tmp_path / "run", reference.out)
    assert load(tmp_path / "run")["config"]["bf16"] is False  # whatever device resumes


def test_resume_can_change_what_changes_no_result(tmp_path):
    saved = train.TrainConfig(out=str(tmp_path), compile=True, wandb=True, accum_steps=4)
    model = IJEPA(MODELS["vit_nano"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    train.save(tmp_path / "last.pt", "I-JEPA", saved, 0, model, optimizer)
    given = train.TrainConfig(out=str(tmp_path), resume=True, compile=False, accum_steps=1)
    config, _ = train.resume(given, "I-JEPA")
    assert (config.compile, config.wandb, config.accum_steps) == (False, True, 1)


def test_log_may_be_lost_but_must_be_written(tmp_path):
    log = train.Log(tmp_path, 20, train.TrainConfig())
    assert log.rows == []
    probe.draw_curves(tmp_path / "curves.png", log.rows)
    log.path.unlink()
    log.path.mkdir()
    with pytest.raises(data.UserError, match="could not be written"):
        log.add({"step": 21})


@pytest.mark.parametrize(
    "number, code, step, saved",
    [(signal.SIGTERM, 143, 17, 20), (signal.SIGINT, 130, 17, 20), (signal.SIGTERM, 143, 28, 30)],
)
def test_signals_save_and_stop(tmp_path, images, number, code, step, saved, capsys):
    options = ["--data", images, *SMALL, "--out", tmp_path / "run"]
    with pytest.raises(SystemExit) as stopped:
        run(*options, at=(step, lambda: os.kill(os.getpid(), number)))
    assert stopped.value.code == code
    assert load(tmp_path / "run")["step"] == saved
    assert f"stopped at step {saved} of 30: continue with --resume" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # a second Ctrl-C stops at once
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def test_a_signal_to_one_process_stops_all(tmp_path, images, port):
    """And to those that load images: torchrun signals a group of processes, schedulers all."""

    def stop():
        for loader in multiprocessing.active_children():
            os.kill(loader.pid, signal.SIGTERM)
        os.killpg(0, signal.SIGTERM)

    def process(rank: int):
        os.setsid()
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank)}
        options = ["--data", images, *SMALL, "--workers", 1, "--out", tmp_path / "run"]
        run(*options, at=(17 if rank == 1 else None, stop))

    processes = [start(rank, call=process) for rank in range(2)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [143, 143]
    assert load(tmp_path / "run")["step"] == 20


def test_ctrl_c_in_the_final_evaluation_stops_at_once(tmp_path, images):
    options = ["--data", images, *SMALL, "--epochs", 0.1, "--warmup-epochs", 0]
    options += ["--out", tmp_path / "run"]
    interrupt = mock.patch.object(train, "finish", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with interrupt, pytest.raises(SystemExit) as stopped:
        run(*options, finish=True)
    assert stopped.value.code == 130


def start(*options, call=run) -> multiprocessing.Process:
    """A run in a process of its own, forked so that it need not import everything again."""
    process = multiprocessing.get_context("fork").Process(target=call, args=options)
    process.start()
    return process


def wait_for_step(process, out: Path, step: int) -> None:
    """Until the checkpoint is of this step, or later."""
    end = time.monotonic() + 120
    while not (out / "last.pt").exists() or load(out)["step"] < step:
        assert time.monotonic() < end and process.is_alive()
        time.sleep(0.002)


def test_terminated_and_killed_processes_resume(tmp_path, images, reference):
    out = tmp_path / "run"
    process = start("--data", images, *SMALL, "--out", out)
    wait_for_step(process, out, 8)
    process.terminate()
    process.join(120)
    assert process.exitcode == 143
    stopped = load(out)["step"]
    assert 10 <= stopped < STEPS
    process = start("--resume", "--out", out)
    wait_for_step(process, out, stopped + 1)
    process.kill()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    run("--resume", "--out", out)
    assert_same_run(out, reference.out)


# ---------------------------------------------------------- a function of seed and batch size only


def test_accumulation_equals_a_large_batch(tmp_path, images, reference):
    run("--data", images, *SMALL, "--out", tmp_path / "run", "--accum-steps", 4)
    assert_close_run(tmp_path / "run", reference.out)


def test_accumulation_with_the_targets_of_the_imagenet_models(tmp_path, images):
    for n in (1, 4):
        options = ("--target-norm", "layer", "--accum-steps", n, "--out", tmp_path / str(n))
        run("--data", images, *SMALL, *options)
    assert_close_run(tmp_path / "4", tmp_path / "1")


def test_two_processes_equal_one(tmp_path, images, reference):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [SCRIPT, "--data", images, *SMALL, "--accum-steps", "2", "--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_close_run(out, reference.out)
    assert done.stdout.count("vit_nano") == done.stdout.count("Validation accuracy") == 1
    assert (out / "result.json").exists()


@pytest.mark.parametrize("eval_every", ["0.3", "inf"])
def test_evaluation_does_not_change_training(tmp_path, images, reference, eval_every):
    options = ["--eval-every", eval_every, "--save-every", 0, "--out", tmp_path / "run"]
    run("--data", images, *SMALL, *options)
    for part in ("model", "optimizer"):
        assert_equal(load(tmp_path / "run")[part], load(reference.out)[part], part)


def test_seed_decides(tmp_path, images, reference):
    with pytest.raises(Killed):
        run("--data", images, *SMALL, "--seed", 1, "--out", tmp_path / "run", at=(9, kill))
    assert log_of(tmp_path / "run")[0]["loss"] != reference.rows[0]["loss"]


# ------------------------------------------------------------------------------ bf16 and compile


def few_steps(out: Path, images: str, *options) -> list[float]:
    """The losses of ten steps, in two rows."""
    run("--data", images, *SMALL, "--epochs", 1, "--out", out, *options)
    return [float(row["loss"]) for row in log_of(out)]


def test_bf16_stays_close(tmp_path, images):
    expected = few_steps(tmp_path / "float32", images)
    losses = few_steps(tmp_path / "bf16", images, "--bf16")
    assert losses != expected
    assert losses == pytest.approx(expected, rel=0.03)
    assert all(x.dtype != torch.bfloat16 for x in load(tmp_path / "bf16")["model"].values())


def test_compiled_run_stays_close(tmp_path, images, monkeypatch):
    compiled, compile_layer = [], torch.nn.Module.compile

    def without_code_generation(layer):  # which alone takes a minute
        compiled.append(layer)
        compile_layer(layer, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", without_code_generation)
    expected = few_steps(tmp_path / "eager", images)
    losses = few_steps(tmp_path / "compiled", images, "--compile")
    assert losses == pytest.approx(expected, rel=1e-3)
    assert len(compiled) == 4 + 4 + 1  # layers of encoder, target encoder and predictor
    assert load(tmp_path / "compiled")["model"].keys() == load(tmp_path / "eager")["model"].keys()


# ----------------------------------------------------------------------------- mistakes of users


def refused(capsys, *options) -> str:
    """The one line of an error with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        run(*options)
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    line = captured.err.split("\r")[-1].strip()  # after the progress bar
    assert line.startswith("train.py: error: ") and "\n" not in line
    return line


@pytest.mark.parametrize(
    "options, message",
    [
        ("--epoch 1", "unrecognized arguments: --epoch.*--help"),
        ("--model vit_enormous", "'vit_nano', 'vit_mini'"),
        ("--lr fast", "argument --lr: invalid float value: 'fast'"),
        ("--img-size 18", "18x18 pixels do not divide into patches of 4"),
        ("--predictor-dim 50", "width 50 must be divisible"),
        ("--num-targets 0", "0 targets"),
        ("--context-size 15", "Lower the context size"),
        ("--target-scale 0.9 0.2", "0.9 to 0.2"),
        ("--accum-steps 3", "choose a multiple of 3"),
        ("--epochs 0.01 --warmup-epochs 0", "less than one batch of 8"),
        ("--epochs 0.9", "--warmup-epochs is longer than --epochs"),
        ("--batch-size 1", "whitened targets need two images"),
        ("--resume", "last.pt does not exist: leave out --resume"),
        ("--momentum 2 2", "--momentum is within 0 to 1"),
        ("--eval-every 0", "--eval-every is above 0"),
        ("--eval-every nan", "--eval-every is above 0"),
        ("--epochs inf", "--epochs, --warmup-epochs and --lr are numbers of 0 or more"),
        ("--lr -1", "--lr are numbers of 0 or more"),
        ("--workers -1", "--workers starts at 0"),
        ("--device gpu:0", "choose cpu, or cuda"),
        ("--data nowhere", "there is no folder nowhere"),
    ],
)
def test_mistakes_are_one_line(tmp_path, images, capsys, options, message):
    given = ["--data", images, *SMALL, *options.split(), "--out", tmp_path / "run"]
    assert re.search(message, refused(capsys, *given))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ("", "already holds a run: add --resume"),
        ("--resume --lr 0.5", "was trained with lr 0.001, not 0.5"),
        ("--resume --warmup-epochs 2.5", "was trained with warmup_epochs 1.0, not 2.5"),
        ("--resume --batch-size 16", "was trained with batch_size 8, not 16"),
        ("--resume --target-norm layer", "target_norm"),
        ("--resume --eval-every 1", "was trained with eval_every 0.8, not 1.0"),  # a default
    ],
)
def test_existing_run_stays_as_it_is(tmp_path, reference, images, capsys, options, message):
    out = shutil.copytree(reference.out, tmp_path / "run")
    given = [] if "--resume" in options else ["--data", images, *SMALL]
    assert message in refused(capsys, *given, *options.split(), "--out", out)
    before, after = ({p.name: p.read_bytes() for p in d.iterdir()} for d in (reference.out, out))
    assert before == after


def test_checkpoint_of_another_version_is_refused(tmp_path, reference, capsys):
    checkpoint = load(reference.out)
    nameless = {key: value for key, value in checkpoint.items() if key != "name"}
    renamed = checkpoint | {"config": checkpoint["config"] | {"an_old_option": 1}}
    for change in nameless, renamed:
        torch.save(change, tmp_path / "last.pt")
        message = refused(capsys, "--resume", "--out", tmp_path)
        assert "another version of train.py" in message and "another --out" in message


def no_eigenvalues(matrix):
    """As LAPACK and cuSOLVER may do with NaN; whether they do depends on the size."""
    raise torch.linalg.LinAlgError("failed to converge")


@pytest.mark.parametrize("eigh", [torch.linalg.eigh, no_eigenvalues])
def test_diverged_run_stops_with_advice(tmp_path, images, capsys, monkeypatch, eigh):
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    options = ["--lr", 1e20, "--out", tmp_path / "run"]
    message = refused(capsys, "--data", images, *SMALL, *options)
    assert "lower --lr" in message
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["log.csv"]


def test_missing_wandb(tmp_path, images, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    given = ["--data", images, *SMALL, "--wandb", "--out", tmp_path / "run"]
    assert "pip install wandb" in refused(capsys, *given)
    assert not (tmp_path / "run" / "last.pt").exists()


def test_wandb_gets_the_log(tmp_path, images, monkeypatch):
    rows, settings = [], {}

    class Wandb(types.ModuleType):
        def init(self, **given):
            settings.update(given)
            return types.SimpleNamespace(log=lambda row, step: rows.append((step, row)))

    monkeypatch.setitem(sys.modules, "wandb", Wandb("wandb"))
    few_steps(tmp_path / "run", images, "--wandb")
    assert [step for step, _ in rows] == [8, 10]
    assert rows[0][1]["loss"] == float(log_of(tmp_path / "run")[0]["loss"])
    assert settings["config"]["batch_size"] == 8


@pytest.mark.parametrize("config, limit", [(train.TrainConfig, 35), (probe.ProbeConfig, 15)])
def test_help_is_short(capsys, config, limit):
    with pytest.raises(SystemExit) as stopped:
        data.parse_args(config, "A description.", ["--help"])
    assert stopped.value.code == 0
    options = re.findall(r"^  (--[a-z]|[a-z]+ )", capsys.readouterr().out, flags=re.MULTILINE)
    assert 10 < len(options) <= limit
