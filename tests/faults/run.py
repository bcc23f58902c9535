"""The longer versions of tests/test_faults.py: each prints a row and writes results/faults.json.

python tests/faults/run.py kills [30]      kill -9 at random moments, half of them while saving
python tests/faults/run.py signals [20]    SIGTERM at random moments
python tests/faults/run.py damage [250]    checkpoints truncated at 50 places, and flipped bits
python tests/faults/run.py full [50]       the disk is full after so many bytes
python tests/faults/run.py equality        1, 2, 4 processes x 1, 2, 4 accumulation steps
python tests/faults/run.py machines        torchrun with two agents; one process is killed
python tests/faults/run.py pictures [500]  damaged and odd files among 25,000 pictures
python tests/faults/run.py fuzz [3000]     odd command lines, mask settings, checkpoints
python tests/faults/run.py memory          2,000 steps and 20 evaluations of streamed pictures
python tests/faults/run.py all             all of them: half an hour on two cores
"""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmark"))

import faulty
import record
import test_faults as faults
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import train

RESULTS = record.RESULTS / "faults.json"


def report(name: str, what: str, tried: str, happened: str, lost: str) -> None:
    """A row of the table, in place of that of an earlier run."""
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rows[name] = {
        "what": what, "tried": tried, "happened": happened, "lost": lost,
        "date": date.today().isoformat(), "hardware": record.hardware(),
        "torch": str(torch.__version__), "command": f"python tests/faults/run.py {name}",
    }  # fmt: skip
    RESULTS.write_text(json.dumps(dict(sorted(rows.items())), indent=1, ensure_ascii=False) + "\n")
    print(f"{what} | {tried} | {happened} | {lost}", flush=True)


def prepared(folder: str) -> tuple[Path, list[str], Path]:
    """A folder to work in, the options of the run, and the folder of the uninterrupted run."""
    root = Path(folder)
    options = ["--data", str(faults.make_folder(root / "pictures")), *faults.RUN]
    faults.finished(root / "reference", *options)
    return root, options, root / "reference"


def kills(count: int = 30) -> None:
    chance, saving, steps = random.Random(0), 0, []
    with tempfile.TemporaryDirectory() as folder:
        root, options, reference = prepared(folder)
        for i in range(count):
            out = root / f"run{i}"
            process = faulty.start(out, *options, faults={"slow": 0.02, "sync": 0.05})
            faults.wait_for((out / "last.pt").exists, process)
            time.sleep(chance.random())
            process.kill()
            faults.ended(process)
            saving += bool(list(out.glob("*.tmp")))
            steps.append(faults.load(out)["step"])
            faults.finished(out, "--resume", *faults.HERE)
            faults.assert_same_run(out, reference)
            assert not list(out.glob("*.tmp"))
            shutil.rmtree(out)
    report(
        "kills", "kill -9 at random moments, then --resume",
        f"{count} times, {saving} of them while a file was being written",
        "the same bits as the uninterrupted run, weights, optimizer and log; no file left over",
        f"nothing saved; the steps since (killed after steps {min(steps)} to {max(steps)} of 20)",
    )  # fmt: skip


def signals(count: int = 20) -> None:
    chance, waits = random.Random(0), []
    with tempfile.TemporaryDirectory() as folder:
        root, options, reference = prepared(folder)
        for i in range(count):
            out, number = root / f"run{i}", (signal.SIGTERM, signal.SIGINT)[i % 2]
            process = faulty.start(out, *options, faults={"slow": 0.05})
            faults.wait_for((out / "last.pt").exists, process)
            time.sleep(0.3 + 0.7 * chance.random())
            asked = time.monotonic()
            os.kill(process.pid, number)
            assert faults.ended(process) == [128 + number]
            waits.append(time.monotonic() - asked)
            faults.finished(out, "--resume", *faults.HERE)
            faults.assert_same_run(out, reference)
    report(
        "signals", "SIGTERM or Ctrl-C at random moments, then --resume", f"{count} times",
        f"saved and left with 143 or 130 after {max(waits):.1f} s at most; the same bits",
        "nothing",
    )  # fmt: skip


