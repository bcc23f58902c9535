"""probe.py as a script: which pictures, what is kept, few labels, the report, and mistakes."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import probe
from data import Folder, Pictures, Place, UserError
from ijepa import IJEPA, IJEPAConfig

HERE = Place(0, 1, torch.device("cpu"))
TINY = IJEPAConfig(
    img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=2,
    predictor_dim=16, predictor_depth=1, predictor_heads=2, init_std=0.1,
)  # fmt: skip
COLOURS = {"blue": (40, 60, 200), "green": (50, 180, 70), "red": (200, 50, 40)}


def paint(root: Path, part: str, count: int, seed: int, shuffled: bool = False, size: int = 16):
    """`count` noisy pictures of each colour, in folders of their name, or of a random one."""
    random = np.random.default_rng(seed)
    for colour, rgb in COLOURS.items():
        for number in range(count):
            name = random.choice(list(COLOURS)) if shuffled else colour
            noise = random.normal(0, 25, (size, size, 3))
            pixels = (np.array(rgb) + noise).clip(0, 255).astype(np.uint8)
            (root / part / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / part / name / f"{colour}{number:03d}.png")
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    return paint(paint(root, "train", 40, 0), "test", 15, 1)


def write_run(folder: Path, seed: int = 0, **config) -> Path:
    """A checkpoint as train.py leaves it, of a model that has learned nothing."""
    torch.manual_seed(seed)
    model = IJEPA(TINY)
    for p in model.target_encoder.parameters():  # so that it is not the context encoder
        p.data += 0.01 * torch.randn_like(p)
    checkpoint = {
        "format": probe.CHECKPOINT_FORMAT,
        "config": {"init_std": 0.1} | config,
        "architecture": asdict(TINY),
        "model": model.state_dict(),
        "optimizer": {},
        "pictures": 120,
        "step": 7,
        "best_knn": 0.0,
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, folder / "last.pt")
    return folder


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def script(*argv) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["probe.py", *map(str, argv)])
        data.run_script(probe.main)


def report_of(out: Path) -> dict:
    return json.loads((out / "probe.json").read_text())


def figures(report: dict) -> dict:
    return {(r["task"], r["features"]): r["figures"] for r in report["results"]}


# ------------------------------------------------------------------------------------ the report


def test_separable_classes_are_told_apart_and_the_report_says_how(run, pictures, capsys):
    script(run, "--data", pictures, "--k", "5")
    out = run / f"probe_{pictures.name}"
    report = report_of(out)
    found = figures(report)
    assert list(found) == [
        ("class", "raw pixels"), ("class", "untrained"), ("class", "target encoder")
    ]  # fmt: skip
    for values in found.values():
        assert list(values) == ["5-NN", "5-NN, plain", "linear probe"]
        assert len(values["linear probe"]) == 3  # seeds
        assert min(min(v) for v in values.values()) > 95
    assert {p.name for p in out.iterdir()} == {
        "probe.json", "confusion.png", "neighbours.png", "pca.png"
    }  # fmt: skip
    shown = capsys.readouterr().out
    assert "45 pictures" in shown and "108 to learn from, 12 to choose settings on" in shown
    for word in ("raw pixels", "untrained", "target encoder", "linear probe", "chosen"):
        assert word in shown


def test_the_report_holds_what_is_needed_to_repeat_it(run, pictures):
    script(run, "--data", pictures, "--k", "5", "--no-baselines", "--seeds", "2")
    report = report_of(run / f"probe_{pictures.name}")
    digest = hashlib.sha256((run / "last.pt").read_bytes()).hexdigest()
    assert report["checkpoint"]["sha256"] == digest
    assert report["checkpoint"]["step"] == 7 and report["checkpoint"]["encoder"] == "target"
    assert report["options"]["seeds"] == 2 and report["options"]["data"] == str(pictures)
    assert report["command"].startswith("python probe.py ") and "--seeds 2" in report["command"]
    assert report["versions"]["torch"] == str(torch.__version__)
    (row,) = report["results"]
    (chosen,) = row["chosen"]
    assert chosen["feature"] in ("last layer", "last 3 layers") and chosen["head"] in probe.HEADS
    assert chosen["rate"] in probe.RATES and chosen["decay"] in probe.DECAYS
    assert len(chosen["val"]) == 2 and row["chance"] == pytest.approx(100 / 3)


def test_shuffled_labels_give_about_chance(run, tmp_path):
    root = paint(paint(tmp_path / "noise", "train", 60, 2, shuffled=True), "test", 40, 3, True)
    script(run, "--data", root, "--k", "20", "--no-baselines")
    (values,) = figures(report_of(run / "probe_noise")).values()
    for name, value in values.items():
        assert 15 < sum(value) / len(value) < 52, name  # chance 33 %, 120 pictures: sd 4 %


def test_the_answer_is_that_of_the_parts_put_together_by_hand(run, pictures):
    script(run, "--data", pictures, "--k", "5", "--no-baselines")
    report = report_of(run / f"probe_{pictures.name}")
    encoder = probe.load_encoder(str(run)).encoder
    train, test = (data.load_data(str(pictures), part, img_size=16) for part in ("train", "test"))
    everything = [torch.arange(len(x)) for x in (train, test)]
    train_x, test_x = (
        probe.pooled_features(encoder, data.eval_batches(x, index))
        for x, index in zip((train, test), everything, strict=True)
    )
    found = probe.knn(train_x, train.labels["class"], test_x, 5)
    (values,) = figures(report).values()
    hits = (found.weighted == test.labels["class"]).double().mean().item()
    assert values["5-NN"] == [pytest.approx(100 * hits)]


def test_the_context_encoder_can_be_asked_for(run, pictures):
    script(run, "--data", pictures, "--k", "5", "--encoder", "context", "--no-baselines")
    report = report_of(run / f"probe_{pictures.name}_context")
    assert report["checkpoint"]["encoder"] == "context"
    assert [row["features"] for row in report["results"]] == ["context encoder"]


def test_the_data_of_the_run_are_the_default(tmp_path, pictures):
    run = write_run(tmp_path / "run", data=str(pictures))
    script(run, "--k", "5", "--no-baselines", "--seeds", "1")
    assert report_of(run / f"probe_{pictures.name}")["pictures"]["name"] == str(pictures)


def test_all_three_tasks_of_the_shapes(run):
    script(run, "--data", "shapes", "--images", "400", "--no-baselines", "--seeds", "1")
    report = report_of(run / "probe_shapes")
    assert [row["task"] for row in report["results"]] == ["kind", "count", "near"]
    assert report["pictures"]["fit"] == 360 and report["pictures"]["report"] == 400
    script(run, "--data", "shapes", "--images", "400", "--no-baselines", "--task", "count")
    assert [row["task"] for row in report_of(run / "probe_shapes")["results"]] == ["count"]


def test_pictures_smaller_than_the_encoder_wants_are_enlarged(run, monkeypatch):
    small = torch.randint(0, 256, (60, 3, 8, 8), dtype=torch.uint8)
    labels = {"class": torch.arange(60) % 2}
    sets = {part: Pictures(small, labels, {"class": ["a", "b"]}) for part in ("train", "test")}
    monkeypatch.setattr(probe, "load_data", lambda name, part, *_: sets[part])
    monkeypatch.setattr(probe, "default_sizes", lambda *_: (8, 4))
    script(run, "--data", "cifar10", "--no-baselines", "--seeds", "1")
    assert report_of(run / "probe_cifar10")["pictures"]["size"] == 16
    seen = next(data.eval_batches(sets["train"], torch.arange(3), size=16))
    wanted = torch.nn.functional.interpolate(
        data.normalize(small[:3]), (16, 16), mode="bicubic", align_corners=False
    )
    assert torch.equal(seen, wanted)


def test_several_processes_find_what_one_finds(run, pictures, tmp_path):
    processes = 3  # shares of unequal size
    script(run, "--data", pictures, "--k", "5", "--out", tmp_path / "one", "--no-cache")
    argv = [run, "--data", pictures, "--k", "5", "--out", tmp_path / "many", "--no-cache"]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [sys.executable, *command, "probe.py", *map(str, argv)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, many = (report_of(tmp_path / name) for name in ("one", "many"))
    assert many["processes"] == processes and figures(one) == figures(many)
    assert done.stdout.count("to learn from") == 1  # one table, not one a process


# ------------------------------------------------------------------------------------- the split


def test_what_is_learned_from_chosen_on_and_reported_on_is_disjoint(pictures):
    sets = probe.load_sets(str(pictures), "data", 16, HERE)
    assert len(sets.bank) == 120 and len(sets.report) == 45 and sets.test is not sets.train
    held_out = data.hold_out(sets.train)[1]
    assert torch.equal(sets.bank[sets.choose], held_out)  # the ones training never saw
    assert sorted(sets.bank.tolist()) == list(range(120))
    assert not set(sets.fit.tolist()) & set(sets.choose.tolist())
    bank_y, report_y = sets.labels("class")
    assert torch.equal(bank_y, sets.train.labels["class"][sets.bank])
    assert report_y.bincount().tolist() == [15, 15, 15]


def test_without_a_test_part_half_of_the_held_out_pictures_are_reported_on(tmp_path):
    sets = probe.load_sets(str(paint(tmp_path, "train", 40, 0)), "data", 16, HERE)
    assert sets.test is sets.train and "held-out" in sets.reported
    assert not set(sets.bank.tolist()) & set(sets.report.tolist())
    assert (len(sets.fit), len(sets.choose), len(sets.report)) == (108, 6, 6)
    held_out = set(data.hold_out(sets.train)[1].tolist())
    assert set(sets.report.tolist()) | set(sets.bank[sets.choose].tolist()) == held_out


def test_a_limit_draws_at_random_but_always_the_same(pictures):
    first, again = (probe.load_sets(str(pictures), "data", 16, HERE, limit=30) for _ in range(2))
    assert (len(first.fit), len(first.choose), len(first.report)) == (27, 3, 30)
    assert torch.equal(first.bank, again.bank) and torch.equal(first.report, again.report)
    assert all(len(labels.unique()) == 3 for labels in first.labels("class"))


def test_unlabelled_pictures_are_left_out(monkeypatch):
    labels = {"class": torch.tensor([0, 1, -1] * 40)}
    made = Pictures(torch.zeros(120, 3, 8, 8, dtype=torch.uint8), labels, {"class": ["a", "b"]})
    monkeypatch.setattr(probe, "load_data", lambda *_: made)
    sets = probe.load_sets("stl10", "data", 8, HERE)
    assert len(sets.bank) == 80 and len(sets.report) == 80
    assert all((y >= 0).all() for y in sets.labels("class"))


# -------------------------------------------------------------------------------- kept on disk


def test_features_are_computed_once(run, pictures, monkeypatch):
    script(run, "--data", pictures, "--k", "5")
    first = figures(report_of(run / f"probe_{pictures.name}"))
    monkeypatch.setattr(probe, "pooled_features", lambda *_, **__: pytest.fail("computed again"))
    script(run, "--data", pictures, "--k", "5")
    assert figures(report_of(run / f"probe_{pictures.name}")) == first


@pytest.mark.parametrize("change", ["weights", "encoder", "pictures", "size", "layers", "limit"])
def test_other_weights_or_pictures_or_options_have_other_features(
    run, pictures, tmp_path, monkeypatch, change
):
    root = shutil.copytree(pictures, tmp_path / "copy")
    argv = [run, "--data", root, "--k", "5", "--no-baselines", "--seeds", "1"]
    script(*argv)
    calls, compute = [], probe.pooled_features
    counted = lambda *args, **kwargs: calls.append(1) or compute(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(probe, "pooled_features", counted)
    script(*argv)
    assert not calls
    if change == "weights":
        write_run(run, seed=1)
    if change == "pictures":
        image = np.array(Image.open(root / "train" / "red" / "red000.png"))
        Image.fromarray(255 - image).save(root / "train" / "red" / "red000.png")
    more = {"encoder": ["--encoder", "context"], "size": ["--img-size", "32"]}
    more |= {"layers": ["--layers", "2"], "limit": ["--images", "60"]}
    script(*argv, *more.get(change, []))
    assert calls


@pytest.mark.parametrize("change", ["heads", "epsilon", "positions"])
def test_encoders_of_the_same_weights_that_differ_otherwise_are_told_apart(run, change):
    encoder, other = (probe.load_encoder(str(run)).encoder for _ in range(2))
    assert probe.encoder_hash(encoder) == probe.encoder_hash(other)
    if change == "heads":
        for block in other.blocks:
            block.attn.num_heads = 3
    elif change == "epsilon":
        other.norm.eps = 1e-12
    else:
        other.pos_embed = other.pos_embed.flip(0)
    assert probe.encoder_hash(encoder) != probe.encoder_hash(other)


def test_kept_features_that_are_damaged_are_computed_again_and_said(run, pictures, capsys):
    argv = [run, "--data", pictures, "--k", "5", "--no-baselines", "--seeds", "1"]
    script(*argv)
    first = figures(report_of(run / f"probe_{pictures.name}"))
    for path in (run / "features").iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    capsys.readouterr()
    script(*argv)
    assert capsys.readouterr().err.count("computed again") == 2
    assert figures(report_of(run / f"probe_{pictures.name}")) == first
    script(*argv)  # and mended
    assert "computed again" not in capsys.readouterr().err


def test_features_that_cannot_be_kept_are_said_in_one_line(tmp_path, monkeypatch):
    """On a full disk safetensors raises an error of its own kind."""

    def full(*args, **kwargs):
        raise probe.SafetensorError("I/O error: no space left on device")

    monkeypatch.setattr(probe, "save_file", full)
    path = tmp_path / "features" / "x.safetensors"
    with pytest.raises(UserError, match=r"could not be written .*no space left"):
        probe.kept(path, lambda: torch.ones(3, 4), HERE)
    assert list(path.parent.iterdir()) == []


def test_features_do_not_depend_on_the_batch(run, pictures):
    encoder = probe.load_encoder(str(run)).encoder
    made = data.load_data(str(pictures), img_size=16)
    whole = probe.pooled_features(encoder, data.eval_batches(made, torch.arange(120), 120), 2)
    parts = probe.shared_features(encoder, made, torch.arange(120), HERE, layers=2)
    ones = probe.pooled_features(encoder, data.eval_batches(made, torch.arange(120), 7), 2)
    for other in (parts, ones):
        torch.testing.assert_close(other, whole, atol=1e-6, rtol=1e-5)


def test_fingerprints_tell_sets_apart(tmp_path):
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    labels, classes = {"class": torch.zeros(5, dtype=torch.int64)}, {"class": ["a"]}
    one = data.fingerprint(Pictures(images, labels, classes))
    assert one == data.fingerprint(Pictures(images.clone(), labels, classes))
    images[3, 0, 0, 0] += 1
    assert one != data.fingerprint(Pictures(images, labels, classes))
    paint(tmp_path, "train", 2, 0)
    files = sorted((tmp_path / "train").rglob("*.png"))
    folder = Folder(files, {}, {}, 8)
    before = data.fingerprint(folder)
    assert before == data.fingerprint(Folder(list(files), {}, {}, 8))
    os.utime(files[0], (1, 1))
    assert before != data.fingerprint(folder)
    assert before != data.fingerprint(Folder(files[1:], {}, {}, 8))


# ------------------------------------------------------------------------------ the untrained one


def test_the_untrained_encoder_is_new_always_the_same_and_costs_no_random_numbers(run):
    encoder = probe.load_encoder(str(run)).encoder
    before = {name: p.clone() for name, p in encoder.named_parameters()}
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    fresh, again = probe.untrained(encoder, 0.1), probe.untrained(encoder, 0.1)
    assert torch.equal(torch.rand(3), wanted)
    for name, p in fresh.named_parameters():
        assert torch.equal(p, dict(again.named_parameters())[name])
        assert torch.equal(before[name], dict(encoder.named_parameters())[name])
        if "norm" in name:
            assert (p == float(name.endswith("weight"))).all()
        elif p.ndim > 1:
            assert not torch.equal(p, before[name])
    torch.manual_seed(0)
    reference = IJEPA(TINY).encoder.state_dict()
    for name, p in fresh.state_dict().items():  # as new as train.py makes them
        torch.testing.assert_close(p.std(), reference[name].std(), rtol=0.15, atol=0)


def test_the_untrained_encoder_begins_as_the_run_did_also_through_an_export(tmp_path):
    """The scale of its weights stands in the architecture, whether it was an option or not."""
    run = write_run(tmp_path / "run", init_std=None)
    loaded = probe.load_encoder(str(run))
    training = {"config": loaded.config, "step": loaded.step}
    probe.export(loaded.encoder, tmp_path / "export", "target", training)
    for source in (str(run), str(tmp_path / "export")):
        loaded = probe.load_encoder(source)
        config = probe.ProbeConfig(checkpoint=source)
        setup = probe.Setup(config, loaded, *[None] * 5, size=16, bf16=False, workers=0, cache=None)
        std = setup.encoders["untrained"].blocks[0].mlp.fc1.weight.std().item()
        assert abs(std / TINY.init_std - 1) < 0.2  # cut at two standard deviations


# ------------------------------------------------------------------------------------- few labels


def test_low_shot_samples_are_stratified_and_differ_by_seed():
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 250)[torch.randperm(400)]
    names = ["a", "b", "c"]
    sample = probe.low_shot_sample(labels, names, fraction=0.1)
    assert labels[sample].bincount().tolist() == [10, 5, 25] and len(set(sample.tolist())) == 40
    sample = probe.low_shot_sample(labels, names, per_class=13)
    assert labels[sample].bincount().tolist() == [13, 13, 13]
    assert torch.equal(sample, probe.low_shot_sample(labels, names, per_class=13))
    other = probe.low_shot_sample(labels, names, per_class=13, seed=1)
    assert not torch.equal(sample, other)


def made(n: int, seed: int, shift: float = 4.0):
    """n images of 3 classes, features around three corners."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = torch.randn(n, 8, generator=generator)
    x[torch.arange(n), y] += shift
    return {"last layer": x, "last 2 layers": torch.cat([x, x.square()], 1)}, y


