"""What it costs to read the encoder of a released ViT-H/14: seconds and memory.

    python tests/benchmark/probe_load.py FOLDER

Makes a file in the released format in FOLDER (10.5 GB at float32: two encoders and a predictor of
random weights, and the two moments of AdamW), reads it in a new process, deletes it, and writes
results/probe_load.json.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from record import ROOT, write

from ijepa import IJEPA, MODELS

MEASURE = """
import json, sys, time
import torch, probe

def memory():
    # Not getrusage, whose peak is that of whoever started this process, if that is more. Pages of
    # the file count in the peak; the system may take them back at any time.
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    kib = {"peak_gb": status["VmHWM"], "own_gb": status["RssAnon"]}
    return {name: round(int(value.split()[0]) * 1024 / 1e9, 2) for name, value in kib.items()}

figures = {"before": memory()}
start = time.perf_counter()
loaded = probe.load_encoder(sys.argv[1])
figures["load_s"] = round(time.perf_counter() - start, 1)
figures["loaded"] = memory()
start = time.perf_counter()
loaded.encoder(torch.zeros(1, 3, 224, 224))
figures["first_image_s"] = round(time.perf_counter() - start, 1)
figures["used"] = memory()
start = time.perf_counter()
probe._sha256([sys.argv[1]])
figures["of_load_hash_s"] = round(time.perf_counter() - start, 1)
print(json.dumps(figures))
"""


def make(path: Path) -> None:
    """A file in the released format. Moments are zeros: in memory they take no room that way."""
    model = IJEPA(MODELS["vit_huge"].config)
    checkpoint = {"epoch": 300, "loss": 0.1, "batch_size": 2048, "world_size": 16, "lr": 1e-3}
    for part, table in (
        ("encoder", "pos_embed"),
        ("predictor", "predictor_pos_embed"),
        ("target_encoder", "pos_embed"),
    ):
        network = getattr(model, part)
        checkpoint[part] = {f"module.{name}": x for name, x in network.state_dict().items()}
        checkpoint[part][f"module.{table}"] = getattr(network, table)[None]
    trained = [p for p in model.parameters() if p.requires_grad]
    moments = ("exp_avg", "exp_avg_sq")
    state = {
        i: {name: torch.from_numpy(np.zeros(p.shape, np.float32)) for name in moments}
        for i, p in enumerate(trained)
    }
    checkpoint["opt"] = {"state": state, "param_groups": [{"params": list(range(len(trained)))}]}
    torch.save(checkpoint, path)


def main(folder: str) -> None:
    path = Path(folder) / "released_vit_huge.pth.tar"
    try:
        start = time.perf_counter()
        make(path)
        print(f"made {path.stat().st_size / 1e9:.1f} GB in {time.perf_counter() - start:.0f} s")
        command = [sys.executable, "-c", MEASURE, str(path)]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        figures = json.loads(done.stdout)
        figures |= {"file_gb": round(path.stat().st_size / 1e9, 2), "load": os.getloadavg()[0]}
    finally:
        path.unlink(missing_ok=True)
    print(figures)
    write("probe_load", "python tests/benchmark/probe_load.py FOLDER", **figures)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
