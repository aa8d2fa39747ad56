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
    if not isinstance(picture, Image.Image | str | os.PathLike):
        raise ValueError(f"image: expected a PIL image or a path, got {type(picture).__name__}")
    try:
        if isinstance(picture, Image.Image):
            return picture.convert("RGB")
        with Image.open(Path(picture)) as opened:
            return opened.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # a SyntaxError is PIL's for a broken PNG
        name = repr(str(picture)) if isinstance(picture, str | os.PathLike) else "one that breaks off"
        raise ValueError(f"image: expected a whole picture file, got {name}: {error}") from error
