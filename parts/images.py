"""Where images come from: CIFAR, a folder, drawn shapes. Open it to add a source of your own."""

import contextlib
import io
import pickle
import re
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image, ImageCms, ImageOps
from tqdm import tqdm

from config import UsageError

Split = tuple[np.ndarray, np.ndarray]  # images (N, 32, 32, 3) uint8 and labels (N,) int64, in one order
Source = tuple[Split, Split, list[str]]  # to train on, to test on, the classes' names
FORMATS = (None, "AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")
HIDDEN = re.compile(r"\.|(thumbs\.db|desktop\.ini|__macosx)$", re.IGNORECASE)  # names of what is no image


def load_source(name: str, data_dir: str | Path, size: int = 32, test_only: bool = False) -> Source:
    """Return (train, test, class_names) of "cifar10", "cifar100", "folder" or "shapes". Raises UsageError.

    size: a folder's images become size x size. test_only: its test images stand in for those to train on.
    """
    if name == "shapes":  # 1,200 to train on, 300 to test on
        rng = np.random.Generator(np.random.Philox(key=0))
        return draw_shapes(1200, rng), draw_shapes(300, rng), list(SHAPES)
    place = Path(data_dir).expanduser()
    return load_folder(place, size, test_only) if name == "folder" else load_cifar(name, place)


def load_cifar(name: str, data_dir: Path) -> Source:
    """Return CIFAR-10, or CIFAR-100 with its fine classes (Krizhevsky 2009), downloaded if it is not in data_dir."""
    from torchvision import datasets  # here: it is slow to import, and other sources do without it

    dataset = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    data_dir = data_dir.parent if data_dir.name == dataset.base_folder else data_dir
    try:
        try:
            parts = [dataset(data_dir, train=train) for train in (True, False)]
        except RuntimeError:  # it is not there, or not whole
            data_dir.mkdir(parents=True, exist_ok=True)
            with FileLock(data_dir / ".lock"):  # of two runs or processes, one downloads
                parts = [dataset(data_dir, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError, EOFError, LookupError, ValueError, pickle.UnpicklingError) as error:
        ways = f"name the folder that holds {dataset.base_folder} with --data-dir, put {dataset.url} there"
        raise UsageError(f"{name} is not whole in {data_dir} and cannot be downloaded ({error}): {ways}") from None
    # torchvision's images are a transposed view; every later read wants them in one piece
    splits = [(np.ascontiguousarray(part.data), np.array(part.targets, dtype=np.int64)) for part in parts]
    return *splits, list(parts[0].classes)


def load_folder(data_dir: Path, size: int = 32, test_only: bool = False) -> Source:
    """Return the images of data_dir/train/<class>/* and data_dir/test/<class>/*, resized to size x size.

    The classes are the folders' names in alphabetical order. Raises UsageError for what is missing or no image.
    """
    parts = [_class_folders(data_dir / part) for part in (["test"] if test_only else ["train", "test"])]
    if others := sorted({*parts[0]} ^ {*parts[-1]}):
        raise UsageError(f"{data_dir}: the class {others[0]!r} must be a folder in both train and test")
    splits = [_read_classes(folders, size) for folders in parts]
    return splits[0], splits[-1], list(parts[0])


def _read_classes(folders: dict[str, Path], size: int) -> Split:
    files = [(label, folder / name) for label, folder in enumerate(folders.values()) for name in _visible(folder)]
    with ThreadPoolExecutor() as pool, contextlib.ExitStack() as end:  # threads: Pillow decodes without Python's lock
        end.callback(pool.shutdown, cancel_futures=True)  # at Ctrl-C, those that have not begun
        jobs = [pool.submit(read_image, file, size) for _, file in files]
        errors = [str(job.exception()) for job in tqdm(jobs, "Reading", disable=None, leave=False) if job.exception()]
    if errors:
        raise UsageError("; ".join(errors[:10]) + (f"; and {len(errors) - 10} more" if errors[10:] else ""))
    return np.stack([job.result() for job in jobs]), np.array([label for label, _ in files], dtype=np.int64)


def _class_folders(folder: Path) -> dict[str, Path]:
    """Return {class name: its folder}, sorted; a Mac's names, whose accents stand apart (NFD), become like others'."""
    names = _visible(folder)
    folders = {unicodedata.normalize("NFC", name): folder / name for name in names}
    if len(folders) < len(names):
        raise UsageError(f"{folder}: two folders have one name, whose accents are written in two ways: rename one")
    return dict(sorted(folders.items()))


def _visible(folder: Path) -> list[str]:
    """Return the sorted names in a folder; raise UsageError if it cannot be read or is empty."""
    try:
        names = sorted(path.name for path in folder.iterdir() if not HIDDEN.match(path.name))
    except OSError as error:
        layout = "--dataset folder reads DATA_DIR/train/CLASS/IMAGE and DATA_DIR/test/CLASS/IMAGE"
        layout += " (--valid-split only divides train, it does not stand in for test)" * (folder.name == "test")
        raise UsageError(f"{folder} cannot be read as a folder ({error.strerror}): {layout}") from None
    if not names:
        raise UsageError(f"{folder} is empty: each class needs images")
    return names


def read_image(path: str | Path, size: int = 32) -> np.ndarray:
    """Return the (first) image in a file that Pillow reads as (size, size, 3) uint8, RGB. Raises UsageError."""
    try:
        if Path(path).is_fifo():  # opening it would wait for ever
            raise ValueError("not a file")
        with Image.open(path) as image:
            return resize_image(image, size)
    except Exception as error:  # Pillow's decoders may raise anything at a damaged file
        heic = Path(path).suffix.lower() in (".heic", ".heif")
        reason = "HEIC needs pillow-heif: convert it to JPEG" if heic else getattr(error, "strerror", None) or error
        raise UsageError(f"{path} cannot be read as an image ({reason})") from None


def resize_image(image: Image.Image, size: int = 32) -> np.ndarray:
    """Return an image upright, in sRGB and squeezed to (size, size, 3) uint8; one of that size keeps its pixels.

    Transparent parts become white; a colour profile is applied. What can be misread is a UsageError.
    """
    form, tags = image.format, getattr(image, "tag_v2", {})  # of a TIFF
    if form not in FORMATS or image.mode in ("I", "F"):  # None: no file; Pillow misreads others, and runs PostScript
        raise UsageError(f"{form or 'a picture'} of mode {image.mode} is not read here: save it as a PNG of 8 bits")
    image = image.copy()  # loads it, before anything is suppressed: a damaged file must fail
    with contextlib.suppress(Exception):  # in place, for it turns the image before it meets what is broken in EXIF data
        ImageOps.exif_transpose(image, in_place=True)
    # Tags: 258, bits of a value; 262, 0 if white is zero; 338, what a fourth band means.
    deep = max(tags.get(258, [8])) > 8 and (image.mode[0] != "I" or tags[262] == 0)
    if form == "TIFF" and (deep or (image.mode == "RGBA" and 338 not in tags)):
        raise UsageError("a TIFF of a rare kind: save it as one of 8 bits, or as PNG")
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8
        pixels = np.asarray(image)
        if pixels.max() < 4096:
            print("warning: a 16-bit image has values below 4,096 only: it will be nearly black", file=sys.stderr)
        image = Image.fromarray(np.where(pixels == image.info.get("transparency"), 255, pixels >> 8).astype(np.uint8))
    if form in ("TGA", "BMP") and image.mode == "RGBA" and image.getextrema()[3] == (0, 0):
        image = image.convert("RGB")  # viewers ignore opacity there, and many programs leave it at zero
    image = image.convert("RGBA") if image.has_transparency_data or image.mode == "P" else image
    if image.mode in ("L", "RGB", "RGBA", "CMYK") and "icc_profile" in image.info:
        with contextlib.suppress(ImageCms.PyCMSError, OSError):
            profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
            mode = "RGBA" if image.mode == "RGBA" else "RGB"
            image = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode=mode)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB").resize((size, size)))


