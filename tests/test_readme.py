"""Every command of the README is run, shortened, and what it says of the files is checked."""

import dataclasses
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import probe
import train
from ijepa import IJEPA, MODELS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
    if re.match(r"(python|torchrun) ", line)
]

# What makes a command short: two steps of a tiny model on a tiny set. What it is about stays.
SHORT = [
    *("--steps", "2", "--batch-size", "8", "--img-size", "16", "--patch-size", "4"),
    *("--eval-images", "16", "--eval-every", "1", "--workers", "0", "--device", "cpu"),
    *("--predictor-dim", "48", "--predictor-depth", "1"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to run in, with a set of pictures under every name that the commands use."""
    folder = tmp_path_factory.mktemp("readme")
    generator = torch.Generator().manual_seed(0)
    for name in ("path/to/folder", "data/imagenet"):
        for label in ("cat", "dog"):
            (folder / name / "train" / label).mkdir(parents=True)
            for i in range(40):
                pixels = torch.randint(256, (16, 16, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / name / "train" / label / f"{i}.png")
    return folder


# The same for probe.py, and what stands for the run, and for files that would be downloaded.
SHORT_PROBE = ["--images", "40", "--workers", "0", "--device", "cpu"]
K = ["--k", "5"]
INSTEAD = {
    "runs/vit_tiny_cifar10": "runs/0",
    "runs/vit_huge_imagenet": "runs/0",
    "IN1K-vit.h.14-300e.pth.tar": "released.pth.tar",
    "facebook/ijepa_vith14_1k": str(ROOT / "tests" / "golden" / "hf_ijepa"),
    "cifar10": "path/to/folder",
    "cifar100": "path/to/folder",
}


def shortened(command: str) -> list[str]:
    words = [INSTEAD.get(word, word) for word in shlex.split(command)]
    probed = "probe.py" in words
    words = [str(ROOT / word) if word.endswith(".py") else word for word in words]
    if words[0] == "torchrun":
        words[words.index("--nproc_per_node") + 1] = "2"
        words = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    words[0] = sys.executable
    if probed:
        slow = {"--augment", "--finetune"} & set(words)
        if "vit_nano_cifar10" in words and "--data" not in words:  # it would be downloaded
            words += ["--data", "path/to/folder"]
        return words + SHORT_PROBE + (["--epochs", "1", "--batch-size", "16"] if slow else K)
    replaced = {"vit_small": "vit_nano", "vit_tiny": "vit_nano", "vit_huge": "vit_nano"}
    if "vit_huge" in words:  # its recipe's data, which another model's would not be
        words += ["--data", "imagenet"]
    words = [replaced.get(word, word) for word in words]
    if "--epochs" in words:  # two steps instead
        place = words.index("--epochs")
        del words[place : place + 2]
    return words if "--resume" in words else words + SHORT


def test_the_readme_has_the_commands_that_the_project_is_for():
    for wanted in (
        "python train.py --model vit_tiny --data cifar10",
        "torchrun --nproc_per_node 8 train.py --model vit_huge",
        "python probe.py runs/vit_tiny_cifar10",
    ):
        assert wanted in COMMANDS


def test_commands_run(place):
    """In the order of the README: one goes on with what another has left."""
    model = IJEPA(dataclasses.replace(MODELS["vit_nano"].config, img_size=16, patch_size=4))
    parts = {part: getattr(model, part) for part in ("encoder", "predictor", "target_encoder")}
    released = {part: network.state_dict() for part, network in parts.items()}
    for part, name in (("encoder", "pos_embed"), ("predictor", "predictor_pos_embed")):
        released[part][name] = getattr(parts[part], name)[None]
    released["target_encoder"]["pos_embed"] = released["encoder"]["pos_embed"]
    torch.save(released, place / "released.pth.tar")

    environment = dict(os.environ, OMP_NUM_THREADS="1")
    last = None
    for command in COMMANDS:
        words = shortened(command)
        if "--resume" in words:
            words += ["--out", last]
        elif "probe.py" not in command:
            last = f"runs/{len(list(place.glob('runs/*')))}"
            words += ["--out", last]
        done = subprocess.run(
            words, cwd=place, env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
        if "--export" in words:
            assert (place / words[words.index("--export") + 1] / "config.json").exists()
        elif "probe.py" in command:
            assert re.search(r"^(target|context) encoder +\d", done.stdout, re.MULTILINE), command
        else:
            assert "trained" in done.stdout
            assert (place / words[words.index("--out") + 1] / "result.png").exists()


@pytest.mark.parametrize("code", [block for language, block in BLOCKS if language == "python"])
def test_python_blocks_run(code):
    exec(compile(code, "README.md", "exec"), {})


def test_set_up_lines_install_the_requirements_and_run_what_they_say():
    lines = re.findall(r"<!-- (demo|test) command -->\n```bash\n(.*)\n```", README)
    assert [name for name, _ in lines] == ["demo", "test"]
    files = ("requirements.txt", "tests/requirements.txt")
    for (_, line), needed in zip(lines, files, strict=True):
        assert line.startswith(
            f"python3 -m venv .venv && .venv/bin/pip install -q -r {needed} && .venv/bin/python "
        )
        assert (ROOT / needed).is_file()
    # What is only tested with is not asked of those who only train.
    assert "-r ../requirements.txt" in (ROOT / "tests/requirements.txt").read_text().splitlines()
    assert "pytest" not in (ROOT / "requirements.txt").read_text()
    assert lines[0][1].endswith(".venv/bin/python train.py")
    assert lines[1][1].endswith(".venv/bin/python -m pytest -q")


def test_files_and_pictures_that_the_readme_names_are_there():
    table = README.partition("## The files")[2].partition("##")[0]
    named = re.findall(r"\]\(([\w./-]+)\)", README) + re.findall(r"^\| `([\w./]+)`", table, re.M)
    assert len(named) > 6
    for path in named:
        assert (ROOT / path).exists(), path


def test_every_option_that_the_readme_names_exists():
    fields = (*dataclasses.fields(train.TrainConfig), *dataclasses.fields(probe.ProbeConfig))
    options = {"--" + field.name.replace("_", "-") for field in fields}
    named = set(re.findall(r"`(--[a-z0-9-]+)", README)) | {
        word for command in COMMANDS for word in command.split() if word.startswith("--")
    }
    assert named - options <= {"--help", "--nproc_per_node"}


def test_the_figures_are_the_recorded_ones(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmark"))
    record = importlib.import_module("record")
    for file, blocks in record.BLOCKS.items():
        text = (ROOT / file).read_text()
        for name, lines in blocks.items():
            block = "\n".join(lines())
            assert f"<!-- {name} figures -->\n{block}\n<!-- end of {name} -->" in text, name


def test_the_demo_shows_that_something_was_learned():
    """Of the recorded runs: 15 points above pixels and the untrained encoder, in five minutes."""
    demo = json.loads((ROOT / "results" / "demo.json").read_text())
    assert len(demo["runs"]) >= 3
    for run in demo["runs"]:
        assert run["seconds"] < 300
        linear = {row["features"]: row["linear"] for row in run["rows"] if row["task"] == "kind"}
        assert linear["trained"] > 15 + max(linear["untrained"], linear["raw pixels"])
