"""Training on streamed pictures: the augmented linear probe and fine-tuning, against timm, PyTorch
and closed forms; and that it does not matter who does the work."""

import contextlib
import copy
import dataclasses
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import probe
from data import Pictures, Place, Plan, UserError, train_batches
from ijepa import ViT
from probe import Examples, FineTuneConfig

ROOT = Path(__file__).resolve().parents[1]
HERE = Place(0, 1, torch.device("cpu"))
CLASSES = 3


def coloured(n: int, seed: int = 0, size: int = 16, noise: float = 25.0) -> Pictures:
    """Noise of which one channel is brighter: red, green or blue. Easy, if the noise is low."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    images = 100 + noise * torch.randn(n, 3, size, size, generator=generator)
    images[torch.arange(n), labels] += 60
    images = images.round().clamp(0, 255).to(torch.uint8)
    return Pictures(images, {"class": labels}, {"class": ["red", "green", "blue"]})


def examples(pictures: Pictures, first: int, last: int) -> Examples:
    index = torch.arange(first, last)
    return Examples(pictures, index, pictures.labels["class"][index])


def parts(n: int = 192, **kwargs) -> tuple[Examples, Examples, Examples]:
    """To learn from (n), to choose on (60) and to report on (90)."""
    pictures = coloured(n + 150, **kwargs)
    return (
        examples(pictures, 0, n), examples(pictures, n, n + 60), examples(pictures, n + 60, n + 150)
    )  # fmt: skip


def shuffled(train: Examples, seed: int = 0) -> Examples:
    """The same pictures with labels that have nothing to do with them."""
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(seed))
    return train._replace(labels=train.labels[order])


@pytest.fixture
def encoder() -> ViT:
    torch.manual_seed(1)
    return ViT(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, init_std=0.2)


# ------------------------------------------------------------------------- heads trained by LARS


def member(stack, q: int, s: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (C, D) and bias (C,) of one member of the grid."""
    return stack.weight[s, q], stack.bias[s, q, :, 0]


