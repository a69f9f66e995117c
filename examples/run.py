"""Runs the notebooks of this folder and stores their outputs: `make examples`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from kne_easyedit._util.files import atomic_write

HERE = Path(__file__).parent
QUIET = """
import logging, os, warnings
os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1")
logging.disable(logging.WARNING)
warnings.simplefilter("ignore")
"""
"""Bars and warnings are no outputs."""


def execute(notebook: nbformat.NotebookNode, folder: Path, timeout: int = 600) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run in ``folder``, in a new kernel. Raises CellExecutionError."""
    notebook = nbformat.from_dict(notebook)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(QUIET))
    NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": str(folder)}}).execute()
    del notebook.cells[0]
    for number, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), start=1):
        cell.execution_count = number
        cell.metadata.pop("execution", None)  # times of day
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number
    return notebook


def main(names: list[str]) -> None:
    """Runs the named notebooks, or all of them."""
    for path in [HERE / name for name in names] or sorted(HERE.glob("*.ipynb")):
        start = time.perf_counter()
        done = nbformat.writes(execute(nbformat.read(path, as_version=4), HERE))
        atomic_write(path, done if done.endswith("\n") else f"{done}\n")  # a file of the repository
        print(f"{path.name}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
