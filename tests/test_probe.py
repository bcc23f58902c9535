"""k-NN, linear probe, collapse indicators, checkpoints and the command line of probe.py."""

import json
import math
import pickle
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import probe
from data import MemoryDataset, UserError, eval_batches, run_main
from ijepa import IJEPA, IJEPAConfig, ViT

TINY = IJEPAConfig(16, 4, 16, 3, 2, 8, 1, mlp_ratio=2.0)


def gaussian_classes(n, width, classes, seed=0, noise=2.0, dtype=torch.float32):
    """Overlapping Gaussian classes, axes of very different variance, as features have."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(classes, width, generator=generator, dtype=dtype)
    mixing = torch.randn(width, width, generator=generator, dtype=dtype) / width**0.5
    generator.manual_seed(seed + 1)
    y = torch.randint(classes, (n,), generator=generator)
    x = means[y] + noise * torch.randn(n, width, generator=generator, dtype=dtype)
    return x @ mixing * torch.logspace(0, -2, width, dtype=dtype) + 3, y


def colored_dataset(n, size=16, classes=3, seed=0):
    """Noise images whose color depends on the class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    colors = torch.tensor([[150, 90, 90], [90, 150, 90], [90, 90, 150]])[y][:, :, None, None]
    x = colors + torch.randint(-60, 60, (n, 3, size, size), generator=generator)
    return MemoryDataset(x.to(torch.uint8), y, [f"color{c}" for c in range(classes)])


def tiny_features(n_layers=2, **sizes):
    """Features of Gaussian classes: "train", "val", "test" or whatever `sizes` names."""
    features = {}
    for seed, (name, n) in enumerate((sizes or {"train": 300, "val": 90, "test": 90}).items()):
        x, y = gaussian_classes(n, 6 * n_layers, 3, seed)
        features[name] = x.view(n, n_layers, 6), y
    return features


# ------------------------------------------------------------------------------------------ k-NN


def test_knn_equals_numpy():
    (x, y), (queries, _) = gaussian_classes(700, 12, 5), gaussian_classes(600, 12, 5, seed=1)
    a = x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True)
    b = queries.double().numpy() / np.linalg.norm(queries.double().numpy(), axis=1, keepdims=True)
    similarity = b @ a.T
    expected = []
    for row in similarity:
        votes = np.zeros(5)
        for i in np.argsort(-row)[:20]:
            votes[y[i]] += math.exp(row[i] / 0.07)
        expected.append(votes.argmax())
    predicted = probe.knn_classify(x, y, queries, 5)
    assert predicted.tolist() == expected


def test_knn_of_fewer_images_than_20():
    x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]])
    assert probe.knn_classify(x, torch.tensor([1, 0, 0]), x, 2).tolist() == [1, 0, 0]


# ---------------------------------------------------------------------------------- linear probe


def sklearn_probe(x, y, l2):
    scaler = StandardScaler().fit(x.numpy())
    model = LogisticRegression(C=1 / (len(x) * l2), tol=1e-9, max_iter=20_000)
    return scaler, model.fit(scaler.transform(x.numpy()), y.numpy())


@pytest.mark.parametrize(("n", "width"), [(600, 20), (40, 60)])
@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_linear_probe_equals_sklearn(n, width, l2):
    x, y = gaussian_classes(n, width, 4, dtype=torch.float64)
    other, other_y = gaussian_classes(300, width, 4, seed=1, dtype=torch.float64)
    fitted = probe.linear_probe(x, y, other, other_y, 4, [l2])
    scaler, model = sklearn_probe(x, y, l2)
    np.testing.assert_allclose(fitted.weight.T.numpy(), model.coef_, atol=5e-4)
    np.testing.assert_allclose(fitted.bias.numpy(), model.intercept_, atol=5e-4)
    predicted = model.predict(scaler.transform(other.numpy()))
    assert (fitted.predict(other).numpy() == predicted).all()
    assert fitted.val_accuracy == pytest.approx((predicted == other_y.numpy()).mean())


@pytest.mark.parametrize("l2", [1e-4, 1e-6])
def test_linear_probe_in_float32(l2):
    x, y = gaussian_classes(2000, 30, 5)
    fitted = probe.linear_probe(x, y, x, y, 5, [l2])
    scaler, model = sklearn_probe(x.double(), y, l2)
    atol = 0.005 * np.abs(model.coef_).max()
    np.testing.assert_allclose(fitted.weight.T.numpy(), model.coef_, atol=atol)
    agreement = fitted.predict(x).numpy() == model.predict(scaler.transform(x.numpy()))
    assert agreement.mean() > 0.998