def damage(count: int = 250) -> None:
    chance, outcome = random.Random(0), {"noticed": 0, "harmless": 0}
    with tempfile.TemporaryDirectory() as folder:
        root, options, _ = prepared(folder)
        out = root / "run"
        codes, _ = faults.run(out, *options, faults={"signal": [0, 8, 15]})
        assert codes == [143]
        whole, wanted = (out / "last.pt").read_bytes(), faults.load(out)
        before = faults.load(out, "previous.pt")
        for i in range(count):
            damaged = bytearray(whole)
            if i < 50:
                del damaged[chance.randrange(len(whole)) :]
            else:
                damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
            (out / "last.pt").write_bytes(damaged)
            checkpoint = train.read_last(out)
            if checkpoint.pop("path").name == "last.pt":
                outcome["harmless"] += 1
                faults.assert_equal(checkpoint, wanted)
                assert i >= 50
            else:
                outcome["noticed"] += 1
                faults.assert_equal(checkpoint, before)
    report(
        "damage", "last.pt truncated, or a bit of it flipped; then --resume",
        f"50 places, {count - 50} bits",
        f"{outcome['noticed']} times noticed, and previous.pt used; {outcome['harmless']} bits "
        "changed nothing that is read", "nothing: the steps since previous.pt are run again",
    )  # fmt: skip


def full(count: int = 50) -> None:
    chance, messages = random.Random(0), 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        state = {"format": "x", "x": torch.randn(100_000), "y": torch.randn(1000)}
        train.save(root / "last.pt", state)
        before, size = (root / "last.pt").read_bytes(), (root / "last.pt").stat().st_size
        from test_train import no_file_larger_than

        for _ in range(count):
            with no_file_larger_than(chance.randrange(size)):
                try:
                    train.save(root / "last.pt", state)
                except data.UserError as error:
                    assert "previous one is still there" in str(error)
                    messages += 1
            assert (root / "last.pt").read_bytes() == before
            assert [path.name for path in root.iterdir()] == ["last.pt"]
    report(
        "full", "no space left while a checkpoint is written", f"after {count} numbers of bytes",
        f"{messages} times one line, exit code 2, the previous checkpoint kept, no file left over",
        "nothing saved",
    )  # fmt: skip


def equality() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root, options, reference = prepared(folder)
        for world in (1, 2, 4):
            for accum in (1, 2, 4):
                out = root / f"{world}x{accum}"
                faults.finished(out, *options, "--accum-steps", str(accum), world=world)
                faults.assert_close_runs(out, reference)
    report(
        "equality", "1, 2, 4 processes x 1, 2, 4 accumulation steps, 20 steps", "9 runs",
        "losses equal to 1e-4, weights to 0.2 % of how far training has moved them", "nothing",
    )  # fmt: skip


def machines() -> None:
    """Also without help: nobody says --resume."""
    with tempfile.TemporaryDirectory() as folder:
        root, options, reference = prepared(folder)
        out = root / "run"
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
        command += ["--nproc_per_node=1", "--max-restarts=2", "--rdzv-backend=c10d"]
        command += [f"--rdzv-endpoint=localhost:{faults.free_port()}", faulty.__file__]
        command += [json.dumps({"die": [1, 9]}), "--out", str(out), *options, "--auto-resume"]
        environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        how = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        how |= {"env": environment, "start_new_session": True}
        running = [subprocess.Popen(command, **how) for _ in range(2)]
        try:
            said = [process.communicate(timeout=300)[1] for process in running]
        finally:
            for process in running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        assert [process.returncode for process in running] == [0, 0], "".join(said)[-3000:]
        assert (out / "died").exists() and "exitcode: -9" in "".join(said)
        faults.assert_close_runs(out, reference)
    report(
        "machines", "`torchrun --max-restarts`, two agents; a process killed at step 9 of 20",
        "once", "both start again, go on from step 8, and end as the run of one process does",
        "one step, run again",
    )  # fmt: skip


