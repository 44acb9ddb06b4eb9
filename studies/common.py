"""What the studies share: where they are, and where their runs lie."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
LOGS = ROOT / "logs"


def is_done(folder: Path) -> bool:
    """Whether a run is."""
    return (folder / "summary.json").exists()