@pytest.mark.parametrize("head", probe.HEADS)
def test_every_head_moves_as_one_alone_under_timms_lars(head, monkeypatch):
    from timm.optim import Lars

    monkeypatch.setattr(probe, "CHUNK", 7)  # the gradient adds up over parts of the batch
    settings, seeds, scale = [(0.5, 0.0), (20.0, 5.0), (3.0, 0.01)], [4, 9], 2.0
    stack = probe._LARSHeads(head, 10, CLASSES, settings, seeds, scale, torch.device("cpu"))
    alone = {}
    for s in range(2):
        for q, (rate, decay) in enumerate(settings):
            linear = nn.Linear(10, CLASSES)
            with torch.no_grad():
                linear.weight.copy_(member(stack, q, s)[0])
                linear.bias.zero_()
            norm = nn.BatchNorm1d(10, 1e-6, affine=False) if head == "bn" else nn.Identity()
            common = {"lr": rate * scale, "momentum": 0.9, "trust_coeff": 0.001}
            optimizers = [
                Lars([linear.weight], weight_decay=decay, always_adapt=True, **common),
                Lars([linear.bias], weight_decay=0.0, **common),
            ]
            alone[s, q] = nn.Sequential(norm, linear), optimizers
    torch.manual_seed(0)
    for factor in (1.0, 1.0, 0.1, 0.1):
        x, y = 2 + 3 * torch.randn(20, 10), torch.randint(CLASSES, (20,))
        stack.step(x, y, factor)
        for (_, q), (network, optimizers) in alone.items():
            network.zero_grad()
            F.cross_entropy(network(x), y).backward()
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = settings[q][0] * scale * factor
                optimizer.step()
    for (s, q), (network, _) in alone.items():
        weight, bias = member(stack, q, s)
        torch.testing.assert_close(weight, network[1].weight.detach(), atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(bias, network[1].bias.detach(), atol=1e-6, rtol=1e-4)
    assert (member(stack, 0, 0)[0] - member(stack, 0, 1)[0]).abs().max() > 1e-3  # seeds differ


def test_a_head_without_errors_stays_finite():
    stack = probe._LARSHeads("linear", 2, 2, [(50.0, 0.0)], [0], 64.0, torch.device("cpu"))
    x, y = torch.tensor([[30.0, 0.0], [0.0, 30.0]]), torch.tensor([0, 1])
    for _ in range(500):
        stack.step(x, y, 1.0)
    assert stack.weight.isfinite().all() and stack.bias.isfinite().all()
    assert stack.predict(x).flatten().tolist() == [0, 1]


def test_batch_norm_predicts_with_the_average_of_all_steps_moments(monkeypatch):
    monkeypatch.setattr(probe, "CHUNK", 64)
    stack = probe._LARSHeads("bn", 5, 2, [(1.0, 0.0)], [0], 1.0, torch.device("cpu"))
    batches = [3 + 2 * torch.randn(40, 5) * (i + 1) for i in range(4)]
    for x in batches:
        stack.step(x, torch.randint(2, (40,)), 1.0)
    mean = np.mean([x.numpy().mean(0) for x in batches], axis=0)
    variance = np.mean([x.numpy().var(0, ddof=1) for x in batches], axis=0)
    x = torch.randn(200, 5) * 4
    logits = (x.numpy() - mean) / np.sqrt(variance) @ stack.weight[0, 0].T.numpy()
    logits += stack.bias[0, 0, :, 0].numpy()
    assert stack.predict(x)[0, 0].tolist() == logits.argmax(1).tolist()
    weight, bias = stack.folded(0)
    np.testing.assert_allclose(x @ weight[0].T + bias[0], logits, atol=1e-4)


def test_rate_falls_as_pytorchs_multi_step_schedule():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [15, 30, 45], gamma=0.1)
    for epoch in range(50):
        rate = optimizer.param_groups[0]["lr"]
        for step in range(5 * epoch, 5 * epoch + 5):
            assert probe.reference_factor(step, 20, 100, 50) == pytest.approx(rate)
        optimizer.step()
        schedule.step()
    # 78.2 steps an epoch: the first that begins after 15 epochs is number 1,174.
    assert probe.reference_factor(1172, 16384, 1_281_167, 50) == 1.0
    assert probe.reference_factor(1173, 16384, 1_281_167, 50) == pytest.approx(0.1)
    assert [probe.reference_factor(e, 1, 1, 10) for e in (2, 3, 6, 9)] == pytest.approx(
        [1.0, 0.1, 0.01, 0.001]
    )


def test_batches_and_rates_on_imagenet_are_the_papers():
    assert probe.augmented_batch(1_281_167) == 16384
    assert probe.augmented_batch(50_000) == 640 and probe.augmented_batch(1000) == 64
    assert probe.augmented_batch(40) == 40
    for n in (999, 5000, 22_500, 45_000):
        assert probe.augmented_batch(n) % 64 == 0
    for n, batch in ((600, 512), (512, 512), (300, 256), (64, 64), (63, 62), (27, 26), (1, 1)):
        assert probe._fit_batch(512, n) == batch


# ------------------------------------------------------------- the linear probe on random crops


def augmented(encoder, train, choose, report, place=HERE, **changes):
    values = {"num_classes": CLASSES, "layers": 2, "seeds": 2, "epochs": 20, "batch_size": 48}
    return probe.augmented_probe(encoder, train, choose, report, place, **values | changes)


def test_separable_pictures_are_told_apart_from_crops_and_shuffled_labels_are_not(encoder):
    train, choose, report = parts()
    found = augmented(encoder, train, choose, report)
    assert list(found.by_feature) == ["last layer", "last 2 layers"]
    assert min(found.best.test) > 0.97
    assert len(found.grid) == 2 * 2 * 4 * 2 and all(len(row.val) == 2 for row in found.grid)
    chance = augmented(encoder, shuffled(train), choose, shuffled(report, seed=1))
    assert 0.15 < chance.best.test_mean < 0.55


