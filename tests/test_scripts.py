"""Scripts: conversion, fine-tuning, the LARS probe, the ablations and the benchmark."""

import csv
import functools
import itertools
import json
import math
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import IJepaModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import ablations
import benchmark
import convert
import finetune
import lars_probe
from test_ijepa import paint, with_random_weights

import train
from data import FolderDataset, run_main
from ijepa import IJEPA, IJEPAConfig, MaskCollator, ViT
from probe import ProbeConfig, load_encoder, load_splits, save_encoder

SPLITS = ("validation", "test")
GOLDEN = Path(__file__).parent / "golden"
TINY = IJEPAConfig(16, 4, 24, 3, 2, 8, 1, mlp_ratio=3.0, norm_eps=1e-3)
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def call(monkeypatch, module, *arguments):
    """`python scripts/module.py arguments`, in this process; strings are split at spaces."""
    words = [word for argument in arguments for word in str(argument).split()]
    monkeypatch.setattr(sys, "argv", [module.__file__, *words])
    run_main(module.main)


def error_line(capsys, monkeypatch, module, *arguments):
    """The one line that a user's mistake prints, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        call(monkeypatch, module, *arguments)
    message = capsys.readouterr().err
    assert exit_info.value.code == 2 and message.count("\n") == 1, message
    return message


close = functools.partial(torch.allclose, atol=1e-5)
equal = functools.partial(torch.testing.assert_close, rtol=0, atol=0)


def random_encoder(config=TINY):  # weights, biases and norms all matter to the output
    encoder = ViT(config).eval().requires_grad_(False)
    for p in encoder.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return encoder


@pytest.fixture
def run(tmp_path):
    """A run's folder with a last.pt as of train.py."""
    model = IJEPA(TINY)
    model.target_encoder = random_encoder()
    checkpoint = {"config": {"data": "folder"}, "architecture": asdict(TINY), "step": 7}
    torch.save(checkpoint | {"model": model.state_dict()}, tmp_path / "last.pt")
    return tmp_path


@pytest.fixture
def dataset(tmp_path):
    """Options: an untrained encoder, and a folder with images of dark and of bright noise.

    The test images have the wrong labels. What chooses by validation images learns the right ones.
    """
    for split, count, c in (("train", 30, 0), ("train", 30, 1), ("test", 6, 1), ("test", 6, 0)):
        folder = tmp_path / "images" / split / ("dark", "bright")[c]
        folder.mkdir(parents=True)
        c = 1 - c if split == "test" else c
        for i in range(count):
            pixels = torch.randint(100 * c, 100 * c + 100, (16, 16, 3)).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    save_encoder(tmp_path / "encoder.safetensors", ViT(TINY), TINY)
    return tmp_path / "encoder.safetensors", "--data", tmp_path / "images"


def test_released_checkpoint_gives_golden_outputs(tmp_path, monkeypatch):
    golden = torch.load(GOLDEN / "reference_steps.pt", weights_only=True)
    path, target, step = tmp_path / "a.pth.tar", tmp_path / "b.safetensors", golden["steps"][0]
    torch.save(golden["checkpoint"], path)
    call(monkeypatch, convert, path, target, "--num-heads 2")
    encoder, config, _ = load_encoder(str(target))
    assert (config.img_size, config.patch_size, config.depth, config.mlp_ratio) == (32, 4, 2, 4.0)
    assert close(encoder(step["images"]), step["target_output"])
    call(monkeypatch, convert, path, target, "--num-heads 2 --online")
    encoder, _, info = load_encoder(str(target))
    output = encoder(step["images"], step["context_masks"][0])
    assert info["network"] == "encoder" and close(output, step["context_output"])


def test_hugging_face_example_gives_golden_output(tmp_path, monkeypatch):
    encoder, config, _ = convert.read_encoder(str(GOLDEN / "hf_ijepa"))
    example = torch.load(GOLDEN / "hf_ijepa" / "example.pt", weights_only=True)
    assert config.norm_eps == 1e-12
    assert close(encoder(example["images"]), example["last_hidden_state"])
    # Through timm and back: nothing is lost, trained positions included.
    through, back = tmp_path / "timm.safetensors", tmp_path / "hf"
    call(monkeypatch, convert, GOLDEN / "hf_ijepa", through, "--to timm")
    call(monkeypatch, convert, through, back, "--to hf --num-heads 2")
    original, written = (load_file(p / "model.safetensors") for p in (GOLDEN / "hf_ijepa", back))
    equal(written, original)


