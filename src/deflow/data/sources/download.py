"""Resumable, checked downloads."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import requests
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from deflow.errors import UserError
from deflow.files import replacing

log = logging.getLogger(__name__)

CHUNK = 1 << 16  # bytes; what a broken connection loses at most
ATTEMPTS = 3
TIMEOUT_SECONDS = 15


def download(url: str, path: Path, is_sound: Callable[[Path], bool] = zipfile.is_zipfile) -> None:
    """Fetch `url` to `path`: into `path.part` first, going on where an earlier attempt broke off, renamed when sound.

    What the server calls the file's version is kept beside the part: of a file that has changed since, or whose server
    gives no version, nothing is taken over.

    Args:
        url: http or https.
        path: to write to.
        is_sound: whether a file is of the kind that is wanted; an `.npz` file is a zip archive.

    Raises:
        UserError: if the server cannot be reached, says no, sends too little or something of another kind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _fetch(url, part)
            break
        except (requests.RequestException, OSError) as error:
            if attempt == ATTEMPTS:
                raise UserError(f"cannot download {url}: {_reason(error)}") from error
            time.sleep(attempt)
    sound = is_sound(part)
    if sound:
        os.replace(part, path)
    else:
        part.unlink()
    _version_file(part).unlink(missing_ok=True)
    if not sound:
        raise UserError(f"{url} sent something that is not a {path.suffix} file; check data.source.url")


def set_aside(path: Path, why: object) -> None:
    """Rename a downloaded file that is of no use, so that it can be had again, and say so."""
    numbers = ("", *(f"-{number}" for number in range(2, 1000)))
    aside = next(a for number in numbers if not (a := path.with_name(f"{path.name}.damaged{number}")).exists())
    os.replace(path, aside)
    log.warning("%s; renamed to %s", why, aside.name)


def identities(paths: Iterable[Path]) -> list[tuple[int, int, int] | None]:
    """What tells that another process has put another file in a file's place; None for one that is gone."""
    return [_identity(path) for path in paths]


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _fetch(url: str, part: Path) -> None:
    version = _read_version(part, url)
    have = part.stat().st_size if version is not None else 0
    headers = {"Accept-Encoding": "identity"}  # or the bytes would be counted compressed
    if version is not None and have:
        headers |= {"Range": f"bytes={have}-", "If-Range": version}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as response:
        if response.status_code == requests.codes.requested_range_not_satisfiable:
            part.unlink()
            raise OSError("the part already fetched does not fit the file; starting over")
        response.raise_for_status()
        resumed = response.status_code == requests.codes.partial_content
        if resumed and not _goes_on(response, have, version):
            part.unlink()
            raise OSError("the server sent a piece of another file than the part already fetched; starting over")
        have = have if resumed else 0  # 200: the whole file, because it has changed or pieces of it cannot be had
        total = have + int(response.headers.get("Content-Length", 0))
        free = shutil.disk_usage(part.parent).free
        if total - have > free:
            raise UserError(f"no space for {url}: {total >> 20} MiB needed, {free >> 20} MiB free in {part.parent}")
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress("{task.description}", *columns) as progress, part.open("ab" if resumed else "wb") as file:
            if not resumed:
                _write_version(part, url, response)  # when the old part is gone, before the new one has a byte
            task = progress.add_task(part.stem, total=total or None, completed=have)
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                progress.advance(task, len(chunk))
    size = part.stat().st_size
    if total > have and size != total:
        raise OSError(f"the connection ended after {size} of {total} bytes")


def _version_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_version(part: Path, url: str) -> str | None:
    """The version of the file that `part` is the beginning of, as If-Range takes it; None if that is not known."""
    try:
        of = json.loads(_version_file(part).read_text())
        return str(of["version"]) if part.exists() and of["url"] == url else None
    except (OSError, ValueError, KeyError, TypeError):  # none was written, or something else stands there
        return None


def _version_of(response: requests.Response) -> str | None:
    tag = response.headers.get("ETag", "")
    # A weak tag does not promise the same bytes, and If-Range does not take it.
    return tag if tag.startswith('"') else response.headers.get("Last-Modified")


def _goes_on(response: requests.Response, have: int, version: str | None) -> bool:
    """Whether the piece begins where the part ends, and is not of another version: some servers ignore If-Range."""
    begins = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
    return begins and _version_of(response) in (None, version)


def _write_version(part: Path, url: str, response: requests.Response) -> None:
    version = _version_of(response)
    if version is None:
        _version_file(part).unlink(missing_ok=True)
        return
    with replacing(_version_file(part)) as file:
        file.write_text(json.dumps({"url": url, "version": version}))


def _reason(error: Exception) -> str:
    if isinstance(error, requests.HTTPError):
        return f"the server answered {getattr(error.response, 'status_code', 'nothing')}"
    if isinstance(error, requests.ConnectionError | requests.Timeout):
        return "no connection to the server"
    return str(error)
