"""Did it help? Runs side by side: ``python -m tools.compare runs/a runs/b ...``; without names, all of runs/.

It reads each run's last.pt and nothing else: no data, no network, no device.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from config import UsageError
from parts.command_line import in_one_line
from parts.run import LAST
from utils import load_checkpoint

IGNORED = {"seed", "data_dir", "weights", "num_workers", "device"}  # runs that differ in these are of one setting


class Run(NamedTuple):
    """What a run's last.pt says of it."""

    name: str
    config: dict
    rows: list[dict]  # of metrics.csv
    right: np.ndarray  # (N,) 0 or 1: which validation images the last epoch's network got right
    images: str  # SHA-256 of the validation images
    made_of: list  # layers, table, augmentation, number of processes, SHA-256 of images, first weights
    modules: dict[str, str]  # file -> its text; if it was edited before a resume, all its texts

    def setting(self, by_code: bool) -> tuple:
        """Return what runs of one setting have in common. by_code: the text of the modules too."""
        settings = frozenset((name, value) for name, value in self.config.items() if name not in IGNORED)  # 0 is 0.0
        return settings, repr([self.made_of, by_code and self.modules])


def read_run(folder: Path) -> Run | None:
    """Return the run in a folder; None, and a line that says so, if it has no finished epoch."""
    checkpoint = load_checkpoint(folder / LAST)
    if not checkpoint["metrics"]:
        print(f"{folder}: no epoch is finished yet")
        return None
    makers = [maker["modules"] for maker in checkpoint["made_by"]]  # of the first epoch, then of each resume
    modules = {name: "".join(dict.fromkeys(maker.get(name, "") for maker in makers)) for name in makers[-1]}
    images, rows, right = checkpoint["images"][:2], checkpoint["metrics"], checkpoint["right"].numpy()
    made_of = [images, *(checkpoint[name] for name in ("network", "augmentation", "processes", "weights"))]
    return Run(folder.name, checkpoint["config"], rows, right, images[1], made_of, modules)


def table(runs: Sequence[Run]) -> str:
    """Return a line for each run: the settings that differ, epochs, last losses and accuracies, seconds an epoch."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    differing = [name for name in names if len({run.config.get(name) for run in runs}) > 1]
    columns = ["train_loss", "train_accuracy", "valid_loss", "valid_accuracy"]
    lines = [["run", *differing, "done", "train loss", "train acc", "valid loss", "valid acc", "s/epoch"]]
    for run in runs:
        done = f"{len(run.rows)} of {run.config['epochs']}"
        numbers = [f"{run.rows[-1][column]:.{2 if 'accuracy' in column else 4}f}" for column in columns]
        seconds = sum(row["seconds"] for row in run.rows) / len(run.rows)
        lines.append([run.name, *(str(run.config.get(name)) for name in differing), done, *numbers, f"{seconds:.1f}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ([word.ljust(width) for word, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in padded)


def one_run_each(before: np.ndarray, after: np.ndarray) -> str:
    """Return which of two networks is better on the same images, by the exact test of McNemar's counts."""
    lost, won = int((before > after).sum()), int((after > before).sum())
    chance = stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
    better = "neither" if chance >= 0.05 else "this" if won > lost else "the first"
    said = f"{better} network is better on these images (p = {chance:.2g})"
    return f"{said}. One run each: a seed alone can do this; repeat with another --seed"


def several_runs_each(before: Sequence[float], after: Sequence[float]) -> str:
    """Return whether it helped, from the accuracies of 2 or more seeds of each of two settings.

    Student's t with pooled variance, two-sided, at 5 %: two groups of one setting are told apart in 5 % of cases.
    """
    if np.ptp(before) + np.ptp(after) == 0:
        return "no difference that can be judged: seeds that agree exactly say nothing of other seeds"
    test, said = stats.ttest_ind(after, before), f"no difference that {len(before)} + {len(after)} seeds can show"
    if test.pvalue < 0.05:
        said = "it helped" if np.mean(after) > np.mean(before) else "it hurt"
    interval = test.confidence_interval(0.95)
    return f"{said} (95 % interval {interval.low:+.2f} to {interval.high:+.2f}, Student's t)"


