import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from config import UsageError
from tests.conftest import flags
from tools import compare
from utils import load_checkpoint, save_checkpoint


@pytest.fixture
def runs(finished, tmp_path):
    """Return a function that makes a run from the finished one, with other settings and other answers."""

    def make(name, right=None, images=None, module=None, facts=(), **settings):
        folder = tmp_path / "runs" / name
        shutil.copytree(finished, folder)
        last = load_checkpoint(folder / "last.pt")
        last["config"] |= settings
        if right is not None:
            last["right"] = torch.tensor(right, dtype=torch.uint8)
            last["metrics"][-1]["valid_accuracy"] = 100 * last["right"].double().mean().item()
        if images:
            last["images"][1] = images
        last |= facts
        if module:  # edited before a resume, which leaves two codes
            last["made_by"].insert(0, last["made_by"][0] | {"modules": {"train.py": module}})
        save_checkpoint(folder / "last.pt", last)
        return folder

    return make


def answers(correct, count=100):
    return [1] * correct + [0] * (count - correct)


def test_table_shows_only_the_settings_that_differ(runs, capsys):
    compare.main([str(runs("base", seed=0)), str(runs("fast", learning_rate=0.04, seed=0))])
    header, base, fast, *_ = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["run", "learning_rate", "done"]
    assert (base.split()[:3], fast.split()[:3]) == (["base", "0.02", "2"], ["fast", "0.04", "2"])


def test_one_run_each_says_which_network_is_better_and_that_a_seed_can_do_this(runs, capsys):
    base, fast = runs("base", answers(60)), runs("fast", answers(75), learning_rate=0.04)
    compare.main([str(base), str(fast)])
    out = capsys.readouterr().out
    assert "+15.00 points to setting 1, ± 3.57 (standard error of the 100 images)" in out  # sqrt(15 - 15^2 / 100)
    assert "this network is better on these images" in out
    assert "a seed alone can do this; repeat with another --seed" in out
    assert "helped" not in out


def test_helped_is_said_from_two_seeds_of_each(runs, capsys):
    base = [runs(f"base-{seed}", answers(60 + seed), seed=seed) for seed in range(2)]
    fast = [runs(f"fast-{seed}", answers(75 + seed), seed=seed, learning_rate=0.04) for seed in range(2)]
    compare.main([*map(str, base), *map(str, fast)])
    out = capsys.readouterr().out
    assert "Setting 1: base-0, base-1\n  valid acc 60.50 % (60.00 to 61.00, 2 seeds)" in out
    assert "it helped (95 % interval +11.96 to +18.04, Student's t)" in out
    compare.main([*map(str, base), str(fast[0])])
    assert "one run of one setting: a seed alone can do this" in capsys.readouterr().out


def test_one_setting_split_in_two_helps_in_five_percent_of_cases():
    rng = np.random.default_rng(0)
    for seeds in (2, 3):
        said = [compare.several_runs_each(*rng.normal(90, 0.3, (2, seeds))) for _ in range(2000)]
        assert 0.035 < np.mean([not words.startswith("no difference") for words in said]) < 0.065
    assert "seeds that agree exactly say nothing" in compare.several_runs_each([93.33] * 3, [99.67] * 3)


def test_where_a_run_ran_makes_no_other_setting_but_what_it_is_made_of_does(runs, capsys):
    elsewhere = {"num_workers": 3, "device": "cuda", "data_dir": "/elsewhere", "weights": "copy.pt", "dropout": 0}
    a, b = runs("a", dropout=0.0), runs("b", seed=1, **elsewhere)
    facts = {"images": ["0"] * 3}, {"network": []}, {"augmentation": []}, {"processes": 2}, {"weights": "0"}
    others = [runs(f"c{number}", dropout=0.0, facts=fact) for number, fact in enumerate(facts)]
    compare.main([str(a / "last.pt"), str(b / "last.pt"), *map(str, others)])
    out = capsys.readouterr().out
    assert ("Setting 1: a, b\n" in out, "Setting 6: c4\n" in out) == (True, True)


def test_other_code_is_named_and_other_images_are_not_compared(runs, tmp_path, capsys):
    compare.main([str(runs("a")), str(runs("b", module="# edited")), str(runs("c", images="0", seed=1))])
    out = capsys.readouterr().out
    assert "The code of b differs from that of a: train.py" in out
    assert "b is not counted: a has its setting and seed (--by-code tells code apart)" in out
    assert "not compared: its validation images are others" in out
    compare.main([*map(str, (tmp_path / "runs").iterdir()), "--by-code"])
    assert "Setting 3" in capsys.readouterr().out
    a, b = (compare.read_run(tmp_path / "runs" / name) for name in "ab")
    for by_code, colors in ((False, {"C0"}), (True, {"C0", "C1"})):
        assert {line.get_color() for line in compare.plot_runs([a, b], by_code).axes[0].lines} == colors


def test_run_that_is_not_finished_is_no_base_and_that_is_said(runs, capsys):
    compare.main([str(runs("a", epochs=3, seed=1)), str(runs("b"))])
    out = capsys.readouterr().out
    assert ("a is not counted: it has 2 of its 3 epochs\n" in out, "Setting 1: b" in out) == (True, True)


def test_without_names_all_of_runs_are_compared(runs, tmp_path, monkeypatch, capsys):
    runs("a"), runs("b", dropout=0.2)
    monkeypatch.chdir(tmp_path)
    compare.main([])
    assert "Setting 2" in capsys.readouterr().out
    assert (tmp_path / "runs" / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_run_without_an_epoch_says_so(cli, tiny, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("train.train_one_epoch", lambda *args: (_ for _ in ()).throw(OSError("full")))
    assert cli(*flags(replace(tiny, run_dir="begun"))) == 1
    with pytest.raises(UsageError, match="no run with a finished epoch"):
        compare.main([str(tmp_path / "begun")])
    assert "begun: no epoch is finished yet" in capsys.readouterr().out
