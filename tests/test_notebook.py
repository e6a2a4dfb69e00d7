import base64
import io

import nbformat
from nbclient import NotebookClient
from PIL import Image

from tests.conftest import ROOT


def test_notebook_is_kept_executed_with_whole_pictures_and_runs_top_to_bottom():
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    pictures = [output.data["image/png"] for cell in cells for output in cell.outputs if "data" in output]
    assert len(pictures) == 4
    for picture in pictures:
        Image.open(io.BytesIO(base64.b64decode(picture))).load()  # raises if a part of it is missing
    client = NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(ROOT / "notebooks")}})
    client.execute()  # raises what a cell raises
    assert not [output for cell in cells for output in cell.outputs if "Warning" in output.get("text", "")]
