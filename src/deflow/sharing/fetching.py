"""The file of a shared policy, wherever it is shared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deflow.errors import UserError
from deflow.sharing.address import HubAddress, is_address, parse


@contextmanager
def at_hand(path: str | Path, tracking_uri: str | None = None) -> Iterator[Path]:
    """The file at `path`, fetched if that is an address; what was fetched may be gone afterwards.

    Args:
        path: of a file, or an address.
        tracking_uri: of MLflow, see `registry.store_of`.

    Raises:
        UserError: if the address is none, a package is missing, or there is no policy that one may read.
    """
    if not is_address(path):
        yield Path(path)
        return
    address = parse(str(path))
    if isinstance(address, HubAddress):
        from deflow.sharing import hub

        yield hub.download(address)
        return
    if address.version is None:
        raise UserError(f"{path} has versions: say which, as in {path}/1 or {path}/latest")
    from deflow.sharing import registry

    with registry.downloaded(address, tracking_uri) as file:
        yield file
