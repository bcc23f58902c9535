# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 6. Ablations: which choice matters?
#
# An ablation takes one thing away, or changes it, and leaves the rest. Tables 6 to 14 of [the
# paper](https://arxiv.org/abs/2301.08243) (Section 9, Appendix C) do this with ViT-B to ViT-H on
# ImageNet, for weeks of GPU time. `tests/benchmark/ablations.py` does the same **in small**:
# another model, other pictures, and far fewer steps. So the figures cannot be the same; what can be
# compared is the *order* of the rows.

# %%
import classroom

classroom.begin()

# %%
import sys
from itertools import pairwise

import matplotlib.pyplot as plt
import torch

from data import generator_for
from ijepa import MaskCollator
from probe import mean_std

sys.path.insert(0, "tests/benchmark")
import ablations

# %% [markdown]
# Two files: `results/paper.csv`, typed in from the paper, and `results/ablations.csv`, a line for
# each run that was done. Rows that nobody has run yet say "not measured".

# %%
paper = ablations.read(classroom.ROOT / "results" / "paper.csv")
measured = ablations.read(classroom.ROOT / "results" / "ablations.csv")
kinds = sorted({(row["model"], row["data"], row["steps"]) for row in measured})
SHOWN = ("vit_nano", "shapes", "500")  # model, pictures, steps
if kinds:  # of several, the one with the most rows: they do not mix
    SHOWN = max(
        kinds, key=lambda k: sum((r["model"], r["data"], r["steps"]) == k for r in measured)
    )
model, data, steps = SHOWN
print(f"paper: {len(paper)} rows; measured: {len(measured)} runs")
print(f"shown: {model} on {data}, {steps} steps")


# %%
def ours(table: str, setting: str, which: str = "linear") -> list[float]:
    """The accuracies of a row in percent, one a seed; empty if it was not measured."""
    wanted = (table, setting, *SHOWN)
    keys = ("table", "setting", "model", "data", "steps")
    return [float(r[which]) for r in measured if tuple(r[key] for key in keys) == wanted]


TITLES = {
    "6": "Masks",
    "7": "What is predicted",
    "8": "Scale of the targets",
    "9": "Scale of the context block",
    "10": "Number of targets",
    "11": "Where targets are cut",
    "12": "Depth of the predictor",
    "13": "Weight decay",
    "14": "Width of the predictor",
}
tables = {table: [row for row in paper if row["table"] == table] for table in TITLES}
assert sum(len(rows) for rows in tables.values()) == len(paper) == 28
known = {(str(table), setting) for table, setting, _ in ablations.rows("vit_nano")}
assert known == {(row["table"], row["setting"]) for row in paper}  # each row can be run

# %% [markdown]
# ## The paper's figures, and ours
#
# Blue, the paper: accuracy on ImageNet, mostly with 1 % of the labels. Vermilion: a linear probe of
# the small model, mean and standard deviation over seeds. Compare within a panel, and within a
# colour.

