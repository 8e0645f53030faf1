"""Every notebook runs from top to bottom with warnings as errors, and is committed executed."""

from __future__ import annotations

import os
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_BYTES = 300_000
SECONDS = 300  # for one cell, on a machine that is busy with other tests

# Runs in the kernel, first. What a reader would see is an error; torch and the kernel itself use
# deprecated parts of their own, which Python hides from the reader as well.
STRICT = """
import warnings

warnings.simplefilter("error")
for category in (DeprecationWarning, PendingDeprecationWarning):
    warnings.simplefilter("ignore", category)
    warnings.filterwarnings("error", category=category, module=r"__main__|fisherfn")
"""

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.notebook
@each_notebook
def test_runs_without_a_warning(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inherited = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [inherited])]))
    monkeypatch.setenv("FISHERFN_FAST", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # tests run side by side
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))  # nobody's profile, nobody's start-up files
    notebook = read(path)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(STRICT))
    client = nbclient.NotebookClient(
        notebook, timeout=SECONDS, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()  # a cell that raises is a CellExecutionError, which shows the cell


@each_notebook
def test_is_committed_executed(path: Path) -> None:
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert path.stat().st_size <= MAX_BYTES


@each_notebook
def test_last_cell_asserts(path: Path) -> None:
    assert "assert " in code_cells(read(path))[-1].source