@pytest.mark.parametrize("per_class", [1, 2, 5, 13])
def test_low_shot_probe_learns_from_few(per_class):
    (train_x, train_y), (report_x, report_y) = made(3 * per_class, 0), made(3000, 1)
    accuracy, chosen = probe.low_shot_probe(
        train_x, train_y, report_x, report_y, 3, torch.device("cpu")
    )
    centres = torch.stack([train_x["last layer"][train_y == c].mean(0) for c in range(3)])
    nearest = torch.cdist(report_x["last layer"], centres).argmin(1)
    assert accuracy > (nearest == report_y).double().mean() - 0.05  # another simple reader's
    assert chosen["feature"] in train_x and chosen["decay"] in probe.DECAYS
    assert accuracy * 3000 == pytest.approx(round(accuracy * 3000), abs=1e-6)


def test_low_shot_settings_are_chosen_without_the_labels_reported_on():
    (train_x, train_y), (report_x, report_y) = made(90, 0, 2.0), made(300, 1, 2.0)
    cpu = torch.device("cpu")
    right, chosen = probe.low_shot_probe(train_x, train_y, report_x, report_y, 3, cpu)
    wrong, same = probe.low_shot_probe(train_x, train_y, report_x, (report_y + 1) % 3, 3, cpu)
    assert chosen == same and right > wrong + 0.2


