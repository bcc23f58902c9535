"""data.py against torchvision, Pillow and F.interpolate; and what users' folders may hold."""

import dataclasses
import urllib.error
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as tvf

import data
from data import CropRandomness, Folder, Pictures, Plan, UserError
from ijepa import MaskCollator

SCALE = (0.3, 1.0)


def noise(width: int, height: int, seed: int) -> Image.Image:
    """A picture of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_folder(root, counts: dict[str, int], size=(16, 16), suffix=".png", part="train"):
    """`<root>/<part>/<class>/<number>` with pictures of noise; size: one, or one for each."""
    number = 0
    for name, count in counts.items():
        (root / part / name).mkdir(parents=True)
        for i in range(count):
            width, height = size[number % len(size)] if isinstance(size, list) else size
            picture = noise(width, height, number)
            picture.save(root / part / name / f"{i:04d}{suffix}", quality=90)
            number += 1
    return root


def streamed(root, img_size=16) -> Folder:
    """The training part as a `Folder`, however small its pictures are."""
    files, labels, classes = data.scan_folder(root, "train")
    return Folder(files, {"class": labels}, {"class": classes}, img_size)


def make_plan(n: int, **changes) -> Plan:
    values = {"seed": 0, "index": torch.arange(n), "batch_size": 8, "accum_steps": 1}
    values |= {"masks": MaskCollator(4), "crop_scale": SCALE, "flip": True}
    return Plan(**values | changes)


def labelled(labels) -> Pictures:
    """A set of which only the labels matter."""
    labels = torch.as_tensor(labels)
    return Pictures(torch.zeros(len(labels), 0), {"class": labels}, {"class": []})


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A folder of JPEGs of three classes and of many sizes, some of them large."""
    sizes = [(40, 30), (30, 41), (150, 90), (64, 64), (33, 140), (200, 50)]
    counts = {"a": 12, "b": 10, "c": 11}
    return make_folder(tmp_path_factory.mktemp("mixed"), counts, sizes, ".jpg")


@pytest.fixture(scope="module")
def memory() -> Pictures:
    images = torch.randint(0, 256, (37, 3, 16, 16), dtype=torch.uint8)
    return Pictures(images, {"class": torch.arange(37) % 3}, {"class": ["a", "b", "c"]})


# ------------------------------------------------------------------------------- crop boxes


def our_boxes(n: int, height: int, width: int, scale=SCALE, seed=0) -> torch.Tensor:
    crops = CropRandomness.draw(n, False, torch.Generator().manual_seed(seed))
    return crops.boxes(torch.full((n,), height), torch.full((n,), width), scale)