SHAPES = {  # each class: whether the point (u, v) is inside the figure, which fits the circle u^2 + v^2 <= 1
    "bar": lambda u, v: (abs(u) <= 0.95) & (abs(v) <= 0.28),
    "bow tie": lambda u, v: (abs(v) <= abs(u)) & (abs(u) <= 0.7),
    "circle": lambda u, v: u * u + v * v <= 0.65,
    "crescent": lambda u, v: (u * u + v * v <= 0.9) & ((u - 0.5) ** 2 + v * v >= 0.5),
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) <= 0.25) & (np.maximum(abs(u), abs(v)) <= 0.95),
    "frame": lambda u, v: (np.maximum(abs(u), abs(v)) <= 0.75) & (np.maximum(abs(u), abs(v)) >= 0.45),
    "half disc": lambda u, v: (u * u + v * v <= 0.9) & (v >= 0),
    "ring": lambda u, v: (u * u + v * v <= 0.85) & (u * u + v * v >= 0.3),
    "square": lambda u, v: np.maximum(abs(u), abs(v)) <= 0.65,
    "triangle": lambda u, v: (v >= -0.5) & (v + 1.75 * abs(u) <= 1),
}


def draw_shapes(count: int, rng: np.random.Generator) -> Split:
    """Draw `count` pictures of SHAPES, the classes in turn, by what IEEE 754 rounds exactly: alike on every machine."""
    labels = np.arange(count, dtype=np.int64) % len(SHAPES)
    t, x, y, size = rng.random((4, count, 1, 1))
    t = 2 * t - 1
    cosine, sine = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)  # a point of the half circle: +-90 degrees
    pixel, radius = np.arange(32) + 0.5, 7 + 5 * size
    dx, dy = pixel - (12 + 8 * x), pixel[:, None] - (12 + 8 * y)  # the centre is within 4 pixels of the image's
    u, v = (cosine * dx + sine * dy) / radius, (cosine * dy - sine * dx) / radius
    inside = np.empty((count, 32, 32), dtype=bool)
    for label, shape in enumerate(SHAPES.values()):
        inside[labels == label] = shape(u[labels == label], v[labels == label])
    background = 0.6 * rng.random((count, 1, 1, 3))
    figure = background + 0.25 + 0.15 * rng.random((count, 1, 1, 3))
    pictures = np.where(inside[..., None], figure, background)
    pictures = np.where(rng.random((count, 1, 1, 1)) < 0.5, 1 - pictures, pictures)  # about half are dark on bright
    return (255 * (pictures + 0.3 * (rng.random(pictures.shape) - 0.5)).clip(0, 1)).astype(np.uint8), labels
