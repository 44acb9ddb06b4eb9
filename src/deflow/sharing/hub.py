"""Hugging Face's hub: a policy's files up as one commit, its one file that is read down."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from deflow.errors import UserError
from deflow.extras import require
from deflow.imports import quick_imports
from deflow.sharing.address import CARD, POLICY, WHOLE, HubAddress

PACKAGE = "huggingface_hub"
LOG_IN = "log in by 'hf auth login', or set HF_TOKEN"


def download(address: HubAddress) -> Path:
    """Where the hub's cache holds the policy of a repository; fetched if it is not there, or has changed since.

    Raises:
        UserError: if the package is missing, there is no such policy, one may not read it or it cannot be reached.
    """
    require("hf://", PACKAGE)
    with quick_imports():
        from huggingface_hub import hf_hub_download
    with _errors_in_one_line(address):
        return Path(hf_hub_download(address.repository, POLICY, revision=address.revision))


def check_place(address: HubAddress) -> None:
    """Whatever can be said of a repository to put files into before anything is made there.

    Raises:
        UserError: if the package or a token is missing, the hub does not take the token, the repository holds something
            else, or the hub cannot be reached.
    """
    require("hf://", PACKAGE)
    with quick_imports():
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    with _errors_in_one_line(address):
        api = HfApi()
        api.whoami()
        try:
            there = set(api.list_repo_files(address.repository, revision=address.revision))
        except RevisionNotFoundError:  # which will be made, from what the repository has
            there = set(api.list_repo_files(address.repository))
        except RepositoryNotFoundError:  # which will be made
            return
    if CARD in there and POLICY not in there:
        raise UserError(f"{address} holds something else, whose {CARD} would be replaced: choose another name")


def upload(address: HubAddress, files: Mapping[str, bytes], message: str, private: bool | None) -> str:
    """Put `files` into a repository as one commit; the repository, and a revision that is named, are made if missing.

    Of `WHOLE`, what is there and not in `files` is of another policy, and deleted.

    Args:
        address: of the repository; its revision is a branch.
        files: name -> content.
        message: of the commit.
        private: whether a repository that is made is private; None: as the account has it.

    Returns:
        The address of that very commit.

    Raises:
        UserError: if one may not write there, or the hub cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    with _errors_in_one_line(address):
        api = HfApi()
        api.create_repo(address.repository, private=private, exist_ok=True)
        if address.revision is not None:
            api.create_branch(address.repository, branch=address.revision, exist_ok=True)
        there = api.list_repo_files(address.repository, revision=address.revision)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(name, content) for name, content in files.items()),
            *(CommitOperationDelete(name) for name in WHOLE if name in there and name not in files),
        ]
        commit = api.create_commit(
            address.repository, operations=operations, commit_message=message, revision=address.revision
        )
    return str(HubAddress(address.repository, commit.oid))


@contextmanager
def _errors_in_one_line(address: HubAddress) -> Iterator[None]:
    from huggingface_hub import errors

    log = logging.getLogger("huggingface_hub")  # it tells of every try, twice
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    except (errors.HTTPError, OSError, ValueError) as error:  # its own are among the two kinds that Python has
        cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else None
        raise UserError(_in_words(cause if isinstance(cause, Exception) else error, address)) from error
    finally:
        log.setLevel(level)


def _in_words(error: Exception, address: HubAddress) -> str:
    """What an error of huggingface_hub's means to the user."""
    from huggingface_hub import constants, errors

    first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"nobody is logged in at {constants.ENDPOINT}: {LOG_IN}"
    if constants.is_offline_mode() and isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        return f"HF_HUB_OFFLINE is set, and {address} is not to be had without the network"
    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{address.repository}"
        return f"{address} is for those whom its owner lets in: ask at {page}, and {LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no {address.repository} at {constants.ENDPOINT}, or it is private: correct the name, or {LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{address.repository} has no revision {address.revision}"
    if isinstance(error, errors.EntryNotFoundError):
        return f"{address} holds no {POLICY}: it is nothing that push.py has shared"
    if isinstance(error, errors.HfHubHTTPError):
        code = error.response.status_code
        if code == 401:
            return f"{constants.ENDPOINT} does not take the token: {LOG_IN}"
        if code == 403:
            return f"the token may not do that with {address}: take one that may, {LOG_IN}"
        return f"{constants.ENDPOINT} answers {code} for {address}: {first}"
    if isinstance(error, errors.HFValidationError):
        return f"{address} is no name that the hub takes: {first}"
    if isinstance(error, errors.HTTPError):
        return f"cannot reach {constants.ENDPOINT} for {address} ({first}): try again"
    return f"{address}: {first}"