def test_the_winner_is_a_map_from_features_to_logits(encoder):
    train, choose, report = parts(noise=90.0)
    found = augmented(encoder, train, choose, report, epochs=4)
    x = probe.pooled_features(encoder, data.eval_batches(report.data, report.index), 2)
    for name, kind in (("last layer", slice(-24, None)), ("last 2 layers", slice(None))):
        choice = found.by_feature[name]
        for s in range(2):
            predicted = (x[:, kind] @ choice.weight[s].T + choice.bias[s]).argmax(1)
            assert (predicted == choice.predictions[s]).double().mean() > 0.98  # but for ties
            hits = (choice.predictions[s] == report.labels).double().mean()
            assert choice.test[s] == pytest.approx(float(hits))


def test_without_augmentation_it_equals_the_probe_on_stored_features(encoder):
    train = parts(600, noise=200.0)[0]
    reports = [examples(coloured(1500, seed=7, noise=200.0), 0, 1500)] * 2
    whole = {"crop_scale": (1.0, 1.0), "flip": False}
    found = augmented(encoder, train, *reports, **whole, epochs=40, seeds=1)
    stored = [
        probe.pooled_features(encoder, data.eval_batches(part.data, part.index), 2)
        for part in (train, reports[0])
    ]
    oracle = probe.linear_probe(
        stored[0],
        train.labels,
        stored[1],
        reports[0].labels,
        stored[1],
        reports[0].labels,
        seeds=1,
    )
    assert 0.6 < oracle.best.test_mean < 0.95  # hard enough to tell good from bad
    assert abs(found.best.test_mean - oracle.best.test_mean) < 0.03


def test_crops_are_what_the_heads_see(encoder, monkeypatch):
    train, choose, report = parts(64)
    seen = []
    step = probe._LARSHeads.step

    def spy(self, x, y, factor):
        seen.append((x, y, factor))
        step(self, x, y, factor)

    monkeypatch.setattr(probe._LARSHeads, "step", spy)
    run = {"layers": 1, "epochs": 2, "batch_size": 64}
    augmented(encoder, train, choose, report, crop_scale=(1.0, 1.0), flip=False, **run)
    whole = probe.pooled_features(encoder, data.eval_batches(train.data, train.index))
    assert [factor for *_, factor in seen] == pytest.approx([1.0, 1.0, 0.1, 0.1])
    for x, y, _ in seen[:: len(probe.HEADS)]:  # two epochs, each with every picture once
        distance = torch.cdist(x, whole, compute_mode="donot_use_mm_for_euclid_dist")
        rows = distance.argmin(1)
        assert sorted(rows.tolist()) == list(range(64)) and distance.amin(1).max() < 1e-4
        assert torch.equal(train.labels[rows], y)
    seen.clear()
    augmented(encoder, train, choose, report, **run)
    first, second = (x for x, *_ in seen[:: len(probe.HEADS)])
    assert torch.cdist(first, whole).amin(1).mean() > 0.05  # crops are not the pictures
    assert torch.cdist(first, second).amin(1).mean() > 0.05  # and others in each epoch


@pytest.mark.parametrize("how", ["augmented", "tuned"])
def test_small_pictures_are_enlarged_for_the_encoder(encoder, how):
    train, choose, report = parts(size=8)
    sizes = set()
    encoder.patch_embed.register_forward_pre_hook(lambda _, args: sizes.add(args[0].shape[1:]))
    protocol = {"augmented": augmented, "tuned": tuned}[how]
    found = protocol(encoder, train, choose, report, size=16)
    assert sizes == {(3, 16, 16)}
    assert (found.best if how == "augmented" else found).test[0] > 0.9


def test_micro_batches_do_not_matter(encoder, monkeypatch):
    train, choose, report = parts(noise=90.0)
    whole = augmented(encoder, train, choose, report, epochs=4)
    monkeypatch.setattr(probe, "at_once", lambda *_, **__: 5)
    assert_same_probes(augmented(encoder, train, choose, report, epochs=4), whole)


