"""Each notebook runs, stays short, and is saved as its source says."""

import re
from pathlib import Path

import jupytext
import nbformat
import pytest

from notebooks import build

SOURCES = sorted(build.HERE.glob("0*.py"))
pytestmark = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def cells(notebook: nbformat.NotebookNode, kind: str) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == kind]


def solutions(notebook: nbformat.NotebookNode) -> list[str]:
    """Python code in the folded solutions of the exercises."""
    text = "\n".join(cells(notebook, "markdown"))
    folded = re.findall(r"<details>.*?</details>", text, flags=re.DOTALL)
    return [code for fold in folded for code in re.findall(r"```python\n(.*?)```", fold, re.DOTALL)]


def test_runs_with_its_solutions(source: Path):
    notebook = jupytext.read(source)
    notebook.cells += [nbformat.v4.new_code_cell(code) for code in solutions(notebook)]
    build.execute(notebook, fast=True)  # raises at the first error


def test_is_short_enough_for_a_class(source: Path):
    code = cells(jupytext.read(source), "code")
    lines = [line.strip() for cell in code for line in cell.splitlines()]
    assert len(code) <= 12
    assert len([line for line in lines if line and not line.startswith("#")]) <= 80
    assert not [line for line in lines if line.startswith("assert")]


def test_has_three_exercises_with_folded_solutions(source: Path):
    text = "\n".join(cells(jupytext.read(source), "markdown"))
    assert text.count("<summary>Solution</summary>") == 3
    assert text.count("<details>") == text.count("</details>")


def test_saved_notebook_matches_its_source(source: Path):
    saved = source.with_suffix(".ipynb")
    notebook, written = nbformat.read(saved, as_version=4), jupytext.read(source)
    for kind in ("markdown", "code"):
        assert cells(notebook, kind) == cells(written, kind)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert saved.stat().st_size < 1_000_000
