"""Image files, damaged: what is read is upright RGB of the size its header told."""

import functools
import io
import warnings
from random import Random

from PIL import Image

from mmpeft import images
from mmpeft.images import content_hash, image_size, load_frames, load_image

from .runner import READ, REFUSALS, refusal

LIMIT = 2**14  # pixels, so that a header that lies costs little
MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), "JPEG": ("L", "RGB", "CMYK"),
    "GIF": ("P", "L"), "WEBP": ("RGB", "RGBA"), "BMP": ("1", "L", "P", "RGB"),
    "TIFF": ("1", "L", "P", "RGB", "RGBA", "CMYK", "LAB", "I;16", "F", "I"),
    "PPM": ("1", "L", "RGB", "I"), "JPEG2000": ("L", "RGB", "RGBA"), "AVIF": ("RGB",),
    "ICO": ("RGBA",), "QOI": ("RGB", "RGBA"),
}  # fmt: skip
SAVED = {  # further ways to write them
    "PNG": [{"transparency": 3}, {"interlace": 1}], "GIF": [{"transparency": 1}],
    "TIFF": [{"compression": how} for how in ("tiff_lzw", "tiff_deflate", "packbits")],
    "JPEG": [{"progressive": True}],
}  # fmt: skip


@functools.cache
def corpus() -> list[bytes]:
    """Small files of every format, mode and way of writing that Pillow has."""
    files = []
    noise = Image.effect_noise((13, 9), 80)
    colour = Image.merge("RGB", [noise, noise.rotate(180), noise])
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind, modes in MODES.items():
        ways = [{}, {"exif": exif}, *SAVED.get(kind, [])]
        ways += [{"save_all": True, "append_images": [colour]}]
        for mode in modes:
            picture = noise.convert("I").convert("I;16") if mode == "I;16" else colour
            if picture.mode != mode:
                picture = picture.convert(mode) if mode != "LAB" else Image.new("LAB", (13, 9))
            for way in ways:
                buffer = io.BytesIO()
                try:
                    picture.save(buffer, kind, **way)
                except Exception:
                    continue  # there is no such file
                files.append(buffer.getvalue())
    buffer = io.BytesIO()
    colour.save(buffer, "TIFF", compression="jpeg")  # other modes damage Pillow's memory
    return [*files, buffer.getvalue()]


def make(random: Random) -> bytes:
    """A file of the corpus with a few bytes changed; rarely bytes that never were one."""
    if random.random() < 0.05:
        return random.randbytes(random.randint(0, 64))
    data = bytearray(random.choice(corpus()))
    for _ in range(random.randint(0, 3)):
        # the start holds what matters most
        place = random.randint(0, min(len(data), 64) if random.random() < 0.5 else len(data))
        kind = random.choice(["set", "set", "set", "cut", "insert", "drop", "repeat"])
        if kind == "set":
            data[place : place + 1] = random.choice(
                [b"\0", b"\1", b"\x7f", b"\xff", None]
            ) or bytes([random.randint(0, 255)])
        elif kind == "cut":
            del data[place:]
        elif kind == "insert":
            data[place:place] = random.randbytes(random.randint(1, 8))
        elif kind == "drop":
            del data[place : place + random.randint(1, 16)]
        else:
            data[place:place] = data[place : place + random.randint(1, 64)]
    return bytes(data)


def check(data: bytes) -> str:
    before, images.MAX_PIXELS = images.MAX_PIXELS, LIMIT
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about tags it cannot read
            content_hash(data)
            _check_frames(data)
            try:
                picture = load_image(data, "data.jsonl line 3: image 1")
            except REFUSALS as error:
                assert str(error).startswith("data.jsonl line 3: image 1")
                return refusal(error)
            assert picture.mode == "RGB" and 0 not in picture.size
            assert image_size(data) == (picture.height, picture.width)
            assert load_image(picture).tobytes() == picture.tobytes()
            return READ
    finally:
        images.MAX_PIXELS = before


def _check_frames(data: bytes) -> None:
    try:
        frames = load_frames(data, 3)
    except REFUSALS as error:
        refusal(error)
    else:
        assert 1 <= len(frames) <= 3 and {frame.mode for frame in frames} == {"RGB"}