def test_low_shot_of_shuffled_labels_is_chance():
    (train_x, train_y), (report_x, report_y) = made(60, 0), made(3000, 1)
    train_y = train_y[torch.randperm(60, generator=torch.Generator().manual_seed(3))]
    accuracy, _ = probe.low_shot_probe(train_x, train_y, report_x, report_y, 3, torch.device("cpu"))
    assert 0.1 < accuracy < 0.6


def test_low_shot_has_a_figure_for_each_sample(run, pictures):
    script(run, "--data", pictures, "--per-class", "4", "--seeds", "5", "--no-baselines")
    report = report_of(run / f"probe_{pictures.name}_4_a_class")
    (values,) = figures(report).values()
    assert list(values) == ["12-NN", "12-NN, plain", "linear probe"]  # no more than there are
    assert all(len(v) == 5 for v in values.values()) and min(values["linear probe"]) > 90
    assert len(report["results"][0]["chosen"]) == 5
    script(run, "--data", pictures, "--fraction", "0.1", "--no-baselines")
    report = report_of(run / f"probe_{pictures.name}_0.1")
    assert len(figures(report)["class", "target encoder"]["linear probe"]) == 3


# ------------------------------------------------------------------------- crops, and fine-tuning


def test_augmented_probe_and_fine_tuning_have_their_own_reports(run, pictures):
    script(run, "--data", pictures, "--augment", "--epochs", "20", "--seeds", "2")
    found = report_of(run / f"probe_{pictures.name}_augment")
    assert [row["features"] for row in found["results"]] == ["untrained", "target encoder"]
    for values in figures(found).values():
        assert list(values) == ["linear probe, crops"] and min(values["linear probe, crops"]) > 60
    script(run, "--data", pictures, "--finetune", "--epochs", "8", "--lr", "3e-3",
           "--batch-size", "28", "--workers", "0", "--no-baselines")  # fmt: skip
    found = report_of(run / f"probe_{pictures.name}_finetune")
    (row,) = found["results"]
    assert row["figures"]["fine-tuned"][0] > 90
    recipe = row["chosen"][0]["fine-tuning"]
    assert recipe["lr"] == 3e-3 and recipe["epochs"] == 8 and recipe["batch_size"] == 28


