"""A run in pictures: ``python -m tools.report runs/<name>``, also of a run that is going on or was stopped."""

import argparse
import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch.nn import functional as F

from dataset import load_datasets, make_loader
from parts.command_line import in_one_line
from parts.run import LAST, resumed_config, sha256
from tools import pictures
from tools.evaluate import check_classes, choose_dtype, compute_outputs, load_network
from utils import choose_device, load_checkpoint, set_numerics

PICTURES = {  # of report.md, with their titles
    "curves.png": "Curves",
    "confusion_matrix.png": "Confusion matrix",
    "predictions.png": "Predictions",
    "misclassified.png": "Most confident mistakes",
    "augmentations.png": "Augmentations",
}
CURVES, CONFUSION, PREDICTIONS, MISTAKES, AUGMENTATIONS = PICTURES
PAGE = "report.md"
MANY = 100  # classes: more have no confusion matrix


@contextlib.contextmanager
def only_warn(what: str) -> Iterator[None]:
    """Let a picture fail: it costs a line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        reason = str(error).partition("\n")[0][:150]
        print(f"warning: {what} cannot be drawn ({type(error).__name__}: {reason})", file=sys.stderr)


def of_each_class(labels: torch.Tensor, count: int) -> list[int]:
    """Return the indices of the first `count` images (N,), taking the classes in turn."""
    seen: dict[int, int] = {}
    turns = []
    for index, label in enumerate(labels.tolist()):
        seen[label] = seen.get(label, 0) + 1
        turns.append((seen[label], label, index))
    return [index for _, _, index in sorted(turns)[:count]]


def report(
    run_dir: str | Path, data_dir: str | None = None, device: str | None = None, net: Callable | None = None
) -> None:
    """Write a run's pictures into its folder, and report.md, which shows them.

    The network, made by `net`, is the one to test: that of the last epoch or, if held-out images chose it, of the best.
    A picture that fails costs a line. Raises UsageError for a folder without a run, or without a finished epoch.
    """
    folder = Path(run_dir).expanduser()
    config = resumed_config(str(folder), {"data_dir": data_dir} if data_dir else {})
    net, checkpoint = load_network(folder, net)
    last = load_checkpoint(folder / LAST)
    device = choose_device(device or config.device)
    set_numerics(config.deterministic)
    train, _, test = data = load_datasets(config, last["mean"], last["std"])
    if [sha256(dataset) for dataset in data] != last["images"]:
        print("warning: the images have changed since this run was trained", file=sys.stderr)
    check_classes(last, test.class_names)
    loader, dtype = make_loader(test, config.batch_size), choose_dtype(checkpoint, device)
    log_probs = compute_outputs(net.to(device), loader, dtype, description="Report")
    counts = pictures.count_confusions(test.labels, log_probs.argmax(dim=1), len(test.class_names))
    first = of_each_class(test.labels, 20)
    drawings = {
        CURVES: lambda: pictures.plot_curves(last["metrics"]),
        CONFUSION: lambda: pictures.plot_confusions(counts, test.class_names),
        PREDICTIONS: lambda: pictures.plot_predictions(net, test, log_probs, first, "Test images, the classes in turn"),
        MISTAKES: lambda: pictures.plot_mistakes(net, test, log_probs),
        AUGMENTATIONS: lambda: pictures.plot_augmentations(train),
    }
    if len(counts) > MANY:
        del drawings[CONFUSION]  # nobody could read it, and it would take minutes
    for name, draw in drawings.items():
        with only_warn(name):
            draw().savefig(folder / name, dpi=100)
    loss = F.nll_loss(log_probs.double(), test.labels).item()
    (folder / PAGE).write_text(describe(checkpoint, counts, loss), encoding="utf-8", errors="backslashreplace")
    print(f"A report with pictures is in {folder / PAGE}")


def describe(checkpoint: dict, counts: torch.Tensor, loss: float) -> str:
    """Return the page: the numbers, the pictures, the classes, what made the run, its settings."""
    config, last, maker = checkpoint["config"], checkpoint["metrics"][-1], checkpoint["made_by"][-1]
    names = [" ".join(name.split()).replace("|", "\\|") for name in checkpoint["class_names"]]  # of a table's cells
    correct, total = int(counts.diagonal().sum()), int(counts.sum())
    accuracy, rates = f"{100 * correct / total:.2f} %", 100 * counts.diagonal() / counts.sum(dim=1).clamp(min=1)
    shown = {name: title for name, title in PICTURES.items() if name != CONFUSION or len(counts) <= MANY}
    gallery = "".join(f"## {title}\n\n![{title}]({name})\n\n" for name, title in shown.items())
    classes = "".join(f"| {name} | {rate:.2f} % |\n" for name, rate in zip(names, rates.tolist(), strict=True))
    made_by = ", ".join([maker["device"], *(f"{name} {version}" for name, version in maker["versions"].items())])
    settings = "".join(f"{name} = {value!r}\n" for name, value in config.items())
    return f"""# {config["dataset"]}: {accuracy} of {total:,} test images

| epochs | training loss | training accuracy | test loss | test accuracy | mean of the classes |
|---|---|---|---|---|---|
| {checkpoint["epoch"]} of {config["epochs"]} | {last["train_loss"]:.4f} | {last["train_accuracy"]:.2f} % | {loss:.4f} \
| {accuracy} ({correct:,} of {total:,}) | {rates.mean():.2f} % |

Training figures are those of images as they were trained on: augmented, each before its step.

{gallery}## Classes

| class | accuracy |
|---|---|
{classes}
The most frequent mistakes:

{worst_pairs(counts, names)}
## What made it

{made_by}; commit {maker["commit"] or "unknown"}. last.pt holds the text of the modules.

## Settings

```
{settings}```
"""


def worst_pairs(counts: torch.Tensor, names: Sequence[str]) -> str:
    """Return a line for each of the 20 most frequent mistakes."""
    mistakes = counts - counts.diagonal().diag()
    order = mistakes.flatten().argsort(descending=True, stable=True)[:20].tolist()
    pairs = [divmod(index, len(names)) for index in order]
    return "".join(f"- {names[a]} taken for {names[b]}: {mistakes[a, b]}\n" for a, b in pairs if mistakes[a, b])


def main(argv: list[str] | None = None) -> None:
    """Report as the command line says."""
    parser = argparse.ArgumentParser("python -m tools.report", description="Draw the pictures of a run, and report.md.")
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("--data-dir", help="where the images are (default: as in the training)")
    parser.add_argument("--device", help="cpu, cuda, mps, ... (default: as in the training)")
    report(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    in_one_line("tools.report", main)
