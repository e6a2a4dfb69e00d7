"""What the README tells its readers to type."""

import re
import shlex

from extras.command_line import parse_args

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_code_for_notebooks_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(re.search(r"```python\n(.+?)```", README, re.DOTALL)[1], {})
    assert len(capsys.readouterr().out.splitlines()) == 3  # the predictions


def test_command_of_the_specification_is_accepted():
    (line,) = re.findall(r"^python train\.py (--.+?)\n```", README.replace("\\\n", ""), re.MULTILINE)
    config = parse_args(shlex.split(line)).config
    assert (config.optimizer, config.schedule, config.label_smoothing) == ("sgd", "plateau", 0)