def test_fine_tuning_with_few_labels_has_a_figure_for_each_sample(run, pictures, monkeypatch):
    learned, fine_tune = [], probe.fine_tune

    def spy(encoder, train, choose, report, *args, **kwargs):
        learned.append(train)
        assert not set(train.index.tolist()) & set(choose.index.tolist())
        return fine_tune(encoder, train, choose, report, *args, **kwargs)

    monkeypatch.setattr(probe, "fine_tune", spy)
    script(run, "--data", pictures, "--finetune", "--per-class", "5", "--epochs", "1",
           "--workers", "0", "--no-baselines")  # fmt: skip
    report = report_of(run / f"probe_{pictures.name}_finetune_5_a_class")
    assert len(figures(report)["class", "target encoder"]["fine-tuned"]) == 3
    assert [x.labels.bincount().tolist() for x in learned] == [[5, 5, 5]] * 3
    assert learned[0].index.tolist() != learned[1].index.tolist()


def test_objects_to_be_counted_are_neither_cropped_nor_mixed(run, monkeypatch):
    seen = []
    monkeypatch.setattr(probe, "fine_tune", lambda *args, **_: seen.append(args[5]) or stop())
    monkeypatch.setattr(probe, "augmented_probe", lambda *_, **more: seen.append(more) or stop())

    def stop():
        raise UserError("enough")

    for protocol in ("--finetune", "--augment"):
        with pytest.raises(SystemExit):
            script(run, "--data", "shapes", "--images", "400", protocol)
    recipe, crops = seen
    assert recipe.crop_scale == (1.0, 1.0) and recipe.mixup == recipe.cutmix == 0
    assert recipe.rand_augment is None and crops["crop_scale"] == (1.0, 1.0)


