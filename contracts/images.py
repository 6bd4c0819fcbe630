"""The one safe way to open a picture.

A catalogue's pictures come from the open web: half a file, an HTML error page, or a 17 KB PNG that unpacks to
411 MB. Each becomes one `UnreadablePicture` with a short reason, before memory is spent. Truncated files are
refused: ImageFile.LOAD_TRUNCATED_IMAGES would turn the missing part into grey pixels without a word.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image, ImageOps

MAX_PIXELS = 40_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


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
    path = Path(path)
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
    with picture:
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise UnreadablePicture(f"{width}x{height} is over {MAX_PIXELS:,} pixels")
        if min_side is not None:
            # draft() takes the smallest scale that covers the box; a box in the picture's own shape keeps
            # the shorter side at min_side or more
            scale = min_side / min(width, height)
            picture.draft("RGB", (max(1, int(width * scale)), max(1, int(height * scale))))
        try:
            picture.load()
            return _on_white(ImageOps.exif_transpose(picture))
        except (OSError, ValueError, SyntaxError, EOFError, IndexError) as error:
            raise UnreadablePicture(f"damaged ({str(error)[:60]})") from None


def _on_white(picture: Image.Image) -> Image.Image:
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        white = Image.new("RGB", rgba.size, "white")
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return picture.convert("RGB")
