"""The built-in pictures: deterministic, labelled rightly, hard for pixels."""

import torch

import data
import probe


def test_a_picture_is_a_function_of_seed_and_index():
    index = torch.arange(300)
    pictures, labels = data.draw_shapes(0, index)
    some = torch.tensor([7, 299, 0, 7])
    again, labels_again = data.draw_shapes(0, some)
    assert torch.equal(again, pictures[some])
    assert all(torch.equal(labels_again[task], labels[task][some]) for task in labels)
    other, _ = data.draw_shapes(1, index)
    assert (other != pictures).flatten(1).float().mean(1).min() > 0.9
    assert len(pictures.flatten(1).unique(dim=0)) == 300


def test_sizes_and_labels():
    for size in (16, 32, 49, 96):
        pictures, labels = data.draw_shapes(0, torch.arange(20), size)
        assert pictures.shape == (20, 3, size, size)
        assert pictures.dtype == torch.uint8
    _, labels = data.draw_shapes(0, torch.arange(8000))
    for task, names in data.SHAPES_CLASSES.items():
        counts = labels[task].bincount(minlength=len(names))
        assert len(counts) == len(names)
        share = counts / 8000
        assert (share - 1 / len(names)).abs().max() < 0.03, task


def test_without_clutter_the_labels_can_be_read_off_the_picture():
    """Two tones for each object and one for the background, so colours count the objects."""
    pictures, labels = data.draw_shapes(0, torch.arange(400), clutter=0.0)
    packed = (pictures.int() * torch.tensor([1, 256, 65536]).view(3, 1, 1)).sum(1).flatten(1)
    colours = torch.tensor([len(row.unique()) for row in packed])
    objects = labels["count"] + 1
    assert (colours <= 1 + 2 * objects).all()
    seen = (colours.float() - 1) / 2  # nearer objects cover some of those behind
    assert torch.corrcoef(torch.stack([seen, objects.float()]))[0, 1] > 0.8
    # The nearer the nearest object, the less is left of the background, whose tone is the corner's
    # most often.
    alone = objects == 1
    background = (packed == packed.mode(dim=1).values[:, None]).float().mean(1)
    covered = torch.stack([1 - background[alone], labels["near"][alone].float()])
    assert torch.corrcoef(covered)[0, 1] > 0.4


def test_clutter_is_a_dimension_of_difficulty():
    calm, _ = data.draw_shapes(0, torch.arange(50), clutter=0.0)
    busy, _ = data.draw_shapes(0, torch.arange(50), clutter=1.0)
    busier, _ = data.draw_shapes(0, torch.arange(50), clutter=2.0)
    distance = [(x.float() - calm.float()).abs().mean() for x in (calm, busy, busier)]
    assert distance[0] == 0
    assert distance[1] > 20
    assert distance[2] > 1.4 * distance[1]


def test_pixels_stay_below_half_on_the_first_task():
    pictures, labels = data.draw_shapes(0, torch.arange(6000))
    x, y = pictures.flatten(1).float() / 255 - 0.5, labels["kind"]
    found = probe.knn(x[:5000], y[:5000], x[5000:])
    assert 0.2 < (found.weighted == y[5000:]).float().mean() < 0.5
    train_x, test_x = probe.narrow(x[:5000], x[5000:], width=256)
    swept = probe.linear_probe(
        train_x, y[:5000], test_x, y[5000:], heads=("bn",), rates=(0.3,), decays=(5e-4,), seeds=1,
        epochs=5, min_steps=100, progress=False,
    )  # fmt: skip
    assert swept.best.val_mean < 0.5


def test_load_data_draws_train_and_test_apart():
    train = data.load_data("shapes", count=200)
    test = data.load_data("shapes", "test", count=200)
    assert train.images.shape == (200, 3, 48, 48)
    assert list(train.labels) == ["kind", "count", "near"]
    assert not torch.equal(train.images, test.images)
    assert torch.equal(train.images, data.load_data("shapes", count=200).images)
    assert not torch.equal(train.images, data.load_data("shapes", count=200, clutter=0.5).images)
