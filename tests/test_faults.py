"""Faults of machines, of other processes and of files: what can be lost, and is not.

The longer versions are the scripts in tests/faults/, whose counts are in results/faults.json.
"""

import contextlib
import dataclasses
import io
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_train import (
    HERE,
    ROOT,
    assert_close_runs,
    assert_equal,
    assert_same_run,
    load,
    log_of,
    make_folder,
)

import data
import ijepa
import train

sys.path.insert(0, str(ROOT / "tests" / "faults"))
from faulty import start

# Twenty steps; what is saved, logged and evaluated falls on different steps.
RUN = [
    *("--img-size", "16", "--patch-size", "4", "--predictor-depth", "1", "--batch-size", "16"),
    *("--steps", "20", "--eval-images", "40", "--eval-every", "10", "--log-every", "3"),
    *("--save-every", "4", *HERE),
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> str:
    return str(make_folder(tmp_path_factory.mktemp("pictures")))


def ended(*processes, seconds: float = 60) -> list[int]:
    """Their exit codes; nothing of them is left running."""
    end = time.monotonic() + seconds
    try:
        for process in processes:
            process.join(max(0, end - time.monotonic()))
            assert process.exitcode is not None, "it hangs"
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def run(out: Path, *options: str, faults: dict | None = None, world: int = 1) -> tuple[list, str]:
    """Exit codes and what was said by all processes of a run that ends by itself."""
    port = free_port()
    codes = ended(
        *(start(out, *options, faults=faults, rank=r, world=world, port=port) for r in range(world))
    )
    return codes, "".join(Path(f"{out}.said{rank}").read_text() for rank in range(world))


def finished(out: Path, *options: str, faults: dict | None = None, world: int = 1) -> str:
    """What was said by a run that ends well."""
    codes, said = run(out, *options, faults=faults, world=world)
    assert codes == [0] * world, said
    return said


def wait_for(condition, process, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.is_alive()
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, pictures) -> Path:
    """The folder of the uninterrupted run."""
    out = tmp_path_factory.mktemp("reference") / "run"
    finished(out, "--data", pictures, *RUN)
    return out


# ---------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_run_and_ends_it_with_the_code_of_shells(
    tmp_path, pictures, reference, number, code
):
    out = tmp_path / "run"
    codes, said = run(out, "--data", pictures, *RUN, faults={"signal": [0, 6, number]})
    assert codes == [code] and "Traceback" not in said
    assert said.endswith(f"stopped by {number.name} and saved: --resume goes on\n")
    assert load(out)["step"] == 7  # the step in hand is finished; 4 was the last to be saved
    finished(out, "--resume", *HERE)
    assert_same_run(out, reference)  # the log too: losses since its last line are not forgotten


def test_a_signal_is_answered_within_seconds(tmp_path, pictures):
    out = tmp_path / "run"
    process = start(out, "--data", pictures, *RUN, "--steps", "10000", "--eval-every", "10000")
    wait_for((out / "last.pt").exists, process)
    time.sleep(0.5)
    asked = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    assert ended(process) == [143] and time.monotonic() - asked < 5


def test_a_second_signal_ends_the_run_at_once(tmp_path, pictures):
    out = tmp_path / "run"
    process = start(out, "--data", pictures, *RUN, faults={"slow": 30})
    wait_for((out / "last.pt").exists, process)
    time.sleep(1)  # now it is in its first step, of half a minute
    before = (out / "last.pt").read_bytes()
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.2)
    assert process.is_alive()
    asked = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    assert ended(process) == [-signal.SIGINT]  # which shells show as 130
    assert time.monotonic() - asked < 2
    assert (out / "last.pt").read_bytes() == before


def test_processes_agree_on_the_step_at_which_they_stop(tmp_path, pictures, reference):
    out = tmp_path / "run"
    faults = {"signal": [1, 6, signal.SIGTERM]}  # one of them gets it
    codes, said = run(out, "--data", pictures, *RUN, faults=faults, world=2)
    assert codes == [143, 143] and said.count("stopped by SIGTERM and saved") == 2
    assert load(out)["step"] == 8  # one more than alone: they exchange it during a step
    finished(out, "--resume", *HERE)
    assert_close_runs(out, reference)