# %%
figure, axes = plt.subplots(3, 3, figsize=(15, 11))
for axis, (table, rows) in zip(axes.flat, tables.items(), strict=True):
    for i, row in enumerate(rows):
        theirs, values = float(row["top1"]), ours(table, row["setting"])
        axis.barh(i - 0.2, theirs, 0.36, color=classroom.BLUE, label="paper" if i == 0 else None)
        axis.text(theirs + 1, i - 0.2, f"{theirs:.1f}", va="center", fontsize=12)
        if values:
            mean, spread = mean_std(values)
            axis.barh(
                i + 0.2, mean, 0.36, xerr=spread or None, color=classroom.VERMILION, hatch="//",
                label=f"{model}, {data}" if i == 0 else None,
            )  # fmt: skip
            axis.text(mean + spread + 1, i + 0.2, f"{mean:.1f}", va="center", fontsize=12)
        else:
            axis.text(
                1, i + 0.2, "not measured", va="center", fontsize=12, color=classroom.VERMILION
            )
    axis.set_yticks(range(len(rows)), [row["setting"] for row in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set(xlim=(0, 100), title=f"Table {table}: {TITLES[table]}")
for axis in axes[-1]:
    axis.set_xlabel("accuracy (%)")
handles = [
    plt.Rectangle((0, 0), 1, 1, color=classroom.BLUE),
    plt.Rectangle((0, 0), 1, 1, facecolor=classroom.VERMILION, hatch="//"),
]
figure.legend(
    handles, ["paper", f"{model} on {data}, {steps} steps"], loc="outside lower center", ncols=2
)
plt.show()

# %% [markdown]
# ## Where they agree
#
# A table agrees if the setting that is best in the paper is best here too, by more than the spread
# over seeds. With one seed there is no spread: such a verdict is a hint.


# %%
def verdict(table: str) -> str:
    """Does the paper's best row win here too?"""
    rows = tables[table]
    values = {row["setting"]: ours(table, row["setting"]) for row in rows}
    if not all(values.values()):
        return "not measured" if not any(values.values()) else "measured in part"
    best = max(rows, key=lambda row: float(row["top1"]))["setting"]
    found = {setting: mean_std(of) for setting, of in values.items()}
    ahead = found[best][0] - max(mean for name, (mean, _) in found.items() if name != best)
    noise = max(spread for _, spread in found.values())
    seeds = min(len(of) for of in values.values())
    word = "undecided" if abs(ahead) <= noise else "agrees" if ahead > 0 else "does not agree"
    where = f"{abs(ahead):.1f} points {'ahead' if ahead > 0 else 'behind'}"
    return f"{word}: {best} is {where}, seeds: {seeds}"


verdicts = {table: verdict(table) for table in TITLES}
for table, words in verdicts.items():
    print(f"Table {table:>2}, {TITLES[table]:26} {words}")

# %%
words = ("agrees", "does not agree", "undecided", "not measured", "measured in part")
assert all(verdict.startswith(words) for verdict in verdicts.values())
best = {
    table: max(rows, key=lambda r: float(r["top1"]))["setting"] for table, rows in tables.items()
}
assert [best[t] for t in ("6", "8", "9", "10")] == ["multiblock", "0.15-0.2", "0.85-1.0", "4"]

# %% [markdown]
# > **Question.** A difference of two points with one seed: what would you do before you believe it?
#
# ## The command of each row

# %%
config = ablations.AblationConfig(model=model, data=data, steps=int(steps))
shown = ablations.commands(config)
for row in shown:
    options = row["command"].split("--seed 0")[1].strip() or "(the default)"
    print(f"Table {row['table']:>2}  {row['setting']:15} {options}")
print("\nthe beginning of all:", shown[0]["command"])
assert len(shown) == len(paper)

# %% [markdown]
# All of them, within a time limit of your choice:
#
# ```bash
# python tests/benchmark/ablations.py --minutes 60
# ```
#
# ## Why could it be so? Easy and hard tasks
#
# In Tables 8 to 10 the paper varies how much is hidden. The picture shows, for each of these
# settings, how much of a picture is predicted, and how far a target patch is from the nearest
# context patch: how hard the task is. One point a row; the number is the paper's accuracy.


# %%
def difficulty(options: dict) -> tuple[float, float]:
    """Share of the picture that is predicted (%), and distance to the context, in patches."""
    sampler = MaskCollator((14, 14), **options)
    generator = generator_for("difficulty", str(options))
    hidden, distance = [], []
    place = torch.cartesian_prod(torch.arange(14), torch.arange(14)).float()  # (N, 2)
    for _ in range(40):
        context, targets = sampler.sample(8, generator)
        for seen, blocks in zip(context, targets, strict=True):
            wanted = blocks.unique()
            hidden.append(len(wanted) / 196)
            distance.append(torch.cdist(place[wanted], place[seen]).amin(1).mean())
    return 100 * sum(hidden) / len(hidden), float(torch.stack(distance).mean())


def options_of(table: str, setting: str) -> dict:
    """A row of Tables 8 to 10 as arguments of MaskCollator."""
    if table == "10":
        return {"num_targets": int(setting)}
    scale = tuple(float(x) for x in setting.split("-"))
    return {"target_scale" if table == "8" else "context_scale": scale}


figure, axis = plt.subplots(figsize=(10, 5))
points = {}
for table, marker, colour in zip(["8", "9", "10"], "os^", classroom.COLOURS, strict=False):
    for i, row in enumerate(tables[table]):
        x, y = points[table, row["setting"]] = difficulty(options_of(table, row["setting"]))
        if row["top1"] == "54.2":  # the default, in all three tables
            continue
        label = f"Table {table}: {TITLES[table]}" if i == 0 else None
        axis.plot(x, y, marker, color=colour, markersize=11, label=label)
        offset = {"8": (-16, -21), "9": (-42, -5), "10": (-42, 4)}[table]
        axis.annotate(row["top1"], (x, y), offset, textcoords="offset points", color=colour)
default = points["10", "4"]
axis.plot(*default, "*", color="black", markersize=15, label="default")
axis.annotate("54.2", default, (10, -5), textcoords="offset points")
axis.set(xlabel="share of the picture that is predicted (%)", xlim=(12, 60), ylim=(1.95, 3.2))
axis.set_ylabel("distance to the nearest\ncontext patch (patches)")
axis.grid()
axis.legend()
plt.show()

# %%
hidden = [points["10", count][0] for count in "1234"]
assert hidden == sorted(hidden)  # more targets, more to predict
assert points["8", "0.2-0.3"][0] > points["8", "0.075-0.2"][0]
assert points["9", "0.4-1.0"][1] > points["9", "0.85-1.0"][1]  # a small context is far away

# %% [markdown]
# Accuracy rises with what is predicted along Table 10, and along Table 8 as far as the default;
# with still larger targets it falls again, and too little context hurts as well (Table 9).
#
# > **Question.** Here the context has the same size in all rows of a table where that is possible
# > (the paper does not say). Which rows would change most if it kept all that the targets leave?

# %% [markdown]
# ## Exercises
#
# Each solution is folded: click on "1 cell hidden" below its heading.

# %% [markdown]
# ### Exercise 1
#
# ImageNet has 50,000 validation pictures, and our report has 250 to 1,250. How large is the
# standard error of an accuracy of 54.2 % in each case? Which differences in Table 9 exceed two of
# them?

# %% [markdown] jp-MarkdownHeadingCollapsed=true
# #### Solution 1

# %% tags=["solution"]
for pictures in (50_000, 1_250, 250):
    error = 100 * (0.542 * (1 - 0.542) / pictures) ** 0.5
    print(f"{pictures:6} pictures: ± {error:.2f} points")
error = 100 * (0.542 * (1 - 0.542) / 50_000) ** 0.5
accuracies = sorted(float(row["top1"]) for row in tables["9"])
gaps = [b - a for a, b in pairwise(accuracies)]
assert min(gaps) > 2 * error  # all of them, as far as the choice of pictures goes: not of the seed

# %% [markdown]
# ### Exercise 2
#
# Which choice matters most, and which least, in the paper? Compare best and worst row of
# each table.

# %% [markdown] jp-MarkdownHeadingCollapsed=true
# #### Solution 2

# %% tags=["solution"]
span = {}
for table, rows in tables.items():
    accuracies = [float(row["top1"]) for row in rows]
    span[table] = max(accuracies) - min(accuracies)
for table, points_apart in sorted(span.items(), key=lambda item: -item[1]):
    print(f"Table {table:>2}, {TITLES[table]:26} {points_apart:5.1f} points")
assert max(span, key=span.get) == "10" and min(span, key=span.get) == "13"

# %% [markdown]
# ### Exercise 3
#
# Print the commands for Table 7 with `vit_tiny` on CIFAR-10, 10,000 steps, three seeds.

# %% [markdown] jp-MarkdownHeadingCollapsed=true
# #### Solution 3

# %% tags=["solution"]
wanted = ablations.AblationConfig(
    model="vit_tiny", data="cifar10", steps=10_000, seeds=3, tables="7"
)
found = [row["command"] for row in ablations.commands(wanted)]
print("\n".join(found))
assert len(found) == 6 and sum("--target pixels" in command for command in found) == 3
