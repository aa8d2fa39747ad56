"""Opening pictures: upright, in RGB, and never white where they are not."""

import numpy as np
import pytest
from PIL import Image

from specvlm.pictures import open_picture, picture_size


@pytest.fixture
def quarters() -> Image.Image:
    """Four colours, of which each corner has one, wider than high."""
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:8, :16, 0] = pixels[8:, :16, 1] = pixels[:8, 16:, 2] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        (1, None),
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (4, Image.Transpose.FLIP_TOP_BOTTOM),
        (5, Image.Transpose.TRANSPOSE),
        (6, Image.Transpose.ROTATE_90),
        (7, Image.Transpose.TRANSVERSE),
        (8, Image.Transpose.ROTATE_270),
    ],
)
def test_a_picture_is_turned_as_its_exif_data_say(quarters, tmp_path, orientation, stored):
    path, exif = tmp_path / "turned.png", Image.Exif()
    exif[0x0112] = orientation
    (quarters if stored is None else quarters.transpose(stored)).save(path, exif=exif)
    for given in (path, path.read_bytes(), Image.open(path)):
        assert open_picture(given).tobytes() == quarters.tobytes()
        assert open_picture(given).size == picture_size(given) == quarters.size


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_become_eight(tmp_path, suffix):
    levels = np.array([[0, 257, 32896, 65535], [128, 129, 65406, 65407]], dtype=np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(levels).save(tmp_path / f"grey{suffix}", exif=exif)
    found = np.array(open_picture(tmp_path / f"grey{suffix}"))
    assert found.shape == (2, 4, 3)
    assert found[::-1, ::-1, 0].tolist() == [[0, 1, 128, 255], [0, 1, 254, 255]]
    big_endian = Image.frombytes("I;16B", (4, 2), levels.astype(">u2").tobytes())
    assert np.array(open_picture(big_endian))[..., 0].tolist() == [[0, 1, 128, 255], [0, 1, 254, 255]]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_levels_of_unknown_range(mode):
    with pytest.raises(ValueError, match=f"image: expected 8 or 16 bits a channel, got PIL's mode {mode}, of 32"):
        open_picture(Image.new(mode, (4, 4), 40000))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK"])
def test_other_modes_become_rgb(quarters, mode):
    assert open_picture(quarters.convert(mode)).mode == "RGB"