def pictures(count: int = 500) -> None:
    each = -(-count // len(faults.KINDS))
    data.IN_MEMORY_SIDE = 8  # streamed
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "pictures"
        broken = faults.add_pictures(root, 50 * count, each)
        start = time.monotonic()
        named, seen = faults.seen_twice(root, 16, workers=2)
        seconds = time.monotonic() - start
        assert named == {path for path, bad in broken.items() if bad}
        gone = list((root / "train" / "a").iterdir())[:20]
        loaded = data.load_data(str(root), "train", img_size=16)
        for path in gone:
            path.unlink()
        with contextlib.redirect_stderr(io.StringIO()):
            images = list(data.eval_batches(loaded, torch.arange(len(loaded)), 500))
        assert sum(map(len, images)) == len(loaded)
    report(
        "pictures", f"files of {len(faults.KINDS)} kinds among {seen} pictures; 20 files vanish",
        f"{len(broken)} files",
        f"{len(named)} unreadable ones named and replaced, {len(broken) - len(named)} odd ones "
        f"read, {seconds:.0f} s", "nothing",
    )  # fmt: skip


def fuzz(count: int = 3000) -> None:
    many = settings(max_examples=count, deadline=5000, derandomize=True, database=None)
    accepted = {"command lines": [], "mask settings": [], "checkpoints": []}

    @many
    @given(faults.command_lines())
    def lines(argv):
        accepted["command lines"].append(faults.check_command_line(argv))

    @many
    @given(faults.mask_settings())
    def masks(chosen):
        accepted["mask settings"].append(faults.check_masks(*chosen))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "last.pt"
        train.save(path, faults.small_checkpoint())
        whole = path.read_bytes()
        places = st.tuples(st.integers(0, len(whole)), st.integers(0, 255))

        @many
        @given(st.lists(places, max_size=4), st.integers(0, 2 * len(whole)))
        def checkpoints(edits, length):
            accepted["checkpoints"].append(faults.check_checkpoint(path, whole, edits, length))

        for check in (lines, masks, checkpoints):
            check()
    report(
        "fuzz", "odd command lines, mask settings, checkpoints (Hypothesis)",
        ", ".join(f"{len(of)} {name}" for name, of in accepted.items()),
        ", ".join(f"{sum(of)} {name} accepted" for name, of in accepted.items())
        + ", all others a clear error; no traceback, none longer than 5 s", "nothing",
    )  # fmt: skip


def memory(steps: int = 2000, evaluations: int = 20) -> None:
    """Resident kilobytes and open files of the main process, every half second."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        options = ["--data", str(faults.make_folder(root / "pictures", count=200)), *faults.RUN]
        options += ["--img-size", "136", "--patch-size", "34", "--workers", "2"]
        options += ["--steps", str(steps), "--eval-every", str(steps // evaluations)]
        shared, samples = set(os.listdir("/dev/shm")), []
        process = faulty.start(root / "run", *options, faults={"group": True})
        proc = Path(f"/proc/{process.pid}")
        while process.is_alive():
            with contextlib.suppress(OSError, ValueError, IndexError):
                resident = int(proc.joinpath("status").read_text().split("VmRSS:")[1].split()[0])
                samples.append((resident, len(os.listdir(proc / "fd"))))
            time.sleep(0.5)
        assert faults.ended(process, seconds=5) == [0], (root / "run.said0").read_text()[-2000:]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 0)
            raise AssertionError("it left a process behind")
        assert set(os.listdir("/dev/shm")) <= shared
        rows = faults.log_of(root / "run")
        assert sum(bool(row["knn"]) for row in rows) == evaluations + 1
    tenth = len(samples) // 10
    resident, files = ([s[i] for s in samples] for i in (0, 1))
    early, late = map(statistics.median, (resident[tenth : 3 * tenth], resident[-2 * tenth :]))
    growth = (late - early) / early
    assert abs(growth) < 0.05, (early, late)
    report(
        "memory", "resident memory and open files, streamed pictures, two workers",
        f"{steps} steps, {evaluations} evaluations",
        f"{early / 1e3:.0f} MB early, {late / 1e3:.0f} MB late ({100 * growth:+.1f} %), "
        f"at most {max(files[tenth:])} files open; no process, no shared memory left at the end",
        "nothing",
    )  # fmt: skip


CHECKS = (kills, signals, damage, full, equality, machines, pictures, fuzz, memory)

if __name__ == "__main__":
    named = {check.__name__: check for check in CHECKS}
    if sys.argv[1:] == ["all"]:
        for check in CHECKS:
            check()
    elif len(sys.argv) > 1 and sys.argv[1] in named:
        named[sys.argv[1]](*map(int, sys.argv[2:]))
    else:
        sys.exit(__doc__)
