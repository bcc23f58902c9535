"""What the notebooks share: where they work, how they draw, how they train.

Nothing of the method is here. The first cell of each notebook is

    import classroom
    classroom.begin()
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FAST = os.environ.get("IJEPA_FAST") == "1"  # for the tests: shorter runs, the same assertions
RUNS = ROOT / "runs" / ("notebooks_fast" if FAST else "notebooks")
EVAL = ("--eval-images", "1000", "--eval-every", "50")  # of each run
PACKAGES = ("torch", "torchvision", "einops", "safetensors", "matplotlib", "tqdm", "ipywidgets")

# Okabe and Ito's colours, told apart by the colour-blind too; the first two are those of probe.py.
BLUE, VERMILION, GREEN, ORANGE, SKY, PURPLE, GREY = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#777777",
)  # fmt: skip
COLOURS = (BLUE, VERMILION, GREEN, ORANGE, SKY, PURPLE)


def begin() -> None:
    """Work in the project's folder, draw for a lecture hall, say errors of users in one line.

    Raises UsageError, which IPython shows as one line, if a package is missing.
    """
    from IPython import get_ipython
    from IPython.core.error import UsageError

    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UsageError(
            f"missing: {', '.join(missing)}. Run `pip install -r requirements.txt` in the "
            "environment of this kernel, and restart the kernel"
        )
    os.chdir(ROOT)  # so that runs/ and data/ are those of the README
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))

    import matplotlib.pyplot as plt
    import torch

    from data import UserError

    plt.rcParams.update(
        {
            "axes.grid": False,
            "axes.prop_cycle": plt.cycler(color=COLOURS),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlesize": 14,
            "figure.constrained_layout.use": True,
            "figure.dpi": 80,
            "font.size": 13,
            "grid.alpha": 0.3,
            "lines.linewidth": 2.5,
        }
    )
    # Of a mistake of ours the traceback is wanted, of a missing set of pictures its one line.
    get_ipython().set_custom_exc(
        (UserError,), lambda shell, kind, error, *_, **__: print(f"error: {error}", file=sys.stderr)
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    advice = "" if device != "CPU" else "; no GPU is needed, times are for two CPU cores"
    print(f"computing on: {device}{advice}{'; fast mode' if FAST else ''}")


def train(name: str, *options: str) -> Path:
    """`python train.py OPTIONS` in this process, afresh: the run's folder, runs/notebooks/NAME.

    The log is seen while it runs, and cleared from the cell at the end.
    """
    from IPython.display import clear_output

    import train as script

    out = RUNS / name
    shutil.rmtree(out, ignore_errors=True)
    config = script.configure([*options, "--out", str(out.relative_to(ROOT))])
    script.train(*config)
    clear_output()
    return out


def small_run() -> Path:
    """The first run of notebook 3: `vit_nano` on `shapes`, trained for a minute if it is absent."""
    out = RUNS / "03_ijepa"
    if not (out / "last.pt").is_file():
        print("training vit_nano for a minute (notebook 3 leaves it for the others)")
        train(out.name, "--steps", "300" if FAST else "500", *EVAL)
    return out


def show(axis, picture, seen=None, grid=None, title: str = "", colour: str | None = None) -> None:
    """A picture, grey where it is hidden, without ticks.

    Args:
        picture: (3, H p, W p) uint8.
        seen: (K,) the patches to show; all of them if None.
        grid: (H, W) patches, with `seen`.
        colour: of a frame.
    """
    import torch

    shown = picture.permute(1, 2, 0).float() / 255  # (H p, W p, 3)
    if seen is not None:
        visible = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
        visible[seen] = True
        p, q = shown.shape[0] // grid[0], shown.shape[1] // grid[1]
        visible = visible.view(grid).repeat_interleave(p, 0).repeat_interleave(q, 1)
        shown = torch.where(visible[..., None], shown, torch.full_like(shown, 0.8))
    axis.imshow(shown.numpy(), interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=13, color=colour or "black")
    for side in axis.spines.values():
        side.set(visible=colour is not None, color=colour, linewidth=3)


def display_file(path: Path, width: int = 800) -> None:
    """A picture that a script has written, at most `width` pixels wide, as a JPEG: small."""
    import io

    from IPython.display import Image, display
    from PIL import Image as Picture

    with Picture.open(path) as picture:
        small = picture.convert("RGB")
    small.thumbnail((width, 10 * width))
    jpeg = io.BytesIO()
    small.save(jpeg, "JPEG", quality=85)
    display(Image(jpeg.getvalue(), format="jpeg"))
