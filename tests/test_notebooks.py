"""Every notebook runs from top to bottom, its install cell apart."""
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "colab").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_runs(path, tmp_path, monkeypatch):
  # The kernel starts as a machine without fake devices.
  monkeypatch.delenv("XLA_FLAGS", raising=False)
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  notebook = nbformat.read(path, as_version=4)
  assert not any(cell.get("outputs") for cell in notebook.cells), f"{path.name} holds outputs; clear them"
  notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", [])]
  NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
  printed = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
  assert "test accuracy" in printed
