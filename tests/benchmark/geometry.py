"""Why 20-NN may fall while a linear probe rises: what fills the representation of a run.

    python tests/benchmark/geometry.py RUN [RUN ...] --data FOLDER

20-NN goes by cosines, which the few directions with the largest variance decide; a linear probe can
take what it needs from any direction. So, of the untrained and of the trained target encoder, on
pictures that training never saw, pooled over patches:

    20-NN          of the features as they are, as train.py reports it
    ... standard   of each feature minus its mean, by its standard deviation
    ... whitened   along the principal axes, each by its standard deviation: all count the same
    linear         train.py's small probe at the end of a run
    RankMe, top 3  effective dimensions, and the share of the variance in the three largest (%)
    colour         share of the features' variance (%) that a linear regression on the mean and
                   spread of red, green and blue explains: what each picture says without its shape

Prints a table in Markdown; the first line is colour alone, read by 20-NN and by the probe.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import probe  # noqa: E402
import train  # noqa: E402
from data import UserError, eval_batches, hold_out, load_data, run_script  # noqa: E402
from ijepa import IJEPA, IJEPAConfig  # noqa: E402

IMAGES = 4_000  # to learn from; a quarter as many choose, and as many report


def explained(x: Tensor, y: Tensor) -> float:
    """Share of the variance of y (n, E) that is linear in x (n, F), on the same pictures."""
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    rest = y - x @ torch.linalg.lstsq(x, y).solution
    return 1 - float(rest.square().sum() / y.square().sum())


def whiten(train: Tensor, *others: Tensor) -> list[Tensor]:
    """Along the principal axes of `train`, each of unit variance there: (n, D) -> (n, D)."""
    mean = train.double().mean(0)
    values, axes = torch.linalg.eigh((train.double() - mean).T.cov())
    scale = values.clamp(min=1e-6 * values.max()).rsqrt()
    return [((x.double() - mean) @ axes * scale).float() for x in (train, *others)]


def describe(features: list[Tensor], labels: list[Tensor], colours: Tensor) -> list[float]:
    """The columns of the table, from features and labels of train, choose and report."""
    (train_x, _, report_x), (train_y, _, report_y) = features, labels

    def nearest(train: Tensor, report: Tensor) -> float:
        return 100 * probe.accuracy(probe.knn(train, train_y, report).weighted, report_y)

    mean, std = train_x.mean(0), train_x.std(0)
    white = whiten(train_x, report_x)
    variances = torch.linalg.eigvalsh((train_x - mean).double().T.cov())
    (row,) = probe.compare({"": features}, {"class": labels})
    return [
        nearest(train_x, report_x),
        nearest((train_x - mean) / std, (report_x - mean) / std),
        nearest(*white),
        row["linear"],
        probe.rankme(train_x),
        100 * float(variances[-3:].sum() / variances.sum()),
        100 * explained(colours, train_x),
    ]


def main() -> None:
    *runs, flag, name = sys.argv[1:] or [""]
    if not runs or flag != "--data":
        raise UserError("give the folders of runs, and --data NAME or FOLDER")
    print("| encoder | 20-NN | standard | whitened | linear | RankMe | top 3 | colour |")
    print("|---|" + "---|" * 7)

    def show(of: str, features: list[Tensor]) -> None:
        cells = " | ".join(f"{value:.1f}" for value in describe(features, labels, colours[0]))
        print(f"| {of} | {cells} |", flush=True)

    for number, run in enumerate(runs):
        checkpoint, trained = train.read_last(Path(run)), probe.load_encoder(run).encoder
        architecture = IJEPAConfig(**checkpoint["architecture"])
        if number == 0:
            data = load_data(name, "train", "data", architecture.img_size)
            learn, held = hold_out(data)
            held = held[: IMAGES // 2]
            parts = [learn[:IMAGES], held[::2], held[1::2]]
            task = next(iter(data.labels))
            labels = [data.labels[task][part] for part in parts]
            colours = []
            for part in parts:
                batches = [(x.mean((2, 3)), x.std((2, 3))) for x in eval_batches(data, part)]
                colours.append(torch.cat([torch.cat(both, dim=1) for both in batches]))
            show("none: colours alone", colours)
        torch.manual_seed(checkpoint["config"]["seed"])
        encoders = {"untrained": IJEPA(architecture).target_encoder, "trained": trained}
        for which, encoder in encoders.items():
            taken = [probe.pooled_features(encoder, eval_batches(data, part)) for part in parts]
            show(f"{Path(run).name}, {which}", taken)


if __name__ == "__main__":
    run_script(main)