def test_transformers_gives_our_output(run, tmp_path, monkeypatch):
    expected = load_encoder(str(run))[0](IMAGES)
    for half, tolerance in (("", 1e-5), ("--half", 0.05)):
        call(monkeypatch, convert, run, tmp_path / "hf", "--to hf", half)
        model, info = IJepaModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        output = model.eval()(IMAGES).last_hidden_state
        assert output.dtype == torch.float32 and close(output, expected, atol=tolerance)
        model.save_pretrained(tmp_path / "saved")  # under the names of this version
        again, _, _ = convert.read_encoder(str(tmp_path / "saved"))
        assert close(again(IMAGES), output)


@pytest.mark.parametrize("change", [{}, {"in_chans": 1, "norm_eps": 1e-3, "mlp_ratio": 41 / 24}])
def test_timm_gives_our_output(change, tmp_path, monkeypatch, capsys):
    config = replace(TINY, **change)
    encoder, images = random_encoder(config), IMAGES[:, : config.in_chans]
    source, target = tmp_path / "ours.safetensors", tmp_path / "timm.safetensors"
    save_encoder(source, encoder, config)
    call(monkeypatch, convert, source, target, "--to timm")
    printed = capsys.readouterr().out.splitlines()[0]
    model = eval(printed, {"timm": timm, "torch": torch, "functools": functools}).eval()
    assert close(model.forward_features(images), encoder(images))
    assert close(model(images), encoder(images).mean(1))
    torch.save(model.state_dict() | {"head.bias": torch.zeros(5)}, tmp_path / "timm.pth")
    again, _, _ = convert.read_encoder(str(tmp_path / "timm.pth"), num_heads=2)
    equal(again.state_dict(), encoder.state_dict())


def test_half_precision_and_older_files_are_read(tmp_path, monkeypatch):
    state = {k: x.bfloat16() for k, x in convert.timm_state(random_encoder(), False).items()}
    source, target = tmp_path / "timm.pth", tmp_path / "ours.safetensors"
    torch.save(state, source, _use_new_zipfile_serialization=False)
    call(monkeypatch, convert, source, target, "--num-heads 2")
    encoder, _, info = load_encoder(str(target))
    equal(encoder.state_dict(), {k: x.float() for k, x in state.items() if k != "pos_embed"})
    assert info["network"] is None  # of a timm file it is not known


def test_run_keeps_its_step_and_config(run, tmp_path, monkeypatch):
    expected = load_encoder(str(run))[0].half().float()
    call(monkeypatch, convert, run, tmp_path / "new" / "model.safetensors --half")
    encoder, config, info = load_encoder(str(tmp_path / "new"))
    assert (config, info["step"], info["train_config"]) == (TINY, 7, {"data": "folder"})
    equal(encoder.state_dict(), expected.state_dict())
    call(monkeypatch, convert, run, tmp_path / "new" / "online.safetensors --online")
    saved = load_file(tmp_path / "new" / "online.safetensors")
    equal(saved, load_encoder(str(run), online=True)[0].state_dict())


def test_width_tells_the_heads_of_vit_huge_and_giant():
    for dim, heads, ratio in ((768, 12, 4), (1280, 16, 4), (1408, 16, 48 / 11)):  # not width / 64
        config = IJEPAConfig(16, 8, dim, 1, heads, dim, mlp_ratio=ratio)
        with torch.device("meta"):
            state = ViT(config).state_dict() | {"pos_embed": torch.empty(1, 4, dim)}
        assert convert.build_encoder(state, None)[1] == config