def assert_same_probes(found: probe.LinearProbe, expected: probe.LinearProbe) -> None:
    """Equal to rounding; a picture may change sides."""
    for row, other in zip(found.grid, expected.grid, strict=True):
        assert row[:4] == other[:4] and row.val == pytest.approx(other.val, abs=0.02)
    chosen = {name: (c.head, c.rate, c.decay) for name, c in found.by_feature.items()}
    for name, other in expected.by_feature.items():
        if chosen[name] == (other.head, other.rate, other.decay):
            weight = found.by_feature[name].weight
            torch.testing.assert_close(weight, other.weight, atol=1e-4, rtol=1e-3)


def test_the_probe_is_repeatable_and_seeds_differ(encoder):
    train, choose, report = parts(noise=90.0)
    first, again = (augmented(encoder, train, choose, report, epochs=3) for _ in range(2))
    for name, choice in first.by_feature.items():
        assert torch.equal(choice.weight, again.by_feature[name].weight)
        assert not torch.equal(choice.weight[0], choice.weight[1])
    other = augmented(encoder, train, choose, report, epochs=3, seeds=[1])
    assert {row.val[0] for row in other.grid} == {row.val[1] for row in first.grid}


def test_features_that_are_not_finite_are_refused(encoder):
    train, choose, report = parts(64)
    with torch.no_grad():
        encoder.blocks[1].mlp.fc2.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"layer 2 of 2 .*60 of 60 images"):
        augmented(encoder, train, choose, report)


def test_batches_divide_into_processes_and_parts_or_are_refused():
    two, three = (Place(0, n, torch.device("cpu")) for n in (2, 3))
    assert probe.micro_batches(16384, 300, two) == 32  # of 256 pictures
    assert probe.micro_batches(48, 100, three) == 1 and probe.micro_batches(48, 5, three) == 4
    assert probe.micro_batches(24, 5, HERE, unit=2) == 6  # of 4, though 5 would fit
    assert probe.micro_batches(6, 1, HERE, unit=2) == 3
    with pytest.raises(UserError, match=r"batch of 64 pictures .* 3 process.*--batch-size"):
        probe.micro_batches(64, 10, three)
    with pytest.raises(UserError, match=r"2 pictures that stay together"):
        probe.micro_batches(15, 10, HERE, unit=2)
    with pytest.raises(UserError):
        probe.micro_batches(1, 10, two)


@pytest.mark.parametrize("size", [16, 32])
def test_memory_of_training_is_as_estimated(size):
    encoder = ViT(img_size=16, patch_size=2, embed_dim=48, depth=3, num_heads=3)
    network = probe._Classifier(encoder, CLASSES)
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        network(torch.randn(8, 3, size, size))
    fits = 2e9 / (sum(kept.values()) / 8)
    estimate = probe.at_once(encoder, size, HERE.device, train=True)
    assert estimate == pytest.approx(fits, rel=0.2)


# ------------------------------------------------------------------------- augmented pictures


def jitter(picture):
    """Something random: which of the numbers a picture draws can be read from it."""
    shift = int(torch.randint(100, ()))
    return picture.point(lambda v: (v + shift) % 256)


def test_each_picture_draws_numbers_of_its_own_whoever_works_on_it():
    pictures = coloured(20)
    plan = Plan(3, torch.arange(20), 8, 1, None, (0.3, 1.0), True, augment=jitter)
    whole = list(train_batches(pictures, plan, range(3)))
    torch.manual_seed(77)
    split = dataclasses.replace(plan, accum_steps=4)
    small = list(train_batches(pictures, split, range(3), workers=1))
    for i, batch in enumerate(whole):
        of_batch = small[4 * i : 4 * i + 4]
        assert torch.equal(batch.images, torch.cat([b.images for b in of_batch]))
        assert torch.equal(batch.index, torch.cat([b.index for b in of_batch]))
        ranks = [dataclasses.replace(plan, rank=rank, world_size=2) for rank in (0, 1)]
        shared = [next(train_batches(pictures, rank, range(i, i + 1))).images for rank in ranks]
        assert torch.equal(batch.images, torch.cat(shared))


