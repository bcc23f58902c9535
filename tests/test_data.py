"""Datasets, crops and batches, the command line, atomic files and processes."""

import dataclasses
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.multiprocessing import start_processes
from torchvision import datasets
from torchvision.transforms import v2

import data
from ijepa import MaskCollator

BATCH = 16
MASKS = MaskCollator(4)


def random_image(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def make_folder(root: Path, per_class: int, sizes=((40, 40),), split="train") -> Path:
    """Two classes of noise; image i of a class has the size number i."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / split / name).mkdir(parents=True)
        for i in range(per_class):
            image = random_image(rng, *sizes[i % len(sizes)])
            image.save(root / split / name / f"{i:03}.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sizes = ((32, 32), (50, 30), (30, 60))
    root = make_folder(tmp_path_factory.mktemp("noise"), 20, sizes)
    return data.FolderDataset(root / "train", 32)


@pytest.fixture(scope="module")
def memory():
    images = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8)
    return data.MemoryDataset(images, torch.arange(40) % 4, list("abcd"))


@pytest.fixture(params=["memory", "folder"])
def dataset(request):
    return request.getfixturevalue(request.param)


def run(dataset, steps=range(3), masks=MASKS, **options):
    options = {"batch_size": BATCH, "seed": 7, "flip": True} | options
    indices = torch.arange(len(dataset))
    return list(data.train_batches(dataset, indices, masks, steps, **options))


def assert_equal(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(batch, other, strict=True))


# ----------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(("world_size", "accum_steps"), [(2, 1), (4, 1), (1, 4), (2, 2)])
def test_processes_and_accumulation_see_the_whole_batch(dataset, world_size, accum_steps):
    options = {"world_size": world_size, "accum_steps": accum_steps}
    ranks = [run(dataset, rank=rank, **options) for rank in range(world_size)]
    expected = run(dataset)
    for step, whole in enumerate(expected):
        micro_steps = range(step * accum_steps, (step + 1) * accum_steps)
        slices = [ranks[rank][i] for i in micro_steps for rank in range(world_size)]
        assert_equal([[torch.cat(x) for x in zip(*slices, strict=True)]], [whole])


def test_worker_processes_change_nothing(dataset):
    assert_equal(run(dataset, workers=2), run(dataset))


def test_resumed_run_sees_the_same_batches(dataset):
    assert_equal(run(dataset, range(2, 5)), run(dataset, range(5))[2:])


def test_batches_ignore_and_leave_the_global_generator(dataset):
    torch.manual_seed(1)
    expected = run(dataset)
    state = torch.get_rng_state()
    assert_equal(run(dataset), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_seeds_and_steps_differ_in_everything(dataset):
    (a, b), (c, _) = run(dataset, range(2)), run(dataset, range(2), seed=8)
    for other in (b, c):
        assert not any(
            x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, other, strict=True)
        )


def test_masks_are_those_of_the_collator(memory):
    (_, context_idx, target_idx), *_ = run(memory)
    expected = MASKS.sample(BATCH, data.seeded_generator(7, "masks", 0))
    assert_equal([[context_idx, target_idx]], [expected])


@pytest.mark.parametrize("batch_size", [8, 24, 100])
def test_every_epoch_sees_each_image_once(memory, batch_size):
    memory = dataclasses.replace(memory, labels=torch.arange(40))
    batches = run(memory, range(5 * 40 // batch_size), masks=None, batch_size=batch_size)
    labels = torch.cat([labels for _, labels in batches])
    epochs = labels[: 40 * (len(labels) // 40)].view(-1, 40)
    assert len(epochs) >= 4
    assert torch.equal(epochs.sort(1).values, torch.arange(40).expand_as(epochs))
    assert not torch.equal(epochs[0], epochs[1])


def test_only_given_indices_are_seen(memory):
    memory = dataclasses.replace(memory, labels=torch.arange(40))
    indices = torch.tensor([3, 5, 8, 13])
    batches = data.train_batches(memory, indices, None, range(3), batch_size=8)
    assert set(torch.cat([labels for _, labels in batches]).tolist()) == {3, 5, 8, 13}


def test_without_crop_and_flip_images_are_whole(dataset):
    (images, labels), *_ = run(dataset, masks=None, crop_scale=(1.0, 1.0), flip=False)
    whole = data.normalize(dataset.load(range(len(dataset))))
    distance = (images[:, None] - whole).abs().amax((2, 3, 4))  # (B, N)
    assert distance.min(1).values.max() < 1e-4
    assert torch.equal(dataset.labels[distance.argmin(1)], labels)


def test_half_of_the_images_are_flipped(memory):
    options = {"masks": None, "crop_scale": (1.0, 1.0), "batch_size": 400}
    (flipped, _), (plain, _) = (run(memory, range(1), flip=x, **options)[0] for x in (True, False))
    mirrored = (flipped - plain.flip(-1)).abs().amax((1, 2, 3)) < 1e-4
    unchanged = (flipped - plain).abs().amax((1, 2, 3)) < 1e-4
    assert (mirrored ^ unchanged).all()
    assert 150 < mirrored.sum() < 250  # p = 0.5: five standard deviations


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_training_images_are_cropped_once(tmp_path, kind):
    ramp = np.linspace(0, 255, 32).round().astype(np.uint8)  # red: the column, green: the row
    image = np.stack(np.broadcast_arrays(ramp[None, :], ramp[:, None], np.uint8(0)), -1)
    (tmp_path / "a").mkdir()
    Image.fromarray(image).save(tmp_path / "a" / "0.png")
    dataset = data.FolderDataset(tmp_path, 32)
    if kind == "memory":
        dataset = data.MemoryDataset(dataset.load([0]), dataset.labels, dataset.classes)
    options = {"batch_size": 50, "crop_scale": (0.3, 0.3)}
    ((images, _),) = data.train_batches(dataset, torch.tensor([0]), None, range(1), **options)
    low, high = images.amin((2, 3)), images.amax((2, 3))  # (50, 3)
    sides = (high - low)[:, :2] * torch.tensor(data.STD[:2])  # 1: the whole image
    assert sides.prod(1).mean().item() == pytest.approx(0.3, abs=0.03)
    assert sides.std(0).min() > 0.02  # of different shapes


def test_batch_that_cannot_be_divided_is_refused(memory):
    with pytest.raises(data.UserError, match="--batch-size 16 is not a multiple of 3"):
        run(memory, accum_steps=3)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_whole_images_in_order(dataset, workers):
    indices = torch.tensor([5, 3, 39, 0, 3])
    batches = list(data.eval_batches(dataset, indices, batch_size=2, workers=workers))
    assert [len(images) for images in batches] == [2, 2, 1]
    assert torch.equal(torch.cat(batches), data.normalize(dataset.load(indices)))


# ------------------------------------------------------------------------------------- crops


@pytest.mark.parametrize("flip", [False, True])
def test_crop_resize_equals_interpolate_of_each_crop(flip):
    s, boxes = 24, torch.tensor([[0, 0, 24, 24], [3, 5, 12, 17], [23, 0, 1, 2], [10, 9, 14, 15]])
    images = torch.randn(4, 3, s, s)
    result = data.crop_resize(images, boxes / s, torch.tensor([flip] * 4))
    for image, (top, left, h, w), found in zip(images, boxes.tolist(), result, strict=True):
        crop = image[None, :, top : top + h, left : left + w]
        expected = F.interpolate(crop, (s, s), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(
            found, expected.flip(-1) if flip else expected, atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("scale", [(0.3, 1.0), (0.08, 0.3), (0.9, 1.0)])
def test_crop_boxes_are_distributed_as_torchvisions(scale):
    boxes = data.random_crop_boxes(20_000, scale, torch.Generator().manual_seed(0)).double()
    torch.manual_seed(0)
    image = torch.empty(1, 10_000, 10_000, device="meta")  # large, so that rounding is small
    crop = v2.RandomResizedCrop(8, scale).make_params
    keys = ("top", "left", "height", "width")
    theirs = [[params[k] for k in keys] for params in (crop([image]) for _ in range(4000))]
    theirs = torch.tensor(theirs).double() / 10_000
    assert (boxes >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= 1 + 1e-6).all()

    def statistics(x):
        top, left, h, w = x.unbind(1)
        return torch.stack([h * w, (w / h).log(), (w / h).log().abs(), h, w, top, left])

    a, b = statistics(boxes), statistics(theirs)
    error = (a.var(1) / a.shape[1] + b.var(1) / b.shape[1]).sqrt()
    assert ((a.mean(1) - b.mean(1)).abs() < 4 * error + 1e-4).all()
    assert ((a.std(1) / b.std(1)) - 1).abs().max() < 0.06


def test_crops_of_a_folder_are_torchvisions(folder):
    for index in range(3):
        image = Image.open(str(folder.paths[index]))
        torch.manual_seed(index)
        expected = v2.RandomResizedCrop(32, (0.3, 1.0))(image)
        found = folder.load_crop(index, (0.3, 1.0), seed=index)
        assert np.array_equal(found.permute(1, 2, 0), expected)


def test_normalize_equals_torchvisions():
    images = torch.randint(256, (2, 3, 5, 5), dtype=torch.uint8)
    expected = v2.functional.normalize(images / 255, data.MEAN, data.STD)
    torch.testing.assert_close(data.normalize(images), expected)


# ---------------------------------------------------------------------------------- datasets


def test_evaluation_takes_the_center_of_an_image(tmp_path):
    x, y = np.meshgrid(np.arange(60), np.arange(30))
    image = Image.fromarray(np.stack([4 * x, 8 * y, x + y], -1).astype(np.uint8))
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / "wide.png")
    expected = v2.Compose([v2.Resize(32), v2.CenterCrop(32), v2.PILToTensor()])(image)
    found = data.FolderDataset(tmp_path, 32).load([0])[0]
    assert (found.int() - expected.int()).abs().max() <= 8  # a pixel: v2 rounds the size first
    (tmp_path / "a" / "wide.png").unlink()
    # Large images: the central 224 of 256 pixels.
    ramp = np.linspace(0, 255, 256).astype(np.uint8)[None, :, None].repeat(256, 0).repeat(3, 2)
    Image.fromarray(ramp).save(tmp_path / "a" / "ramp.png")
    found = data.FolderDataset(tmp_path, 224).load([0])[0]
    assert np.array_equal(found.permute(1, 2, 0), ramp[16:-16, 16:-16])


def damage(folder: data.FolderDataset, *indices: int) -> list[str]:
    paths = [str(folder.paths[i]) for i in indices]
    for path in paths:
        content = Path(path).read_bytes()
        Path(path).write_bytes(content[: len(content) // 2])
    return paths


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_image_is_named_once_and_replaced(tmp_path, capfd, workers):
    root = make_folder(tmp_path, 100, sizes=((8, 8),))
    folder = data.FolderDataset(root / "train", 8)
    (path,) = damage(folder, 99)  # the last cat: its replacement is the first one
    for _ in range(2):
        images = torch.cat(list(data.eval_batches(folder, range(200), workers=workers)))
    assert capfd.readouterr().err.count(path) == 1
    assert torch.equal(images[99], images[0])
    batches = data.train_batches(folder, torch.arange(200), None, range(2), batch_size=200)
    assert all(images.isfinite().all() for images, _ in batches)
    assert folder.reported == {path}


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_damaged_images_are_refused(tmp_path, workers):
    root = make_folder(tmp_path, 100, sizes=((8, 8),))
    folder = data.FolderDataset(root / "train", 8)
    damage(folder, 0, 50, 150)
    with pytest.raises(data.UserError, match="3 of 200 images are damaged, more than 1 %"):
        list(data.eval_batches(folder, range(200), workers=workers))


def test_folder_without_readable_image_is_refused(tmp_path):
    root = make_folder(tmp_path, 2)
    folder = data.FolderDataset(root / "train", 8)
    damage(folder, *range(4))
    with pytest.raises(data.UserError, match="no readable image in class cat"):
        list(data.eval_batches(folder, range(4)))


@pytest.mark.parametrize("name", ["test", "val"])
def test_test_split_is_test_or_val(tmp_path, name):
    root = make_folder(make_folder(tmp_path, 2), 3, split=name)
    dataset = data.load_dataset(str(root), "test", 8)
    assert (len(dataset), dataset.classes) == (6, ["cat", "dog"])
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_folders_that_cannot_be_used_say_why(tmp_path):
    def message(name, split="train"):
        with pytest.raises(data.UserError) as error:
            data.load_dataset(str(name), split, 8, str(tmp_path))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no folder nowhere; named datasets are textures, cifar10" in message("nowhere")
    assert f"no folder {tmp_path / 'imagenet'}" in message("imagenet")
    assert f"expected {tmp_path / 'train'}/<class>/<image>.jpg" in message(tmp_path)
    (tmp_path / "train").mkdir()
    assert f"expected {tmp_path / 'train'}/<class>/<image>.jpg" in message(tmp_path)
    (tmp_path / "train" / "cat").mkdir()
    assert "no valid file for the classes cat" in message(tmp_path)
    (tmp_path / "train" / "cat").rmdir()
    make_folder(make_folder(tmp_path / "other", 1), 1, split="test")
    (tmp_path / "other" / "train" / "cow").mkdir()
    assert "different classes" in message(tmp_path / "other", "test")


class FakeCIFAR:
    classes, targets = ["a", "b"], [0, 1, 1]

    def __init__(self, root, train, download):
        self.data = np.arange(3 * 32 * 32 * 3).reshape(3, 32, 32, 3).astype(np.uint8)
        self.data += 0 if train else 1


def test_cifar_is_loaded_into_memory_and_resized(monkeypatch):
    monkeypatch.setattr(datasets, "CIFAR10", FakeCIFAR)
    train, test = (data.load_dataset("cifar10", split, 32) for split in ("train", "test"))
    assert np.array_equal(train.images.permute(0, 2, 3, 1), FakeCIFAR("", True, True).data)
    assert torch.equal(test.images, train.images + 1)
    assert train.labels.tolist() == [0, 1, 1]
    resized = data.load_dataset("cifar10", "train", 48)
    assert torch.equal(resized.images, v2.functional.resize(train.images, [48, 48]))


def test_failed_download_names_what_needs_none(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr(datasets, "CIFAR100", offline)
    with pytest.raises(data.UserError, match=r"unreachable.*--data textures needs no download"):
        data.load_dataset("cifar100", "train", 32)


@pytest.mark.parametrize(("labelled", "n_val"), [(25, 2), (60_000, 5000)])
def test_validation_is_a_tenth_or_5000(labelled, n_val):
    labels = torch.cat([torch.full((50,), -1), torch.arange(labelled)])
    dataset = data.MemoryDataset(torch.empty(len(labels), 3, 1, 1), labels, [])
    train, val = data.train_val_split(dataset)
    assert len(val) == n_val
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(len(labels)))
    assert (labels[val] >= 0).all()


def test_textures_are_a_function_of_the_seed():
    images, labels = data.draw_textures(50, 0)
    again, labels_again = data.draw_textures(50, 0)
    assert torch.equal(again, images) and torch.equal(labels_again, labels)
    other, _ = data.draw_textures(50, 1)
    assert len(torch.cat([images, other]).flatten(1).unique(dim=0)) == 100


def test_textures_have_all_classes():
    _, labels = data.draw_textures(800, 0)
    assert labels.bincount(minlength=len(data.TEXTURES)).min() > 50


def test_small_images_of_a_folder_are_kept_in_memory(tmp_path):
    root = make_folder(tmp_path, 3, sizes=((8, 8),))
    dataset = data.load_dataset(str(root), "train", img_size=8)
    assert isinstance(dataset, data.MemoryDataset)
    assert torch.equal(dataset.images, data.FolderDataset(root / "train", 8).load(range(6)))


# ------------------------------------------------------------ command line, files, processes


@dataclasses.dataclass
class Config:
    model: str = data.option("tiny", "which model", choices=("tiny", "large"))
    batch_size: int = data.option(64, "images per step", group="optimization")
    lr: float | None = data.option(None, "50% of it at the end", group="optimization")
    crop_scale: tuple[float, float] = data.option((0.3, 1.0), "fraction of the area")
    flip: bool = data.option(False, "horizontal flip")
    bf16: bool | None = data.option(None, "autocast")
    encoder: str | None = data.option(None, "checkpoint", positional=True)


@pytest.mark.parametrize(
    ("argv", "changes"),
    [
        ([], {}),
        (["--model", "large", "--batch-size", "8"], {"model": "large", "batch_size": 8}),
        (["--lr", "1e-3", "--crop-scale", "0.5", "1"], {"lr": 1e-3, "crop_scale": (0.5, 1.0)}),
        (["--flip", "--no-bf16"], {"flip": True, "bf16": False}),
        (["last.pt", "--no-flip"], {"encoder": "last.pt"}),
    ],
)
def test_options_are_parsed(argv, changes):
    assert data.parse_args(Config, "test", argv) == dataclasses.replace(Config(), **changes)


def test_help_shows_groups_and_defaults(capsys):
    with pytest.raises(SystemExit) as error:
        data.parse_args(Config, "What it does.", ["--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    for part in ("What it does.", "optimization:", "50% of it", "--no-flip", "(default: 64)"):
        assert part in text


def test_ctrl_c_is_code_130_and_bugs_are_shown():
    def fail(error):
        raise error

    with pytest.raises(SystemExit) as exit_:
        data.run_main(lambda: fail(KeyboardInterrupt()))
    assert exit_.value.code == 130
    with pytest.raises(ZeroDivisionError):
        data.run_main(lambda: fail(ZeroDivisionError()))


def test_generators_depend_on_the_whole_key():
    keys = [(0,), (1,), (0, "crop"), (0, "crop", 1), (0, "mask", 1), ("0",)]
    first = {int(torch.randint(2**62, (), generator=data.seeded_generator(*key))) for key in keys}
    assert len(first) == len(keys)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, RuntimeError, ValueError])
def test_failed_write_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "last.pt"
    path.write_text("old")
    shown = data.UserError if error in (OSError, RuntimeError) else error  # torch.save raises both
    with pytest.raises(shown), data.atomic_write(path) as p:
        p.write_text("ne")
        raise error
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("last.pt", "old")]


def test_missing_gpu_is_a_user_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(data.UserError, match="where PyTorch finds a GPU"), data.distributed("cuda"):
        pass
    with data.distributed() as process:
        assert (process.rank, process.world_size, process.is_main) == (0, 1, True)
        assert process.device == torch.device("cpu")


def test_a_script_for_one_process_refuses_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(data.UserError, match="with python"), data.distributed("cpu", alone=True):
        pass


def join_and_download(rank: int, port: str, folder: Path):
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank)}
    with data.distributed("cpu") as process:
        with data.main_process_first(process):
            if process.is_main:
                time.sleep(0.3)
                (folder / "downloaded").touch()
            assert (folder / "downloaded").exists()
        total = torch.tensor(process.rank + 1)
        torch.distributed.all_reduce(total)
        (folder / str(process.rank)).write_text(str(total.item()))
    assert not torch.distributed.is_initialized()


def test_processes_join_and_main_is_first(tmp_path, port):
    start_processes(join_and_download, (port, tmp_path), nprocs=2, start_method="fork")
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["3", "3"]
