"""Every command of README.md runs, on a few small images and for a few steps."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ijepa
import probe
from data import draw_textures

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.split(" #")[0].strip() for block in BLOCKS for line in block.splitlines()]
# Installation runs in .ci/run, and notebooks in test_notebooks.py. There are no released weights.
ELSEWHERE = ("python3 -m venv", "source ", "jupyter lab", "python scripts/convert.py IN1K")
SMALL = {  # what makes a command small enough for a test; later rules see earlier ones' results
    "train.py --data cifar10": "train.py --data images --out runs/first",
    "--data cifar10": "--data images",
    "vit_nano_cifar10 ": f"{ROOT}/results/weights/vit_nano_cifar10/model.safetensors --out probed ",
    "vit_tiny_cifar10": "vit_nano_images",
    "path/to/folder --img-size 96 --patch-size 8": "images --out runs/folder",
    "--model vit_huge": "--model vit_nano --data images --out runs/two_processes",
    "--model vit_mini": "--model vit_mini --data images",
    "--model vit_tiny": "--model vit_nano",
    "--model vit_small": "--model vit_nano",
    "--nproc_per_node 8": "--nproc_per_node 2",
    "torchrun": "python -m torch.distributed.run",
}
FAST = {
    "train.py": "--epochs 0.5 --batch-size 8",
    "--resume": "",
    "scripts/finetune.py": "--epochs 1 --batch-size 16",
    "scripts/lars_probe.py": "--epochs 1 --batch-size 16",
    "scripts/ablations.py": "--epochs 0.5 --seeds 0 --only pixels",
    "scripts/benchmark.py": "--batch-size 2 --steps 1",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with a small dataset in images/."""
    from torchvision.io import write_jpeg

    path = tmp_path_factory.mktemp("readme")
    for split, seed in (("train", 0), ("test", 1)):
        images, labels = draw_textures(60, seed)
        for i, (image, label) in enumerate(zip(images, labels % 2, strict=True)):
            target = path / "images" / split / f"class{label}" / f"{i}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            write_jpeg(image, str(target))
    return path


def small(command: str) -> list[str]:
    for old, new in SMALL.items():
        command = command.replace(old, new)
    command = command.replace("python ", f"{sys.executable} ", 1)
    options = [option for name, option in FAST.items() if name in command]
    command += " " + (options[-1] if options else "")
    words = shlex.split(command)
    return [str(ROOT / w) if w.endswith(".py") else w for w in words]


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith(ELSEWHERE)])
def test_readme_command_runs(command, folder):
    result = subprocess.run(small(command), cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"{small(command)}\n{result.stdout}{result.stderr}"


def test_python_example_of_readme():
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    names = {}
    exec(example, names)
    assert names["features"].shape == (8, names["config"].embed_dim)


def test_demo_and_test_commands_are_marked():
    for name, script in (("demo", "train.py"), ("test", "pytest")):
        command = re.search(rf"<!-- {name} command -->\n```bash\n(.*?)\n```", README)[1]
        assert script in command and "\n" not in command


def test_files_named_in_readme_exist():
    links = re.findall(r"\]\(((?!http)[^)]+)\)", README)
    assert len(links) > 5
    assert not [link for link in links if not (ROOT / link).exists()]


@pytest.mark.parametrize("model", ["vit_nano", "vit_mini"])
def test_included_weights_match_their_model(model):
    encoder, config, info = probe.load_encoder(f"{model}_cifar10")
    assert config == ijepa.MODELS[model]
    assert sum(p.numel() for p in encoder.parameters()) < 1.5e6
    assert all(torch.isfinite(p).all() for p in encoder.parameters())
    assert info["train_config"]["model"] == model