# ------------------------------------------------------------------------------------------ CLEVR


def make_clevr(root: Path) -> Path:
    """A tree like CLEVR's, of 48 small scenes a part."""
    base = root / "clevr" / "CLEVR_v1.0"
    (base / "scenes").mkdir(parents=True)
    for part in ("train", "val"):
        (base / "images" / part).mkdir(parents=True)
        scenes = []
        for i in range(48):
            name = f"CLEVR_{part}_{i:06d}.png"
            Image.new("RGB", (48, 32), (5 * i, 0, 0)).save(base / "images" / part / name)
            depths = [7.5 + i % 6 * 0.5 + j for j in range(3 + i % 8)]
            objects = [{"pixel_coords": [1, 2, depth]} for depth in reversed(depths)]
            scenes.append({"image_filename": name, "objects": objects})
        content = json.dumps({"scenes": scenes[::-1]})  # in another order than the files
        (base / "scenes" / f"CLEVR_{part}_scenes.json").write_text(content)
    return root


def test_clevr_counts_and_distances_come_from_the_scenes(tmp_path):
    folder = data.load_data("clevr", "test", str(make_clevr(tmp_path)), 16)
    assert isinstance(folder, Folder) and len(folder) == 48
    assert folder.labels["count"].tolist() == [i % 8 for i in range(48)]
    # The nearest is at 7.5, 8, 8.5, ... 10: a distance on a boundary counts as nearer.
    assert folder.labels["distance"].tolist() == [max(0, i % 6 - 1) for i in range(48)]
    assert [len(folder.classes[task]) for task in ("count", "distance")] == [8, 6]
    picture = folder.centre(torch.tensor([30]))
    assert picture.shape == (1, 3, 16, 16) and (picture[0, 0] == 150).all()


