"""Reading images: upright RGB, or one clear error."""

import base64
import io
import struct
import zlib

import pytest
from PIL import ExifTags, Image

from mmpeft.images import image_size, load_image


def png(image, **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, kwargs.pop("format", "PNG"), **kwargs)
    return buffer.getvalue()


RED = Image.new("RGB", (6, 4), (255, 0, 0))


def test_sources_agree(tmp_path):
    path = tmp_path / "red.png"
    path.write_bytes(png(RED))
    url = "data:image/png;base64," + base64.b64encode(png(RED)).decode()
    for source in (path, str(path), png(RED), url, RED):
        image = load_image(source)
        assert image.mode == "RGB" and image.tobytes() == RED.tobytes()


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("LA", (2, 2), (0, 0)), (255, 255, 255)),
        (Image.new("I;16", (2, 2), 0x8000), (128, 128, 128)),
        (Image.new("L", (2, 2), 77), (77, 77, 77)),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), (255, 0, 0)),
        (RED.quantize(), (255, 0, 0)),
    ],
    ids=["rgba", "la", "16 bit", "grey", "cmyk", "palette"],
)
def test_modes(image, expected):
    got = load_image(image).getpixel((0, 0))
    assert all(abs(a - b) <= 1 for a, b in zip(got, expected, strict=True))


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert load_image(png(RED, format="JPEG", exif=exif)).size == (4, 6)


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"row 3: .*nope.png does not exist"):
        load_image(tmp_path / "nope.png", "row 3")


def test_a_text_too_long_for_a_path_is_one_short_line():
    with pytest.raises(FileNotFoundError, match="^row 3: iVBOR.* does not exist") as error:
        load_image("iVBOR" * 1000, "row 3")
    assert len(str(error.value)) < 200


def test_a_text_file_named_png(tmp_path):
    path = tmp_path / "fake.png"
    path.write_text("not a picture")
    with pytest.raises(ValueError, match=r"fake.png is not an image"):
        load_image(path)


def test_truncated_jpeg(tmp_path):
    path = tmp_path / "cut.jpg"
    noise = Image.effect_noise((200, 200), 80)
    path.write_bytes(png(noise, format="JPEG")[:2000])
    with pytest.raises(ValueError, match=r"cut.jpg is truncated or damaged"):
        load_image(path)


def png_with(name, content, check=None):
    """A PNG with one more chunk behind its header."""
    data = png(Image.new("RGB", (8, 6), "red"))
    check = zlib.crc32(name + content) if check is None else check
    chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)
    return data[:33] + chunk + data[33:]


LONG = zlib.compress(b"x" * (2 << 20))


@pytest.mark.parametrize("chunk", [(b"zTXt", b"k\0\0" + LONG), (b"iTXt", b"k\0\1\0\0\0" + LONG)])
def test_metadata_that_cannot_be_read_is_not_called_damage(chunk):
    for read in (load_image, image_size):
        with pytest.raises(ValueError, match="image: its metadata cannot be read .*save it with"):
            read(png_with(*chunk))


def test_broken_exif_turns_no_picture():
    for read in (load_image, image_size):
        read(png_with(b"eXIf", b"junk"))
    own = Image.open(io.BytesIO(png_with(b"eXIf", b"junk")))
    assert load_image(own).size == (8, 6) and own.info["exif"]


def test_a_damaged_file_is_said_to_be_one():
    with pytest.raises(ValueError, match="truncated or damaged .it begins like PNG.; replace"):
        load_image(png_with(b"tEXt", b"a\0b", check=0))


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_the_image_of_the_caller_is_never_changed(mode, kind):
    exif = Image.Exif()
    exif[0x112] = 6
    file = io.BytesIO()
    Image.linear_gradient("L").resize((8, 6)).convert(mode).save(file, kind, exif=exif)
    own = Image.open(file)
    own.load()
    before, info = own.tobytes(), dict(own.info)
    loaded = load_image(own)
    assert own.tobytes() == before and own.info == info
    assert loaded.size == (6, 8) and type(loaded) is Image.Image and not loaded.info
    read = load_image(file.getvalue())
    assert read == loaded and not read.getexif()
    loaded.paste("white", (0, 0, 6, 8))
    assert own.tobytes() == before


def test_bomb(tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("1", (20_000, 20_000)).save(path)
    with pytest.raises(ValueError, match=r"bomb.png.*pixels"):
        load_image(path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://example.org/a.png", "download it"),
        ("data:image/png,abc", "not base64"),
        ("data:image/png;base64,%%%", "cannot be decoded"),
        (b"", "not an image"),
        (3, "expected a path"),
    ],
)
def test_other_sources(source, message):
    with pytest.raises(ValueError, match=message):
        load_image(source)


@pytest.mark.parametrize("orientation", [0, 1, 5, 6, 8, 9])
def test_the_size_without_the_pixels_is_that_of_the_upright_image(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation  # 0 and 9 mean nothing
    buffer = io.BytesIO()
    Image.new("RGB", (4, 2)).save(buffer, "JPEG", exif=exif)
    width, height = load_image(buffer.getvalue()).size
    assert image_size(buffer.getvalue()) == (height, width)


def tiff(bits, photometric, data):
    """A grey picture of 4 x 2, uncompressed."""
    entries = [(256, 4), (257, 2), (258, bits), (259, 1), (262, photometric), (273, 0), (277, 1),
               (278, 2), (279, len(data))]  # fmt: skip
    start = 8 + 2 + 12 * len(entries) + 4
    found = b"II*\0" + struct.pack("<IH", 8, len(entries))
    for tag, value in entries:
        found += struct.pack("<HHII", tag, 4, 1, start if tag == 273 else value)
    return found + struct.pack("<I", 0) + data


@pytest.mark.parametrize(
    ("bits", "photometric", "data", "expected"),
    [
        (12, 1, b"\xff" * 12, 255), (12, 1, b"\x80\x08\x00" * 4, 128), (16, 1, b"\xff" * 16, 255),
        (16, 0, b"\0" * 16, 255), (16, 0, b"\xff" * 16, 0), (8, 0, b"\0" * 8, 255),
    ],
)  # fmt: skip
def test_white_of_a_tiff_is_white(bits, photometric, data, expected):
    found = load_image(tiff(bits, photometric, data))
    assert set(found.tobytes()) == {expected} or found.getpixel((0, 0)) == (expected,) * 3


def test_premultiplied_grey_is_read():
    grey = Image.new("LA", (6, 4), (100, 255))
    assert load_image(grey.convert("La")).getpixel((0, 0)) == (100, 100, 100)
