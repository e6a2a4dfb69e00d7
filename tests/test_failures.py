import signal
import subprocess
import sys
from unittest.mock import Mock

from extras import command_line

import train
from config import UsageError
from tests.conftest import ROOT


def test_message_is_one_line_whatever_a_name_holds(cli, monkeypatch, refusal):
    monkeypatch.setattr(train, "main", Mock(side_effect=UsageError("bad\nname.png is no image")))
    assert cli() == 2
    assert refusal() == "train.py: error: bad name.png is no image\n"


def test_stopped_before_the_command_line_is_read(cli, monkeypatch, refusal):
    monkeypatch.setattr(command_line, "parse_args", lambda: signal.raise_signal(signal.SIGINT))
    assert cli() == 130
    assert refusal() == "train.py: stopped by SIGINT\n"


def test_run_in_a_notebook_leaves_it_its_signals():
    code = """if True:
        import builtins, runpy, signal, sys
        builtins.__IPYTHON__ = True
        numbers = signal.SIGINT, signal.SIGTERM, signal.SIGPIPE
        before = [signal.getsignal(number) for number in numbers]
        for sys.argv in (["train.py", "--epoch", "3"], ["model.py"]):
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as stop:
                assert stop.code == 2
        assert [signal.getsignal(number) for number in numbers] == before
    """
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
