"""What comes with the project: weights, and cards that say nothing but what was recorded."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "benchmark"))

import record  # noqa: E402
import sweep  # noqa: E402
import weights  # noqa: E402

import data  # noqa: E402
import probe  # noqa: E402
import train  # noqa: E402


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of two steps with its line in a runs.csv, and a project of its own to ship it in."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(probe, "WEIGHTS", tmp_path / "results" / "weights")
    options = "--batch-size 8 --eval-images 40 --eval-every 1 --steps 2 --predictor-depth 1"
    options += " --img-size 16 --patch-size 8 --device cpu --workers 0"
    runs = sweep.make_runs([("mine", [])], options.split(), 1)
    sweep.sweep(runs, 5, record.RESULTS / "runs.csv", tmp_path / "kept", "pictures: made up")
    return tmp_path / "kept" / "mine_seed0"


def test_ship_and_card(run, tmp_path):
    # The task is called kind there; the card is for sets of one task called class.
    path = record.RESULTS / "runs.csv"
    path.write_text(path.read_text().replace('""kind""', '""class""'))
    weights.ship(str(run), "mine", "small_cifar10")
    folder = record.RESULTS / "weights" / "small_cifar10"
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "LICENSE",
    }  # fmt: skip
    shipped, given = probe.load_encoder("small_cifar10"), probe.load_encoder(str(run))
    for name, weight in given.encoder.state_dict().items():
        assert torch.equal(shipped.encoder.state_dict()[name], weight.half().float())
    assert (shipped.which, shipped.step, shipped.config["data"]) == ("target", 2, "cifar10")
    assert str(tmp_path) not in json.dumps(shipped.config)
    card = (folder / "README.md").read_text()
    assert "pictures: made up" in card and shipped.sha256 in card and "Not measured yet." in card
    row = weights.line("mine", 0, 2)
    linear = json.loads(row["linear"])["class"]
    assert f"linear probe {linear:.1f} %" in card and row["command"] in card

    # A report counts if it is about these weights, and no other does.
    report = {
        "what": "small", "command": "python probe.py small_cifar10", "seconds": 3.0,
        "hardware": "an abacus", "date": "today", "pictures": {"report": 10},
        "checkpoint": {"sha256": shipped.sha256},
        "results": [
            {"features": "target encoder", "task": "class", "figures": {"20-NN": [12.34]}},
        ],
    }  # fmt: skip
    (record.RESULTS / "probe_small.json").write_text(json.dumps(report))
    weights.card()
    card = (folder / "README.md").read_text()
    assert "12.3" in card and "Not measured yet." not in card
    report["checkpoint"]["sha256"] = "another"
    (record.RESULTS / "probe_small.json").write_text(json.dumps(report))
    assert "Not measured yet." in weights.text("small_cifar10")


def test_what_cannot_be_shipped(run):
    with pytest.raises(SystemExit, match="has 0 runs other of 2 steps with seed 0"):
        weights.ship(str(run), "other", "small_cifar10")
    golden = ROOT / "tests" / "golden" / "hf_ijepa"
    with pytest.raises(SystemExit, match="does not say how it was trained"):
        weights.ship(str(golden), "mine", "small_cifar10")
    assert not probe.WEIGHTS.exists()


@pytest.mark.parametrize("name", probe.coming_along())
def test_what_comes_along_is_an_encoder_with_the_card_that_its_records_give(name):
    folder = probe.WEIGHTS / name
    assert (folder / "README.md").read_text() == weights.text(name)
    loaded = probe.load_encoder(name)
    assert loaded.which == "target" and loaded.config["data"] in data.NAMED
    model = train.MODELS[loaded.config["model"]].config
    encoder = loaded.encoder
    assert (encoder.embed_dim, len(encoder.blocks)) == (model.embed_dim, model.depth)
    pictures = data.load_data("shapes", "test", img_size=32, count=64).images
    features = encoder(data.normalize(pictures)).mean(1)
    assert features.isfinite().all() and probe.rankme(features) > 5  # not collapsed
