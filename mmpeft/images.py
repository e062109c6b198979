"""Read an image or a clip the careful way: whole, upright, RGB, or one clear error.

A header is judged before any pixel is read. Nothing is guessed: a picture of several frames is
refused as a still image, since only one of them would be seen, and so are 32-bit pixels, which do
not say what is white. Formats that run other programs (EPS) or are known by no signature are not
read.
"""

import base64
import hashlib
import io
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, ImageSequence, UnidentifiedImageError

BITS, PHOTOMETRIC = 258, 262  # tags of TIFF
FORMATS = (
    "AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP",
)  # fmt: skip
MAX_PIXELS = 2**30 // 12  # 89 million, where Pillow begins to suspect a bomb
MAX_SIDE = 16_384
MAX_BYTES = 2**29  # of a file
MAX_CLIP_PIXELS = 100 * MAX_PIXELS  # of all frames


def load_image(source, what: str = "image") -> Image.Image:
    """Load one image as upright RGB; transparency is laid over white, 16 bits become 8.

    Args:
        source: a path, ``bytes`` of an image file, a ``data:image/...;base64,`` URL or a PIL image.
        what: how error messages call it, for example ``"data.jsonl row 3, image 1"``.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: not an image in one of ``FORMATS``, truncated, empty, of several frames or of
            32-bit pixels, or larger than ``MAX_PIXELS``, ``MAX_SIDE`` or ``MAX_BYTES``.
    """
    return _to_rgb(*_open_still(source, what), own=not isinstance(source, Image.Image))


def check_image(source, what: str = "image") -> None:
    """Read an image, or the first frame of a clip, to its last pixel; raises as ``load_image``."""
    image, what = _open(source, what)
    with _decoding(what):
        image.load()


def image_size(source, what: str = "image") -> tuple[int, int]:
    """Height and width of the upright image, from its header alone; sources as ``load_image``."""
    image, what = _open_still(source, what)
    width, height = image.size
    with _decoding(what):
        _settle_exif(image)
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    turned &= image.format != "TIFF"  # there, Pillow has turned the size already
    return (width, height) if turned else (height, width)


def content_hash(source, what: str = "image") -> str:
    """128 bits, as 32 hex digits, that tell one picture from another; sources as ``load_image``.

    A file, its bytes and its data URL have one hash, taken without decoding. A PIL image has that
    of its upright pixels.
    """
    source, what = _open(source, what) if isinstance(source, Image.Image) else _read(source, what)
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
    with _decoding(what):
        count = getattr(image, "n_frames", 1)
    if count * image.width * image.height > MAX_CLIP_PIXELS:
        raise ValueError(
            f"{what} has {count:,} frames of {image.width} x {image.height} pixels, more than "
            f"{MAX_CLIP_PIXELS:,} in all; cut or resize it before use."
        )
    numbers = _spread(list(range(count)), num_frames, what)
    frames = []
    with _decoding(what):
        for number, frame in enumerate(ImageSequence.Iterator(image)):
            if number in numbers:
                frames.append(_to_rgb(frame.copy(), f"{what}, frame {number + 1}", own=True))
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
            raise ValueError(
                f"{what}: {_shown(source)} is a web address; download it and pass the file."
            )
        if source.startswith("data:"):
            source = _decode_data_url(source, what)
        else:
            what = f"{what}: {_shown(source)}"
            if not os.path.isfile(source):  # also of what is too long for a path
                raise FileNotFoundError(f"{what} does not exist or is not a file.")
            if (size := os.path.getsize(source)) > MAX_BYTES:
                raise ValueError(f"{what} is a file of {size:,} bytes; the most is {MAX_BYTES:,}.")
            source = Path(source).read_bytes()
    if not isinstance(source, bytes):
        kind = type(source).__name__
        raise ValueError(f"{what}: expected a path, bytes or a PIL image, got {kind}.")
    return source, what


def _shown(source: str) -> str:
    """A path or address as error messages show it: short and in one line."""
    shown = source if source.isprintable() else repr(source)
    return shown if len(shown) < 300 else f"{shown[:60]}..."  # bytes in base64, perhaps


