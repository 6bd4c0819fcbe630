"""The one safe way to open a picture, and the rows of a table as pictures for an encoder.

A catalogue's pictures come from the open web: half a file, an HTML error page, or a 17 KB PNG that unpacks to
411 MB. Each of these becomes one `UnreadablePicture` with a short reason, before memory is spent. Truncated files are
rejected too: ImageFile.LOAD_TRUNCATED_IMAGES would fill the missing part with grey pixels without a warning.
"""

from __future__ import annotations

import hashlib
import struct
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps

MAX_PIXELS = 40_000_000
MAX_SCANNED_PIXELS = 1_000_000_000
"""Pixels times scans of a progressive JPEG. An ordinary one has ten scans; a small file may have thousands, each of
which the decoder applies to the whole picture."""
START_OF_SCAN = b"\xff\xda"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
DAMAGE = (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error)
"""What Pillow raises for the content of a damaged file."""
NO_LINK, MISSING = "no image link", "missing"
"""Reasons for which there is no file to look at; every other reason is about the content of a file."""


class UnreadablePicture(Exception):
    """`str(error)` is the reason in a few words: "missing", "empty file", "not a picture", …"""


def open_picture(path: Path | str, *, min_side: int | None = None) -> Image.Image:
    """Decode one picture to RGB, upright, transparency on white.

    Args:
        path: the picture file.
        min_side: when given, a JPEG is decoded at the smallest of the scales 1, 1/2, 1/4, 1/8 whose shorter
            side is still at least this many pixels. libjpeg does this inside the DCT, several times faster.

    Raises:
        UnreadablePicture: with the reason.
    """
    with _header(Path(path)) as picture:
        return _load(picture, min_side)


def read_pixels(path: Path | str, *, min_side: int | None = None) -> np.ndarray:
    """The same pixels as `open_picture` gives, as an array (H, W, 3) uint8.

    simplejpeg decodes a plain JPEG straight into the array, which saves the copies that Pillow makes. Arguments and
    errors are those of `open_picture`.
    """
    path = Path(path)
    with _header(path) as picture:
        if picture.format != "JPEG":
            return np.array(_load(picture, min_side))
        try:
            upright = picture.getexif().get(ExifTags.Base.Orientation, 1) == 1
            if picture.mode in ("RGB", "L") and upright:
                reduction = _reduction(picture.size, min_side)
                width, height = (-(-side // reduction) for side in picture.size)
                return simplejpeg.decode_jpeg(path.read_bytes(), "RGB", min_height=height, min_width=width)
        except DAMAGE:
            # simplejpeg also rejects files that libjpeg would only warn about; Pillow decides whether they are damaged
            pass
        return np.array(_load(picture, min_side))


def _header(path: Path) -> Image.Image:
    """The picture, opened but not decoded."""
    if not path.is_file():
        raise UnreadablePicture(MISSING)
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
    if picture.format == "PNG":
        _require_checksums(path)
    if picture.info.get("progressive"):
        scans = path.read_bytes().count(START_OF_SCAN)
        if scans * width * height > MAX_SCANNED_PIXELS:
            picture.close()
            raise UnreadablePicture(f"{scans} scans of {width}x{height} pixels would take too long")
    return picture


def _require_checksums(path: Path) -> None:
    """Raise UnreadablePicture for a PNG with a wrong checksum; its decoder would leave rows black without a word."""
    try:
        with Image.open(path, formats=("PNG",)) as unread:
            unread.verify()
    except DAMAGE as error:
        raise UnreadablePicture(f"damaged ({str(error)[:60]})") from None


def _load(picture: Image.Image, min_side: int | None) -> Image.Image:
    """Decode an opened picture to RGB, upright, transparency on white."""
    if (reduction := _reduction(picture.size, min_side)) > 1:
        picture.draft("RGB", (picture.width // reduction, picture.height // reduction))
    try:
        picture.load()
        ImageOps.exif_transpose(picture, in_place=True)
        return _on_white(picture)
    except DAMAGE as error:
        raise UnreadablePicture(f"damaged ({str(error)[:60]})") from None


def _reduction(size: tuple[int, int], min_side: int | None) -> int:
    """The largest factor, 1 to 8, that libjpeg may shrink by so that the shorter side keeps `min_side` pixels."""
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


class PictureRows:
    """The pictures of a table as inputs of an encoder: a map-style dataset for torch's DataLoader.

    Item `row` is (input, "") or, where the picture cannot be used, (None, reason).

    Args:
        names: (N,) file names; "" where a row has no picture.
        folder: the folder that holds the files; None where there is none, and every picture is missing.
        prepare: turns what `read` returns into the encoder's input. For several encoders it returns a tuple with one
            input for each, so that one decoded picture serves them all.
        min_side: side of the encoder's input in pixels, the largest one for several encoders; a JPEG is decoded at
            the smallest scale that still has it.
        read: `open_picture` for a `prepare` that takes a Pillow picture, `read_pixels` for one that takes an array.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path | None,
        prepare: Callable[[Any], Any],
        *,
        min_side: int,
        read: Callable[..., Any] = open_picture,
    ):
        self.names = list(names)
        self.folder = folder
        self.prepare = prepare
        self.min_side = min_side
        self.read = read

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> tuple[Any | None, str]:
        if not self.names[row]:
            return None, NO_LINK
        if self.folder is None:
            return None, MISSING
        try:
            picture = self.read(self.folder / self.names[row], min_side=self.min_side)
        except UnreadablePicture as error:
            return None, str(error)
        return self.prepare(picture), ""

    @staticmethod
    def collate(items: list[tuple[Any | None, str]]) -> tuple[Any | None, list[str]]:
        """Make a batch of B items, of which B' have an input.

        Returns:
            The inputs, stacked to (B', …) and in the structure that `prepare` gave them, or None if there are none;
            and B reasons, "" for a row that has an input.
        """
        from torch.utils.data import default_collate

        inputs = [prepared for prepared, _ in items if prepared is not None]
        reasons = [reason for _, reason in items]
        return default_collate(inputs) if inputs else None, reasons

    def identity(self) -> str:
        """A hash that changes when a picture is added, removed or gets another size on disk."""
        digest = hashlib.sha256()
        for name in self.names:
            path = self.folder / name if self.folder and name else None
            size = path.stat().st_size if path and path.is_file() else "-"
            digest.update(f"{name} {size}\n".encode())
        return digest.hexdigest()[:16]
