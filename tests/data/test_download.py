"""Downloads against a local HTTP server: whole, broken off and resumed, refused, not what was asked for."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from deflow.data import download as module
from deflow.data.download import download
from deflow.errors import UserError


class Server(http.server.BaseHTTPRequestHandler):
    """Serves one file with ranges; the first `break_off` answers stop halfway."""

    content = b""
    break_off = 0
    ranges: list[str | None] = []  # noqa: RUF012

    def do_GET(self) -> None:
        cls = type(self)
        if self.path == "/missing.npz":
            self.send_error(404)
            return
        wanted = self.headers.get("Range")
        cls.ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        body = b"<html>" if self.path == "/page.npz" else cls.content[start:]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if cls.break_off > 0:
            cls.break_off -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    np.savez(tmp_path / "served.npz", data=np.arange(100_000))
    Server.content, Server.break_off, Server.ranges = (tmp_path / "served.npz").read_bytes(), 0, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_whole_file(url: str, tmp_path: Path) -> None:
    download(f"{url}/file.npz", tmp_path / "out" / "file.npz")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["file.npz"]
    assert (tmp_path / "out" / "file.npz").read_bytes() == Server.content


def test_broken_off_is_resumed_where_it_stopped(url: str, tmp_path: Path) -> None:
    Server.break_off = 1
    download(f"{url}/file.npz", tmp_path / "file.npz")
    assert (tmp_path / "file.npz").read_bytes() == Server.content
    assert Server.ranges[0] is None
    assert Server.ranges[1] is not None


def test_a_later_call_goes_on_with_the_part(url: str, tmp_path: Path) -> None:
    (tmp_path / "file.npz.part").write_bytes(Server.content[:1000])
    download(f"{url}/file.npz", tmp_path / "file.npz")
    assert Server.ranges == ["bytes=1000-"]
    assert (tmp_path / "file.npz").read_bytes() == Server.content


@pytest.mark.parametrize("page,says", [("missing.npz", "the server answered 404"), ("page.npz", "not a .npz file")])
def test_refusals_are_named_and_leave_no_file(url: str, tmp_path: Path, page: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        download(f"{url}/{page}", tmp_path / "file.npz")
    assert not (tmp_path / "file.npz").exists()


def test_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    with pytest.raises(UserError, match="no connection"):
        download("http://127.0.0.1:9/file.npz", tmp_path / "file.npz")


def test_no_space(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="no space"):
        download(f"{url}/file.npz", tmp_path / "file.npz")
