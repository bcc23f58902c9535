"""The paper's Tables 6 to 14 in small, and what the released mask sampler's errors cost.

    python tests/benchmark/ablations.py --minutes 60                          vit_nano on shapes
    python tests/benchmark/ablations.py --minutes 600 --model vit_tiny --data cifar10 --steps 10000
    python tests/benchmark/ablations.py --minutes 60 --tables 6,7,masks --seeds 3
    python tests/benchmark/ablations.py --minutes 0                           show the commands

Here is which rows there are and which command each is; `sweep.py` runs them, says what the columns
of results/ablations.csv are, and goes on where it was stopped. Rows with the same options, such as
the default that stands in nine tables, are one run: its tag names all of its rows, "6 multiblock;
7 representation; ...".
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import sweep  # noqa: E402

from data import UserError, option, parse_options, run_script  # noqa: E402
from ijepa import MODELS  # noqa: E402

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


def main() -> None:
    config, _ = parse_options(AblationConfig, __doc__)
    if config.minutes is None:
        raise UserError("for how long? Give --minutes, 0 to see the commands only")
    keep = None if config.keep is None else Path(config.keep)
    out = Path(config.out)
    sweep.sweep(runs(config), config.minutes, out, keep, config.note, config.again)


if __name__ == "__main__":
    run_script(main)
