"""How many cores this process may use, which is not how many the machine has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

PROCESS, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores that the scheduler gives this process (affinity), or fewer, at least 1, if a control group limits it."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([affinity, *quotas()])))


def set_threads(threads: int | None) -> None:
    """Let torch compute with so many threads; None: torch's own choice, but no more than `usable_cores`.

    Threads that share a core wait for each other by spinning, which costs many times what they gain.
    """
    import torch  # seconds, which whoever counts cores need not wait for

    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()) if threads is None else threads)


def spin_briefly() -> None:
    """Let threads that wait for each other soon go to sleep, unless the user chose; call it before torch is imported.

    Left alone, libgomp's turn 300,000 times first, and where processes share the cores, those that turn keep those that
    work from them. A thousand times bridge the gaps inside an update, so that a run alone is as fast as ever; none at
    all (OMP_WAIT_POLICY=PASSIVE) would cost it a third.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def quotas(process: Path = PROCESS, root: Path = CGROUPS) -> Iterator[float]:
    """Cores' worth of time that each control group around this process may take.

    Args:
        process: file with the groups that the process belongs to, a line each: `number:controllers:/path`.
        root: where the control groups' file system is mounted.
    """
    lines = process.read_text().splitlines() if process.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        top = root if not controllers else root / "cpu"
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            yield from _quota(folder)
            if folder == top:
                break


def _quota(group: Path) -> Iterator[float]:
    """The limit of one group, in the files of version 2 or 1; nothing if it has none."""
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    except OSError:  # the group is not to be seen from inside a container
        return
    if quota not in ("max", "-1"):
        yield int(quota) / int(period)
