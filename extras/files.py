"""Files that are whole at every moment: open it to see how a kill or a full disk leaves the old one in place."""

import contextlib
import os
import sys
import time
from pathlib import Path

from extras.failures import RunStopped


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file with a whole new one: whoever reads it, at any moment, finds the old or the new content.

    Raises RunStopped if it cannot be written; what was there before then stays untouched.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # --evaluate may report into a run's folder
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        for attempt in range(5):
            try:
                os.replace(temporary, path)
                break
            except PermissionError:  # on Windows, while somebody reads the file
                if sys.platform != "win32" or attempt == 4:
                    raise
                time.sleep(0.2)
    except OSError as error:
        raise RunStopped(f"{path} cannot be written ({error.strerror})") from None
    finally:
        with contextlib.suppress(OSError):  # it has been renamed by now, or cannot be removed
            temporary.unlink()
    with contextlib.suppress(OSError):  # Windows and some filesystems cannot do this with a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name is on the disk only when its folder is
        finally:
            os.close(folder)
