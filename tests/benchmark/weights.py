"""The weights that come with the project, and their model card.

    python tests/benchmark/weights.py ship RUN TAG [NAME]    of a run that has a line in runs.csv
    python tests/benchmark/weights.py card                   write the cards again, from the records

`ship` puts the target encoder of RUN, in half precision, into results/weights/NAME, where probe.py
finds it by NAME (default: vit_nano_cifar10). What its card says comes from the file, from the line
of results/runs.csv called TAG, and from the reports of probe.py in results/ that are about these
very weights, by their checksum. So, after `ship`, `record.py probe` with NAME, and then `card`.
"""

import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import record  # noqa: E402
import sweep  # noqa: E402

import probe  # noqa: E402
from data import whole_file  # noqa: E402

RECIPE = (
    "batch_size", "lr", "start_lr", "final_lr", "warmup_epochs", "weight_decay",
    "final_weight_decay", "momentum", "final_momentum", "crop_scale", "flip", "masks",
)  # fmt: skip


def ship(run: str, tag: str, name: str = "vit_nano_cifar10") -> None:
    """Export the target encoder of a run, and write its card."""
    loaded = probe.load_encoder(run)
    if not loaded.config:
        sys.exit(f"{run} does not say how it was trained: give a run of train.py")
    config = loaded.config
    line(tag, config["seed"], loaded.step)
    folder = probe.WEIGHTS / name
    # The set that these pictures are of, whatever folder they lay in.
    training = {"config": config | {"data": name.rpartition("_")[2]}, "step": loaded.step}
    probe.export(loaded.encoder, folder, loaded.which, training, half=True)
    (folder / "timm.safetensors").unlink()  # `probe.py NAME --export FOLDER` makes it again
    shutil.copy(ROOT / "LICENSE", folder / "LICENSE")
    command = f"python tests/benchmark/weights.py ship RUN {tag!r}"
    record.write(f"weights_{name}", command, tag=tag)
    card()


def line(tag: str, seed: int, steps: int) -> dict:
    """The line of the finished run of this name, seed and length."""
    rows = sweep.read(record.RESULTS / "runs.csv")
    rows = [row for row in rows if row["tag"] == tag and not row["error"]]
    rows = [row for row in rows if (int(row["seed"]), int(row["steps"])) == (seed, steps)]
    if len(rows) != 1:
        sys.exit(f"results/runs.csv has {len(rows)} runs {tag} of {steps} steps with seed {seed}")
    return rows[0]


def text(name: str) -> str:
    """The model card."""
    loaded = probe.load_encoder(name)
    config, encoder = loaded.config, loaded.encoder
    run = line(record.record(f"weights_{name}")["tag"], config["seed"], loaded.step)
    file = probe.coming_along()[name] / "model.safetensors"
    curve = json.loads(run["curve"])
    size = sum(p.numel() for p in encoder.parameters()) / 1e6
    recipe = "\n".join(f"| `{key}` | {config[key]} |" for key in RECIPE)
    points = "\n".join(
        f"| {p['epoch']:.1f} | {p['train_minutes']:.0f} | {p['val_loss']:.3f} | {p['knn']:.1f} "
        f"| {p['rankme']:.1f} |"
        for p in curve
    )
    held = {column: json.loads(run[column])["class"] for column in ("knn", "linear")}
    reports = [r for r in record.reports() if r["checkpoint"]["sha256"] == loaded.sha256]
    found = "\n".join(record.probe_table(reports)) if reports else "Not measured yet."
    return CARD.format(
        name=name, size=size, width=encoder.embed_dim, layers=len(encoder.blocks),
        heads=encoder.blocks[0].attn.num_heads, patch=encoder.patch_size,
        side=encoder.grid[0] * encoder.patch_size, megabytes=file.stat().st_size / 1e6,
        sha256=loaded.sha256, step=loaded.step, tag=run["tag"], epochs=float(run["epochs"]),
        note=run["note"],
        minutes=curve[-1]["train_minutes"], all_minutes=float(run["minutes"]),
        hardware=run["hardware"], torch=run["torch"], date=run["date"], command=run["command"],
        recipe=recipe, points=points, found=found, **held,
    )  # fmt: skip


def card() -> None:
    """Write all cards."""
    for name, folder in probe.coming_along().items():
        with whole_file(folder / "README.md") as temporary:
            temporary.write_text(text(name))


CARD = """\
# `{name}`: an I-JEPA encoder

The *target* encoder, which the paper evaluates, of a small I-JEPA: a ViT of width {width} with
{layers} layers and {heads} heads, patches of {patch} pixels, pictures of {side} pixels, no class
token; {size:.2f} million parameters in half precision ({megabytes:.1f} MB). It comes from this
project alone; nothing of the released I-JEPA is in it.

```bash
python probe.py {name}                          # kNN and linear probe
python probe.py {name} --data path/to/folder    # on other pictures
python probe.py {name} --export exported        # for transformers and timm, in float32
```

```python
import data, probe

encoder = probe.load_encoder("{name}").encoder
features = encoder(data.normalize(pictures)).mean(1)  # (B, 3, {side}, {side}) -> (B, {width})
```

transformers reads this folder as it is, with `IJepaModel.from_pretrained`.

## What it was trained on

{note}.

Of the 50,000 training pictures 45,000, without their labels; the other 5,000 were held out, to
watch it. Crops and mirroring, nothing that changes colours. No test picture was seen.

## How

{epochs:.1f} epochs ({step} steps) in {minutes:.0f} minutes of training, {all_minutes:.0f} with
all evaluations, on {hardware} ({date}, torch {torch}): the run "{tag}" of `results/runs.csv`,

```bash
{command}
```

| | |
|---|---|
{recipe}

On held-out training pictures, as it was trained:

| epochs | minutes | loss | 20-NN, % | RankMe |
|---|---|---|---|---|
{points}

At the end: 20-NN {knn:.1f} %, linear probe {linear:.1f} %.

## What it is good for

{found}

It shows what the method learns in so short a time, and saves a class the wait. It is no
general-purpose encoder: it has seen nothing but ten kinds of things in pictures of {side} pixels.

## Licence

MIT, as the project. SHA-256 of `model.safetensors`: `{sha256}`.
"""


if __name__ == "__main__":
    commands = {"ship": ship, "card": card}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]](*sys.argv[2:])
