import signal
from unittest.mock import Mock

import train
from config import UsageError
from extras import command_line


def test_message_is_one_line_whatever_a_name_holds(cli, monkeypatch, refusal):
    monkeypatch.setattr(train, "main", Mock(side_effect=UsageError("bad\nname.png is no image")))
    assert cli() == 2
    assert refusal() == "train.py: error: bad name.png is no image\n"


def test_stopped_before_the_command_line_is_read(cli, monkeypatch, refusal):
    monkeypatch.setattr(command_line, "parse_args", lambda: signal.raise_signal(signal.SIGINT))
    assert cli() == 130
    assert refusal() == "train.py: stopped by SIGINT\n"
