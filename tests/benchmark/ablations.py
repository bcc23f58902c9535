"""The paper's Tables 6 to 14 in small, and what the released mask sampler's errors cost.

    python tests/benchmark/ablations.py --minutes 60                          vit_nano on shapes
    python tests/benchmark/ablations.py --minutes 600 --model vit_tiny --data cifar10 --steps 10000
    python tests/benchmark/ablations.py --minutes 60 --tables 6,7,masks --seeds 3
    python tests/benchmark/ablations.py --minutes 0                           show the commands
    python tests/benchmark/ablations.py --show                                what came of them

Here is which rows there are and which command each is; `sweep.py` runs them, says what the columns
of results/ablations.csv are, and goes on where it was stopped. Rows with the same options, such as
the default that stands in nine tables, are one run: its tag names all of its rows, "6 multiblock;
7 representation; ...".
"""

import json
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import sweep  # noqa: E402

from data import UserError, option, parse_options, run_script  # noqa: E402
from ijepa import MODELS  # noqa: E402
from probe import mean_std  # noqa: E402

TABLES = (*map(str, range(6, 15)), "masks")  # "masks" is ours, the others are the paper's


@dataclass(frozen=True)
class AblationConfig:
    """Which rows, of which model, for how long."""

    minutes: float | None = option(None, "for all of it; 0: show the commands, run nothing")
    model: str = option("vit_nano", "which model", MODELS)
    data: str = option("shapes", "which pictures, as for train.py")
    steps: int = option(500, "of each run")
    seeds: int = option(1, "0, 1, ...: all rows with the first before any with the second")
    tables: str = option(",".join(TABLES), "which tables")
    out: str = option("results/ablations.csv", "the file to add to")
    options: str = option("", "further options of train.py for every run, in quotation marks")
    keep: str | None = option(None, "a folder for the runs' folders (default: removed)")
    note: str = option("", "what else to say of these runs, such as which copy of the pictures")
    again: bool = option(False, "repeat what failed or was stopped")
    show: bool = option(False, "print what is in --out as tables, one for each kind; run nothing")