def test_warm_start_does_not_change_the_optimum():
    x, y = gaussian_classes(400, 15, 3, dtype=torch.float64)
    alone = probe.linear_probe(x, y, x, y, 3, [1e-4])
    after_others = probe.linear_probe(x, y, x, y, 3, [1e-4, 1.0, 1e-2])
    assert after_others.l2 == alone.l2 == 1e-4  # the training images fit best with little L2
    torch.testing.assert_close(after_others.weight, alone.weight, atol=2e-4, rtol=0)


def test_validation_images_choose_l2():
    x, y = gaussian_classes(60, 40, 3, noise=4.0, dtype=torch.float64)
    val, val_y = gaussian_classes(500, 40, 3, seed=1, noise=4.0, dtype=torch.float64)
    grid = (1.0, 1e-1, 1e-2, 1e-3, 1e-5)
    scores = {}
    for l2 in grid:
        scaler, model = sklearn_probe(x, y, l2)
        scores[l2] = model.score(scaler.transform(val.numpy()), val_y.numpy())
    chosen = probe.linear_probe(x, y, val, val_y, 3, grid)
    assert len(set(scores.values())) > 1
    assert chosen.l2 == max(grid, key=lambda l2: (scores[l2], l2))
    assert chosen.val_accuracy == pytest.approx(max(scores.values()))


def test_strongest_l2_wins_ties():
    x = torch.eye(2).repeat(10, 1)
    y = torch.arange(20) % 2
    assert probe.linear_probe(x, y, x, y, 2, [1e-4, 1e-1, 1e-2]).l2 == 1e-1


def test_constant_feature_is_harmless():
    x, y = gaussian_classes(200, 8, 3)
    constant = torch.cat([x, torch.full((200, 1), 7.0)], dim=1)
    with_it, without = (probe.linear_probe(z, y, z, y, 3, [1e-2]) for z in (constant, x))
    torch.testing.assert_close(with_it.weight[:8], without.weight, atol=1e-3, rtol=0)
    assert with_it.weight.isfinite().all()


# --------------------------------------------------------------------------- collapse indicators


@pytest.mark.parametrize("shape", [(100, 20), (20, 100)])
def test_rankme_equals_svd(shape):
    x = torch.randn(shape) * torch.logspace(0, -3, shape[1])
    p = np.linalg.svd(x.double().numpy(), compute_uv=False)
    p = p / p.sum() + 1e-7
    assert probe.rankme(x) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)


def test_feature_std_closed_forms():
    assert probe.feature_std(torch.ones(50, 8)) == pytest.approx(0, abs=1e-7)
    assert probe.feature_std(torch.randn(20_000, 16)) == pytest.approx(1 / 4, rel=0.01)


# -------------------------------------------------------------------------------------- features


def test_features_are_pooled_layers():
    encoder, data = ViT(replace(TINY, depth=5)), colored_dataset(10)
    indices = torch.arange(10)
    x = probe.extract_features(encoder, eval_batches(data, indices, "cpu", batch_size=4))
    images = next(eval_batches(data, indices, "cpu"))
    expected = torch.stack([t.mean(1) for t in encoder.get_intermediate_layers(images, 4)], dim=1)
    torch.testing.assert_close(x, expected)
    torch.testing.assert_close(x[:, -1], encoder(images).mean(1))
    assert encoder.training  # as before


def test_features_of_a_shallow_encoder():
    x = probe.extract_features(ViT(TINY), [torch.randn(2, 3, 16, 16)])
    assert x.shape == (2, 3, 16)


def test_diverged_encoder_is_a_user_error():
    encoder = ViT(TINY)
    encoder.norm.weight.data[0] = math.nan
    with pytest.raises(UserError, match="diverged"):
        probe.extract_features(encoder, [torch.randn(2, 3, 16, 16)])


def test_pixel_features_shrink_large_images():
    small, large = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 64, 64)
    assert torch.equal(probe.pixel_features([small]), small.view(2, 1, -1))
    expected = F.avg_pool2d(large, 4).view(2, 1, -1)
    torch.testing.assert_close(probe.pixel_features([large]), expected)