def test_signals_are_noted_between_the_first_and_the_second():
    place = data.Place(0, 1, torch.device("cpu"))
    before = signal.getsignal(signal.SIGTERM)
    with train.Signals(place, 1.0) as signals:
        assert signals.agreed() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.agreed() == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == before


# --------------------------------------------------------------------------------- kill -9


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_run_killed_at_any_moment_resumes_to_the_same_bits(tmp_path, pictures, reference, seed):
    out = tmp_path / "run"
    faults = {"slow": 0.02, "sync": 0.05}  # half of the time it is saving
    process = start(out, "--data", pictures, *RUN, faults=faults)
    wait_for((out / "last.pt").exists, process)
    time.sleep(random.Random(seed).random())
    process.kill()
    ended(process)
    assert load(out)["step"] < 20, "too late to kill it"
    finished(out, "--resume", *HERE)
    assert_same_run(out, reference)
    assert not list(out.glob("*.tmp"))


def test_what_a_killed_process_left_half_written_is_removed(tmp_path, reference):
    out = shutil.copytree(reference, tmp_path / "run")
    for name in ("best.pt.tmp", "last.pt.tmp", "log.csv.tmp"):
        (out / name).write_bytes(b"half")
    finished(out, "--resume", *HERE)
    assert not list(out.glob("*.tmp"))
    assert_same_run(out, reference)


# ------------------------------------------------------------------------ other processes


def test_a_loss_that_breaks_in_one_process_stops_all_and_names_it(tmp_path, pictures):
    out = tmp_path / "run"
    codes, said = run(out, "--data", pictures, *RUN, faults={"nan": [1, 9]}, world=2)
    assert codes == [2, 2] and "Traceback" not in said
    # Step 10 of people who count from 1; logged and to be saved with an evaluation at 10.
    assert said.count("the loss is nan at step 10 in process 1 of 2: stopped") == 2
    assert load(out)["step"] == 8
    assert all(x.isfinite().all() for x in load(out)["model"].values())


def test_a_process_that_hangs_ends_the_run_within_the_timeout(tmp_path, pictures):
    out, options = tmp_path / "run", ["--data", pictures, *RUN, "--timeout", "0.05"]
    port, faults = free_port(), {"hang": [1, 5]}
    runs = [start(out, *options, faults=faults, rank=r, world=2, port=port) for r in range(2)]
    try:
        runs[0].join(60)
        assert runs[0].exitcode == 2 and runs[1].is_alive()
    finally:
        ended_by_force = [process.kill() or process.join() for process in runs]
    said = Path(f"{out}.said0").read_text()
    assert "process 0 of 2: another one has ended, or has not answered for 0.05 minutes" in said
    assert "Traceback" not in said and ended_by_force
    assert load(out)["step"] == 4


def test_a_run_whose_process_died_goes_on_when_all_are_started_again(tmp_path, pictures, reference):
    out, options = tmp_path / "run", ["--data", pictures, *RUN, "--auto-resume"]
    codes, said = run(out, *options, faults={"die": [1, 9]}, world=2)
    assert codes == [2, -signal.SIGKILL] and load(out)["step"] == 8
    assert "process 0 of 2: another one has ended" in said and "Traceback" not in said
    finished(out, *options, faults={"die": [1, 9]}, world=2)  # as torchrun does
    assert_close_runs(out, reference)
    assert [row["step"] for row in log_of(out)] == [row["step"] for row in log_of(reference)]


@pytest.mark.parametrize("again", [["--auto-resume"], ["--resume"]])
def test_auto_resume_starts_a_run_and_goes_on_with_it(tmp_path, pictures, reference, again):
    out, options = tmp_path / "run", ["--data", pictures, *RUN]
    faults = {"signal": [0, 6, signal.SIGTERM]}
    assert run(out, *options, "--auto-resume", faults=faults)[0] == [143]
    finished(out, *options, *again)
    assert_same_run(out, reference)


@pytest.mark.parametrize("world, accum", [(1, 4), (2, 2), (4, 1)])
def test_processes_and_accumulation_change_nothing_but_rounding(
    tmp_path, pictures, reference, world, accum
):
    out = tmp_path / "run"
    finished(out, "--data", pictures, *RUN, "--accum-steps", str(accum), world=world)
    assert_close_runs(out, reference)


