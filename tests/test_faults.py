"""Faults of machines, of other processes and of files: what can be lost, and is not.

The longer versions are the scripts in tests/faults/, whose counts are in results/faults.json.
"""

import os
import random
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
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


def test_every_flipped_bit_is_noticed_or_harmless(tmp_path):
    """At 300 places of a checkpoint, most of them in what describes its records."""
    path = tmp_path / "last.pt"
    wanted = {"format": train.probe.CHECKPOINT_FORMAT, "model": {"x": torch.arange(100.0)}}
    train.save(path, wanted)
    whole, noticed = path.read_bytes(), 0
    chance = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            data.verify_file(path)
            assert_equal(train.probe.read_checkpoint(path), wanted)
        except data.UserError:
            noticed += 1
    assert noticed > 100
    path.write_bytes(whole)
    data.verify_file(path)


# ------------------------------------------------------------------- what others do to a run


def test_a_folder_removed_in_mid_run_is_made_again(tmp_path, pictures, reference):
    out = tmp_path / "run"
    finished(out, "--data", pictures, *RUN, faults={"remove": [0, 9]})
    assert_same_run(out, reference)
