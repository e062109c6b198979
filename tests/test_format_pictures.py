"""Where pictures may come from: paths under a root, and addresses when asked for."""

import contextlib
import http.server
import os
import threading
import time
from pathlib import Path

import pytest

from mmpeft.formats import RowError, open_rows
from mmpeft.formats import pictures as p

from .formats_sample import chat, image, own_cache, png, refusal, write_bytes  # noqa: F401 (a fixture)


@pytest.fixture
def root(tmp_path):
    """A root with a picture, a neighbour outside, and links between them."""
    for folder in ("root/sub", "root-not"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.png").write_bytes(png())
    (tmp_path / "root/in").symlink_to("sub")
    (tmp_path / "root/in.png").symlink_to("sub/a.png")
    (tmp_path / "root/out").symlink_to(tmp_path / "root-not")
    (tmp_path / "root/out.png").symlink_to(tmp_path / "root-not/a.png")
    (tmp_path / "root/twice.png").symlink_to("out.png")
    return tmp_path / "root"


@pytest.mark.parametrize(
    "path", ["sub/a.png", "in/a.png", "in.png", "sub/../in/./a.png", "ROOT/sub/a.png",
             "../root/sub/a.png", "out/../root/sub/a.png", "missing.png", "..a.png"]
)  # fmt: skip
def test_a_path_under_the_root_is_taken(root, path):
    found = p.Pictures(Path("/elsewhere"), str(root)).find(path.replace("ROOT", str(root)))
    assert Path(found).resolve().is_relative_to(root.resolve())
    assert os.path.exists(found) == (path not in ("missing.png", "..a.png"))


@pytest.mark.parametrize(
    "path", ["../root-not/a.png", "out/a.png", "out.png", "twice.png", "/etc/passwd", "..",
             "out/missing.png", "ROOT-not/a.png", "sub/../../root-not/a.png", "in/../../x.png"]
)  # fmt: skip
def test_a_path_out_of_the_root_is_refused(root, jsonl, path):
    path = path.replace("ROOT", str(root))
    rows = open_rows(jsonl([{"image": path, "caption": "x"}]), image_root=str(root))
    assert "lies outside image_root" in refusal(lambda: rows[0])
    parts = [{"messages": chat([image(path)], "a")},
             {"messages": chat([{"type": "video", "video": [path]}], "a")},
             {"messages": chat([{"type": "image"}], "a"), "images": [{"path": path}]}]  # fmt: skip
    for found in [row for _, row in open_rows(jsonl(parts), image_root=str(root)).scan()]:
        assert isinstance(found, RowError) and "outside image_root" in found.problem


def test_a_root_must_be_a_folder(jsonl, tmp_path):
    path = jsonl([{"image": "a.png", "caption": "x"}])
    assert "image_root" in refusal(lambda: open_rows(path, image_root=str(tmp_path / "no")))


@pytest.fixture
def server(monkeypatch):
    """A web server here; ``asked`` lists what it was asked for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path)
            if self.path == "/none.png":
                return self.send_error(404)
            if self.path == "/no-http":
                return self.wfile.write(b"what?\r\n\r\n")
            self.send_response(302 if self.path == "/away" else 200)
            if self.path == "/away":
                self.send_header("Location", "ftp://127.0.0.1:1/a.png")
            if self.path == "/short.png":
                self.send_header("Content-Length", "9999")
            self.end_headers()
            if self.path in ("/slow", "/short.png"):
                self.wfile.write(png()[:40])
                with contextlib.suppress(OSError):  # once nobody listens
                    for server.dripped in range(100 if self.path == "/slow" else 0):
                        self.wfile.write(b"x")
                        time.sleep(0.05)
                return None
            if self.path == "/cut.png":
                return self.wfile.write(png()[:45])
            self.wfile.write(png() if self.path == "/a.png" else b"x" * 200_000)

        def log_message(self, *_):
            pass

    monkeypatch.setenv("no_proxy", "*")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.dripped, server.url = [], 0, f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_addresses_are_fetched_once_and_only_when_asked_for(server, jsonl):
    path = jsonl([{"image": f"{server.url}/a.png", "caption": "x"}])
    assert "set allow_urls: true" in refusal(lambda: open_rows(path)[0])
    assert not server.asked
    for _ in range(2):
        (part,) = open_rows(path, allow_urls=True)[0]["messages"][0]["content"]
        assert Path(part["image"]).read_bytes() == png()
    assert server.asked == ["/a.png"]


def test_an_address_that_cannot_be_fetched_is_named(server, jsonl, monkeypatch, tmp_path):
    monkeypatch.setattr(p, "MAX_BYTES", 100_000)
    names = ["none.png", "large.png"]
    rows = open_rows(jsonl([{"image": f"{server.url}/{name}", "caption": "x"} for name in names]),
                     allow_urls=True)  # fmt: skip
    assert "cannot be fetched (HTTP Error 404" in refusal(lambda: rows[0])
    assert "MB)" in refusal(lambda: rows[1])
    assert not list((tmp_path / "home").rglob("*.partial"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short.png", "it broke off after 40 bytes"),
        ("page.html", "what it serves is not an image"),
        ("cut.png", "what it serves is truncated or damaged"),
        ("no-http", "what?"),
        ("a b", "URL can't contain control characters"),
        ("away", "it leads to 'ftp://127.0.0.1:1/a.png'"),
        ("slow", "not done within 0.5 seconds"),
    ],
)
def test_what_is_no_whole_picture_is_not_kept(server, jsonl, monkeypatch, tmp_path, name, message):
    monkeypatch.setattr(p, "TIMEOUT", 0.5)
    url = f"{server.url}/{name}"
    rows = open_rows(jsonl([{"image": url, "caption": "x"}]), allow_urls=True)
    for _ in range(2):
        said = refusal(lambda: rows[0])
        assert message in said and url in said
    assert not list((tmp_path / "home" / "urls").iterdir())
    assert server.dripped < 99  # it is not waited for the end
