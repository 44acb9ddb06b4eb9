"""Packages that only some of the project needs."""

from __future__ import annotations

import importlib.util

from deflow.errors import UserError


def require(what: str, *packages: str) -> None:
    """Raise `UserError` unless all `packages` are there, named as they are imported; `what` needs them.

    They are named one by one, and not as an extra of this project: an index may know another project of its name.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        s = "s" if len(missing) > 1 else ""
        raise UserError(f"{what} needs the package{s} {' and '.join(missing)}: pip install {' '.join(missing)}")
