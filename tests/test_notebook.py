import base64
import io

import nbformat
from nbclient import NotebookClient
from PIL import Image

from tests.conftest import ROOT


def pictures(cells):
    """The pictures in the outputs of the cells."""
    data = [output.get("data", {}) for cell in cells for output in cell.outputs]
    return [Image.open(io.BytesIO(base64.b64decode(parts["image/png"]))) for parts in data if "image/png" in parts]


def test_notebook_is_kept_executed_and_runs_top_to_bottom():
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kept = pictures(cells)
    client = NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(ROOT / "notebooks")}})
    client.execute()  # raises what a cell raises
    for shown in (kept, pictures(cells)):
        assert len(shown) == 4
        for picture in shown:
            picture.load()  # raises if a part of it is missing
    assert not [output for cell in cells for output in cell.outputs if "Warning" in output.get("text", "")]
