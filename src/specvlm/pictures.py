"""Opening pictures."""

import os
from pathlib import Path
from typing import Any

from PIL import Image


def open_picture(picture: Any) -> Image.Image:
    """`picture` as RGB, from a PIL image or the path of a picture file.

    Raises:
        ValueError: it is neither, the file is not there, or it is not a whole picture.
    """
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    if not isinstance(picture, str | os.PathLike):
        raise ValueError(f"image: expected a PIL image or a path, got {type(picture).__name__}")
    try:
        with Image.open(Path(picture)) as opened:
            return opened.convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"image: expected a picture file, got {str(picture)!r}: {error}") from error
