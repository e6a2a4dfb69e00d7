import nbformat
from nbclient import NotebookClient

from tests.conftest import ROOT


def test_notebook_is_kept_executed_and_runs_top_to_bottom():
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    client = NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(ROOT / "notebooks")}})
    client.execute()  # raises what a cell raises
    outputs = [output for cell in cells for output in cell.outputs]
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) == 4
    assert not [output for output in outputs if "Warning" in output.get("text", "")]
