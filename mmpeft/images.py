"""Read an image or a clip the careful way: whole, upright, RGB, or one clear error."""

import base64
import binascii
import hashlib
import io
import os
from pathlib import Path

from PIL import ExifTags, Image, ImageOps, ImageSequence, UnidentifiedImageError

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
    return _to_rgb(*_open(source, what))


def image_size(source, what: str = "image") -> tuple[int, int]:
    """Height and width of the upright image, from its header alone; sources as ``load_image``."""
    image, what = _open(source, what)
    width, height = image.size
    turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def content_hash(source, what: str = "image") -> str:
    """128 bits, as 32 hex digits, that tell one picture from another; sources as ``load_image``.

    A file, its bytes and its data URL have one hash, taken without decoding. A PIL image has that
    of its upright pixels.
    """
    source, what = _read(source, what)
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(source, Image.Image):
        image = _to_rgb(source, what)
        digest.update(f"RGB {image.size}".encode())
        source = image.tobytes()
    digest.update(source)
    return digest.hexdigest()


def load_frames(source, num_frames: int, what: str = "clip") -> list[Image.Image]:
    """At most ``num_frames`` frames of a clip, evenly spread, as upright RGB images in order.

    Args:
        source: a list of images, or an animated image file (GIF, WebP, APNG).

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: no frames, or a film format: those are to be cut into frames first.
    """
    if isinstance(source, (list, tuple)):
        pictures = [(frame, f"{what}, frame {n}") for n, frame in enumerate(source, 1)]
        return [load_image(*picture) for picture in _spread(pictures, num_frames, what)]
    try:
        image, what = _open(source, what)
    except ValueError as error:
        raise ValueError(f"{error} A film is given as a list of its frames.") from None
    numbers = _spread(list(range(getattr(image, "n_frames", 1))), num_frames, what)
    frames = []
    for number, frame in enumerate(ImageSequence.Iterator(image)):
        if number in numbers:
            frames.append(_to_rgb(frame.copy(), f"{what}, frame {number + 1}"))
    return frames


def _spread(everything: list, count: int, what: str) -> list:
    """``count`` of them, the middles of as many equal stretches; all if there are no more."""
    if not everything:
        raise ValueError(f"{what} has no frames.")
    if len(everything) <= count:
        return everything
    return [everything[int((i + 0.5) * len(everything) / count)] for i in range(count)]


def _read(source, what: str) -> tuple[Image.Image | bytes, str]:
    """A PIL image as it is, of anything else the bytes; and how error messages call it."""
    if isinstance(source, Image.Image):
        return source, what
    if isinstance(source, (str, Path)):
        source = str(source)
        if source.startswith(("http://", "https://")):
            raise ValueError(f"{what}: {source} is a web address; download it and pass the file.")
        if source.startswith("data:"):
            source = _decode_data_url(source, what)
        else:
            shown = source if len(source) < 300 else f"{source[:60]}..."  # bytes in base64, perhaps
            what = f"{what}: {shown}"
            if not os.path.isfile(source):  # also of what is too long for a path
                raise FileNotFoundError(f"{what} does not exist or is not a file.")
            source = Path(source).read_bytes()
    if not isinstance(source, bytes):
        kind = type(source).__name__
        raise ValueError(f"{what}: expected a path, bytes or a PIL image, got {kind}.")
    return source, what


def _open(source, what: str) -> tuple[Image.Image, str]:
    """The image, its pixels unread, and how error messages call it."""
    source, what = _read(source, what)
    if isinstance(source, Image.Image):
        return source, what
    try:
        return Image.open(io.BytesIO(source)), what
    except UnidentifiedImageError:
        raise ValueError(f"{what} is not an image in a format that Pillow reads.") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{what} has too many pixels ({error}); resize it before use.") from None


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