def compare(runs: Sequence[Run], by_code: bool = False) -> None:
    """Print the table, and each setting's repetitions and difference to the first. by_code: see Run.setting."""
    print(table(runs))
    for run in runs[1:]:
        if changed := sorted(name for name, text in run.modules.items() if runs[0].modules.get(name) != text):
            print(f"The code of {run.name} differs from that of {runs[0].name}: {', '.join(changed)}")
    settings: dict[tuple, dict[int, Run]] = {}  # of each, its runs by seed
    for run in runs:
        if len(run.rows) < run.config["epochs"]:
            print(f"{run.name} is not counted: it has {len(run.rows)} of its {run.config['epochs']} epochs")
            continue
        group, seed = settings.setdefault(run.setting(by_code), {}), run.config["seed"]
        if seed in group:
            said = f"{group[seed].name} has its setting and seed (--by-code tells code apart)"
            print(f"{run.name} is not counted: {said}")
        group.setdefault(seed, run)
    groups = [list(group.values()) for group in settings.values()]
    for number, group in enumerate(groups, start=1):
        accuracies = [run.rows[-1]["valid_accuracy"] for run in group]
        spread = f" ({min(accuracies):.2f} to {max(accuracies):.2f}, {len(group)} seeds)" if len(group) > 1 else ""
        names = ", ".join(run.name for run in group)
        print(f"\nSetting {number}: {names}\n  valid acc {np.mean(accuracies):.2f} %{spread}")
        if number == 1:
            first, base = group, accuracies
        elif group[0].images != first[0].images:
            print("  not compared: its validation images are others")
        else:
            before, after = (np.mean([run.right for run in each], axis=0) for each in (first, group))
            error = 100 * stats.sem(after - before, ddof=0)  # McNemar's: Agresti 2013, section 11.1
            difference = f"{100 * (after.mean() - before.mean()):+.2f} points to setting 1"
            print(f"  {difference}, ± {error:.2f} (standard error of the {len(before):,} images)")
            if len(first) == len(group) == 1:
                print(f"  {one_run_each(first[0].right, group[0].right)}")
            elif min(len(first), len(group)) == 1:
                print("  one run of one setting: a seed alone can do this; repeat that setting with another --seed")
            else:
                print(f"  {several_runs_each(base, accuracies)}")


def plot_runs(runs: Sequence[Run], by_code: bool = False) -> Figure:
    """Return the curves of all runs over each other, one colour for each setting; training is dashed."""
    figure, settings = Figure(figsize=(12, 4.5), layout="constrained"), [run.setting(by_code) for run in runs]
    colors = {setting: f"C{number % 10}" for number, setting in enumerate(dict.fromkeys(settings))}
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for run, setting in zip(runs, settings, strict=True):
            look = {"color": colors[setting], "alpha": 0.8, "marker": "." * (len(run.rows) < 2)}
            for part, style in (("train", "--"), ("valid", "-")):
                values = {row["epoch"]: row[f"{part}_{name}"] for row in run.rows}
                axes.plot(values.keys(), values.values(), style, label=run.name if part == "valid" else None, **look)
        title = f"{name.capitalize()} (dashed: training)"
        axes.set(title=title, xlabel="Epoch", yscale="log" if name == "loss" else "linear")  # for early peaks
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def main(argv: list[str] | None = None) -> None:
    """Compare the runs that the command line names."""
    parser = argparse.ArgumentParser("python -m tools.compare", description="Compare runs; the first is the base.")
    parser.add_argument("runs", metavar="RUN_DIR", nargs="*", type=Path, help="(default: all of runs/, newest last)")
    parser.add_argument("--by-code", action="store_true", help="runs whose modules differ are of other settings")
    arguments = parser.parse_args(argv)
    folders = [path.parent if path.suffix == ".pt" else path for path in arguments.runs]
    folders = [path for path in folders if not path.is_file()]  # runs/* names compare.png too
    if not arguments.runs:
        lasts = sorted(Path("runs").glob(f"*/{LAST}"), key=lambda path: path.stat().st_mtime)
        folders = [path.parent for path in lasts]
    runs = [run for run in map(read_run, folders) if run]
    if not runs:
        raise UsageError("there is no run with a finished epoch to compare: name their folders")
    compare(runs, arguments.by_code)
    path = folders[0].parent / "compare.png"
    try:
        plot_runs(runs, arguments.by_code).savefig(path, dpi=100)
        print(f"\nThe curves are in {path}")
    except Exception as error:
        print(f"warning: the curves cannot be drawn ({error})", file=sys.stderr)


if __name__ == "__main__":
    in_one_line("tools.compare", main)