# ------------------------------------------------------------------------------------ evaluation


def test_splits_do_not_overlap():
    train, test = colored_dataset(100), colored_dataset(30, seed=1)
    splits = probe.make_splits(train, test)
    used = [set(splits[name][1].tolist()) for name in ("train", "val")]
    assert not used[0] & used[1] and used[0] | used[1] == set(range(100))
    assert splits["test"][1].tolist() == list(range(30))


def test_fewer_training_images_are_a_subset():
    data = colored_dataset(100)
    few, more = (probe.make_splits(data, train_images=n) for n in (20, 50))
    assert len(few["train"][1]) == 20 and set(few["train"][1].tolist()) < set(
        more["train"][1].tolist()
    )
    assert torch.equal(few["val"][1], more["val"][1])


def test_unlabeled_images_are_not_used():
    data = colored_dataset(100)
    data.labels[::2] = -1
    splits = probe.make_splits(data)
    for _, indices in splits.values():
        assert (data.labels[indices] >= 0).all()


def test_test_images_choose_nothing():
    features = tiny_features()
    row = probe.evaluate(features, 3)
    x, y = features["test"]
    other = probe.evaluate(features | {"test": (x.flip(0), (y + 1) % 3)}, 3)
    changed = {key for key in row if row[key] != other[key]}
    assert changed and all(key.startswith("test_") for key in changed)


def test_evaluation_figures():
    features = tiny_features()
    row = probe.evaluate(features, 3)
    (x, y), (val_x, val_y), (test_x, test_y) = features.values()
    predicted = probe.knn_classify(x[:, -1], y, test_x[:, -1], 3)
    assert row["test_knn"] == pytest.approx((predicted == test_y).double().mean().item())
    assert row["rankme"] == probe.rankme(val_x[:, -1])
    for name, select in (("linear", lambda x: x[:, 1]), ("linear_4", lambda x: x.flatten(1))):
        scaler, model = sklearn_probe(select(x), y, row[f"{name}_l2"])
        for split, (z, z_y) in (("", (val_x, val_y)), ("test_", (test_x, test_y))):
            expected = model.score(scaler.transform(select(z).numpy()), z_y.numpy())
            assert row[split + name] == pytest.approx(expected, abs=0.012)  # one image


def test_one_layer_has_no_linear_4():
    row = probe.evaluate(tiny_features(n_layers=1), 3)
    assert "linear_4" not in row and 0 < row["linear"] <= 1 <= row["rankme"]


def test_low_shot_samples(monkeypatch):
    seen = []

    def fake(features, num_classes, device):
        seen.append(features["train"])
        return {"knn": [0.1, 0.2, 0.6][len(seen) % 3], "linear_l2": 0.1}

    monkeypatch.setattr(probe, "evaluate", fake)
    features = tiny_features()
    row = probe.evaluate_low_shot(features, 3, 5)
    assert all(y.bincount().tolist() == [5, 5, 5] for _, y in seen)
    images = {tuple(x[:, -1, 0].tolist()) for x, _ in seen}
    assert len(images) == len(seen) == 3  # each draw takes others
    assert row["knn"] == pytest.approx(0.3)
    assert row["knn_std"] == pytest.approx(np.std([0.1, 0.2, 0.6], ddof=1))


def test_low_shot_depends_on_the_seed():
    features = tiny_features(n_layers=1)
    rows = [probe.evaluate_low_shot(features, 3, 2, seed=seed) for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]


def test_too_many_labels_per_class():
    with pytest.raises(UserError, match="fewer than 500"):
        probe.evaluate_low_shot(tiny_features(), 3, 500)


def test_table():
    rows = [
        {"name": "pixels", "knn": 0.1, "linear": 0.25, "test_linear": 0.3},
        {"name": "few", "knn": 0.5, "knn_std": 0.012, "rankme": 12.3456, "feature_std": 0.1},
    ]
    lines = probe.format_table(rows).splitlines()
    assert lines[1].split() == ["pixels", "10.0", "25.0", "/", "30.0", "-", "-", "-"]
    assert lines[2].split() == ["few", "50.0±1.2", "-", "-", "12.3", "0.1"]


