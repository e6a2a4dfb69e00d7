import os
import re
import shutil
import subprocess
import sys

from tests.conftest import ROOT


def test_readmes_python_runs_as_it_stands_beside_the_code_and_writes_nothing(tmp_path):
    for path in (*ROOT.glob("*.py"), ROOT / "parts", ROOT / "tools", ROOT / "weights"):
        copy, ignored = (
            (shutil.copytree, {"ignore": lambda *_: ["__pycache__"]}) if path.is_dir() else (shutil.copy, {})
        )
        copy(path, tmp_path / path.name, **ignored)
    before = sorted(tmp_path.rglob("*"))
    (code,) = re.findall(r"```python\n(.+?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(tmp_path.rglob("*")) == before