def test_convert_errors_are_one_line(run, tmp_path, monkeypatch, capsys):
    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    content, state = (run / "last.pt").read_bytes(), convert.timm_state(random_encoder(), False)
    (tmp_path / "cut.pth.tar").write_bytes(content[: len(content) // 2])
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    torch.save({"encoder": Code()}, tmp_path / "code.pth.tar")
    torch.save({"a": 1}, tmp_path / "foreign.pth")
    save_file(state | {"cls_token": torch.zeros(1)}, tmp_path / "class.safetensors")
    save_file(state | {"pos_embed": torch.zeros(1, 17, 24)}, tmp_path / "17.safetensors")
    save_file(state | {"pos_embed": torch.zeros(1, 16, 24)}, tmp_path / "trained.safetensors")
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    out, error = tmp_path / "out.safetensors", functools.partial(error_line, capsys, monkeypatch)
    for name, message in {
        "cut.pth.tar": "cut", "cut.safetensors": "cut", "code.pth.tar": "code",
        "foreign.pth": "pos_embed", "class.safetensors": "cls_token", "17.safetensors": "17",
        "trained.safetensors": "trained", "vit": "type vit", "nothing": "no checkpoint",
    }.items():  # fmt: skip
        assert message in error(convert, tmp_path / name, out, "--num-heads 2")
    assert "--num-heads" in error(convert, tmp_path / "17.safetensors", out)
    assert "a target" in error(convert, run) and "must end" in error(convert, run, "out.pt")
    assert "written" in error(convert, run, run / "last.pt", "--to hf")
    assert not out.exists() and not (tmp_path / "executed").exists()
    result = subprocess.run([sys.executable, convert.__file__, "none", out], capture_output=True)
    assert result.returncode == 2 and result.stderr.count(b"\n") == 1


def test_layer_decay_and_drop_path():
    encoder = random_encoder()
    expected, model = encoder(IMAGES).mean(1), finetune.Classifier(encoder, 24, max_drop=0.9)
    model.head.weight.data.copy_(torch.eye(24))
    assert close(model.eval()(IMAGES), expected) and not close(model.train()(IMAGES), expected)
    groups = finetune.param_groups_layer_decay(model, 0.1, layer_decay=0.5)
    settings = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    for name, p in model.named_parameters():
        layer = 0 if "patch_embed" in name else 4  # 4: head and last norm
        layer = int(name.split(".")[2]) + 1 if "blocks" in name else layer
        assert settings[id(p)] == (0.5 ** (4 - layer), 0.1 if p.ndim > 1 else 0.0), name


def test_fraction_is_taken_from_each_class():
    labels, indices = torch.arange(300) % 3, torch.arange(30, 300)
    chosen = finetune.select_fraction(labels, indices, 0.1, seed=0)
    assert labels[chosen].bincount().tolist() == [9, 9, 9]
    assert len(set(chosen.tolist())) == 27 and set(chosen.tolist()) <= set(indices.tolist())
    assert len(finetune.select_fraction(labels, indices, 1e-6, seed=0)) == 3


def test_finetune_learns_bright_from_dark(dataset, tmp_path, monkeypatch):
    options = "--epochs 8 --batch-size 16 --accum-steps 2 --lr 0.01 --no-rand-augment"
    call(monkeypatch, finetune, *dataset, options, "--layer-decay 0 --out", tmp_path / "out")
    result = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert result["val"] > 0.9 and result["test"] < 0.1 and len(result["epochs"]) == 8
    assert result["epochs"][-1]["val"] == result["val"]
    path = str(tmp_path / "out" / "classifier.pt")
    saved = torch.load(path, weights_only=True)
    finetune.Classifier(ViT(TINY), 2).load_state_dict(saved["model"])
    assert saved["classes"] == ["bright", "dark"]
    start, end = load_encoder(str(dataset[0]))[0], load_encoder(path, online=True)[0]
    end = end.state_dict()
    moved = {k for k, x in start.state_dict().items() if not torch.equal(end[k], x)}
    assert moved == {"norm.weight", "norm.bias"}  # with the head, the last layer: no decay


def test_augmented_images_of_a_folder(dataset):
    images = FolderDataset(dataset[2] / "train", 8)
    augmented = finetune.AugmentedImages(images, torch.arange(60), (0.5, 1.0), True)
    (bright, label), (_, other) = augmented[0], augmented[59]
    assert bright.shape == (3, 8, 8) and bright.dtype == torch.uint8
    assert (label, other) == (0, 1) and images.classes == ["bright", "dark"]


def test_finetune_names_damaged_images_once(dataset, tmp_path, monkeypatch, capsys):
    """Also those that other processes meet."""
    for path in (dataset[2] / "train").glob("*/*.png"):
        shutil.copy(path, path.with_name(f"copy_{path.name}"))
    (dataset[2] / "train" / "dark" / "7.png").write_text("not an image")  # a training image
    options = "--epochs 2 --batch-size 16 --img-size 8 --workers 2"
    call(monkeypatch, finetune, *dataset, options, "--out", tmp_path / "out")
    assert capsys.readouterr().err.count("skipped damaged image") == 1
    # probe.py takes the size of the fine-tuning by default, not that of the encoder.
    path = str(tmp_path / "out" / "classifier.pt")
    splits = load_splits(ProbeConfig(path), *load_encoder(path, online=True)[1:])
    assert splits["test"][0].img_size == 8


def test_finetune_is_reproducible(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # for the default of --out
    options = "--epochs 2 --batch-size 8 --mixup 0.8 --cutmix 1 --drop-path 0.2"
    call(monkeypatch, finetune, *dataset, options, "--labels-fraction 0.5")
    first = capsys.readouterr().out
    assert "another --out" in error_line(capsys, monkeypatch, finetune, *dataset, options)
    shutil.rmtree("runs")
    call(monkeypatch, finetune, *dataset, options, "--labels-fraction 0.5")
    assert capsys.readouterr().out == first and "on 28 labeled images" in first
    assert (tmp_path / "runs" / f"finetune_{dataset[0].parent.name}" / "classifier.pt").exists()


def test_lars_probe_learns_bright_from_dark(dataset, monkeypatch, capsys):
    call(monkeypatch, lars_probe, *dataset, "--epochs 15 --batch-size 16 --accum-steps 2")
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split(":")[0] for line in lines] == ["last layer", "last 4 layers"]
    for line in lines:
        val, test = (float(line.split(f"{name} ")[1].split(" %")[0]) for name in SPLITS)
        assert val > 90 and test < 10


def test_lars_learning_rate_falls_twice_or_thrice(dataset, monkeypatch):
    scales, step = [], lars_probe.Head.step

    def recorded(head, x, y, lr_scale):
        scales.append(lr_scale)
        step(head, x, y, lr_scale)

    monkeypatch.setattr(lars_probe.Head, "step", recorded)
    call(monkeypatch, lars_probe, *dataset, "--epochs 3 --batch-size 16")  # 10 steps of 16 heads
    expected = [1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.001]
    assert scales[::16] == pytest.approx(expected)


def test_lars_step_is_a_fraction_of_the_norm():
    head = lars_probe.Head("last layer", 24, 3, lr=2.0, weight_decay=0.0)
    before = head.linear.weight.detach().clone()
    head.step(torch.randn(32, 4, 24), torch.arange(32) % 3, lr_scale=0.1)
    moved = (head.linear.weight - before).norm().item()
    assert moved == pytest.approx(0.001 * 0.2 * before.norm().item(), rel=1e-2)


def test_benchmark_prints_one_line(monkeypatch, capsys):
    call(monkeypatch, benchmark, "--batch-size 4 --steps 2 --bf16")
    (line,) = capsys.readouterr().out.splitlines()
    assert "vit_nano on cpu" in line and "images/s" in line


def test_script_errors_are_one_line(dataset, monkeypatch, capsys):
    error = functools.partial(error_line, capsys, monkeypatch)
    assert "multiple of 2" in error(finetune, *dataset, "--batch-size 3")
    for module in (finetune, lars_probe):
        assert "--epochs" in error(module, *dataset, "--epochs 0")
        assert "--accum-steps" in error(module, *dataset, "--accum-steps 0")
        assert "--batch-size starts at 1" in error(module, *dataset, "--batch-size 0")
        assert "--workers at 0" in error(module, *dataset, "--batch-size 16 --workers -1")
    assert "--crop-scale" in error(finetune, *dataset, "--crop-scale 1 0.2")
    assert "--lr" in error(finetune, *dataset, "--lr -1")
    assert "drop_path" in error(finetune, *dataset, "--drop-path 2")
    assert "batch norm" in error(lars_probe, *dataset, "--batch-size 1")
    (dataset[2] / "file").touch()
    options = "--batch-size 16 --out", dataset[2] / "file"
    assert "cannot be created" in error(finetune, *dataset, *options)
    assert "'vit_nanoo'" in error(ablations, "--model vit_nanoo")
    assert "two images" in error(benchmark, "--batch-size 1")
    for module, name in ((finetune, "Mixup"), (lars_probe, "Lars")):
        assert "54 labeled" in error(module, *dataset, "--batch-size 64")
        monkeypatch.setattr(module, name, None)
        assert "needs timm: pip install" in error(module)


# -------------------------------------------------------------------------------------- ablations


@pytest.mark.parametrize("target_norm", ["layer", "whiten"])
def test_pixel_targets_are_normalized_patches(batch, target_norm):
    images, _, target_idx = batch
    model = ablations.PixelTargets(replace(TINY, target_norm=target_norm))
    targets = model.targets(images, target_idx)
    assert targets.shape == (3, 2, 4, 48)
    for b, m, t in itertools.product(range(3), range(2), range(4)):
        y, x = divmod(target_idx[b, m, t].item(), 4)
        patch = images[b, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].permute(1, 2, 0).flatten()
        expected = (patch - patch.mean()) / (patch.var(correction=0) + 1e-5).sqrt()
        torch.testing.assert_close(targets[b, m, t], expected, atol=1e-5, rtol=1e-5)
    model(*batch).backward()
    model.update_target(0.9)


@pytest.mark.parametrize("method", [IJEPA, ablations.InputMasking])
def test_targets_know_their_surroundings(batch, method):
    images, context_idx, target_idx = batch
    model = with_random_weights(method(TINY))
    targets = model.targets(images, target_idx)
    assert targets.shape == (3, 2, 4, 24)
    repainted = model.targets(paint(images, context_idx), target_idx)
    assert torch.equal(repainted, targets) == (method is ablations.InputMasking)
    if method is ablations.InputMasking:  # one block alone, normalized
        block = model.target_encoder(images, keep=target_idx[:, 1])
        expected = torch.nn.functional.layer_norm(block, (24,))
        torch.testing.assert_close(targets[:, 1], expected, atol=1e-5, rtol=1e-5)


def test_l2_loss(batch):
    model = with_random_weights(ablations.L2Loss(TINY))
    context = model.encoder(batch[0], batch[1])
    predictions = model.predictor(context, *batch[1:])
    expected = (predictions - model.targets(batch[0], batch[2])).square().mean()
    torch.testing.assert_close(model(*batch), expected)


@pytest.mark.parametrize("grid", [(8, 8), (14, 14), (6, 10)])
@pytest.mark.parametrize("strategy, num_targets", [("rasterized", 3), ("block", 1), ("random", 1)])
def test_masks_of_the_other_strategies(strategy, num_targets, grid):
    masks, n = ablations.STRATEGIES[strategy](grid), math.prod(grid)
    context_idx, target_idx = masks.sample(100, torch.Generator().manual_seed(0))
    assert context_idx.shape == (100, masks.context_size)
    assert target_idx.shape[:2] == (100, num_targets)
    assert min(context_idx.min(), target_idx.min()) >= 0
    assert max(context_idx.max(), target_idx.max()) < n
    for context, blocks in zip(context_idx, target_idx, strict=True):
        assert len(context.unique()) == masks.context_size
        assert not set(context.tolist()) & set(blocks.flatten().tolist())
        assert len(blocks.unique()) == blocks.numel()
        if strategy == "random":
            assert blocks.numel() == round(0.6 * n)
            assert len(context) == n - blocks.numel()  # all the others
            continue
        rows, columns = blocks // grid[1], blocks % grid[1]
        height, width = (x.amax(1) - x.amin(1) + 1 for x in (rows, columns))
        assert (height * width == blocks.shape[1]).all()  # rectangles
        if strategy == "rasterized":
            assert len(context) == n // 4
            assert (height == grid[0] // 2).all() and (width == grid[1] // 2).all()
            assert (rows.amin(1) % (grid[0] // 2) == 0).all()
            assert (columns.amin(1) % (grid[1] // 2) == 0).all()


@pytest.mark.parametrize(
    "collator, settings, message",
    [
        (ablations.RasterizedMasks, {"grid": (7, 8), "num_targets": 3}, "even sides"),
        (ablations.RasterizedMasks, {"grid": 8, "num_targets": 2}, "3 quadrants"),
        (ablations.RandomMasks, {"grid": 8, "target_scale": (1.0, 1.0)}, "leave no context"),
    ],
)
def test_impossible_masks_are_refused(collator, settings, message):
    with pytest.raises(ValueError, match=message):
        collator(**settings)


def test_ablations_train_every_row_once(monkeypatch, tmp_path, capsys):
    """Each row with its classes and options; finished runs are kept, a stopped one resumes."""
    calls = {}

    def fake_train(run, world, method, collator, name):
        folder = Path(run.out)
        folder.mkdir(parents=True)
        result = {"name": "trained", "knn": 0.5, "linear": 0.25, "linear_4": 0.75, "rankme": 9.0}
        (folder / "result.json").write_text(json.dumps({"config": asdict(run), "rows": [result]}))
        calls[folder.name] = run, method, collator, name
        return 0

    monkeypatch.setattr(ablations, "train", fake_train)
    options = ["--data textures --epochs 2 --seeds 3 5 --out", tmp_path]
    call(monkeypatch, ablations, *options)
    assert len(calls) == 2 * len(ablations.ROWS)
    methods = {"pixels": "PixelTargets", "input mask": "InputMasking", "L2 loss": "L2Loss"}
    for name, row in ablations.ROWS.items():
        assert row.method.__name__ == methods.get(name, "IJEPA")
        assert row.collator is ablations.STRATEGIES.get(name, MaskCollator)
    for (name, row), seed in itertools.product(ablations.ROWS.items(), (3, 5)):
        run, *passed = calls[f"{name.replace(' ', '_')}_seed{seed}"]
        assert passed == [row.method, row.collator, name]
        assert (run.data, run.epochs, run.seed, run.resume) == ("textures", 2, seed, False)
        assert all(getattr(run, key) == value for key, value in row.options.items())
    with (tmp_path / "ablations.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["row"], r["seed"]) for r in rows] == [(n, s) for s in "35" for n in ablations.ROWS]
    assert rows[0]["linear_4"] == "0.7500"
    assert "I-JEPA          50.0    25.0    75.0" in capsys.readouterr().out

    calls.clear()
    folder = tmp_path / "pixels_seed3"
    saved = json.loads((folder / "result.json").read_text())["config"]
    (folder / "result.json").unlink()  # as if stopped
    torch.save({"config": saved, "architecture": {}, "model": {}, "step": 1}, folder / "last.pt")
    monkeypatch.setattr(ablations, "train", lambda run, *_: calls.update(run=run) or 143)
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, ablations, *options)
    assert stopped.value.code == 143
    assert calls["run"].resume and calls["run"].out == str(folder)
    monkeypatch.undo()
    message = error_line(capsys, monkeypatch, ablations, *options, "--only pixels --model vit_tiny")
    assert "was trained with model vit_nano: choose another --out" in message


def test_ablations_refuse_an_unknown_row(monkeypatch, capsys):
    message = error_line(capsys, monkeypatch, ablations, "--only pixel")
    assert "no row ['pixel']" in message and "I-JEPA" in message


def test_ablations_and_train_keep_their_runs_apart(monkeypatch, tmp_path, capsys):
    options = "--data textures --epochs 0.02 --seeds 0 --only", "random", "--out", tmp_path
    call(monkeypatch, ablations, *options)
    out = tmp_path / "random_seed0"
    message = error_line(capsys, monkeypatch, ablations, *options, "--epochs 1")
    assert "was trained with epochs 0.02: choose another --out" in message
    message = error_line(capsys, monkeypatch, train, "--resume --out", out)
    assert "is a run of scripts/ablations.py: resume it there" in message