def test_curves_from_numbers_and_csv(tmp_path):
    rows = [
        {"step": "10", "loss": "0.5", "val_loss": "", "knn": ""},  # as csv.DictReader gives it
        {"step": 20, "loss": 0.4, "val_loss": 0.5, "knn": 0.3, "rankme": 9.0, "feature_std": 0.1},
    ]
    probe.draw_curves(tmp_path / "curves.png", rows)
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > image.height > 100


# ----------------------------------------------------------------------------------- checkpoints


def save_checkpoint(path, **changes):
    """A checkpoint as train.py writes it."""
    checkpoint = {
        "config": {"data": "shapes"},
        "architecture": asdict(TINY),
        "model": IJEPA(TINY).state_dict(),
        "step": 7,
    }
    torch.save(checkpoint | changes, path)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_checkpoint_holds_both_encoders(tmp_path):
    model = IJEPA(TINY)
    model.encoder.norm.bias.data.fill_(1)
    save_checkpoint(tmp_path / "last.pt", model=model.state_dict())
    encoder, config, info = probe.load_encoder(str(tmp_path))  # the run's folder
    assert same(encoder, model.target_encoder) and config == TINY
    assert (info["step"], info["network"]) == (7, "target_encoder")
    online, _, info = probe.load_encoder(str(tmp_path / "last.pt"), online=True)
    assert same(online, model.encoder) and info["train_config"]["data"] == "shapes"


@pytest.mark.parametrize("half", [False, True])
def test_safetensors_round_trip(tmp_path, half):
    encoder, path = ViT(TINY), tmp_path / "model.safetensors"
    probe.save_encoder(path, encoder, TINY, half, {"step": 3, "train_config": {"data": "stl10"}})
    loaded, config, info = probe.load_encoder(str(path))
    assert config == TINY and (info["step"], info["train_config"]) == (3, {"data": "stl10"})
    for a, b in zip(loaded.parameters(), encoder.parameters(), strict=True):
        assert torch.equal(a, b.half().float() if half else b)


@pytest.mark.parametrize(("given", "used"), [(None, "/run"), ("/here", "/here")])
def test_images_are_where_the_run_found_them(monkeypatch, given, used):
    def load(name, split, size, data_dir):
        raise UserError(f"{name} in {data_dir}")

    monkeypatch.setattr(probe, "load_dataset", load)
    info = {"file": "last.pt", "train_config": {"data": "cifar10", "data_dir": "/run"}}
    with pytest.raises(UserError, match=f"cifar10 in {used}"):
        probe.load_splits(probe.ProbeConfig("last.pt", data_dir=given), TINY, info)


def test_figures_show_eight_images_of_different_classes_first():
    labels = torch.tensor([3, 3, 1, 3, 1, 1, 1, 1, 1])
    assert probe._examples(labels) == [2, 0, 1, 3, 4, 5, 6, 7]
    assert probe._examples(torch.arange(20)) == list(range(8))
    assert probe._examples(torch.zeros(3)) == [0, 1, 2]


def test_position_is_removed_from_patch_colors(tmp_path, monkeypatch):
    shown, data = [], colored_dataset(60)
    monkeypatch.setattr(probe, "_show", lambda axis, image: shown.append(image))
    encoders, indices = {"untrained": ViT(TINY)}, torch.arange(60)
    probe.draw_patch_pca(tmp_path / "a.png", encoders, data, indices[:20], indices[20:])
    means = [torch.stack(shown[i : i + 20]).mean(0).flatten(1) for i in (20, 40)]
    with_position, without = (mean.std(1).mean() for mean in means)
    assert without < 0.3 * with_position


def test_included_weights_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "WEIGHTS", tmp_path)
    (tmp_path / "tiny").mkdir()
    encoder = ViT(TINY)
    probe.save_encoder(tmp_path / "tiny" / "model.safetensors", encoder, TINY)
    assert same(probe.load_encoder("tiny")[0], encoder)
    with pytest.raises(UserError, match="included: tiny"):
        probe.load_encoder("huge")


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_hostile_checkpoint_is_refused(tmp_path):
    touched, path = tmp_path / "touched", tmp_path / "last.pt"
    torch.save({"model": Hostile(touched)}, path)
    result = subprocess.run([sys.executable, probe.__file__, path], capture_output=True, text=True)
    assert result.returncode == 2 and not touched.exists()
    assert len(result.stderr.splitlines()) == 1 and "holds code" in result.stderr
    torch.load(path, weights_only=False)
    assert touched.exists()  # the file is dangerous indeed


