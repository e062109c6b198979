"""Where a row's pictures are: paths held under a root, URLs only when asked for."""

import functools
import hashlib
import os
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from PIL import Image

from mmpeft.cache import cache_home
from mmpeft.images import check_image

TIMEOUT = 30  # seconds for a whole picture from the web
MAX_BYTES = 64 << 20  # of one picture from the web
WEB = ("http://", "https://")


class Pictures:
    """Turns what a row says of a picture into a path, bytes, a data URL or a PIL image.

    Args:
        folder: where relative paths start, if there is no root; ``None`` refuses them.
        root: folder that every path has to stay in, links followed; relative paths start there.
        allow_urls: fetch ``http(s)`` addresses, each once, into the user's cache.
    """

    def __init__(self, folder: Path | None, root: str | None = None, allow_urls: bool = False):
        self.folder, self.allow_urls = folder, allow_urls
        self.root = None
        if root is not None:
            self.root = os.path.realpath(os.path.expanduser(root))
            if not os.path.isdir(self.root):
                raise FileNotFoundError(f"image_root {root} does not exist or is no folder.")

    def find(self, source):
        """What :func:`mmpeft.images.load_image` reads.

        Raises:
            ValueError: ``(problem, remedy)``.
        """
        if isinstance(source, dict) and set(source) <= {"bytes", "path"}:  # as ``datasets`` has it
            data = source.get("bytes") or None
            # JSON has no bytes, only their base64
            source = f"data:;base64,{data}" if isinstance(data, str) else data or source.get("path")
        if isinstance(source, (bytes, Image.Image)):
            return source
        if isinstance(source, os.PathLike):
            source = os.fspath(source)
        if not isinstance(source, str):
            kind = type(source).__name__
            raise ValueError(f"is a {kind}", "give a path, bytes, a data URL or a picture")
        if source.startswith("data:"):
            return source
        if source.startswith(WEB):
            return self._fetch(source)
        if not source or "\0" in source:
            problem = "has a NUL character" if source else "is an empty path"
            raise ValueError(problem, "give a path, or null for a row without a picture")
        if self.root is None:
            if self.folder is None and not os.path.isabs(source):
                problem = f"is {shown(source)}, but the files of these rows lie in several folders"
                raise ValueError(problem, "set image_root, or give whole paths")
            return os.path.join(self.folder or "", source)
        found = _real(os.path.join(self.root, source))
        if os.path.commonpath([self.root, found]) != self.root:
            raise ValueError(
                f"is {shown(source)}, which lies outside image_root {self.root}",
                "move the picture there, or change image_root",
            )
        return found

    def _fetch(self, url: str) -> str:
        if not self.allow_urls:
            problem = f"is the web address {shown(url)}"
            raise ValueError(problem, "set allow_urls: true to fetch it, or give a file")
        folder = cache_home() / "urls"
        path = folder / hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
            try:
                data = download(url)
                check_image(data, "what it serves")
                partial.write_bytes(data)
                os.replace(partial, path)
            except (OSError, ValueError, HTTPException) as error:
                partial.unlink(missing_ok=True)
                raise ValueError(
                    f"is {shown(url)}, which cannot be fetched ({str(error).rstrip('.')})",
                    "try again, or give a file",
                ) from None
        return str(path)


def _real(path: str) -> str:
    """As ``realpath``; a folder is resolved once for all of its files."""
    folder, name = os.path.split(path)
    if name in ("", ".", ".."):
        return os.path.realpath(path)
    path = os.path.join(_real_folder(folder), name)
    return os.path.realpath(path) if os.path.islink(path) else path


_real_folder = functools.lru_cache(4096)(os.path.realpath)


def download(url: str) -> bytes:
    """What an address serves, of at most ``MAX_BYTES`` and within ``TIMEOUT``.

    Raises:
        OSError, HTTPException: it cannot be reached in time, or leads to what is not the web.
        ValueError: it is too large, or ends too early.
    """
    start, chunks, size = time.monotonic(), [], 0
    asked = urllib.request.Request(url, headers={"User-Agent": "mmpeft"})
    with urllib.request.build_opener(_StayOnTheWeb).open(asked, timeout=TIMEOUT) as reply:
        while chunk := reply.read1(1 << 16):  # ``read`` would wait until it has them all
            chunks.append(chunk)
            size += len(chunk)
            if size > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES >> 20} MB")
            if time.monotonic() - start > TIMEOUT:
                raise TimeoutError(f"not done within {TIMEOUT} seconds")
        if reply.length:  # that were announced and never came
            raise ValueError(f"it broke off after {size:,} bytes, {reply.length:,} early")
    return b"".join(chunks)


class _StayOnTheWeb(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not newurl.lower().startswith(WEB):
            raise urllib.error.URLError(f"it leads to {shown(newurl)}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def shown(text: str) -> str:
    """A text as errors show it."""
    return repr(text if len(text) < 200 else f"{text[:60]}...")