def test_pictures_are_augmented_after_the_crop_each_differently():
    pictures = coloured(6)
    plan = Plan(0, torch.arange(6), 6, 1, None, (1.0, 1.0), False, augment=jitter)
    for step in (0, 1):
        batch = next(train_batches(pictures, plan, range(step, step + 1)))
        raw = data.normalize(pictures.centre(batch.index))
        _, std = data._moments(torch.device("cpu"))
        shifts = ((batch.images - raw) * std * 255).round().long() % 256  # (6, 3, S, S)
        assert (shifts == shifts[:, :1, :1, :1]).all()
        assert len(shifts[:, 0, 0, 0].unique()) > 3
        if step == 0:
            first = shifts[:, 0, 0, 0]
    assert not torch.equal(first, shifts[:, 0, 0, 0])  # another epoch, other numbers


# -------------------------------------------------------------------------------- fine-tuning

QUICK = FineTuneConfig(
    lr=3e-3, batch_size=32, epochs=6, warmup=0.2, rand_augment=None, crop_scale=(0.5, 1.0)
)


def tuned(encoder, train, choose, report, config=QUICK, place=HERE, **changes):
    values = {"num_classes": CLASSES, "seeds": 1}
    return probe.fine_tune(encoder, train, choose, report, place, config, **values | changes)


def test_recipes_are_the_papers_where_it_speaks():
    large, huge = (probe.fine_tune_recipe(width, low_shot=True) for width in (1024, 1280))
    assert (large.lr, large.weight_decay, huge.lr, huge.weight_decay) == (3e-5, 0.05, 3e-5, 0.4)
    for config in (large, huge):
        assert (config.epochs, config.batch_size, config.layer_decay) == (50, 512, 0.75)
        assert config.label_smoothing == 0.1 and config.rand_augment == (2, 9)
        assert config.mixup == config.cutmix == config.drop_path == 0
    full = probe.fine_tune_recipe(1280, low_shot=False)
    assert (full.epochs, full.batch_size, full.lr, full.weight_decay) == (50, 528, 1e-4, 0.04)
    assert (full.mixup, full.cutmix, full.drop_path, full.layer_decay) == (0.8, 1.0, 0.25, 0.75)
    assert probe.fine_tune_recipe(96, low_shot=True).lr == pytest.approx(3e-3, rel=0.05)  # ours


