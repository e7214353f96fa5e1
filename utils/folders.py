"""Output folders that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.files import fsync_folder


@contextmanager
def whole_folder(target: str | os.PathLike) -> Iterator[Path]:
    """Fill a temporary folder in the block; at its end it takes the place of `target`.

    A failure or a kill leaves `target` as it was. What a kill left behind is removed by the next
    call for the same target, so two calls for one target must not run at the same time.

    Args:
        target: the folder to make; one that exists is replaced.

    Yields:
        An empty folder next to `target`.
    """
    target = Path(target)
    temporary = target.with_name(f".{target.name}.partial")
    replaced = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _fsync_tree(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    temporary.rename(target)
    fsync_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _fsync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(Path(parent, name), "rb") as file:
                os.fsync(file.fileno())
        fsync_folder(parent)
