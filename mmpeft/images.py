"""Read an image the careful way: whole, upright, RGB, or one clear error."""

import base64
import binascii
import io
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = Image.MAX_IMAGE_PIXELS  # about 89 million; beyond it Pillow suspects a bomb


def load_image(source, what: str = "image") -> Image.Image:
    """Load one image as upright RGB; transparency is laid over white.

    Args:
        source: a path, ``bytes`` of an image file, a ``data:image/...;base64,`` URL or a PIL image.
        what: how error messages call it, for example ``"data.jsonl row 3, image 1"``.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: not an image, truncated, empty, or more than ``MAX_PIXELS`` pixels.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, what)
    if isinstance(source, (str, Path)):
        source = str(source)
        if source.startswith(("http://", "https://")):
            raise ValueError(f"{what}: {source} is a web address; download it and pass the file.")
        if source.startswith("data:"):
            source = _decode_data_url(source, what)
        else:
            what = f"{what}: {source}"
            if not Path(source).is_file():
                raise FileNotFoundError(f"{what} does not exist or is not a file.")
            source = Path(source).read_bytes()
    if not isinstance(source, bytes):
        kind = type(source).__name__
        raise ValueError(f"{what}: expected a path, bytes or a PIL image, got {kind}.")
    try:
        image = Image.open(io.BytesIO(source))
    except UnidentifiedImageError:
        raise ValueError(f"{what} is not an image in a format that Pillow reads.") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{what} has too many pixels ({error}); resize it before use.") from None
    return _to_rgb(image, what)


def _decode_data_url(url: str, what: str) -> bytes:
    header, _, payload = url.partition(",")
    try:
        if not header.endswith(";base64"):
            raise binascii.Error("it is not base64")
        return base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise ValueError(f"{what}: the data URL cannot be decoded ({error}).") from None


def _to_rgb(image: Image.Image, what: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{what} has {width} x {height} pixels, more than the limit of {MAX_PIXELS:,}; "
            "resize it before use."
        )
    if width == 0 or height == 0:
        raise ValueError(f"{what} has no pixels ({width} x {height}).")
    try:
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if image.mode.startswith("I;16"):  # convert("RGB") would clip 16 bits to white
            image = image.point(lambda value: value / 256).convert("L")
        return image.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{what} is truncated or damaged ({error}); replace the file.") from None
