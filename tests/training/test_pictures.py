import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from training import pictures as images
from training.pictures import PictureRows, UnreadablePicture, open_picture, read_pixels


def png_that_unpacks_to(width, height):
    """A small PNG file of width x height black pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    pixels = zlib.compressobj(9)
    rows = b"".join(pixels.compress(bytes(1 + width * 3)) for _ in range(height)) + pixels.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.fixture
def jpeg(tmp_path):
    path = tmp_path / "good.jpg"
    Image.effect_noise((1000, 800), 60).convert("RGB").save(path, quality=90)
    return path


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "missing"),
        (b"", "empty"),
        (b"<!doctype html><p>404", "not a picture"),
        (b"GIF89a", "not a picture"),
        ("half", "damaged"),
        ("all but the last bytes", "damaged"),
        ("411 MB", "over 40,000,000 pixels"),
        ("turned, but another EXIF field is text for a number", "damaged"),
    ],
)
def test_unusable_pictures(tmp_path, jpeg, content, reason):
    path = tmp_path / "p.jpg"
    good = jpeg.read_bytes()
    if content == "half":
        content = good[: len(good) // 2]
    elif content == "all but the last bytes":
        content = good[:-3000]
    elif content == "411 MB":
        content = png_that_unpacks_to(11_700, 11_700)
        assert len(content) < 500_000
    elif content and "EXIF" in str(content):
        fields = bytes.fromhex(
            "0129 0002 00000015 00000026  0112 0003 00000001 00060000"
        )  # PageNumber, Orientation
        exif = b"Exif\0\0MM\0*" + bytes.fromhex("00000008 0002") + fields + bytes(4) + b"x" * 20 + bytes(2)
        content = good[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + good[2:]
    if content is not None:
        path.write_bytes(content)
    for read in (open_picture, read_pixels):
        with pytest.raises(UnreadablePicture, match=reason):
            read(path)


def test_pixels_are_those_of_the_picture(tmp_path, jpeg, monkeypatch):
    """Bit for bit, at every scale; JPEGs by libjpeg-turbo alone, everything out of the ordinary by Pillow."""
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = Image.effect_noise((407, 611), 60)
    noise.convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
    noise.convert("CMYK").save(tmp_path / "cmyk.jpg")
    noise.save(tmp_path / "grey.jpg")
    noise.convert("RGBA").save(tmp_path / "p.png")
    noise.convert("RGB").save(tmp_path / "progressive.jpg", progressive=True, subsampling=0)
    (tmp_path / "garbage behind.jpg").write_bytes(jpeg.read_bytes() + b"more")
    direct = []
    decode = images.simplejpeg.decode_jpeg
    monkeypatch.setattr(
        images.simplejpeg, "decode_jpeg", lambda *a, **k: (direct.append(path.name), decode(*a, **k))[1]
    )
    for path in sorted(tmp_path.iterdir()):
        for side in (None, 50, 101, 203, 240):
            expected = np.asarray(open_picture(path, min_side=side))
            pixels = read_pixels(path, min_side=side)
            assert pixels.dtype == np.uint8 and pixels.flags.writeable
            np.testing.assert_array_equal(pixels, expected, err_msg=f"{path.name} at {side}")
    assert set(direct) == {"good.jpg", "grey.jpg", "progressive.jpg", "garbage behind.jpg"}


@pytest.mark.parametrize("read", [open_picture, read_pixels])
def test_a_damaged_png_is_never_read(tmp_path, read):
    """Its decoder looks at no checksum: a changed byte left 54 of 90 rows black, and nobody was told."""
    path = tmp_path / "a.png"
    Image.radial_gradient("L").resize((120, 90)).convert("RGB").save(path)
    content = path.read_bytes()
    assert np.array(read(path)).shape == (90, 120, 3)
    for place in np.linspace(40, len(content) - 16, 25).astype(int):
        flipped = content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]
        for damaged in (flipped, content[:place]):
            path.write_bytes(damaged)
            with pytest.raises(UnreadablePicture):
                read(path)


@pytest.mark.parametrize("read", [open_picture, read_pixels])
def test_a_progressive_jpeg_of_many_scans_is_refused_before_it_is_decoded(tmp_path, read):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (4000, 4000)).save(path, progressive=True)
    ordinary = path.read_bytes()
    assert read(path, min_side=64) is not None
    last_scan = ordinary[ordinary.rindex(images.START_OF_SCAN) : -2]
    path.write_bytes(ordinary[:-2] + 100 * last_scan + ordinary[-2:])
    with pytest.raises(UnreadablePicture, match="scans of 4000x4000"):
        read(path)


def test_modes_become_rgb_on_white(tmp_path):
    transparent = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    transparent.save(tmp_path / "t.png")
    assert open_picture(tmp_path / "t.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("CMYK", (4, 4)).save(tmp_path / "c.jpg")
    Image.new("P", (4, 4)).save(tmp_path / "p.png")
    Image.new("L", (4, 4)).save(tmp_path / "l.png")
    assert {open_picture(tmp_path / name).mode for name in ("c.jpg", "p.png", "l.png")} == {"RGB"}


def test_camera_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "o.jpg", exif=exif)
    assert open_picture(tmp_path / "o.jpg").size == (20, 40)


def test_reduced_decoding_keeps_the_asked_side(jpeg):
    assert open_picture(jpeg).size == (1000, 800)
    small = open_picture(jpeg, min_side=224)
    assert 224 <= min(small.size) < 800
    assert open_picture(jpeg, min_side=900).size == (1000, 800)  # never enlarged


@pytest.mark.parametrize("side", [60, 110, 224])
def test_reduced_decoding_shows_the_same_picture(tmp_path, side):
    x, y = np.meshgrid(np.linspace(0, 9, 1000), np.linspace(0, 7, 800))
    waves = np.stack([np.sin(x), np.cos(x + y), np.sin(2 * y)], axis=2)
    Image.fromarray((127 + 120 * waves).astype(np.uint8)).save(tmp_path / "p.jpg", quality=90)
    reduced = open_picture(tmp_path / "p.jpg", min_side=side)
    assert side <= min(reduced.size) < 2 * side
    full, small = (
        np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC), float)
        for picture in (open_picture(tmp_path / "p.jpg"), reduced)
    )
    assert np.abs(full - small).mean() < 1 and np.abs(full - small).max() < 12


def test_real_pictures(challenge):
    reasons = {}
    for path in sorted((challenge / "images").iterdir()):
        try:
            picture = open_picture(path, min_side=384)
            assert picture.mode == "RGB"
            np.testing.assert_array_equal(read_pixels(path, min_side=384), np.asarray(picture))
        except UnreadablePicture as error:
            reasons[path.name] = str(error)
    assert len(reasons) == 4, reasons  # one unreadable, three truncated by a few bytes


NAMES = ["good.png", "page.jpg", "absent.jpg", "", "other.png"]


def mean_colour(picture):
    return torch.tensor(np.asarray(picture, np.float32).mean((0, 1)))


def colour_and_width(picture):
    return mean_colour(picture), torch.tensor(picture.width)


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (40, 20), (255, 0, 0)).save(tmp_path / "good.png")
    Image.new("RGB", (30, 30), (0, 255, 0)).save(tmp_path / "other.png")
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    return tmp_path


@pytest.mark.parametrize("read", [open_picture, read_pixels])
def test_rows_have_an_input_or_a_reason(folder, read):
    rows = PictureRows(NAMES, folder, mean_colour, min_side=8, read=read)
    items = [rows[row] for row in range(len(rows))]
    assert [reason for _, reason in items] == ["", "not a picture", "missing", "no image link", ""]
    assert items[0][0].tolist() == [255, 0, 0] and items[1][0] is None
    inputs, reasons = rows.collate(items)
    assert inputs.tolist() == [[255, 0, 0], [0, 255, 0]]
    assert reasons == [reason for _, reason in items]
    assert rows.collate(items[1:3]) == (None, ["not a picture", "missing"])


def test_one_picture_can_serve_several_encoders(folder):
    rows = PictureRows(NAMES, folder, colour_and_width, min_side=8)
    (colours, widths), _ = rows.collate([rows[0], rows[4]])
    assert colours.shape == (2, 3) and widths.tolist() == [40, 30]


def test_rows_can_be_sent_to_a_worker(folder):
    """Where workers are not forked, as on macOS, they get the dataset pickled."""
    rows = pickle.loads(pickle.dumps(PictureRows(NAMES, folder, mean_colour, min_side=8)))
    assert rows[0][0].tolist() == [255, 0, 0]


def test_identity_changes_with_the_files(folder):
    def identity(names=NAMES):
        return PictureRows(names, folder, mean_colour, min_side=8).identity()

    before = identity()
    assert identity() == before and identity(NAMES[:4]) != before
    Image.new("RGB", (80, 80), "blue").save(folder / "absent.jpg")
    assert identity() != before
