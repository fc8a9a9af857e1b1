"""The notebooks of the documentation run to their end, and have outputs."""

import nbformat
import pytest
from nbclient import NotebookClient

from helpers import HANG, ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def read(path):
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_executed_in_order_and_is_small(path):
    counts = [cell.execution_count for cell in read(path).cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert path.stat().st_size < 1_000_000


@pytest.mark.slow(reason="trains for minutes")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    resources = {"metadata": {"path": tmp_path}}
    NotebookClient(read(path), timeout=HANG, kernel_name="python3", resources=resources).execute()
