"""Opening pictures."""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image


def open_picture(picture: Any, name: str | None = None) -> Image.Image:
    """`picture` as RGB, from a PIL image, the path of a picture file, or such a file's bytes, which may have a `name`.

    Raises:
        ValueError: it is none of these, the file is not there, or it is not a whole picture.
    """
    with _opened(picture, name) as opened:
        return opened.convert("RGB")


def picture_size(picture: Any, name: str | None = None) -> tuple[int, int]:
    """(width, height) of what `open_picture` takes, as it says of itself.

    Raises:
        ValueError: as `open_picture`, but for a picture that breaks off.
    """
    with _opened(picture, name) as opened:
        return opened.size


@contextlib.contextmanager
def _opened(picture: Any, name: str | None) -> Iterator[Image.Image]:
    if not isinstance(picture, Image.Image | str | os.PathLike | bytes):
        raise ValueError(f"image: expected a PIL image or a path, got {type(picture).__name__}")
    try:
        if isinstance(picture, Image.Image):
            yield picture
            return
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else Path(picture)) as opened:
            yield opened
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # a SyntaxError is PIL's for a broken PNG
        named = str(picture) if isinstance(picture, str | os.PathLike) else name
        got = "one that breaks off" if named is None else repr(named)
        raise ValueError(f"image: expected a whole picture file, got {got}: {error}") from error
