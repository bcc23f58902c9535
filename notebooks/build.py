"""Execute the notebooks: NAME.py is the source, NAME.ipynb beside it is written with outputs.

python notebooks/build.py              all notebooks
python notebooks/build.py 01_masks     some of them
"""

import argparse
import os
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
WIDGET = "application/vnd.jupyter.widget-view+json"


def execute(notebook: nbformat.NotebookNode, fast: bool = False) -> nbformat.NotebookNode:
    """Run all cells in a new kernel, in place; raises CellExecutionError at the first error.

    `fast`: small versions of the cells, for the tests.
    """
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02}"  # not random, so that a new build changes little
    env = os.environ | {"IJEPA_FAST": "1" if fast else "0"}
    if fast:
        env["IJEPA_DATA"] = "textures"  # needs no download
    resources = {"metadata": {"path": str(HERE)}}
    options = {
        "timeout": 600,
        "startup_timeout": 300,
        "record_timing": False,
        "coalesce_streams": True,
    }
    NotebookClient(notebook, resources=resources, **options).execute(env=env)
    # Without jupytext's metadata, saving in JupyterLab does not rewrite the .py file.
    kernel = notebook.metadata["kernelspec"]
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    for cell in notebook.cells:
        if any(WIDGET in output.get("data", {}) for output in cell.get("outputs", ())):
            text = {"text/plain": "(Run this cell to get the sliders.)"}  # they need a kernel
            cell.outputs = [nbformat.v4.new_output("display_data", text)]
    return notebook


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="such as 01_masks; default: all")
    args = parser.parse_args()
    for name in args.names or sorted(path.stem for path in HERE.glob("0*.py")):
        start = time.perf_counter()
        notebook = execute(jupytext.read(HERE / f"{name}.py"))
        text = nbformat.writes(notebook)
        (HERE / f"{name}.ipynb").write_text(text + "\n")
        print(f"{name}: {time.perf_counter() - start:.0f} s, {len(text) / 1e3:.0f} kB")