def test_a_run_goes_from_one_process_to_four_and_back(tmp_path, pictures, reference):
    out = tmp_path / "run"
    code = [128 + signal.SIGTERM]
    at_6, at_12 = ({"signal": [0, step, signal.SIGTERM]} for step in (6, 12))
    assert run(out, "--data", pictures, *RUN, faults=at_6)[0] == code
    assert run(out, "--resume", *HERE, faults=at_12, world=4)[0] == 4 * code
    assert load(out)["step"] == 14
    finished(out, "--resume", *HERE)
    assert_close_runs(out, reference)


@pytest.mark.parametrize("stopped", [False, True])
def test_the_slurm_script_starts_train_py_and_queues_itself_again(tmp_path, stopped):
    """With srun and scontrol that write down what they are asked."""
    readme = (ROOT / "README.md").read_text()
    script = re.search(r"```sh\n(#!/bin/bash\n.*?)```", readme, re.S)[1]
    (tmp_path / "job.sh").write_text(script)
    asked = tmp_path / "asked"
    for name, body in (
        ("srun", f'echo "srun $@" >> {asked}; trap "exit 1" TERM; sleep {3 * stopped} & wait'),
        ("scontrol", f'echo "scontrol $@" >> {asked}; echo node1; echo node2'),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]"}
    environment = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    job = subprocess.Popen(["bash", tmp_path / "job.sh"], env=environment)
    if stopped:
        end = time.monotonic() + 20
        while "srun" not in (asked.read_text() if asked.exists() else ""):
            assert time.monotonic() < end
            time.sleep(0.05)
        time.sleep(0.3)
        job.send_signal(signal.SIGTERM)
    job.wait(30)
    hosts, started, *more = asked.read_text().splitlines()
    assert hosts == "scontrol show hostnames node[1-2]"
    assert more == (["scontrol requeue 7"] if stopped else [])
    assert "--nnodes 2" in started and "--rdzv-endpoint node1:29400" in started
    config, *_ = train.configure(started.partition(" train.py ")[2].split())
    assert config.auto_resume and config.model == "vit_huge"


# ---------------------------------------------------------------- models that are too large


needs_fsdp_on_cpu = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"),
    reason="this PyTorch shards on GPUs only (2.6 does)",
)


@needs_fsdp_on_cpu
def test_a_sharded_run_equals_one_that_is_not(tmp_path, pictures, reference):
    out = tmp_path / "run"
    options = ["--data", pictures, *RUN, "--accum-steps", "2"]
    finished(out, *options, "--shard", "--checkpoint-activations", world=2)
    assert_close_runs(out, reference)
    assert_same_kind(load(out), load(reference))