def _open(source, what: str) -> tuple[Image.Image, str]:
    """The image, its pixels unread and not too many, and how error messages call it."""
    image, what = _read(source, what)
    if isinstance(image, bytes):
        data = image
        try:
            with _decoding(what, (UnidentifiedImageError, Image.DecompressionBombError)):
                image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            if (kind := _signature(data)) is not None:
                raise ValueError(
                    f"{what} is truncated or damaged (it begins like {kind}); replace the file."
                ) from None
            raise ValueError(
                f"{what} is not an image in a format that is read here ({', '.join(FORMATS)})."
            ) from None
        except Image.DecompressionBombError as error:
            raise ValueError(f"{what} has too many pixels ({error}); resize it first.") from None
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ValueError(
            f"{what} has {width} x {height} pixels, more than the limit of {MAX_PIXELS:,} or "
            f"{MAX_SIDE:,} a side; resize it before use."
        )
    if width == 0 or height == 0:
        raise ValueError(f"{what} has no pixels ({width} x {height}).")
    return image, what


def _signature(data: bytes) -> str | None:
    """The format that bytes begin like; of two letters alone, as a text may have, none."""
    kinds = (kind for kind in FORMATS if kind not in ("BMP", "PPM"))
    return next((kind for kind in kinds if Image.OPEN[kind][1](data[:16])), None)


def _settle_exif(image: Image.Image) -> None:
    """EXIF that cannot be read turns no picture, as Pillow has it in JPEG."""
    try:
        image.getexif()
    except SyntaxError as error:
        if not str(error).startswith("not a TIFF file"):
            raise
        image.getexif()  # from now on empty


def _open_still(source, what: str) -> tuple[Image.Image, str]:
    """As :func:`_open`, of an image that is one picture."""
    image, what = _open(source, what)
    with _decoding(what):
        # what else a photograph brings along (MPO) is no frame: a preview, a map of its depth
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1:
        raise ValueError(
            f"{what} has {frames} frames, of which one alone would be seen; give it as a part of "
            "type 'video', or save the frame that is meant as an image of its own."
        )
    return image, what


@contextmanager
def _decoding(what: str, but: tuple = ()):
    """Inside, whatever Pillow raises at damaged bytes is one line; its plugins raise any kind."""
    try:
        yield
    except but:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(what):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        if "MAX_TEXT" in reason:  # so Pillow names its limits on texts and colour profiles
            raise ValueError(
                f"{what}: its metadata cannot be read ({reason}); save it without."
            ) from None
        raise ValueError(f"{what} is truncated or damaged ({reason}); replace the file.") from None


def _decode_data_url(url: str, what: str) -> bytes:
    header, _, payload = url.partition(",")
    try:
        if not header.endswith(";base64"):
            raise ValueError("it is not base64")
        return base64.b64decode(payload, validate=True)
    except ValueError as error:
        raise ValueError(f"{what}: the data URL cannot be decoded ({error}).") from None


def _to_rgb(image: Image.Image, what: str, own: bool = False) -> Image.Image:
    """Upright RGB; ``own`` is an image that nobody else has, and may be changed."""
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError(
            f"{what}: PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on, which fills what is missing of an "
            "image with grey; set it to False."
        )
    with _decoding(what):
        image.load()  # all of it, while it still says what format it was
        if image.mode == "La":  # premultiplied
            image = image.convert("LA")
        tags = getattr(image, "tag_v2", {})
        bits = tags.get(BITS, 16)
        bits = bits if isinstance(bits, int) else bits[0]
        sixteen_bits = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")
        _settle_exif(image)
        if own:
            ImageOps.exif_transpose(image, in_place=True)
            image = image._new(image.im)  # a plain image of the same pixels, without the file
        else:
            image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") and not sixteen_bits:
        raise ValueError(
            f"{what} has 32-bit pixels (mode {image.mode}), which do not say what is white; save "
            "it with 8 or 16 bits."
        )
    with _decoding(what):
        if sixteen_bits:
            image = _from_16_bits(image, bits, tags.get(PHOTOMETRIC) == 0)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if image.mode != "RGB":
            image = image.convert("RGB")
    image.info.clear()  # what it says (EXIF, a colour profile) is of the file
    return image


def _from_16_bits(image: Image.Image, bits: int = 16, inverted: bool = False) -> Image.Image:
    """Grey in 8 bits, white where it is transparent; ``convert`` would clip 16 bits to white.

    Pillow leaves TIFF's samples of 12 bits as they are, and 0 for white.
    """
    values = np.asarray(image)
    grey = (values >> (bits - 8)).astype(np.uint8)
    grey = 255 - grey if inverted else grey
    grey[values == image.info.get("transparency", -1)] = 255
    return Image.fromarray(grey)