def rows(model: str) -> list[tuple[str, str, list[str]]]:
    """Table, setting and words of the command for each row; settings as in results/paper.csv."""
    config = MODELS[model].config
    found = [("6", name, ["--masks", name]) for name in ("rasterized", "block", "random")]
    found.insert(0, ("6", "multiblock", []))
    found += [("7", "representation", []), ("7", "pixels", ["--target", "pixels"])]
    for low, high in ((0.075, 0.2), (0.1, 0.2), (0.125, 0.2), (0.15, 0.2), (0.2, 0.25), (0.2, 0.3)):
        scale = ["--target-scale", str(low), str(high)] if (low, high) != (0.15, 0.2) else []
        found.append(("8", f"{low}-{high}", scale))
    for low in (0.4, 0.65, 0.75, 0.85):
        scale = ["--context-scale", str(low), "1.0"] if low != 0.85 else []
        found.append(("9", f"{low}-1.0", scale))
    for count in (1, 2, 3, 4):
        found.append(("10", str(count), ["--num-targets", str(count)] if count != 4 else []))
    found += [("11", "output", []), ("11", "input", ["--target-mask", "input"])]
    half = str(max(1, config.predictor_depth // 2))
    found += [("12", "half", ["--predictor-depth", half]), ("12", "full", [])]
    for setting, final in (("rising", "0.4"), ("fixed", "0.05")):
        start = "0.04" if setting == "rising" else "0.05"
        found.append(("13", setting, ["--weight-decay", start, "--final-weight-decay", final]))
    found += [("14", "narrow", []), ("14", "wide", ["--predictor-dim", str(config.embed_dim)])]
    released = ["tests/benchmark/released_masks.py"]
    return [*found, ("masks", "ours", []), ("masks", "released", released)]


def runs(config: AblationConfig) -> list[sweep.Run]:
    """What there is to run, in order, each command once.

    Raises UserError for unknown tables, and for options that sweep.py gives itself.
    """
    wanted = config.tables.split(",")
    if unknown := [table for table in wanted if table not in TABLES]:
        raise UserError(f"--tables {config.tables}: choose from {','.join(TABLES)}, not {unknown}")
    tags: dict[tuple[str, ...], list[str]] = {}
    chosen = {}
    for table, setting, words in rows(config.model):
        tags.setdefault(tuple(words), []).append(f"{table} {setting}")
        if table in wanted:
            chosen[tuple(words)] = words
    lines = [("; ".join(tags[key]), words) for key, words in chosen.items()]
    common = ["--model", config.model, "--data", config.data, "--steps", str(config.steps)]
    return sweep.make_runs(lines, common + shlex.split(config.options), config.seeds)


def is_row(tag: str, table: str, setting: str) -> bool:
    """Whether a run with this tag is a row's."""
    return f"{table} {setting}" in tag.split("; ")


def kinds(lines: list[dict]) -> dict[str, list[dict]]:
    """The finished runs of a CSV by the options that all rows share: these alone compare."""
    found: dict[str, list[dict]] = {}
    for line in lines:
        if not line["error"]:
            common = sweep.common_options(line["command"])
            # Two folders look alike in commands, which show no paths.
            common = common.replace("--data FOLDER", f"--data {line['data']}")
            found.setdefault(common, []).append(line)
    return found


def by_seed(lines: Iterable[dict], column: str = "linear") -> dict[int, float]:
    """Accuracy (%) of the trained encoder, mean over the tasks, for each seed."""
    return {int(x["seed"]): mean_std([*json.loads(x[column]).values()])[0] for x in lines}


def chance(runs: Iterable[dict[int, float]]) -> float | None:
    """Standard deviation of a single run (points) around its row, from all rows together.

    Seeds differ in the same way in every row: the same first weights, the same pictures. So it goes
    by the differences between two seeds, of which half the variance is a single run's. None, if no
    two runs have been done with the same two seeds.
    """
    runs = list(runs)
    squares, degrees = 0.0, 0
    for one, two in combinations(sorted({seed for of in runs for seed in of}), 2):
        gaps = [of[one] - of[two] for of in runs if one in of and two in of]
        squares += (len(gaps) - 1) * mean_std(gaps)[1] ** 2 / 2 if gaps else 0
        degrees += max(0, len(gaps) - 1)
    return (squares / degrees) ** 0.5 if degrees else None


def least_gap(noise: float, seeds: int) -> float:
    """What it takes to believe a mean difference (points): two of its standard errors.

    Of a mean over so many differences between two runs, each with the standard deviation `noise`.
    """
    return 2 * noise * (2 / seeds) ** 0.5


def difference(
    first: dict[int, float], second: dict[int, float], noise: float | None
) -> tuple[float, float]:
    """How far the first is ahead, seed by seed (points), and what it takes to believe it."""
    gaps = [first[seed] - second[seed] for seed in first if seed in second]
    known = noise is not None and gaps
    return mean_std(gaps)[0], least_gap(noise, len(gaps)) if known else float("inf")


def table(lines: list[dict]) -> list[str]:
    """The runs of one kind in Markdown: each row, and how far from the method as it is."""
    model = json.loads(lines[0]["config"])["model"]
    accuracies = {name: {} for name in ("knn", "linear")}
    for column, of in accuracies.items():
        for tag in dict.fromkeys(line["tag"] for line in lines):
            of[tag] = by_seed((line for line in lines if line["tag"] == tag), column)
    noise = {column: chance(of.values()) for column, of in accuracies.items()}
    shown = ["| table | row | seeds | 20-NN | linear probe | 20-NN, ahead of ours | linear, same |"]
    shown.append("|---" * 7 + "|")
    for name in ("raw pixels", "untrained"):
        cells = []
        for column in accuracies:
            found = [json.loads(line["baselines"])[name].values() for line in lines]
            cells.append(f"{mean_std([mean_std([t[column] for t in x])[0] for x in found])[0]:.1f}")
        shown.append(f"| | {name} | | {' | '.join(cells)} | | |")
    for number, setting, _ in rows(model):
        tags = [tag for tag in accuracies["linear"] if is_row(tag, number, setting)]
        ours = [tag for tag in accuracies["linear"] if is_row(tag, "masks", "ours")]
        if not tags or (tags == ours and (number, setting) != ("masks", "ours")):
            continue
        cells, ahead = [], []
        for column, of in accuracies.items():
            values = of[tags[0]]
            mean, spread = mean_std(list(values.values()))
            cells.append(f"{mean:.1f}" + f" ± {spread:.1f}" * (len(values) > 1))
            if ours and tags != ours:
                gap, least = difference(values, of[ours[0]], noise[column])
                ahead.append(f"{gap:+.1f}" + ("" if abs(gap) >= least else " (undecided)"))
            else:
                ahead.append("")
        cells = [str(len(accuracies["linear"][tags[0]])), *cells, *ahead]
        shown.append(f"| {number} | {setting} | {' | '.join(cells)} |")
    most = max(len(of) for of in accuracies["linear"].values())
    for seeds in range(2, most + 1) if None not in noise.values() else ():
        knn, linear = (least_gap(s, seeds) for s in noise.values())
        needed = f"{knn:.1f} points of 20-NN or {linear:.1f} of the linear probe"
        shown += ["", f"With {seeds} seeds it takes {needed} to tell two rows apart."]
    return shown


def main() -> None:
    config, _ = parse_options(AblationConfig, __doc__)
    if config.show:
        for common, lines in kinds(sweep.read(Path(config.out))).items():
            print(f"`{common}`: {len(lines)} runs\n")
            print("\n".join(table(lines)) + "\n")
        return
    if config.minutes is None:
        raise UserError("for how long? Give --minutes, 0 to see the commands only")
    keep = None if config.keep is None else Path(config.keep)
    out = Path(config.out)
    sweep.sweep(runs(config), config.minutes, out, keep, config.note, config.again)


if __name__ == "__main__":
    run_script(main)
