"""train.py, made to fail: `python faulty.py FAULTS OPTIONS` for `python train.py OPTIONS`.

FAULTS is JSON, a dict of any of these; with a rank, for the process of that rank alone:

    slow     seconds that each step takes longer
    sync     seconds that each file takes longer to reach the disk
    nan      [rank, step]: the loss of the step (from 0) is not a number
    hang     [rank, step]: never goes on, and lets no signal handler run
    die      [rank, step]: killed by signal 9, but once only
    signal   [rank, step, number]: sends itself a signal
    remove   [rank, step]: removes --out
    group    true: in a process group of its own

What takes longer than the run itself, pictures and linear probes, is left out.
"""

import ctypes
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import ijepa
import train


def break_things(faults: dict) -> None:
    """Put the faults into train.py, for this process."""
    at = {name: value[1] for name, value in faults.items() if name not in ("slow", "sync", "group")}
    rank = int(os.environ.get("RANK", 0))
    at = {name: step for name, step in at.items() if faults[name][0] == rank}
    rate, forward, fsync = train.learning_rate, ijepa.IJEPA.forward, os.fsync
    now, out = [-1], Path(sys.argv[sys.argv.index("--out") + 1])

    def learning_rate(step, *rest):  # called at the beginning of each step
        now[0] = step
        time.sleep(faults.get("slow", 0))
        if at.get("hang") == step:
            ctypes.PyDLL(None).sleep(1000)  # holds the interpreter, as a stuck driver does
        if at.get("die") == step and not (out / "died").exists():
            (out / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if at.get("signal") == step:
            os.kill(os.getpid(), faults["signal"][2])
        if at.get("remove") == step:
            shutil.rmtree(out)
        return rate(step, *rest)

    def nan_forward(self, *args):
        loss = forward(self, *args)
        return loss * torch.nan if at.get("nan") == now[0] and self.training else loss

    def slow_fsync(file):
        time.sleep(faults.get("sync", 0))
        fsync(file)

    train.learning_rate = learning_rate
    ijepa.IJEPA.forward = nan_forward
    os.fsync = slow_fsync
    train.Log.draw = lambda *_: None
    train.finish = lambda *_: None


def main(faults: dict, argv: list[str], environment: dict, said: str) -> None:
    """In a process that a fork server has forked: what it says goes to the file `said`."""
    with open(said, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    if faults.get("group"):
        os.setpgrp()
    multiprocessing.set_start_method("fork", force=True)  # of its workers, as outside of here
    torch.set_num_threads(1)
    sys.argv = ["train.py", *argv]
    break_things(faults)
    train.run_script(train.main)


def start(
    out: Path, *options: str, faults: dict | None = None, rank: int = 0, world: int = 1, port=0
) -> multiprocessing.Process:
    """`train.py --out OUT OPTIONS` with faults, as one of several processes.

    What it says is in `<out>.said<rank>`. A server that has imported PyTorch forks it: seconds
    less than a fresh interpreter.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "torchvision", "einops", "tqdm"])
    environment = {}
    if world > 1:
        environment = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank}
        environment |= {"LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    argv = ["--out", str(out), *options]
    environment = {name: str(value) for name, value in environment.items()}
    arguments = (faults or {}, argv, environment, f"{out}.said{rank}")
    process = context.Process(target=main, args=arguments)
    process.start()
    return process


if __name__ == "__main__":
    torch.set_num_threads(1)
    break_things(json.loads(sys.argv.pop(1)))
    train.run_script(train.main)