def assert_same_kind(ours, theirs) -> None:
    """Two checkpoints of the same form: names, types, shapes."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for name in ours:
            assert_same_kind(ours[name], theirs[name])
    elif isinstance(ours, torch.Tensor):
        assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)


@needs_fsdp_on_cpu
def test_a_run_goes_from_one_process_to_four_shards_and_back(tmp_path, pictures, reference):
    out = tmp_path / "run"
    at_6, at_12 = ({"signal": [0, step, signal.SIGTERM]} for step in (6, 12))
    assert run(out, "--data", pictures, *RUN, faults=at_6)[0] == [143]
    codes, said = run(out, "--resume", *HERE, "--shard", faults=at_12, world=4)
    assert codes == 4 * [143], said
    assert load(out)["step"] == 14
    finished(out, "--resume", *HERE, "--no-shard")
    assert_close_runs(out, reference)


@needs_fsdp_on_cpu
def test_a_shard_that_breaks_stops_all(tmp_path, pictures):
    out = tmp_path / "run"
    codes, said = run(out, "--data", pictures, *RUN, "--shard", faults={"nan": [1, 9]}, world=2)
    assert codes == [2, 2] and said.count("the loss is nan at step 10 in process 1 of 2") == 2
    assert load(out)["step"] == 8


@pytest.mark.skipif(hasattr(torch.cpu.Stream, "record_event"), reason="this PyTorch can do it")
def test_an_old_pytorch_that_cannot_shard_on_a_cpu_says_so(tmp_path, pictures):
    codes, said = run(tmp_path / "run", "--data", pictures, *RUN, "--shard", world=2)
    assert codes == [2, 2] and "needs a newer PyTorch" in said


def test_activations_computed_twice_give_the_same_bits(tmp_path, pictures, reference):
    out = tmp_path / "run"
    finished(out, "--data", pictures, *RUN, "--checkpoint-activations")
    assert_same_run(out, reference)


def test_to_shard_takes_several_processes(tmp_path, pictures):
    codes, said = run(tmp_path / "run", "--data", pictures, *RUN, "--shard")
    assert codes == [2] and "use torchrun" in said


# ----------------------------------------------------------------- checkpoints that are damaged


@pytest.fixture
def begun(tmp_path, pictures) -> Path:
    """A run that was stopped after nine steps: previous.pt is of eight."""
    out = tmp_path / "begun"
    assert run(out, "--data", pictures, *RUN, faults={"signal": [0, 8, 15]})[0] == [143]
    assert (load(out)["step"], load(out, "previous.pt")["step"]) == (9, 8)
    return out


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # one bit, of a weight
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink], ids=lambda f: f.__name__)
def test_the_checkpoint_before_the_last_is_used_if_that_is_damaged(begun, reference, damage):
    damage(begun / "last.pt")
    was = (begun / "last.pt").exists() and (begun / "last.pt").read_bytes()
    said = finished(begun, "--resume", *HERE)
    assert f"going on from {begun / 'previous.pt'}, step 8" in said
    assert_same_run(begun, reference)
    kept = begun / "damaged.pt"
    assert kept.read_bytes() == was if was else not kept.exists()


def test_if_no_checkpoint_but_the_best_is_whole_it_is_offered(begun):
    for name in ("last.pt", "previous.pt"):
        flip(begun / name)
    codes, said = run(begun, "--resume", *HERE)
    assert codes == [2] and said.count("\n") == 1
    for words in ("last.pt is no checkpoint, or is truncated or damaged", "previous.pt is no"):
        assert words in said
    assert f"copy {begun / 'best.pt'} to {begun / 'last.pt'}" in said
    shutil.copy(begun / "best.pt", begun / "last.pt")
    finished(begun, "--resume", *HERE)


def small_checkpoint() -> dict:
    """What train.py would save of a model of a few hundred weights."""
    config = ijepa.IJEPAConfig(
        16, 8, 3, 8, 1, 1, predictor_dim=4, predictor_depth=1, predictor_heads=1
    )
    return {
        "format": train.probe.CHECKPOINT_FORMAT,
        "config": {},
        "architecture": dataclasses.asdict(config),
        "model": ijepa.IJEPA(config).state_dict(),
        "optimizer": {},
        "pictures": 1,
        "step": 1,
        "best_knn": 0.0,
    }


def test_every_flipped_bit_is_noticed_or_harmless(tmp_path):
    """At 300 places of a checkpoint, most of them in what describes its records."""
    path, wanted = tmp_path / "last.pt", small_checkpoint()
    train.save(path, wanted)
    whole, noticed = path.read_bytes(), 0
    chance = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            assert_equal(train.probe.read_checkpoint(path), wanted)
        except data.UserError:
            noticed += 1
    assert noticed > 100
    path.write_bytes(whole)
    assert_equal(train.probe.read_checkpoint(path), wanted)


# ------------------------------------------------------------------- what others do to a run


def test_a_folder_removed_in_mid_run_is_made_again(tmp_path, pictures, reference):
    out = tmp_path / "run"
    finished(out, "--data", pictures, *RUN, faults={"remove": [0, 9]})
    assert_same_run(out, reference)


def test_a_signal_to_all_processes_of_a_run_ends_it_well(tmp_path, pictures):
    """As from Slurm: workers that decode pictures get it too, and must not fail under it."""
    out = tmp_path / "run"
    options = ["--data", pictures, *RUN, "--steps", "10000", "--eval-every", "10000"]
    options += ["--workers", "2", "--img-size", "136", "--patch-size", "34"]  # streamed
    process = start(out, *options, faults={"group": True})
    wait_for((out / "last.pt").exists, process)
    time.sleep(2)
    os.killpg(process.pid, signal.SIGTERM)
    assert ended(process) == [143], Path(f"{out}.said0").read_text()
    assert load(out)["step"] > 0


# ----------------------------------------------------------------- pictures, good and bad


def jpeg(pixels: np.ndarray, **options) -> bytes:
    return encoded(Image.fromarray(pixels), "JPEG", **options)


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def rotated(pixels: np.ndarray) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    return jpeg(pixels, exif=exif)


def bomb(side: int) -> bytes:
    """A PNG of side x side pixels in a few kilobytes."""
    return encoded(Image.new("1", (side, side)), "PNG")


def animation(pixels: np.ndarray) -> bytes:
    frames = [Image.fromarray(pixels), Image.fromarray(255 - pixels)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


# Every kind of file that may lie among pictures, from 40x30 pixels of noise; whether it is broken.
KINDS = {
    "empty": (lambda x: b"", True),
    "text": (lambda x: b"this is not a picture\n", True),
    "truncated": (lambda x: jpeg(x)[:400], True),
    "html": (lambda x: b"<html>404</html>", True),
    "bomb": (lambda x: bomb(20_000), True),  # an error of the decoder
    "large": (lambda x: bomb(10_000), True),  # a warning of the decoder
    "1x1": (lambda x: encoded(Image.fromarray(x[:1, :1]), "PNG"), False),
    "30000x1": (lambda x: encoded(Image.new("RGB", (30_000, 1), (9, 9, 9)), "PNG"), False),
    "1x30000": (lambda x: encoded(Image.new("RGB", (1, 30_000), (9, 9, 9)), "PNG"), False),
    "greyscale": (lambda x: jpeg(x[..., 0]), False),
    "palette": (lambda x: encoded(Image.fromarray(x).convert("P"), "PNG"), False),
    "CMYK": (lambda x: encoded(Image.fromarray(x).convert("CMYK"), "JPEG"), False),
    "16 bit": (lambda x: encoded(Image.fromarray(x[..., 0].astype(np.uint16) * 256), "PNG"), False),
    "rotated": (rotated, False),
    "animated": (animation, False),
    "transparent": (lambda x: encoded(Image.fromarray(x).convert("RGBA"), "PNG"), False),
}


def add_pictures(root: Path, good: int, each: int, small: int = 30) -> dict[str, bool]:
    """A folder with `good` pictures, and `each` files of each kind: which of those are broken."""
    rng = np.random.default_rng(0)
    broken = {}
    for name in "ab":
        (root / "train" / name).mkdir(parents=True)
    seeds = [rng.integers(0, 256, (small, small + 10, 3), dtype=np.uint8) for _ in range(20)]
    for i, pixels in enumerate(seeds):
        (root / f"seed{i}.jpg").write_bytes(jpeg(pixels))
    for i in range(good):  # links: a set of any size is made in no time
        os.link(root / f"seed{i % 20}.jpg", root / "train" / "ab"[i % 2] / f"{i:06d}.jpg")
    for name, (make, bad) in KINDS.items():
        content = make(seeds[0])
        for i in range(each):
            path = root / "train" / "ab"[i % 2] / f"{name} {i}.jpg"
            path.write_bytes(content)
            broken[str(path)] = bad
    return broken


def seen_twice(root: Path, side: int, workers: int) -> tuple[set[str], int]:
    """Each picture of a folder as training sees it, and then as evaluation does: who is named."""
    folder = data.load_data(str(root), "train", img_size=side)
    index, _ = data.hold_out(folder)
    masks = ijepa.MaskCollator(4)
    plan = data.Plan(0, torch.arange(len(folder)), 50, 1, masks, (0.3, 1.0))
    said, count = io.StringIO(), 0
    with contextlib.redirect_stderr(said):
        steps = range(-(-len(folder) // 50))
        for batch in data.train_batches(folder, plan, steps, workers=workers):
            assert batch.images.isfinite().all()
            count += len(batch.images)
        for images in data.eval_batches(folder, index[:200], 50, workers=workers):
            assert images.isfinite().all()
    named = r"replaced a picture that cannot be read: (.*) \(\w+: .*\)\n"
    return set(re.findall(named, said.getvalue())), count


@pytest.mark.parametrize("workers", [0, 2])
def test_files_of_every_kind_are_read_or_named(tmp_path, workers, monkeypatch):
    monkeypatch.setattr(data, "IN_MEMORY_SIDE", 8)
    root = tmp_path / "pictures"
    broken = add_pictures(root, 700, 1)
    named, count = seen_twice(root, 16, workers)
    assert named == {path for path, bad in broken.items() if bad}
    assert count >= 700 + len(KINDS)


def test_a_pipe_among_pictures_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(OSError, match="not a regular file"):
        data.open_picture(tmp_path / "pipe.jpg")


def test_pictures_that_vanish_are_named_and_replaced(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "IN_MEMORY_SIDE", 8)
    root = make_folder(tmp_path / "pictures", count=70)
    folder = data.load_data(str(root), "train", img_size=16)
    gone = folder.files[3]
    gone.unlink()
    assert len(torch.cat(list(data.eval_batches(folder, torch.arange(210), 50)))) == 210
    assert f"cannot be read: {gone} (FileNotFoundError" in capsys.readouterr().err


def test_what_a_worker_finds_wrong_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "IN_MEMORY_SIDE", 8)
    root = make_folder(tmp_path / "pictures", "ab", count=30)
    folder = data.load_data(str(root), "train", img_size=16)
    for path in (root / "train" / "a").iterdir():
        path.unlink()
    with pytest.raises(data.UserError, match=r"^neither .* nor any picture") as caught:
        list(data.eval_batches(folder, torch.arange(60), 30, workers=1))
    assert "\n" not in str(caught.value)


def test_other_files_of_the_same_number_are_noticed(tmp_path, pictures, begun):
    other = shutil.copytree(pictures, tmp_path / "other")
    moved = shutil.copytree(pictures, tmp_path / "moved")
    (other / "train" / "a" / "000.png").rename(other / "train" / "a" / "new.png")
    state = load(begun)
    for folder, code in ((other, 2), (moved, 0)):  # a folder may move, not change
        state["config"]["data"] = str(folder)
        torch.save(state, begun / "last.pt")
        codes, said = run(begun, "--resume", *HERE)
        assert codes == [code], said
        assert ("but other files or labels" in said) == (code == 2)


# --------------------------------------------------------------------- hostile checkpoints


def resumed(out: Path, state: dict) -> str:
    """What is said when a run is resumed from this checkpoint: one line, or nothing if it runs."""
    out.mkdir(exist_ok=True)
    torch.save(state, out / "last.pt")
    try:
        train.configure(["--out", str(out), "--resume"])
    except data.UserError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda s: s["architecture"].update(embed_dim=12 * 10**9),
            "impossible architecture: no tensor can be so large",
        ),
        (
            lambda s: s["architecture"].update(depth=10**9),
            "4 encoder.blocks, where its architecture has 1000000000",
        ),
        (
            lambda s: s["architecture"].update(predictor_dim=12 * 10**6),
            "where (1, 1, 12000000) is needed",
        ),
        (
            lambda s: s["architecture"].update(mlp_ratio=1e12),
            "where (96000000000000, 96) is needed",
        ),
        (
            lambda s: s["architecture"].update(img_size=4 * 10**9),
            "1,000,000,000,000,000,000 patches an image",
        ),
        (lambda s: s["architecture"].update(embed_dim="96"), "embed_dim is '96'"),
        (lambda s: s["architecture"].update(norm_eps=float("nan")), "norm_eps is nan"),
        (lambda s: s["architecture"].update(extra=1), "architecture"),
        (lambda s: s.update(architecture=None), "lacks its architecture"),
        (lambda s: s["config"].update(model="vit_evil"), "model 'vit_evil'"),
        (lambda s: s["config"].update(batch_size=10**12), "--batch-size is 10"),
        (lambda s: s["config"].update(num_targets=10**9), "--num-targets is 10"),
        (lambda s: s["config"].update(lr="fast"), "lr 'fast'"),
        (lambda s: s["config"].update(target_scale=(1, 2, 3)), "target_scale"),
        (lambda s: s.pop("config"), "lacks its config"),
        (lambda s: s["model"].popitem(), "lacks the weights target_encoder.norm.bias"),
        (
            lambda s: s["model"].update({"encoder.norm.bias": 1}),
            "no plain tensor of numbers for encoder.norm.bias",
        ),
        (
            lambda s: s["model"].update({"encoder.norm.bias": torch.zeros(1).expand(10**12)}),
            "no plain tensor of numbers for encoder.norm.bias",
        ),
        (lambda s: s.update(step="7"), "lacks its step"),
        (lambda s: s.pop("optimizer"), "lacks its optimizer"),
    ],
)
def test_checkpoints_that_claim_what_they_do_not_hold_are_refused(
    tmp_path, reference, change, message
):
    state = load(reference)
    change(state)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert message in resumed(tmp_path / "run", state)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(state={}) or s.update(state={0: s["state"]}),
        lambda s: s["state"].pop(3),
        lambda s: s["state"][0].update(exp_avg=torch.zeros(3)),
        lambda s: s["state"][0].update(step=torch.zeros(3)),
        lambda s: s["state"][0].pop("exp_avg_sq"),
        lambda s: s["state"][0].update(more=torch.zeros(1)),
        lambda s: s.pop("state"),
    ],
)
def test_optimizer_state_that_does_not_fit_is_refused(reference, change):
    saved = load(reference)
    model = ijepa.IJEPA(ijepa.IJEPAConfig(**saved["architecture"]))
    optimizer = torch.optim.AdamW(ijepa.parameter_groups(model))
    train.load_optimizer(optimizer, saved["optimizer"], Path("x"))
    assert_equal(optimizer.state_dict()["state"], saved["optimizer"]["state"])
    change(saved["optimizer"])
    with pytest.raises(data.UserError, match="optimizer state does not fit"):
        train.load_optimizer(optimizer, saved["optimizer"], Path("x"))


def test_a_checkpoint_does_not_say_where_to_write(tmp_path, reference):
    state = load(reference)
    state["config"] |= {"out": str(tmp_path / "elsewhere"), "data_dir": str(tmp_path / "else")}
    (tmp_path / "run").mkdir()
    torch.save(state, tmp_path / "run" / "last.pt")
    config, *_ = train.configure(["--out", str(tmp_path / "run"), "--resume"])
    assert (config.out, config.data_dir) == (str(tmp_path / "run"), "data")
    state["config"]["data"] = "cifar10"  # which would be downloaded there
    assert f"add --data-dir {tmp_path / 'else'}" in resumed(tmp_path / "run", state)
    argv = ["--out", str(tmp_path / "run"), "--resume", "--data-dir", str(tmp_path / "else")]
    assert train.configure(argv)[0].data_dir == str(tmp_path / "else")


def test_an_archive_that_unpacks_to_more_than_it_holds_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "last.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\0" * 10**7)
    with pytest.raises(data.UserError, match="unpack to more than it holds"):
        train.probe.read_checkpoint(tmp_path / "last.pt")


class Bytes:
    """Unpickled, it takes a terabyte, by a name that weights_only=True allows."""

    def __reduce__(self):
        return bytearray, (10**12,)


def longer(pickled: bytes) -> bytes:
    """A storage of four numbers made one of 2^31 - 1."""
    place = pickled.index(b"K\x04", pickled.index(b"cpu"))  # BININT1 4
    return pickled[:place] + b"J\xff\xff\xff\x7f" + pickled[place + 2 :]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda _: pickle.dumps({"x": Bytes()}, 2), r"would run code \(__builtin__.bytearray\)"),
        (lambda _: pickle.dumps({"x": Bytes()}, 4), r"would run code \(builtins.bytearray\)"),
        (longer, "does not match expected size|lacks its config"),  # torch 2.6 does not compare
        (lambda pickled: pickled[:-5], "truncated or damaged"),
    ],
)
def test_what_would_take_memory_is_refused_by_name(tmp_path, change, message):
    torch.save({"format": train.probe.CHECKPOINT_FORMAT, "x": torch.zeros(4)}, tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as source,
        zipfile.ZipFile(tmp_path / "last.pt", "w") as target,
    ):
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, change(content) if name.endswith("data.pkl") else content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(data.UserError, match=message):
        train.read_last(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


# ------------------------------------------------------------------------- odd inputs

NUMBERS = st.one_of(
    st.integers(-3, 70), st.integers(), st.floats(), st.sampled_from(["", "x", "1e3", "0.5", "-0"])
)
OPTIONS = {
    "--" + field.name.replace("_", "-"): field
    for field in dataclasses.fields(train.TrainConfig)
    if field.name not in ("wandb", "data_dir", "out", "resume", "auto_resume")
}


@st.composite
def command_lines(draw) -> list[str]:
    argv = []
    for name in draw(st.lists(st.sampled_from(sorted(OPTIONS)), max_size=4)):
        choices = OPTIONS[name].metadata["choices"]
        count = draw(st.sampled_from([0, 1, 1, 1, 1, 2, 2]))
        values = st.sampled_from([*choices]) if choices else NUMBERS
        if isinstance(OPTIONS[name].default, bool) or "bool" in str(OPTIONS[name].type):
            count = 0
        elif "Range" in str(OPTIONS[name].type):
            values, count = NUMBERS | st.floats(0, 1), 2
        argv += [name, *(str(draw(values)) for _ in range(count))]
    return argv


@st.composite
def mask_settings(draw) -> tuple[tuple, dict]:
    scales = (
        st.sampled_from([0.1, 0.15, 0.2, 0.25, 0.5, 0.85, 1.0]) | st.floats(0, 1.2) | st.floats()
    )
    pairs = st.tuples(scales, scales) | st.tuples(scales, scales).map(lambda x: tuple(sorted(x)))
    chosen = {
        "strategy": draw(st.sampled_from([*ijepa.STRATEGIES])),
        "num_targets": draw(st.none() | st.none() | st.integers(-1, 6)),
        "target_scale": draw(st.none() | st.none() | pairs),
        "target_aspect": draw(st.just((0.75, 1.5)) | pairs),
        "context_scale": draw(st.none() | st.none() | pairs),
        "context_size": draw(st.none() | st.none() | st.integers(-1, 40)),
    }
    sides = st.integers(2, 16) | st.integers(-1, 16)
    return (draw(sides), draw(sides)), chosen


def check_command_line(argv: list[str]) -> bool:
    """Whether it is accepted; anything but a UserError of one line fails."""
    try:
        config, architecture, _ = train.configure(argv)
    except data.UserError as error:
        assert "\n" not in str(error)
        return False
    assert config.steps is None or config.steps >= 1
    assert math.isfinite(config.lr) and architecture.depth >= 1
    return True


def check_masks(grid: tuple, settings: dict) -> bool:
    """Whether masks can be drawn, and if so, that they are masks; ValueError otherwise."""
    try:
        masks = ijepa.MaskCollator(grid, **settings)
    except ValueError:
        return False
    context, targets = masks.sample(3, torch.Generator().manual_seed(0))
    size = grid[0] * grid[1]
    assert context.shape == (3, masks.context_size) and targets.shape[:2] == (3, masks.num_targets)
    assert context.min() >= 0 and context.max() < size and targets.max() < size
    for row in range(3):
        assert not set(context[row].tolist()) & set(targets[row].flatten().tolist())
    return True


def check_checkpoint(path: Path, whole: bytes, edits: list[tuple[int, int]], length: int) -> bool:
    """Whether a checkpoint with some bytes changed, or cut off, can be resumed from."""
    content = bytearray(whole[:length])
    for place, value in edits:
        if content:
            content[place % len(content)] = value
    path.write_bytes(content)
    try:
        checkpoint = train.read_last(path.parent)
    except data.UserError as error:
        assert "\n" not in str(error)
        return False
    assert checkpoint["format"] == train.probe.CHECKPOINT_FORMAT
    return True


MODERATE = settings(max_examples=100, deadline=None, derandomize=True, database=None)


@MODERATE
@given(command_lines())
def test_odd_command_lines_are_configurations_or_errors(argv):
    check_command_line(argv)


@MODERATE
@given(mask_settings())
def test_odd_mask_settings_give_masks_or_errors(given_):
    check_masks(*given_)


def test_damaged_checkpoints_are_read_or_errors(tmp_path):
    train.save(tmp_path / "last.pt", small_checkpoint())
    whole = (tmp_path / "last.pt").read_bytes()
    places = st.tuples(st.integers(0, len(whole)), st.integers(0, 255))

    @MODERATE
    @given(st.lists(places, max_size=4), st.integers(0, 2 * len(whole)))
    def check(edits, length):
        accepted.append(check_checkpoint(tmp_path / "last.pt", whole, edits, length))

    accepted = []
    check()
    assert 0 < sum(accepted) < len(accepted)  # some are whole: both ways have been tried
