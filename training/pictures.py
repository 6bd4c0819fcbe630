"""The one safe way to open a picture.

A catalogue's pictures come from the open web: half a file, an HTML error page, or a 17 KB PNG that unpacks to
411 MB. Each becomes one `UnreadablePicture` with a short reason, before memory is spent. Truncated files are
refused: ImageFile.LOAD_TRUNCATED_IMAGES would turn the missing part into grey pixels without a word.
"""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps

MAX_PIXELS = 40_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
DAMAGE = (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error)
"""what Pillow raises on the content of a file"""


class UnreadablePicture(Exception):
    """`str(error)` is the reason in a few words: "missing", "empty file", "not a picture", …"""


def open_picture(path: Path | str, *, min_side: int | None = None) -> Image.Image:
    """Decode one picture to RGB, upright, transparency on white.

    Args:
        path: the picture file.
        min_side: when given, a JPEG is decoded at the smallest of the scales 1, 1/2, 1/4, 1/8 whose shorter
            side is still at least this many pixels (libjpeg does this inside the DCT, several times faster).

    Raises:
        UnreadablePicture: with the reason.
    """
    with _header(Path(path)) as picture:
        return _load(picture, min_side)


def read_pixels(path: Path | str, *, min_side: int | None = None) -> np.ndarray:
    """The pixels of `open_picture`, (H, W, 3) uint8; of a JPEG without the copies that Pillow makes of them.

    Raises:
        UnreadablePicture: with the reason.
    """
    path = Path(path)
    with _header(path) as picture:
        try:
            upright = picture.getexif().get(ExifTags.Base.Orientation, 1) == 1
            if picture.format == "JPEG" and picture.mode in ("RGB", "L") and upright:
                reduction = _reduction(picture.size, min_side)
                width, height = (-(-side // reduction) for side in picture.size)
                return simplejpeg.decode_jpeg(path.read_bytes(), "RGB", min_height=height, min_width=width)
        except DAMAGE:
            pass  # refused is also what libjpeg only warns of; Pillow knows which of that is damage
        return np.array(_load(picture, min_side))


def _header(path: Path) -> Image.Image:
    """The picture, opened but not decoded."""
    if not path.is_file():
        raise UnreadablePicture("missing")
    if path.stat().st_size == 0:
        raise UnreadablePicture("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS below is stricter
            picture = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError:
        raise UnreadablePicture(f"over {MAX_PIXELS:,} pixels") from None
    except (OSError, ValueError, SyntaxError):
        raise UnreadablePicture("not a picture") from None
    width, height = picture.size
    if width * height > MAX_PIXELS:
        picture.close()
        raise UnreadablePicture(f"{width}x{height} is over {MAX_PIXELS:,} pixels")
    return picture


def _load(picture: Image.Image, min_side: int | None) -> Image.Image:
    if (reduction := _reduction(picture.size, min_side)) > 1:
        picture.draft("RGB", (picture.width // reduction, picture.height // reduction))
    try:
        picture.load()
        ImageOps.exif_transpose(picture, in_place=True)
        return _on_white(picture)
    except DAMAGE as error:
        raise UnreadablePicture(f"damaged ({str(error)[:60]})") from None


def _reduction(size: tuple[int, int], min_side: int | None) -> int:
    """By how much libjpeg may shrink a picture whose shorter side is to keep `min_side` pixels."""
    if min_side is None:
        return 1
    return max((n for n in (2, 4, 8) if min(size) >= n * min_side), default=1)


def _on_white(picture: Image.Image) -> Image.Image:
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        white = Image.new("RGB", rgba.size, "white")
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return picture if picture.mode == "RGB" else picture.convert("RGB")