def test_clevr_distance_beyond_the_last_boundary():
    boundaries = data.CLEVR_DISTANCES
    assert torch.bucketize(torch.tensor(10.01, dtype=torch.float64), boundaries) == 5


def test_clevr_that_is_damaged_is_said_in_one_line(tmp_path):
    root = make_clevr(tmp_path)
    path = root / "clevr" / "CLEVR_v1.0" / "scenes" / "CLEVR_train_scenes.json"
    path.write_text(path.read_text()[:-50])
    with pytest.raises(UserError, match=r"clevr is not in .* or is damaged") as caught:
        data.load_data("clevr", "train", str(root), 16)
    assert "\n" not in str(caught.value)


def test_clevr_is_probed_on_both_tasks(run, tmp_path):
    root = make_clevr(tmp_path)
    script(run, "--data", "clevr", "--data-dir", root, "--no-baselines", "--task", "count")
    assert [r["task"] for r in report_of(run / "probe_clevr")["results"]] == ["count"]


# --------------------------------------------------------------------------------------- mistakes


def fails(capsys, *argv) -> str:
    """The one line that the script ends with, and nothing else."""
    with pytest.raises(SystemExit) as ended:
        script(*argv)
    captured = capsys.readouterr().err
    lines = [line for line in captured.splitlines() if line.startswith("probe.py: error: ")]
    assert ended.value.code == 2 and len(lines) == 1 and "Traceback" not in captured
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ([], "which encoder"),
        (["{run}"], "does not say what it was trained on: give --data"),
        (["{run}/nothing.pt", "--data", "{pictures}"], "nothing.pt"),
        (["{run}", "--data", "nowhere"], "nowhere is neither a folder nor one of"),
        (["{run}", "--data", "{pictures}", "--finetune", "--augment"], "contradict"),
        (["{run}", "--data", "{pictures}", "--fraction", "0.1", "--per-class", "3"], "contradict"),
        (["{run}", "--data", "{pictures}", "--augment", "--per-class", "3"], "all labels"),
        (["{run}", "--data", "{pictures}", "--lr", "1"], "--lr needs --finetune"),
        (["{run}", "--data", "{pictures}", "--epochs", "3"], "--epochs needs --augment"),
        (["{run}", "--data", "{pictures}", "--layers", "4"], "--layers 4: the encoder has 3"),
        (["{run}", "--data", "{pictures}", "--finetune", "--k", "3"], "no effect with --finetune"),
        (["{run}", "--data", "{pictures}", "--k", "0"], "--k is 0: it must be at least 1"),
        (["{run}", "--data", "{pictures}", "--k", "121"], "only 120 pictures"),
        (["{run}", "--data", "{pictures}", "--img-size", "18"], "--img-size 18"),
        (["{run}", "--data", "{pictures}", "--task", "colour"], "no task 'colour'.* class"),
        (["{run}", "--data", "{pictures}", "--fraction", "2"], "at most 1"),
        (["{run}", "--data", "{pictures}", "--fraction", "0.001"], "leaves none .*'blue'"),
        (["{run}", "--data", "{pictures}", "--per-class", "41"], r"'blue' has only \d\d"),
        (["{run}", "--data", "{pictures}", "--images", "3"], "too few|only"),
        (["{run}", "--data", "{pictures}", "--temperature", "0"], "must be positive"),
        (["{run}", "--data", "{pictures}", "--finetune", "--lr", "-1"], "--lr is -1.*positive"),
        (["{run}", "--data", "{pictures}", "--finetune", "--weight-decay", "nan"], "decay is nan"),
        (["{run}", "--data", "{pictures}", "--frobnicate"], "unrecognized"),
    ],
)
def test_mistakes_are_said_in_one_line(run, pictures, capsys, argv, reason):
    import re

    argv = [x.format(run=run, pictures=pictures) for x in argv]
    assert re.search(reason, fails(capsys, *argv))


