import os
import re
import shutil
import subprocess
import sys

from tests.conftest import ROOT


def test_readmes_python_runs_as_it_stands_beside_the_code_and_writes_nothing(tmp_path):
    root = shutil.copytree(ROOT, tmp_path / "root", ignore=shutil.ignore_patterns(".*", "runs", "data", "__pycache__"))
    before = sorted(root.rglob("*"))
    blocks = re.findall(r"```python\n(.+?)```", (root / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    code = "\n".join(["import tools.benchmark", *blocks])  # no import asks a server for anything: it would warn here
    env = {name: value for name, value in os.environ.items() if name != "NO_ALBUMENTATIONS_UPDATE"}
    env["https_proxy"] = "http://127.0.0.1:9"
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=root, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(root.rglob("*")) == before
