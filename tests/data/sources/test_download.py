"""Downloads against a local HTTP server: whole, broken off and resumed, refused, not what was asked for."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from deflow.data.sources import download as module
from deflow.data.sources.download import download
from deflow.errors import UserError


class Server(http.server.BaseHTTPRequestHandler):
    """Serves one file with ranges, as HTTP has it; the first `break_off` answers stop halfway."""

    content = b""
    version: dict[str, str] = {}  # noqa: RUF012 (headers that name it)
    understands_if_range = True
    break_off = 0
    ranges: list[tuple[str | None, str | None]] = []  # noqa: RUF012 (Range and If-Range of each request)

    def do_GET(self) -> None:
        cls = type(self)
        if self.path == "/missing.npz":
            self.send_error(404)
            return
        wanted, version = self.headers.get("Range"), self.headers.get("If-Range")
        cls.ranges.append((wanted, version))
        if cls.understands_if_range and version not in cls.version.values():
            wanted = None
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        body = b"<html>" if self.path == "/page.npz" else cls.content[start:]
        self.send_response(206 if wanted else 200)
        for name, value in cls.version.items():
            self.send_header(name, value)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(cls.content) - 1}/{len(cls.content)}")
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
    Server.version, Server.understands_if_range = {"ETag": '"one"'}, True
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_whole_file(url: str, tmp_path: Path) -> None:
    download(f"{url}/file.npz", tmp_path / "out" / "file.npz")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["file.npz"]
    assert (tmp_path / "out" / "file.npz").read_bytes() == Server.content


VERSIONS = [{"ETag": '"one"'}, {"Last-Modified": "Sat, 31 Jan 2026 12:00:00 GMT"}]


@pytest.mark.parametrize("version", VERSIONS)
def test_broken_off_is_resumed_where_it_stopped(version: dict[str, str], url: str, tmp_path: Path) -> None:
    Server.version, Server.break_off = version, 1
    download(f"{url}/file.npz", tmp_path / "file.npz")
    assert (tmp_path / "file.npz").read_bytes() == Server.content
    (first, second) = Server.ranges
    assert first == (None, None)
    assert second[0] is not None
    assert second[1] in version.values()


def break_off_for_good(url: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An attempt that leaves half of the file and ends with an error; returns the part."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "ATTEMPTS", 1)
        Server.break_off = 1
        with pytest.raises(UserError, match="cannot download"):
            download(f"{url}/file.npz", path)
    Server.ranges.clear()
    part = path.with_name("file.npz.part")
    assert 0 < part.stat().st_size < len(Server.content)
    return part


def test_a_later_call_goes_on_with_the_part(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    part = break_off_for_good(url, folder / "file.npz", monkeypatch)
    size = part.stat().st_size
    download(f"{url}/file.npz", folder / "file.npz")
    assert Server.ranges == [(f"bytes={size}-", '"one"')]
    assert (folder / "file.npz").read_bytes() == Server.content
    assert [path.name for path in folder.iterdir()] == ["file.npz"]


@pytest.mark.parametrize("understands_if_range", [True, False])
def test_a_file_that_has_changed_is_fetched_whole(
    understands_if_range: bool, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_off_for_good(url, tmp_path / "file.npz", monkeypatch)
    np.savez(tmp_path / "served.npz", data=np.arange(100_000)[::-1])
    Server.content, Server.version = (tmp_path / "served.npz").read_bytes(), {"ETag": '"two"'}
    Server.understands_if_range = understands_if_range
    download(f"{url}/file.npz", tmp_path / "file.npz")
    assert (tmp_path / "file.npz").read_bytes() == Server.content


@pytest.mark.parametrize("why", ["no version", "a weak version", "another url", "a damaged note", "no note"])
def test_a_part_of_unknown_origin_is_not_continued(
    why: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Server.version = {"no version": {}, "a weak version": {"ETag": 'W/"one"'}}.get(why, Server.version)
    part = break_off_for_good(url, tmp_path / "file.npz", monkeypatch)
    note = part.with_name("file.npz.part.json")
    if why == "a damaged note":
        note.write_text('{"url"')
    if why == "no note":
        note.unlink()
    download(f"{url}/{'other' if why == 'another url' else 'file'}.npz", tmp_path / "file.npz")
    assert Server.ranges == [(None, None)]
    assert (tmp_path / "file.npz").read_bytes() == Server.content


def test_setting_aside_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for content in ("a", "b"):
        (tmp_path / "file.npz").write_text(content)
        module.set_aside(tmp_path / "file.npz", "it is of no use")
    assert "it is of no use; renamed to file.npz.damaged-2" in caplog.text
    left = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert left == {"file.npz.damaged": "a", "file.npz.damaged-2": "b"}


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
