"""Opening pictures."""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, ImageOps

#: EXIF orientations that swap width and height.
_LYING = range(5, 9)


def open_picture(picture: Any, name: str | None = None) -> Image.Image:
    """`picture` as RGB, from a PIL image, the path of a picture file, or such a file's bytes, which may have a `name`.

    It is turned as its EXIF data say, and grey levels of 16 bits become 8.

    Raises:
        ValueError: it is none of these, the file is not there, it is not a whole picture, or its levels have a range
            that nobody knows.
    """
    with _opened(picture, name) as opened:
        upright = ImageOps.exif_transpose(opened)
        if opened.mode.startswith("I;16") or (opened.mode, opened.format) == ("I", "PNG"):  # PIL would cut, not scale
            upright = upright.convert("I").point(lambda level: level / 257 + 0.5).convert("L")
        elif opened.mode in ("I", "F"):
            raise ValueError(f"image: expected 8 or 16 bits a channel, got PIL's mode {opened.mode}, of 32")
        return upright.convert("RGB")


def picture_size(picture: Any, name: str | None = None) -> tuple[int, int]:
    """(width, height) of what `open_picture` gives, as the picture says of itself.

    Raises:
        ValueError: as `open_picture`, but for a picture that breaks off.
    """
    with _opened(picture, name) as opened:
        width, height = opened.size
        return (height, width) if opened.getexif().get(ExifTags.Base.Orientation) in _LYING else (width, height)


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