def ks_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Largest distance between two empirical distribution functions."""
    points = np.concatenate([a, b])
    below = (np.searchsorted(np.sort(x), points, side="right") / len(x) for x in (a, b))
    return float(np.abs(next(below) - next(below)).max())


@pytest.mark.parametrize(
    "height, width", [(32, 32), (224, 300), (300, 224), (20, 32), (64, 128), (500, 90), (7, 9)]
)
def test_boxes_have_the_distribution_of_torchvision(height, width):
    n = 3000
    blank = torch.empty(3, height, width)
    theirs = [RandomResizedCrop.get_params(blank, SCALE, (3 / 4, 4 / 3)) for _ in range(n)]
    theirs = torch.tensor(theirs)
    ours = our_boxes(n, height, width)
    limit = 1.95 * (2 / n) ** 0.5  # two samples of one distribution: exceeded once in a thousand

    def statistics(boxes):
        top, left, h, w = boxes.double().numpy().T
        return {
            "area": h * w,
            "aspect": w / h,
            "row of the centre": top + h / 2,
            "column of the centre": left + w / 2,
            "free rows above": top / np.maximum(1, height - h),
            "free columns left": left / np.maximum(1, width - w),
        }

    theirs = statistics(theirs)
    for name, values in statistics(ours).items():
        assert ks_distance(values, theirs[name]) < limit, name


def test_boxes_that_do_not_fit_are_those_of_torchvision():
    sides = [1, 2, 3, 4, 5, 7, 10, 15, 31, 32, 47, 100, 333]
    height, width = (x.flatten() for x in torch.meshgrid(*[torch.tensor(sides)] * 2, indexing="ij"))
    crops = CropRandomness.draw(len(height), False, torch.Generator().manual_seed(0))
    ours = crops.boxes(height, width, (9.0, 9.0))  # larger than the picture: nothing fits
    theirs = [
        RandomResizedCrop.get_params(torch.empty(3, h, w), [9.0, 9.0], [3 / 4, 4 / 3])
        for h, w in zip(height.tolist(), width.tolist(), strict=True)
    ]
    assert torch.equal(ours, torch.tensor(theirs))


@pytest.mark.parametrize("scale", [(0.001, 1.0), SCALE, (1.0, 1.0)])
def test_boxes_are_inside_the_picture_and_not_empty(scale):
    generator = torch.Generator().manual_seed(1)
    height, width = torch.randint(1, 700, (2, 20_000), generator=generator)
    crops = CropRandomness.draw(20_000, False, generator)
    largest = 1 - 2.0**-24  # of torch.rand
    for place in (crops.place, torch.zeros_like(crops.place), crops.place * 0 + largest):
        boxes = dataclasses.replace(crops, place=place).boxes(height, width, scale)
        top, left, h, w = boxes.unbind(1)
        assert boxes.dtype == torch.int64
        assert min(top.min(), left.min()) >= 0 and min(h.min(), w.min()) >= 1
        assert (top + h <= height).all() and (left + w <= width).all()


def test_every_position_of_a_crop_is_reached():
    top, left, h, w = our_boxes(20_000, 12, 12, scale=(0.4, 0.6)).unbind(1)
    for start, extent in ((top, h), (left, w)):
        for size in (8, 9):
            reached = start[extent == size].unique().tolist()
            assert reached == list(range(12 - size + 1))


def test_half_of_the_pictures_are_flipped_if_asked():
    crops = CropRandomness.draw(10_000, True, torch.Generator().manual_seed(0))
    assert abs(crops.flip.double().mean() - 0.5) < 0.02
    assert not CropRandomness.draw(10_000, False, torch.Generator().manual_seed(0)).flip.any()


@pytest.mark.parametrize("size", [8, 20, 33])
def test_crop_resize_is_interpolate_of_each_crop(size):
    pictures = torch.randn(60, 3, 20, 28)
    crops = CropRandomness.draw(60, True, torch.Generator().manual_seed(2))
    boxes = crops.boxes(torch.full((60,), 20), torch.full((60,), 28), (0.01, 1.0))
    boxes[:4] = torch.tensor([[0, 0, 20, 28], [19, 27, 1, 1], [0, 0, 1, 28], [0, 27, 20, 1]])
    resized = data.crop_resize(pictures, boxes, crops.flip, size)
    assert 10 < crops.flip.sum() < 50
    for i, (top, left, h, w) in enumerate(boxes.tolist()):
        crop = pictures[i : i + 1, :, top : top + h, left : left + w]
        wanted = F.interpolate(crop, (size, size), mode="bilinear", align_corners=False)[0]
        wanted = wanted.flip(-1) if crops.flip[i] else wanted
        torch.testing.assert_close(resized[i], wanted, atol=1e-4, rtol=0)


def test_normalize_is_imagenets():
    pictures = torch.randint(0, 256, (5, 3, 4, 6), dtype=torch.uint8)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    wanted = (pictures.numpy() / 255 - mean[:, None, None]) / std[:, None, None]
    normalized = data.normalize(pictures)
    assert normalized.dtype == torch.float32
    np.testing.assert_allclose(normalized.numpy(), wanted, atol=1e-6)


# ---------------------------------------------------------------------------------- held out


@pytest.mark.parametrize("n, held", [(60_000, 5000), (50_001, 5000), (999, 99), (100, 10), (9, 0)])
def test_held_out_are_5000_or_a_tenth_and_the_parts_are_disjoint(n, held):
    train, val = data.hold_out(labelled(torch.arange(n) % 10))
    assert len(val) == held
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(n))


def test_held_out_are_the_same_in_every_run():
    pictures = labelled(torch.arange(500) % 10)
    first = data.hold_out(pictures)
    torch.manual_seed(1234)
    assert all(torch.equal(a, b) for a, b in zip(first, data.hold_out(pictures), strict=True))


@pytest.mark.parametrize("n, first", [(60_000, 1000), (2000, 200)])
def test_held_out_is_a_fair_sample_of_files_sorted_by_class(n, first):
    labels = torch.arange(10).repeat_interleave(n // 10)
    train, val = data.hold_out(labelled(labels))
    for part in (val, train, train[:first], val[: first // 2]):
        share = labels[part].bincount(minlength=10) / len(part)
        assert (share - 0.1).abs().max() < 5 * (0.09 / len(part)) ** 0.5


def test_pictures_without_a_label_are_never_held_out_but_trained_on():
    labels = torch.full((3000,), -1)
    labels[1000:1500] = torch.arange(500) % 10
    train, val = data.hold_out(labelled(labels))
    assert len(val) == 50 and (labels[val] >= 0).all()
    assert (labels[train] < 0).sum() == 2500 and len(train) == 2950


# ---------------------------------------------------------------------- what a step draws


def flat(drawn) -> list[torch.Tensor]:
    index, crops, context_idx, target_idx = drawn
    return [index, crops.tries, crops.place, crops.flip, context_idx, target_idx]


def test_a_step_is_a_function_of_seed_and_step_only():
    plan = make_plan(50, seed=7)
    first = flat(data.draw_step(plan, 3))
    torch.manual_seed(99)
    data.draw_step(plan, 4), data.draw_step(plan, 5)  # out of the cache, and out of order
    others = [make_plan(50, seed=7, rank=1, world_size=2, accum_steps=2), plan]
    for other in others:
        for a, b in zip(first, flat(data.draw_step(other, 3)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("seed, step", [(7, 4), (8, 3)])
def test_a_step_differs_by_step_and_by_seed_in_everything(seed, step):
    first = flat(data.draw_step(make_plan(50, seed=7, batch_size=32), 3))
    second = flat(data.draw_step(make_plan(50, seed=seed, batch_size=32), step))
    for a, b in zip(first, second, strict=True):
        assert a.shape != b.shape or not torch.equal(a, b)


@pytest.mark.parametrize("n, batch", [(23, 7), (5, 16), (8, 8), (24, 8)])
def test_every_picture_is_seen_exactly_once_an_epoch_also_by_batches_across_two(n, batch):
    plan = make_plan(n, index=torch.arange(100, 100 + n), batch_size=batch)
    steps = range(6 * n // batch + 1)
    seen = torch.cat([data.draw_step(plan, step)[0] for step in steps])
    epochs = seen[: len(seen) // n * n].view(-1, n)
    assert len(epochs) >= 5
    assert (epochs.sort(1).values == plan.index).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == len(epochs)  # in another order


SPLITS = [(world, accum) for world in (1, 2, 4) for accum in (1, 2, 4)]


@pytest.mark.parametrize("world, accum", SPLITS)
def test_shares_partition_the_batch(world, accum):
    places = []
    for rank in range(world):
        plan = make_plan(9, batch_size=32, rank=rank, world_size=world, accum_steps=accum)
        assert plan.micro_batch == 32 // (world * accum)
        for micro in range(accum):
            mine = list(range(32))[data.share(plan, micro)]
            assert len(mine) == plan.micro_batch
            places += mine
    assert sorted(places) == list(range(32))


def put_together(pictures, n: int, world: int, accum: int, workers: int = 0) -> list[tuple]:
    """What all processes get in steps 2 to 4 (across epochs), in the order of the whole batch."""
    steps = range(2, 5)
    parts = {}
    for rank in range(world):
        plan = make_plan(n, batch_size=16, rank=rank, world_size=world, accum_steps=accum)
        batches = data.train_batches(pictures, plan, steps, workers=workers)
        keys = [(step, micro, rank) for step in steps for micro in range(accum)]
        parts |= dict(zip(keys, batches, strict=True))
    whole = []
    for step in steps:
        mine = [parts[key] for key in sorted(parts) if key[0] == step]
        fields = ("images", "context_idx", "target_idx")
        whole.append(tuple(torch.cat([getattr(b, name) for b in mine]) for name in fields))
    return whole


def assert_same_batches(ours: list[tuple], theirs: list[tuple], atol: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a[0], b[0], atol=atol, rtol=0)
        assert torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])


@pytest.mark.parametrize("world, accum", SPLITS[1:])
def test_in_memory_all_processes_together_see_what_one_sees(memory, world, accum):
    one = put_together(memory, 37, 1, 1)
    assert one[0][0].shape == (16, 3, 16, 16) and one[0][2].dtype == torch.int64
    assert_same_batches(put_together(memory, 37, world, accum), one, atol=1e-6)


@pytest.mark.parametrize("world, accum", [(2, 1), (1, 4), (4, 2)])
def test_streamed_all_processes_together_see_what_one_sees(mixed, world, accum):
    folder = streamed(mixed)
    one = put_together(folder, len(folder), 1, 1)
    assert_same_batches(put_together(folder, len(folder), world, accum), one, atol=0)


def test_workers_change_nothing(mixed):
    folder = streamed(mixed)
    alone = put_together(folder, len(folder), 1, 2, workers=0)
    assert_same_batches(put_together(folder, len(folder), 1, 2, workers=2), alone, atol=0)
    index = torch.tensor([5, 30, 1, 2, 3])
    for a, b in zip(*(data.eval_batches(folder, index, 2, workers=w) for w in (0, 2)), strict=True):
        assert torch.equal(a, b)


def test_streamed_pictures_are_torchvisions_crops(mixed):
    folder = streamed(mixed, img_size=24)
    plan = make_plan(len(folder))
    batch = next(data.train_batches(folder, plan, range(4, 5)))
    index, crops, context_idx, target_idx = data.draw_step(plan, 4)
    for i, number in enumerate(index.tolist()):
        picture = Image.open(folder.files[number]).convert("RGB")
        size = torch.tensor([picture.height]), torch.tensor([picture.width])
        box = crops[i : i + 1].boxes(*size, SCALE)[0].tolist()
        wanted = tvf.resized_crop(picture, *box, [24, 24], antialias=True)
        wanted = tvf.hflip(wanted) if crops.flip[i] else wanted
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        wanted = tvf.normalize(tvf.to_tensor(wanted), mean, std)
        assert (batch.images[i] - wanted).abs().max() < 1e-5
    assert torch.equal(batch.context_idx, context_idx)
    assert torch.equal(batch.target_idx, target_idx)


def test_in_memory_pictures_are_the_crops_drawn(memory):
    plan = make_plan(37)
    batch = next(data.train_batches(memory, plan, range(4, 5)))
    index, crops, *_ = data.draw_step(plan, 4)
    boxes = crops.boxes(*[torch.full((8,), 16)] * 2, SCALE)
    for i, (top, left, h, w) in enumerate(boxes.tolist()):
        crop = data.normalize(memory.images[index[i : i + 1]])[..., top : top + h, left : left + w]
        wanted = F.interpolate(crop, (16, 16), mode="bilinear", align_corners=False)[0]
        wanted = wanted.flip(-1) if crops.flip[i] else wanted
        torch.testing.assert_close(batch.images[i], wanted, atol=1e-4, rtol=0)


def test_without_crop_and_flip_pictures_are_left_as_they_are(memory):
    plan = make_plan(37, crop_scale=(1.0, 1.0), flip=False)
    batch = next(data.train_batches(memory, plan, range(1)))
    assert torch.equal(batch.images, data.normalize(memory.images[data.draw_step(plan, 0)[0]]))


@pytest.mark.parametrize("kind", ["memory", "streamed"])
def test_an_empty_range_of_steps_gives_nothing(kind, memory, mixed):
    pictures = memory if kind == "memory" else streamed(mixed)
    assert list(data.train_batches(pictures, make_plan(30), range(5, 5))) == []


@pytest.mark.parametrize("kind", ["memory", "streamed"])
def test_evaluation_sees_every_picture_once_in_order(kind, memory, mixed):
    pictures = memory if kind == "memory" else streamed(mixed)
    index = torch.tensor([7, 3, 3, 20, 1])
    parts = list(data.eval_batches(pictures, index, batch_size=2))
    assert [len(part) for part in parts] == [2, 2, 1]
    wanted = data.normalize(torch.cat([pictures.centre(i[None]) for i in index]))
    assert torch.equal(torch.cat(parts), wanted)


@pytest.mark.parametrize("kind", ["memory", "streamed"])
def test_a_process_without_pictures_to_evaluate_gets_none(kind, memory, mixed):
    pictures = memory if kind == "memory" else streamed(mixed)
    parts = list(data.eval_batches(pictures, torch.arange(4)[5::8]))
    assert sum(len(part) for part in parts) == 0
    assert all(part.shape[1:] == (3, 16, 16) for part in parts)


# --------------------------------------------------------------------------- reading pictures

COLOURS = ((220, 40, 30), (30, 200, 60), (20, 50, 210), (240, 240, 20))  # the four quadrants


def quadrants(width=32, height=16) -> Image.Image:
    picture = Image.new("RGB", (width, height))
    for i, colour in enumerate(COLOURS):
        corner = (i % 2 * width // 2, i // 2 * height // 2)
        picture.paste(colour, (*corner, corner[0] + width // 2, corner[1] + height // 2))
    return picture


def colours_of(picture: Image.Image) -> np.ndarray:
    """(4, 3) colours in the middle of the quadrants."""
    w, h = picture.size
    return np.array([[picture.getpixel((x, y)) for x in (w // 4, 3 * w // 4)]
                     for y in (h // 4, 3 * h // 4)], dtype=float).reshape(4, 3)  # fmt: skip


@pytest.mark.parametrize(
    "mode, suffix, tolerance",
    [
        ("RGB", ".png", 0),
        ("RGB", ".jpg", 12),
        ("RGB", ".webp", 30),
        ("RGB", ".bmp", 0),
        ("RGBA", ".png", 0),
        ("P", ".png", 0),
        ("P", ".gif", 0),
        ("CMYK", ".jpg", 12),
    ],
)
def test_pictures_of_every_mode_load_as_rgb(tmp_path, mode, suffix, tolerance):
    picture = quadrants()
    picture = picture.quantize(4) if mode == "P" else picture.convert(mode)
    picture.save(tmp_path / f"x{suffix}")
    assert Image.open(tmp_path / f"x{suffix}").mode == mode
    loaded = data.open_picture(tmp_path / f"x{suffix}")
    assert loaded.mode == "RGB" and loaded.size == (32, 16)
    assert np.abs(colours_of(loaded) - np.array(COLOURS)).max() <= tolerance
    assert data.to_tensor(loaded).shape == (3, 16, 32)


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_gray_pictures_load_as_rgb(tmp_path, mode):
    quadrants().convert("L").convert(mode).save(tmp_path / "x.png")
    gray = np.array(Image.open(tmp_path / "x.png").convert("L"))
    loaded = data.to_tensor(data.open_picture(tmp_path / "x.png"))
    assert loaded.shape == (3, 16, 32)
    assert all(np.array_equal(channel, gray) for channel in loaded)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_pictures_keep_their_brightness(tmp_path, suffix):
    values = np.linspace(0, 65535, 32 * 16).reshape(16, 32).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / f"x{suffix}")
    loaded = data.to_tensor(data.open_picture(tmp_path / f"x{suffix}"))
    assert np.abs(loaded.numpy() - values / 257).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_the_right_way_up(tmp_path, orientation):
    stored = {  # what a camera held that way stores
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    picture = quadrants() if stored is None else quadrants().transpose(stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "x.jpg", exif=exif, quality=95)
    loaded = data.open_picture(tmp_path / "x.jpg")
    assert loaded.size == (32, 16)
    assert np.abs(colours_of(loaded) - np.array(COLOURS)).max() <= 12


@pytest.mark.parametrize(
    ("size", "least", "expected"),
    [
        ((400, 300), 300, (400, 300)),
        ((400, 300), 151, (400, 300)),  # half of it would not do
        ((400, 300), 150, (200, 150)),
        ((403, 301), 75, (101, 76)),  # a quarter, rounded up
        ((400, 300), 1, (50, 38)),  # an eighth is the least there is
    ],
)
def test_large_jpegs_are_decoded_at_a_fraction_that_will_do(tmp_path, size, least, expected):
    gradient = np.add.outer(np.linspace(0, 120, size[1]), np.linspace(0, 120, size[0]))
    picture = Image.fromarray(gradient.round().astype(np.uint8)).convert("RGB")
    picture.save(tmp_path / "x.jpg", quality=95)
    loaded = data.open_picture(tmp_path / "x.jpg", least)
    assert loaded.size == expected
    wanted = picture.resize(expected, Image.Resampling.BOX)
    assert np.abs(np.array(loaded).astype(int) - np.array(wanted)).max() <= 4
    picture.save(tmp_path / "x.png")
    assert data.open_picture(tmp_path / "x.png", least).size == size


def test_a_fraction_is_turned_the_right_way_up_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = quadrants().resize((320, 160)).transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / "x.jpg", exif=exif, quality=95)
    loaded = data.open_picture(tmp_path / "x.jpg", 16)
    assert loaded.size == (40, 20)
    assert np.abs(colours_of(loaded) - np.array(COLOURS)).max() <= 12


def test_no_crop_of_a_large_jpeg_is_enlarged(tmp_path, monkeypatch):
    """Pictures of many sizes, decoded at a fraction: each crop still has the pixels it needs."""
    sides = [(320, 200), (200, 320), (150, 150), (640, 90), (1000, 700)]
    make_folder(tmp_path, {"a": 20, "b": 20}, sides, ".jpg")
    crops, crop = [], Image.Image.crop
    monkeypatch.setattr(
        Image.Image, "crop", lambda p, box: crops.append((p.size, box)) or crop(p, box)
    )
    folder, size = streamed(tmp_path, img_size=32), 32
    stream = data._Stream(folder, make_plan(40, batch_size=40, masks=MaskCollator(8)))
    for step in range(5):
        stream[step, 0]
    assert len(crops) == 200 and {p for p, _ in crops} & {(160, 100), (250, 175)}
    for _, (left, top, right, bottom) in crops:
        assert min(right - left, bottom - top) >= size - 1  # rounded to whole pixels


def test_a_full_shared_memory_is_said_in_one_line():
    def loader(message):
        yield "a batch"
        raise RuntimeError(message)

    coming = data._loaded(loader("unable to allocate shared memory(shm) for file </torch_1>"))
    assert next(coming) == "a batch"
    with pytest.raises(UserError, match="no room in /dev/shm"):
        next(coming)
    with pytest.raises(RuntimeError, match="something else"):
        list(data._loaded(loader("something else")))


def test_evaluation_crops_the_centre_at_seven_eighths(tmp_path):
    columns = np.linspace(0, 240, 121)[None].repeat(80, 0)  # 2 a pixel, from left to right
    Image.fromarray(columns.astype(np.uint8)).save(tmp_path / "x.png")
    folder = Folder([tmp_path / "x.png"], {}, {}, img_size=28)
    values = folder.centre(torch.tensor([0]))[0, 0].float()  # (28, 28)
    side = 80 * 7 / 8
    wanted = 2 * ((121 - side) / 2 + (torch.arange(28) + 0.5) * side / 28 - 0.5)
    assert values.shape == (28, 28)
    assert (values - wanted)[:, 1:-1].abs().max() <= 1


def test_small_pictures_are_kept_in_memory_pixel_by_pixel(tmp_path):
    make_folder(tmp_path, {"a": 3, "b": 2})
    pictures = data.load_data(str(tmp_path), img_size=16)
    assert isinstance(pictures, Pictures) and pictures.images.dtype == torch.uint8
    files, labels, classes = data.scan_folder(tmp_path, "train")
    for image, path in zip(pictures.images, files, strict=True):
        assert np.array_equal(image.permute(1, 2, 0), np.array(Image.open(path)))
    assert pictures.labels["class"].tolist() == labels.tolist() == [0, 0, 0, 1, 1]
    assert pictures.classes == {"class": ["a", "b"]} and classes == ["a", "b"]


def test_large_pictures_are_streamed_and_so_are_large_sizes(tmp_path, mixed):
    folder = data.load_data(str(mixed), img_size=32)
    assert isinstance(folder, Folder) and len(folder) == 33
    make_folder(tmp_path, {"a": 2, "b": 2})
    assert isinstance(data.load_data(str(tmp_path), img_size=160), Folder)


def test_pictures_in_subfolders_and_with_capital_suffixes_count_and_other_files_do_not(tmp_path):
    make_folder(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "train" / "a" / "more").mkdir()
    noise(8, 8, 0).save(tmp_path / "train" / "a" / "more" / "X.JPEG")
    (tmp_path / "train" / "b" / "notes.txt").write_text("not a picture")
    (tmp_path / "train" / "stray.png").write_text("not in a class")
    files, labels, classes = data.scan_folder(tmp_path, "train")
    assert classes == ["a", "b"] and labels.tolist() == [0, 0, 0, 1, 1]
    assert all(path.suffix.lower() in (".png", ".jpeg") for path in files)


# --------------------------------------------------------------------------- broken pictures


def damage(root, numbers) -> list[str]:
    """Damage the files of these numbers, in three ways; their paths."""
    files = data.scan_folder(root, "train")[0]
    for i, number in enumerate(numbers):
        content = files[number].read_bytes()
        changed = (b"", b"not a picture", content[: len(content) // 2])[i % 3]
        files[number].write_bytes(changed)
    return [str(files[number]) for number in numbers]


def reports(capsys, paths: list[str]) -> list[int]:
    """How many lines on stderr are about each of these pictures."""
    lines = capsys.readouterr().err.splitlines()
    return [sum(path in line for line in lines) for path in paths]


@pytest.fixture
def hundreds(tmp_path):
    return make_folder(tmp_path, {"a": 150, "b": 150}, size=(8, 8))


def test_broken_pictures_in_memory_are_named_replaced_and_few(hundreds, capsys):
    whole = data.load_data(str(hundreds), img_size=8)
    # Each is replaced by the next one of its class, after which comes the first.
    numbers, others = [3, 200, 299], [4, 201, 150]
    paths = damage(hundreds, numbers)
    pictures = data.load_data(str(hundreds), img_size=8)
    assert reports(capsys, paths) == [1, 1, 1]
    sound = torch.ones(300, dtype=torch.bool)
    sound[numbers] = False
    assert torch.equal(pictures.images[sound], whole.images[sound])
    for number, other in zip(numbers, others, strict=True):
        assert torch.equal(pictures.images[number], whole.images[other])


def test_too_many_broken_pictures_in_memory_are_an_error(hundreds, capsys):
    paths = damage(hundreds, [3, 4, 5, 200])  # 4 of 300
    with pytest.raises(UserError, match=r"4 of 300 pictures cannot be read.*1 %") as caught:
        data.load_data(str(hundreds), img_size=8)
    assert any(path in str(caught.value) for path in paths) and "\n" not in str(caught.value)
    assert reports(capsys, paths) == [1, 1, 1, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_pictures_in_a_stream_are_named_and_replaced(hundreds, capsys, workers):
    folder = streamed(hundreds, img_size=8)
    plan = make_plan(300, batch_size=30, crop_scale=(1.0, 1.0), flip=False)
    whole = list(data.train_batches(folder, plan, range(10)))
    paths = damage(hundreds, [7])
    batches = list(data.train_batches(folder, plan, range(10), workers=workers))
    assert reports(capsys, paths) == [1]
    order = torch.cat([data.draw_step(plan, step)[0] for step in range(10)]).tolist()
    images, before = (torch.cat([batch.images for batch in x]) for x in (batches, whole))
    for place, number in enumerate(order):
        wanted = before[order.index(8)] if number == 7 else before[place]
        assert torch.equal(images[place], wanted)


def test_each_broken_picture_in_a_stream_is_reported_once(hundreds, capsys):
    paths = damage(hundreds, [7, 100, 250])
    plan = make_plan(300, batch_size=10)
    list(data.train_batches(streamed(hundreds, 8), plan, range(60)))  # two epochs
    assert reports(capsys, paths) == [1, 1, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_broken_pictures_in_a_stream_are_an_error(hundreds, workers):
    damage(hundreds, [3, 4, 5, 200])
    batches = data.train_batches(streamed(hundreds, 8), make_plan(300), range(60), workers=workers)
    with pytest.raises(UserError, match=r"4 of 300 pictures cannot be read"):
        list(batches)


def test_broken_pictures_are_reported_in_evaluation_too(hundreds, capsys):
    path = damage(hundreds, [7])[0]
    images = torch.cat(list(data.eval_batches(streamed(hundreds, 8), torch.arange(20))))
    assert torch.equal(images[7], images[8])
    assert reports(capsys, [path]) == [1]


def test_a_folder_in_which_nothing_can_be_read_is_an_error(tmp_path):
    make_folder(tmp_path, {"a": 2, "b": 2})
    damage(tmp_path, range(4))
    with pytest.raises(
        UserError, match=r"neither .*train.* nor any .* with its labels can be read"
    ):
        streamed(tmp_path).open(0, set())
    with pytest.raises(UserError, match="read"):
        data.load_data(str(tmp_path), img_size=8)


# ------------------------------------------------------------------------------- sets by name


def problem_no_train(root):
    make_folder(root, {"a": 1, "b": 1}, part="training")
    return r"has no folder train/.*train/<class>/<picture>"


def problem_no_pictures(root):
    (root / "train" / "a").mkdir(parents=True)
    (root / "train" / "a" / "notes.txt").write_text("x")
    return r"no pictures under .*train.*<class>/<picture>"


def problem_one_class(root):
    make_folder(root, {"a": 5})
    (root / "train" / "empty").mkdir()
    return r"train has pictures of one class only.*at least two"


@pytest.mark.parametrize("problem", [problem_no_train, problem_no_pictures, problem_one_class])
def test_folders_that_cannot_be_used_say_why(tmp_path, problem):
    message = problem(tmp_path)
    for call in (data.load_data, lambda name: data.default_sizes(name, "data")):
        with pytest.raises(UserError, match=message) as caught:
            call(str(tmp_path))
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_what_is_no_folder_and_no_name_says_what_there_is(tmp_path, kind):
    path = tmp_path / "cifar11"
    if kind == "a file":
        path.write_text("x")
    with pytest.raises(UserError, match="neither a folder nor one of shapes, cifar10") as caught:
        data.load_data(str(path))
    assert str(path) in str(caught.value)


def test_imagenet_absent_says_what_is_expected_where(tmp_path):
    with pytest.raises(UserError, match=r"train/<wnid>.*val/<wnid>.*--data shapes") as caught:
        data.load_data("imagenet", data_dir=str(tmp_path), img_size=32)
    assert str(tmp_path / "imagenet") in str(caught.value)


def test_imagenet_is_the_folder_of_that_name(tmp_path):
    make_folder(tmp_path / "imagenet", {"n01": 2, "n02": 3})
    assert len(data.load_data("imagenet", data_dir=str(tmp_path), img_size=16)) == 5


@pytest.mark.parametrize("part", ["test", "val"])
def test_the_test_part_is_test_or_val(tmp_path, part):
    make_folder(tmp_path, {"a": 2, "b": 2})
    make_folder(tmp_path, {"a": 3, "b": 4}, part=part)
    assert len(data.load_data(str(tmp_path), "train", img_size=16)) == 4
    assert len(data.load_data(str(tmp_path), "test", img_size=16)) == 7


def test_without_a_test_part_the_error_names_it(tmp_path):
    make_folder(tmp_path, {"a": 2, "b": 2})
    with pytest.raises(UserError, match=r"no folder test/") as caught:
        data.load_data(str(tmp_path), "test", img_size=16)
    assert str(tmp_path) in str(caught.value)


def test_other_classes_in_the_test_part_are_an_error(tmp_path):
    make_folder(tmp_path, {"a": 2, "b": 2})
    make_folder(tmp_path, {"a": 2, "c": 2}, part="test")
    with pytest.raises(UserError, match="different classes") as caught:
        data.load_data(str(tmp_path), "test", img_size=16)
    assert "test" in str(caught.value)
    assert str(tmp_path / "train") in str(caught.value)


@pytest.mark.parametrize(
    "name, dataset", [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100"), ("stl10", "STL10")]
)
@pytest.mark.parametrize(
    "error",
    [urllib.error.URLError("no route to host"), RuntimeError("Dataset not found or corrupted.")],
)
def test_without_a_network_the_error_names_what_needs_none(monkeypatch, name, dataset, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(torchvision.datasets, dataset, fail)
    with pytest.raises(UserError, match=rf"{name} .*some/place.*--data shapes needs no") as caught:
        data.load_data(name, data_dir="some/place", img_size=32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, classes", [("cifar10", 10), ("cifar100", 100)])
@pytest.mark.parametrize("part", ["train", "test"])
def test_cifar_comes_from_torchvision(monkeypatch, tmp_path, name, classes, part):
    pixels = np.random.default_rng(0).integers(0, 256, (classes, 32, 32, 3), dtype=np.uint8)

    class Fake:
        def __init__(self, root, train=True, transform=None, target_transform=None, download=False):
            assert (root, train, download) == (str(tmp_path), part == "train", True)
            self.data, self.targets = pixels, list(range(classes))
            self.classes = [f"class {i}" for i in range(classes)]

    monkeypatch.setattr(torchvision.datasets, name.upper(), Fake)
    pictures = data.load_data(name, part, str(tmp_path))
    assert pictures.images.shape == (classes, 3, 32, 32) and pictures.images.dtype == torch.uint8
    assert np.array_equal(pictures.images.permute(0, 2, 3, 1), pixels)
    assert pictures.labels["class"].tolist() == list(range(classes))
    assert pictures.classes["class"][3] == "class 3"

    flat_colour = np.broadcast_to(pixels[:, :1, :1], pixels.shape)
    pixels = np.ascontiguousarray(flat_colour)
    smaller = data.load_data(name, part, str(tmp_path), img_size=20).images  # the same colours
    assert smaller.shape == (classes, 3, 20, 20) and smaller.dtype == torch.uint8
    assert np.array_equal(smaller[:, :, 7, 9], pixels[:, 0, 0])


@pytest.mark.parametrize("part, split", [("train", "train+unlabeled"), ("test", "test")])
def test_stl10_has_pictures_without_labels(monkeypatch, tmp_path, part, split):
    labels = np.array([-1, 4, 9, -1, 0]) if part == "train" else np.arange(5, dtype=np.uint8)

    class Fake:
        def __init__(self, root, split_, *args, download=False):
            assert (root, split_, download) == (str(tmp_path), split, True)
            self.data = np.full((5, 3, 96, 96), 7, np.uint8)
            self.labels, self.classes = labels, list("abcdefghij")

    monkeypatch.setattr(torchvision.datasets, "STL10", Fake)
    pictures = data.load_data("stl10", part, str(tmp_path))
    assert pictures.images.shape == (5, 3, 96, 96) and (pictures.images == 7).all()
    assert pictures.labels["class"].dtype == torch.int64
    assert pictures.labels["class"].tolist() == labels.tolist()


@pytest.mark.parametrize(
    "name, sizes", [("cifar10", (32, 4)), ("cifar100", (32, 4)), ("stl10", (96, 8))]
)
def test_default_sizes_of_named_sets(name, sizes):
    assert data.default_sizes(name, "data") == sizes


@pytest.mark.parametrize(
    "pixels, sizes",
    [
        ((16, 16), (32, 4)),
        ((40, 28), (32, 4)),
        ((28, 41), (96, 8)),
        ((128, 128), (96, 8)),
        ((129, 20), (224, 16)),
    ],
)
def test_default_sizes_follow_the_largest_side(tmp_path, pixels, sizes):
    make_folder(tmp_path, {"a": 2, "b": 2}, size=[(8, 8), (8, 8), pixels])
    (tmp_path / "train" / "a" / "0001.png").write_text("broken")
    assert data.default_sizes(str(tmp_path), "data") == sizes


# ------------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class Options:
    """One field of every kind."""

    batch_size: int = data.option(8, "an int")
    lr: float | None = data.option(None, "a float, 50 %% of the time")
    name: str = data.option("x", "a str")
    kind: str | None = data.option(None, "one of", ("big", "small"))
    scale: tuple[float, float] | None = data.option(None, "two")
    aspect: tuple[float, float] = data.option((0.5, 2.0), "two")
    flip: bool = data.option(False, "a switch")
    bf16: bool | None = data.option(None, "a switch that is not set")


def parse(*argv: str):
    return data.parse_options(Options, "About.", list(argv))


@pytest.mark.parametrize(
    "argv, changes",
    [
        ([], {}),
        (["--batch-size", "3"], {"batch_size": 3}),
        (["--batch-size=8"], {"batch_size": 8}),  # the default, but given
        (["--lr", "1e-3", "--name", "y z"], {"lr": 1e-3, "name": "y z"}),
        (["--kind", "small"], {"kind": "small"}),
        (["--scale", "0.1", "1", "--aspect", "1", "1"], {"scale": (0.1, 1.0), "aspect": (1, 1)}),
        (["--flip", "--bf16"], {"flip": True, "bf16": True}),
        (["--no-flip", "--no-bf16"], {"flip": False, "bf16": False}),
    ],
)
def test_options_are_parsed_and_those_given_are_named(argv, changes):
    options, given = parse(*argv)
    assert options == Options(**changes)
    assert given == set(changes)
    assert all(type(getattr(options, k)) is type(v) for k, v in changes.items())


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--batchsize", "3"], "unrecognized arguments: --batchsize"),
        (["--batch", "3"], "unrecognized arguments: --batch"),  # no abbreviations
        (["stray"], "unrecognized arguments: stray"),
        (["--batch-size", "3.5"], "--batch-size: invalid int value: '3.5'"),
        (["--batch-size"], "--batch-size: expected one argument"),
        (["--lr", "high"], "--lr: invalid float value: 'high'"),
        (["--kind", "huge"], "--kind: invalid choice: 'huge' .*big.*small"),
        (["--scale", "0.1"], "--scale: expected 2 arguments"),
        (["--scale", "0.1", "0.2", "0.3"], "unrecognized arguments: 0.3"),
        (["--flip", "yes"], "unrecognized arguments: yes"),
    ],
)
def test_options_that_cannot_be_are_errors_in_one_line(argv, message):
    with pytest.raises(UserError, match=message) as caught:
        parse(*argv)
    assert "\n" not in str(caught.value) and "--help" in str(caught.value)


def test_help_lists_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    text = capsys.readouterr().out
    assert caught.value.code == 0 and "About." in text
    for field in dataclasses.fields(Options):
        assert "--" + field.name.replace("_", "-") in text
    assert "(default: 8)" in text and "--no-bf16" in text and "(default: None)" not in text


def test_a_user_error_is_one_line_and_exit_code_2(capsys):
    def fail():
        raise UserError("the reason")

    with pytest.raises(SystemExit) as caught:
        data.run_script(fail)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].endswith("error: the reason")


def test_other_errors_are_not_hidden():
    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        data.run_script(fail)


def test_generators_depend_on_the_whole_key():
    def numbers(*key):
        return torch.rand(8, generator=data.generator_for(*key)).tolist()

    keys = [(0, "crop", 1), (0, "crop", 2), (1, "crop", 1), (0, "masks", 1), (0, "crop"), (-1, "x")]
    assert len({tuple(numbers(*key)) for key in keys}) == len(keys)
    assert numbers(0, "crop", 1) == numbers(0, "crop", 1)
