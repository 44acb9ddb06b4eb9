"""Resumable, checked downloads."""

from __future__ import annotations

import os
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import requests
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from deflow.errors import UserError

CHUNK = 1 << 16  # bytes; what a broken connection loses at most
ATTEMPTS = 3
TIMEOUT_SECONDS = 15


def download(url: str, path: Path, is_sound: Callable[[Path], bool] = zipfile.is_zipfile) -> None:
    """Fetch `url` to `path`: into `path.part` first, going on where an earlier attempt broke off, renamed when sound.

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
    if not is_sound(part):
        part.unlink()
        raise UserError(f"{url} sent something that is not a {path.suffix} file; check data.source.url")
    os.replace(part, path)


def _fetch(url: str, part: Path) -> None:
    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as response:
        if response.status_code == requests.codes.requested_range_not_satisfiable:
            part.unlink()
            raise OSError("the part already fetched does not fit the file; starting over")
        response.raise_for_status()
        resumed = response.status_code == requests.codes.partial_content
        have = have if resumed else 0
        total = have + int(response.headers.get("Content-Length", 0))
        free = shutil.disk_usage(part.parent).free
        if total - have > free:
            raise UserError(f"no space for {url}: {total >> 20} MiB needed, {free >> 20} MiB free in {part.parent}")
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress("{task.description}", *columns) as progress, part.open("ab" if resumed else "wb") as file:
            task = progress.add_task(part.stem, total=total or None, completed=have)
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                progress.advance(task, len(chunk))
    size = part.stat().st_size
    if total > have and size != total:
        raise OSError(f"the connection ended after {size} of {total} bytes")


def _reason(error: Exception) -> str:
    if isinstance(error, requests.HTTPError):
        return f"the server answered {getattr(error.response, 'status_code', 'nothing')}"
    if isinstance(error, requests.ConnectionError | requests.Timeout):
        return "no connection to the server"
    return str(error)