def test_a_class_of_the_test_pictures_that_training_lacks(run, tmp_path, capsys):
    root = paint(paint(tmp_path / "set", "train", 20, 0), "test", 5, 1)
    shutil.copytree(root / "test" / "red", root / "test" / "violet")
    assert "have different classes" in fails(capsys, run, "--data", root)
    (root / "train" / "violet").mkdir()  # known, but empty
    data.scan_folder.cache_clear()
    message = fails(capsys, run, "--data", root, "--k", "5")
    assert "no picture to learn from" in message and "'violet'" in message


def test_fewer_pictures_than_classes(run, tmp_path, capsys):
    root = tmp_path / "many"
    for number in range(50):
        (root / "train" / f"c{number:02d}").mkdir(parents=True)
        image = Image.new("RGB", (16, 16), (number, 0, 0))
        image.save(root / "train" / f"c{number:02d}" / "a.png")
    message = fails(capsys, run, "--data", root, "--k", "5")
    assert "only 45 pictures to learn 50 classes from" in message


def test_features_that_are_not_finite_are_named(tmp_path, pictures, capsys):
    run = write_run(tmp_path / "broken")
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    checkpoint["model"]["target_encoder.blocks.1.mlp.fc2.bias"][0] = float("nan")
    torch.save(checkpoint, run / "last.pt")
    message = fails(capsys, run, "--data", pictures, "--no-baselines")
    assert "layer 2 of 3 are not finite for 120 of 120 images" in message


