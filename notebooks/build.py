"""Execute the notebooks: NAME.py is the source, NAME.ipynb beside it is made from it.

A cell with the tag results/NAME.png leaves its picture there too, for the README.

python notebooks/build.py                 all of them
python notebooks/build.py 01_masks        some
"""

import base64
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent
NAMES = (
    "01_masks",
    "02_step_by_step",
    "03_training",
    "04_linear_probing",
    "05_what_the_predictor_sees",
    "06_ablations",
)
LIMIT = 1_000_000  # bytes of an .ipynb
SKIPPED = "skip-execution"  # nbclient heeds this tag: sliders need a reader, and may hang without


def read(name: str, folder: Path = HERE) -> NotebookNode:
    """The text form as a notebook without outputs."""
    notebook = jupytext.read(folder / f"{name}.py", fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"  # not at random: built twice, it is the same file
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    return notebook


def execute(notebook: NotebookNode, folder: Path = HERE, timeout: int = 1800) -> None:
    """Run all cells in a new kernel; raises CellExecutionError at the first that fails."""
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
    )
    client.execute()
    notebook.metadata["language_info"] = {"name": "python"}  # the kernel adds its version
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if SKIPPED in cell.metadata.get("tags", ()):
            text = {"text/plain": "(sliders: run this cell)"}
            cell["outputs"] = [nbformat.v4.new_output("display_data", text)]


def tagged_pictures(notebook: NotebookNode) -> dict[str, bytes]:
    """The pictures that cells leave for the README: path in the project -> PNG."""
    return {
        tag: base64.b64decode(output["data"]["image/png"])
        for cell in notebook.cells
        for tag in cell.metadata.get("tags", ())
        if tag.endswith(".png")
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    }


def build(name: str) -> None:
    """Write NAME.ipynb, and the pictures that it has for the README."""
    start = time.perf_counter()
    notebook = read(name)
    execute(notebook)
    text = nbformat.writes(notebook) + "\n"
    if len(text) > LIMIT:
        sys.exit(f"{name}.ipynb has {len(text)} bytes, more than {LIMIT}: smaller pictures, please")
    (HERE / f"{name}.ipynb").write_text(text)
    for path, picture in tagged_pictures(notebook).items():
        (HERE.parent / path).parent.mkdir(exist_ok=True)
        (HERE.parent / path).write_bytes(picture)
    print(f"{name}.ipynb: {time.perf_counter() - start:.0f} s, {len(text) / 1e3:.0f} kB")


if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        build(name)