def damaged_files(folder):
    """(name, contents) of files that are no checkpoint of this project."""
    save_checkpoint(folder / "good.pt")
    probe.save_encoder(folder / "good.safetensors", ViT(TINY), TINY)
    good, safe = ((folder / f"good.{s}").read_bytes() for s in ("pt", "safetensors"))
    yield from (("a.pt", good[:n]) for n in (0, 1, 100, len(good) // 2, len(good) - 10))
    yield from (("a.safetensors", safe[:n]) for n in (0, 4, 100, len(safe) - 4))
    yield from (("a.pt", b"text\n" * 50), ("a.pt", pickle.dumps([1, 2])), ("a.pt", safe))
    yield from (("a.safetensors", good), ("a.safetensors", b"\xff" * 500))


def test_damaged_files_give_one_line(tmp_path):
    for name, contents in damaged_files(tmp_path):
        (tmp_path / name).write_bytes(contents)
        with pytest.raises(UserError) as error:
            probe.load_encoder(str(tmp_path / name))
        assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": {"embed_dim": 30}},
        {"architecture": {"unknown": 1}},
        {"architecture": asdict(TINY) | {"depth": 2}},
        {"architecture": asdict(TINY) | {"embed_dim": 32}},
        {"architecture": None},
        {"model": {}},
        {"model": [1]},
    ],
)
def test_wrong_contents_give_one_line(tmp_path, changes):
    save_checkpoint(tmp_path / "last.pt", **changes)
    with pytest.raises(UserError) as error:
        probe.load_encoder(str(tmp_path))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_foreign_safetensors(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="does not hold an encoder"):
        probe.load_encoder(str(tmp_path))


def test_untrained_encoder_is_seeded():
    state = torch.get_rng_state()
    a, b, c = (probe.untrained_encoder(TINY, seed) for seed in (0, 0, 1))
    assert same(a, b) and not same(a, c)
    assert torch.equal(torch.get_rng_state(), state)


# ----------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A folder of images, and a run that was trained on it."""
    root = tmp_path_factory.mktemp("probe")
    for split, n in (("train", 120), ("test", 30)):
        data = colored_dataset(n, seed=n)
        for i, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
            folder = root / "images" / split / data.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    (root / "run").mkdir()
    save_checkpoint(root / "run" / "last.pt", config={"data": str(root / "images")})
    return root / "run"


def run_probe(monkeypatch, capsys, *args):
    """Exit code, output and error output of `python probe.py ...`, in this process."""
    monkeypatch.setattr(sys, "argv", ["probe.py", *map(str, args)])
    try:
        run_main(probe.main)
        code = 0
    except SystemExit as exit:
        code = exit.code
    return code, *capsys.readouterr()


def test_command_line(run_folder, monkeypatch, capsys):
    args = (run_folder, "--labels-per-class", 2, "--device", "cpu")
    code, out, _ = run_probe(monkeypatch, capsys, *args)
    assert code == 0
    found = json.loads((run_folder / "probe.json").read_text())
    assert found["images"] == {"train": 108, "val": 12, "test": 30}
    names = [row["name"] for row in found["rows"]]
    assert names[::2] == ["pixels", "untrained", "trained"]
    assert names[5] == "trained, 2 per class" and "knn_std" in found["rows"][5]
    assert found["rows"][0]["test_linear"] > 0.8  # colors are easy
    assert probe.format_table(found["rows"]) in out and "108 labeled training images" in out
    for name in ("neighbors", "confusion", "patch_pca"):
        with Image.open(run_folder / f"{name}.png") as image:
            colors = image.convert("RGB").getcolors(10**6)
            assert image.width > 200 and len(colors) > 50


def test_command_line_errors(run_folder, tmp_path, monkeypatch, capsys):
    for args, message in (
        (["nothing"], "no checkpoint in 'nothing'"),
        ([run_folder, "--img-size", 30], "multiple of 4"),
        ([run_folder, "--img-size", 0], "multiple of 4"),
        ([run_folder, "--data", tmp_path / "none"], "none"),
    ):
        code, out, error = run_probe(monkeypatch, capsys, *args)
        assert code == 2 and out == ""
        assert len(error.splitlines()) == 1 and message in error