def test_an_output_folder_that_is_a_file(run, pictures, capsys, tmp_path):
    (tmp_path / "out").write_text("a file")
    assert "could not be written" in fails(
        capsys, run, "--data", pictures, "--out", tmp_path / "out"
    )


# --------------------------------------------------------------------------------------- pictures


def test_the_confusion_picture_shows_the_classes_with_most_errors(tmp_path, monkeypatch):
    figure = {}
    monkeypatch.setattr(probe, "_save_figure", lambda fig, path: figure.update({path.name: fig}))
    matrix = torch.eye(30, dtype=torch.int64) * 50
    matrix[25, 3] = 50  # half of class 25 is taken for 3
    names = [f"class {i}" for i in range(30)]
    probe.draw_confusion(tmp_path / "c.png", matrix, names, "made")
    axis = figure["c.png"].axes[0]
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert len(labels) == 20 and "class 25" in labels
    texts = {(t.get_position()[1], t.get_position()[0]): t.get_text() for t in axis.texts}
    row = labels.index("class 25")
    assert texts[row, row] == "50" and texts[0, 0] == "100"
    if "class 3" in labels:
        assert texts[row, labels.index("class 3")] == "50"
    assert "20 classes with the most errors" in axis.get_title()


def test_the_neighbours_picture_marks_those_of_another_class(tmp_path, monkeypatch, pictures):
    figure = {}
    monkeypatch.setattr(probe, "_save_figure", lambda fig, path: figure.update({path.name: fig}))
    sets = probe.load_sets(str(pictures), "data", 16, HERE)
    bank_y, report_y = sets.labels("class")
    wrong = (bank_y == 0).nonzero()[:5, 0].repeat(len(report_y), 1)  # all of them blue
    probe.draw_neighbours(tmp_path / "n.png", sets, "class", wrong, torch.zeros_like(report_y))
    axes = figure["n.png"].axes
    titles = [axis.get_title() for axis in axes]
    assert titles[0] == "blue?" and titles[1:6] == ["blue"] * 5
    assert titles[6] == "green?" and titles[7:12] == ["(blue)"] * 5
    assert "33.3 %" in figure["n.png"].get_suptitle()
    shown = axes[1].images[0].get_array()
    wanted = sets.train.centre(sets.bank[wrong[0, :1]])[0].permute(1, 2, 0)
    assert np.array_equal(shown, wanted)
