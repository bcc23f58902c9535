"""The notebooks: text and saved form agree, they run from a clean kernel, and nothing is repeated.

Packages that only the notebooks need may be absent: then these tests are skipped, and say so.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext", reason="pip install -r tests/requirements.txt")
nbformat = pytest.importorskip("nbformat", reason="pip install -r tests/requirements.txt")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))

import build  # noqa: E402

# Small networks and variants that are the subject of an experiment, and belong to no module.
EXPERIMENTS = {
    "03_training": {"WithoutStopGradient": "IJEPA"},
    "05_what_the_predictor_sees": {"Decoder": "Module"},
}
FORBIDDEN = (str(ROOT), "/home/", "/root/", "/tmp/", "Traceback", "it/s]", " at 0x")


@pytest.fixture(params=build.NAMES)
def name(request) -> str:
    return request.param


def saved(name: str) -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def code(name: str) -> list[ast.Module]:
    """Each code cell of the text form."""
    cells = jupytext.read(NOTEBOOKS / f"{name}.py", fmt="py:percent").cells
    return [ast.parse(cell.source) for cell in cells if cell.cell_type == "code"]


def described(notebook: nbformat.NotebookNode) -> list[tuple]:
    """What the two forms share: kind, source, tags and folding of each cell."""
    return [(cell.cell_type, cell.source, dict(cell.metadata)) for cell in notebook.cells]


def test_all_notebooks_are_listed():
    found = {path.stem for path in NOTEBOOKS.glob("[0-9]*")}
    assert found == set(build.NAMES)


def test_text_and_notebook_agree_cell_by_cell(name):
    text = jupytext.read(NOTEBOOKS / f"{name}.py", fmt="py:percent")
    assert described(saved(name)) == described(text), "python notebooks/build.py " + name


def test_saved_notebooks_are_executed_small_and_of_no_machine(name):
    notebook, text = saved(name), (NOTEBOOKS / f"{name}.ipynb").read_text()
    nbformat.validate(notebook)
    assert len(text) < build.LIMIT
    code_cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    executed = [c for c in code_cells if build.SKIPPED not in c.metadata.get("tags", ())]
    assert len(code_cells) - len(executed) == (name == "01_masks")  # its sliders
    counts = [cell.execution_count for cell in executed]
    assert counts == list(range(1, len(counts) + 1))  # top to bottom, once
    outputs = [output for cell in code_cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    written = [output.get("text", "") + str(output.get("data", "")) for output in outputs]
    for words in FORBIDDEN:
        assert not [text for text in written if words in text], words
    assert all(output.get("text", "").count("\n") < 40 for output in outputs)  # no wall of logs
    assert set(notebook.metadata) == {"kernelspec", "language_info"}  # no versions, no times


def test_pictures_of_the_readme_are_those_of_the_notebooks():
    pictures = {}
    for name in build.NAMES:
        pictures |= build.tagged_pictures(saved(name))
    assert set(pictures) == {"results/class_collapse.png", "results/class_predictor.png"}
    for path, picture in pictures.items():
        assert (ROOT / path).read_bytes() == picture
        assert f"]({path})" in (ROOT / "README.md").read_text()


def test_each_has_questions_three_solved_exercises_and_assertions(name):
    cells = saved(name).cells
    places = [i for i, cell in enumerate(cells) if "solution" in cell.metadata.get("tags", ())]
    solutions = [cells[i] for i in places]
    assert len(solutions) == 3
    for number, i in enumerate(places, start=1):
        assert "assert " in cells[i].source
        heading = cells[i - 1]  # folded: so is what stands below it, and its output
        assert heading.source == f"#### Solution {number}"
        assert heading.metadata["jp-MarkdownHeadingCollapsed"] is True
        assert cells[i - 2].source.startswith(f"### Exercise {number}\n")
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert text.count("**Question.**") >= 2
    others = [cell.source for cell in cells if cell not in solutions and cell.cell_type == "code"]
    assert sum("assert " in source for source in others) >= 2


def test_each_question_has_an_answer():
    sections = re.split(r"^## \d\. ", (NOTEBOOKS / "ANSWERS.md").read_text(), flags=re.M)[1:]
    answers = [len(re.findall(r"^\*\*.+?\*\*\s\w", of, re.M | re.S)) for of in sections]
    texts = [(NOTEBOOKS / f"{name}.py").read_text() for name in build.NAMES]
    assert answers == [text.count("**Question.**") for text in texts]


def test_no_cell_repeats_what_the_project_has(name):
    """No function or class of theirs is defined again, and no network but those of experiments."""
    taken = {
        node.name
        for module in ("ijepa", "data", "train", "probe")
        for node in ast.parse((ROOT / f"{module}.py").read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    imported, networks = set(), {}
    for cell in code(name):
        for node in ast.walk(cell):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                assert node.name not in taken, node.name
            if isinstance(node, ast.ClassDef) and node.bases:
                networks[node.name] = ast.unparse(node.bases[0]).split(".")[-1]
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module)
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
    assert networks == EXPERIMENTS.get(name, {})
    assert imported & {"ijepa", "data", "train", "probe"} or name == "06_ablations"


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of what the notebooks need: what they write stays out of the working tree."""
    root = tmp_path_factory.mktemp("project")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, root)
    (root / "notebooks").mkdir()
    for path in NOTEBOOKS.glob("*.py"):
        shutil.copy(path, root / "notebooks")
    for path in ROOT.glob("results/*.csv"):
        (root / "results").mkdir(exist_ok=True)
        shutil.copy(path, root / "results")
    (root / "tests" / "benchmark").mkdir(parents=True)
    for name in ("ablations", "record", "sweep"):
        shutil.copy(ROOT / "tests" / "benchmark" / f"{name}.py", root / "tests" / "benchmark")
    return root


def test_it_runs_from_a_clean_kernel(name, project):
    """In fast mode: shorter runs, the same assertions. No network, no data, no earlier run."""
    pytest.importorskip("ipykernel", reason="pip install -r requirements.txt")
    environment = dict(os.environ, IJEPA_FAST="1", OMP_NUM_THREADS="1")
    command = [sys.executable, str(project / "notebooks" / "build.py"), name]
    done = subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_ablations_of_which_few_or_none_are_measured(project):
    """What a class sees that has begun with runs of its own: no figure is missed."""
    pytest.importorskip("ipykernel", reason="pip install -r requirements.txt")
    path = project / "results" / "ablations.csv"
    before = path.read_text()
    first, *others = before.splitlines(keepends=True)
    try:
        for lines in ([], [first, *others[1:3]]):
            path.write_text("".join(lines))
            notebook = build.read("06_ablations", project / "notebooks")
            build.execute(notebook, project / "notebooks", timeout=300)
            outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
            text = "".join(output.get("text", "") for output in outputs)
            assert f"here: {len(lines[1:])} of 30 rows are measured" in text
            assert text.count(" not measured") >= 6 and "not enough is measured" in text
    finally:
        path.write_text(before)


def test_missing_packages_are_named_in_one_line(monkeypatch):
    error = pytest.importorskip("IPython.core.error", reason="pip install -r requirements.txt")
    import classroom

    monkeypatch.setattr(classroom, "PACKAGES", ("torch", "a_package_that_is_not_there"))
    with pytest.raises(error.UsageError, match=r"^missing: a_package_that_is_not_there\. Run "):
        classroom.begin()
