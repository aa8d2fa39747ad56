"""Writing files whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write what is to stand at `path`: it gets there, in the place of an older one, when the block ends.

    A kill at any moment leaves the older file or the new one; a block that fails, a full disk included, the older one.
    """
    fresh = path.with_name(f"{path.name}.part")
    try:
        yield fresh
        with fresh.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
