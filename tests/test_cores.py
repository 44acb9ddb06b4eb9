"""How many cores may be used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deflow import cores


def lay(root: Path, files: dict[str, str]) -> tuple[Path, Path]:
    """A process's file of control groups, and what they hold."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root / "cgroup", root / "fs"


@pytest.mark.parametrize(
    ("files", "quotas"),
    [
        ({}, []),
        ({"cgroup": "0::/\n", "fs/cpu.max": "150000 100000\n"}, [1.5]),
        ({"cgroup": "0::/\n", "fs/cpu.max": "max 100000\n"}, []),
        ({"cgroup": "0::/job/step\n", "fs/job/cpu.max": "400000 100000\n", "fs/job/step/cpu.max": "max 100000\n"}, [4]),
        ({"cgroup": "0::/not/seen/from/inside\n", "fs/cpu.max": "200000 100000\n"}, [2]),
        (
            {
                "cgroup": "5:memory:/\n4:cpuacct,cpu:/job\n",
                "fs/cpu/job/cpu.cfs_quota_us": "300000\n",
                "fs/cpu/job/cpu.cfs_period_us": "100000\n",
                "fs/cpu/cpu.cfs_quota_us": "-1\n",
                "fs/cpu/cpu.cfs_period_us": "100000\n",
            },
            [3],
        ),
    ],
)
def test_quotas_of_control_groups(files: dict[str, str], quotas: list[float], tmp_path: Path) -> None:
    assert list(cores.quotas(*lay(tmp_path, files))) == quotas


@pytest.mark.parametrize(("quota", "expected"), [([], 3), ([8.0], 3), ([2.9], 2), ([4.0, 0.5], 1)])
def test_the_smallest_limit_counts(quota: list[float], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 5}, raising=False)
    monkeypatch.setattr(cores, "quotas", lambda: quota)
    assert cores.usable_cores() == expected


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(4)
    monkeypatch.setattr(cores, "usable_cores", lambda: 2)
    cores.set_threads(None)
    assert torch.get_num_threads() == 2
    monkeypatch.setattr(cores, "usable_cores", lambda: 8)
    cores.set_threads(None)  # more than torch, or OMP_NUM_THREADS, would take are not taken
    assert torch.get_num_threads() == 2
    cores.set_threads(3)
    assert torch.get_num_threads() == 3


def test_threads_spin_briefly_unless_the_user_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_WAIT_POLICY", "ACTIVE")
        cores.spin_briefly()
        assert "GOMP_SPINCOUNT" not in os.environ
    cores.spin_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == "1000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    cores.spin_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == "5"


def test_a_command_sees_to_it_before_torch_is_there() -> None:
    code = (
        "import sys\n"
        "from deflow.entry import entry_point\n"
        "sys.argv = ['x', '+nonsense=1']\n"
        "assert 'torch' not in sys.modules\n"
        "try:\n"
        "    entry_point('generate')(print)()\n"
        "except SystemExit:\n"
        "    import os\n"
        "    print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)\n"
    )
    variables = {name: value for name, value in os.environ.items() if "OMP" not in name}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=variables)
    assert done.stdout.split() == ["1000", "False"]