def test_a_run_equals_a_plain_loop_over_the_same_pictures(encoder):
    train, choose, report = parts(64)
    config = FineTuneConfig(
        lr=0.01, weight_decay=0.5, batch_size=64, epochs=6, warmup=0.5, final_lr=0.001,
        layer_decay=0.5, label_smoothing=0.2, rand_augment=None, crop_scale=(1.0, 1.0), flip=False,
    )  # fmt: skip
    found = tuned(encoder, train, choose, report, config)

    network = copy.deepcopy(encoder)
    head = nn.Linear(24, CLASSES)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    layers = [network.patch_embed, *network.blocks, nn.ModuleList([network.norm, head])]
    optimizer = torch.optim.AdamW(
        {"params": [p], "scale": 0.5 ** (3 - i), "weight_decay": 0.5 * (p.ndim > 1)}
        for i, layer in enumerate(layers)
        for p in layer.parameters()
    )
    images = data.normalize(train.data.centre(train.index))
    wanted = 0.8 * F.one_hot(train.labels, CLASSES) + 0.2 / CLASSES
    rates = (0.01 / 3, 0.02 / 3, 0.01, 0.00775, 0.00325, 0.001)  # a line, and a cosine
    for row, rate in zip(found.epochs, rates, strict=True):
        logits = head(network(images).mean(1))
        loss = -(wanted * logits.log_softmax(1)).sum(1).mean()
        assert row.loss == pytest.approx(loss.item(), rel=1e-4)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def scales(network, config) -> dict[str, tuple[float, float]]:
    """Parameter -> its share of the rate, and its weight decay."""
    names = {id(p): name.removeprefix("encoder.") for name, p in network.named_parameters()}
    groups = probe.layer_groups(network, config)
    found = {names[id(p)]: (g["scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(found) == sum(len(g["params"]) for g in groups) == len(names)
    return found


def test_rates_fall_with_depth_as_in_timm(encoder):
    from timm.models import VisionTransformer
    from timm.optim import param_groups_layer_decay

    config = FineTuneConfig(layer_decay=0.6, weight_decay=0.07)
    found = scales(probe._Classifier(encoder, CLASSES), config)
    other = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=CLASSES,
        class_token=False, global_pool="avg", fc_norm=False, pos_embed="none",
    )  # fmt: skip
    names = {id(p): name for name, p in other.named_parameters()}
    expected = {
        names[id(p)]: (group["lr_scale"], group["weight_decay"])
        for group in param_groups_layer_decay(other, 0.07, layer_decay=0.6)
        for p in group["params"]
    }
    assert found.keys() == expected.keys()
    for name in found:
        if name.startswith("norm."):  # BEiT and MAE: with the head; timm: with the last block
            assert found[name] == (1.0, 0.0)
        else:
            assert found[name] == pytest.approx(expected[name])
    assert found["patch_embed.proj.weight"] == pytest.approx((0.6**3, 0.07))
    assert found["blocks.1.attn.qkv.weight"] == pytest.approx((0.6, 0.07))


def test_rates_over_the_steps_are_a_line_and_a_cosine(encoder, monkeypatch):
    seen = []
    step = torch.optim.AdamW.step

    def spy(self, *args):
        seen.append([group["lr"] for group in self.param_groups])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    train, choose, report = parts(64)
    config = dataclasses.replace(QUICK, epochs=10, warmup=0.2, lr=0.01, final_lr=0.001)
    tuned(encoder, train, choose, report, config)
    rates = np.array(seen)
    assert len(rates) == 20  # 10 epochs of two batches
    done = np.arange(1, 21)
    expected = np.where(
        done < 4, 0.01 * done / 4, 0.001 + 0.009 * (1 + np.cos(np.pi * (done - 4) / 16)) / 2
    )
    np.testing.assert_allclose(rates.max(1), expected, rtol=1e-6)
    np.testing.assert_allclose(rates.min(1), expected * 0.75**3, rtol=1e-6)


def test_separable_pictures_are_learned_and_shuffled_labels_are_not(encoder):
    train, choose, report = parts()
    config = dataclasses.replace(QUICK, rand_augment=(2, 9))
    found = tuned(encoder, train, choose, report, config)
    assert found.test[0] > 0.95 and found.val[0] > 0.95
    assert found.predictions.shape == (1, 90) and found.predictions.dtype == torch.int64
    hits = (found.predictions[0] == report.labels).double().mean()
    assert found.test[0] == pytest.approx(float(hits))
    assert [row.epoch for row in found.epochs] == [1, 2, 3, 4, 5, 6]
    assert found.epochs[-1].loss < found.epochs[0].loss < math.log(CLASSES) + 0.1
    assert found.val[0] == found.epochs[-1].val
    chance = tuned(encoder, shuffled(train), choose, report, config)
    assert 0.15 < chance.test[0] < 0.55


def test_all_augmentations_together_still_learn(encoder):
    train, choose, report = parts()
    mixing = {"mixup": 0.8, "cutmix": 1.0, "drop_path": 0.25, "epochs": 10}
    found = tuned(encoder, train, choose, report, dataclasses.replace(QUICK, **mixing))
    assert found.test[0] > 0.95


def test_the_same_seed_gives_the_same_and_another_another(encoder):
    train, choose, report = parts(96, noise=120.0)
    config = dataclasses.replace(QUICK, drop_path=0.3, mixup=0.8, rand_augment=(2, 9), epochs=2)
    before, threads = copy.deepcopy(encoder), torch.get_rng_state()
    both = tuned(encoder, train, choose, report, config, seeds=2)
    assert torch.equal(torch.get_rng_state(), threads)  # nothing is drawn from the caller's
    torch.manual_seed(123)
    alone = tuned(encoder, train, choose, report, config, seeds=[1])
    assert alone.epochs == [row for row in both.epochs if row.seed == 1]
    assert torch.equal(alone.predictions[0], both.predictions[1])
    plain = tuned(encoder, train, choose, report, QUICK, seeds=2)  # only order and crops differ
    for found in (both, plain):
        losses = {row.seed: row.loss for row in found.epochs}
        assert losses[0] != losses[1]
    # The caller's encoder is as it was.
    for name, tensor in before.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor)
    assert not encoder.blocks[0].attn._forward_hooks
    assert all(p.grad is None and p.requires_grad for p in encoder.parameters())


def test_training_reaches_every_layer_also_of_a_frozen_encoder(encoder):
    train, choose, _ = parts(64)
    encoder.requires_grad_(False).eval()
    network = probe._Classifier(encoder, CLASSES)
    probe._fine_tune(network, train, choose, QUICK, 0, HERE, None, False, 0)
    for name, parameter in network.encoder.named_parameters():
        if not name.endswith("attn.qkv.bias"):  # the keys' have no influence
            assert (parameter - encoder.get_parameter(name)).abs().max() > 1e-4, name
    assert not any(p.requires_grad for p in encoder.parameters())


def test_the_head_reads_the_mean_of_the_patches_and_starts_from_zero(encoder):
    network, images = probe._Classifier(encoder, CLASSES), torch.randn(4, 3, 16, 16)
    assert network(images).abs().max() == 0
    with torch.no_grad():
        network.head.weight.normal_()
        expected = encoder(images).mean(1) @ network.head.weight.T
        torch.testing.assert_close(network(images), expected)


def test_drop_path_leaves_out_branches_of_pictures_and_only_in_training(encoder):
    p = 0.4
    network, images = probe._Classifier(encoder, CLASSES, p), torch.randn(400, 3, 16, 16)
    plain = encoder.blocks[1].mlp(encoder.patch_embed(images))
    branch = network.encoder.blocks[1].mlp
    with torch.no_grad():
        torch.testing.assert_close(network.eval().encoder(images), encoder(images))
        network.train()
        ratio = branch(encoder.patch_embed(images)) / plain  # (b, N, D)
        first = network.encoder.blocks[0].attn(encoder.patch_embed(images))
    dropped = ratio[:, 0, 0] == 0
    assert 0.3 < dropped.double().mean() < 0.5
    for picture, gone in zip(ratio, dropped, strict=True):
        expected = 0.0 if gone else 1 / (1 - p)
        torch.testing.assert_close(picture, torch.full_like(picture, expected))
    # The first layer is never left out, the others the more the deeper.
    torch.testing.assert_close(first, encoder.blocks[0].attn(encoder.patch_embed(images)))


def test_micro_batches_do_not_matter_to_fine_tuning(encoder, monkeypatch):
    train, choose, report = parts(96, noise=120.0)
    mixing = dataclasses.replace(QUICK, mixup=0.8, cutmix=1.0, rand_augment=(2, 9), epochs=3)
    for config, most in ((QUICK, 4), (mixing, 1)):  # mixed pictures stay together
        whole = tuned(encoder, train, choose, report, config)
        with monkeypatch.context() as patched:
            patched.setattr(probe, "at_once", lambda *_, most=most, **__: most)
            small = tuned(encoder, train, choose, report, config)
        assert_same_tuning(small, whole)


def assert_same_tuning(found: probe.FineTuned, expected: probe.FineTuned) -> None:
    """Equal to rounding, which a picture in a hundred may feel."""
    for row, other in zip(found.epochs, expected.epochs, strict=True):
        assert row.loss == pytest.approx(other.loss, rel=2e-3)
    assert (found.predictions != expected.predictions).double().mean() < 0.03


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_pictures_are_mixed_in_pairs_as_their_labels_are(kind):
    config = FineTuneConfig(mixup=0.8 * (kind == "mixup"), cutmix=1.0 * (kind == "cutmix"))
    images, targets = torch.rand(6, 3, 16, 16), F.one_hot(torch.arange(6), 6).float()
    shares = []
    for step in range(5):
        x, y = probe.mixed(images, targets, config, (0, "mix", step))
        share = y.diagonal()  # what is left of each picture
        shares.append(float(share[0]))
        assert torch.allclose(share, share[:1]) and torch.allclose(y.sum(1), torch.ones(6))
        for a, b in ((0, 1), (2, 3), (4, 5)):
            assert y[a, b] == y[b, a] == pytest.approx(1 - shares[-1], abs=1e-6)
            torch.testing.assert_close(x[a] + x[b], images[a] + images[b])
            if kind == "mixup":
                torch.testing.assert_close(x[a], shares[-1] * images[a] + y[a, b] * images[b])
            else:
                own, others = (x[a] == images[a]).all(0), (x[a] == images[b]).all(0)  # (S, S)
                assert (own ^ others).all()
                assert float(own.double().mean()) == pytest.approx(shares[-1], abs=1e-6)
        halves = [
            probe.mixed(images[i], targets[i], config, (0, "mix", step))
            for i in (slice(0, 2), slice(2, 6))
        ]
        assert torch.equal(torch.cat([h[0] for h in halves]), x)
        assert torch.equal(torch.cat([h[1] for h in halves]), y)
    assert len(set(shares)) == 5


def test_both_ways_of_mixing_come_up_and_none_without():
    images, targets = torch.rand(2, 3, 8, 8), torch.eye(2)
    config = FineTuneConfig(mixup=0.8, cutmix=1.0)
    cut = [
        bool(((x == images) | (x == images.flip(0))).all())
        for x in (probe.mixed(images, targets, config, (step,))[0] for step in range(20))
    ]
    assert 4 < sum(cut) < 16
    same = probe.mixed(images, targets, FineTuneConfig(), (0,))
    assert same[0] is images and same[1] is targets


def test_a_loss_that_is_not_finite_is_said(encoder):
    train, choose, report = parts(64)
    with torch.no_grad():
        encoder.norm.bias[0] = float("inf")
    with pytest.raises(UserError, match=r"loss is nan in epoch 1: try a lower --lr"):
        tuned(encoder, train, choose, report)


# ------------------------------------------------------------------------------- two processes

WORKER = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
torch.set_num_threads(1)
from data import placed
from test_probe_training import both
with placed("cpu") as place:
    found = both(place)
    torch.save(found, os.path.join({out!r}, "rank%d.pt" % place.rank))
"""


def both(place: Place):
    """What two processes do as well as one: (pictures seen, probe, two ways of fine-tuning)."""
    torch.manual_seed(1)
    encoder = ViT(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, init_std=0.2)
    seen = []
    encoder.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    train, choose, report = parts(96, noise=90.0)
    mixing = dataclasses.replace(QUICK, mixup=0.8, cutmix=1.0, rand_augment=(2, 9), epochs=2)
    found = (
        augmented(encoder, train, choose, report, place, epochs=4),
        tuned(encoder, train, choose, report, dataclasses.replace(QUICK, epochs=3), place),
        tuned(encoder, train, choose, report, mixing, place),
    )
    return sum(seen), *found


def test_two_processes_equal_one(tmp_path):
    (tmp_path / "worker.py").write_text(
        WORKER.format(root=str(ROOT), tests=str(ROOT / "tests"), out=str(tmp_path))
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(tmp_path / "worker.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(tmp_path / "errors", "w") as errors:
        process = subprocess.Popen(
            command, stdout=errors, stderr=errors, env=environment, start_new_session=True
        )
        try:
            code = process.wait(timeout=100)
        finally:  # its processes too, whatever happened
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert code == 0, (tmp_path / "errors").read_text()[-3000:]
    expected = both(HERE)
    for rank in (0, 1):
        seen, linear, *fine = torch.load(tmp_path / f"rank{rank}.pt", weights_only=False)
        assert seen == expected[0] // 2  # each does half of the work
        assert_same_probes(linear, expected[1])
        for found, other in zip(fine, expected[2:], strict=True):
            assert_same_tuning(found, other)
