"""Deltas in repositories of a model hub: pushed to it, and fetched into its client's cache."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerrl.checks import check_path, check_switch, check_text, shown
from layerrl.delta.card import CARD, card_of
from layerrl.delta.description import Version2, read
from layerrl.delta.folder import META, TENSORS, Delta
from layerrl.errors import DeltaError
from layerrl.seams import installed_version

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_CLIENTS = {"huggingface_hub", "httpx", "httpx2", "requests", "hf_xet"}
_LOG_IN = "Log in with `hf auth login`, or pass token=..."


def push_delta(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """Push a delta to a repository of the hub, which is made if there is none.

    What else lies in the folder (the rest of a checkpoint, say) stays where it is, and so does what
    else is in the repository.

    Args:
        folder: A delta's folder, as `save_delta` writes it, or a trainer's checkpoint with one.
        repo_id: The repository, `"user/name"`.
        private: Whether a repository that is made is private; None: as the user or organization
            has it. One that exists has to be what is asked for.
        token: A token with write access; None: of who is logged in.
        revision: Branch to push to, made from `main` if there is none; None: `main`.
        commit_message: First line of the commit.

    Returns:
        The commit: its `oid` is what `load_delta` takes as `revision`, its `commit_url` the page.

    Raises:
        DeltaError: If the folder holds no delta, or a damaged one; if the hub cannot be reached,
            refuses to be written to by this token, or has a public repository where a private one
            was asked for.
    """
    check_path("folder", folder, DeltaError)
    private = check_switch("private", private, DeltaError, or_none=True)
    _check_texts(
        repo_id="" if repo_id is None else repo_id, revision=revision, commit_message=commit_message
    )
    delta, api = Delta.read(folder), _api(token)
    with hub_errors("push to", repo_id, token=token, revision=revision):
        api.create_repo(repo_id, private=private, exist_ok=True)
        there = api.model_info(repo_id)
        _check_visibility(there, repo_id, private)
        if revision is not None and not revision.startswith("refs/"):  # a pull request's
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if revision is not None:
            there = api.model_info(repo_id, revision=revision)
        names = {file.rfilename for file in there.siblings or ()}
        return api.create_commit(
            repo_id,
            _additions(delta, repo_id, beside="older" if _whole_model(names) else "nothing"),
            commit_message=commit_message or f"Delta: {delta.selection}",
            revision=revision,
        )


def _additions(delta: Delta, repo_id: str, *, beside: Any) -> list[Any]:
    """The files of a delta, with a card that names the repository."""
    from huggingface_hub import CommitOperationAdd

    file, (_, _, meta) = delta.path / CARD, read(delta.path / META)
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    card = card_of(text, meta, beside=beside, hub_id=repo_id)
    names = [META, TENSORS, *delta.files]
    if missing := [name for name in names if not (delta.path / name).is_file()]:
        raise DeltaError(
            f"{delta.path / missing[0]} is missing, which was written with the delta: save the "
            "delta again, or push a folder that is whole"
        )
    additions = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=delta.path / name) for name in names
    ]
    return [*additions, CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=card.encode())]


def _check_visibility(there: Any, repo_id: str, private: bool | None) -> None:
    """The client passes over `private` where the repository exists."""
    if private is not None and there.private is not None and there.private != private:
        now = "private" if there.private else "public"
        raise DeltaError(
            f"{repo_id!r} exists and is {now}, expected private={private}: nothing was pushed. "
            f"Change it (HfApi().update_repo_settings({repo_id!r}, private={private})) or push to "
            "another name."
        )


def delta_folder(
    path: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """The folder of a delta: the one that is given, or a repository's in the hub's cache."""
    check_path("path", path, DeltaError)
    check_token(token)
    if not isinstance(path, str) or os.path.lexists(path) or not _REPOSITORY.fullmatch(path):
        if revision is not None:
            why = "which is a folder here" if os.path.lexists(path) else "which is no 'user/name'"
            raise DeltaError(
                f"revision={revision!r} was given for {os.fspath(path)!r}, {why}: only a "
                "repository on the hub has revisions"
            )
        return Path(path)
    _check_texts(revision=revision)
    api = _api(token)
    with hub_errors("read", path, token=token, revision=revision):
        folder = Path(api.snapshot_download(path, revision=revision, allow_patterns=[META]))
        if not (folder / META).is_file():
            raise DeltaError(_no_delta(api, path, folder.name))
        found, _, _ = read(folder / META)
        files = found.files if isinstance(found, Version2) else ()
        names = [glob.escape(name) for name in (META, TENSORS, *files)]
        commit = folder.name  # both times the same one, whatever is pushed meanwhile
        return Path(api.snapshot_download(path, revision=commit, allow_patterns=names))


def _no_delta(api: HfApi, repo_id: str, commit: str) -> str:
    """The sentence for a repository that holds something else."""
    names = {*api.list_repo_files(repo_id, revision=commit)}
    below = sorted(name for name in names if name.endswith(f"/{META}"))
    if "adapter_config.json" in names:
        what = (
            f"a PEFT adapter (adapter_config.json). Put it on its base with PeftModel.from_"
            f"pretrained(model, {repo_id!r})"
        )
    elif below:
        what = (
            f"one only further down ({below[0]}): the run that pushed it has not pushed a delta to "
            "the top. Download the repository and give that folder"
        )
    elif _whole_model(names):
        what = (
            "a whole model. Load it with AutoModelForCausalLM.from_pretrained("
            f"{repo_id!r}); it needs no delta"
        )
    else:
        what = f"{', '.join(sorted(names)[:5]) or 'nothing'} ({len(names)} files)"
    return f"{repo_id!r} at {commit} holds no delta at its top ({META}) but {what}."


def _whole_model(names: set[str]) -> bool:
    weights = (".safetensors", ".bin", ".gguf", ".pth")
    at_top = {name for name in names if "/" not in name and name.endswith(weights)}
    return bool(at_top - {TENSORS, "training_args.bin", "adapter_model.safetensors"})


def check_token(token: object) -> None:
    """Refuse a token that no request could carry; a text is not shown."""
    if token is None or isinstance(token, bool):
        return
    if not isinstance(token, str) or not token.strip():
        raise DeltaError(f"token is {shown(token)}, expected a text, True, False or None")
    if not (token.isascii() and token.isprintable()):
        raise DeltaError("token holds characters that no token of the hub has: copy it again")


def _check_texts(**options: object) -> None:
    for name, value in options.items():
        if value is not None and not (isinstance(value, str) and value.strip()):
            raise DeltaError(f"{name} is {shown(value)}, expected a text, or None")
        if value is not None:
            check_text(name, value, DeltaError)


def _api(token: str | bool | None) -> HfApi:
    from huggingface_hub import HfApi

    check_token(token)
    return HfApi(token=token, library_name="layerrl", library_version=installed_version("layerrl"))


@contextmanager
def hub_errors(
    action: str,
    repo_id: str | None,
    *,
    token: str | bool | None = None,
    revision: str | None = None,
) -> Iterator[None]:
    """Inside, what the hub's client raises becomes a `DeltaError` of a sentence or two."""
    try:
        yield
    except Exception as error:
        if not (_is_of_client(error) or _is_of_client(error.__cause__)):
            raise
        name = repo_id or "a new repository"
        why = _reason(error, action, name, token=token, revision=revision)
        raise DeltaError(f"cannot {action} {name!r}: {why}") from error


def _is_of_client(error: BaseException | None) -> bool:
    """Whether an error is of the hub's client or of what that connects with, in any version."""
    modules = {base.__module__.partition(".")[0] for base in type(error).__mro__}
    return bool(modules & _CLIENTS) or isinstance(error, ConnectionError | TimeoutError)


def _reason(
    error: Exception, action: str, repo_id: str, *, token: str | bool | None, revision: str | None
) -> str:
    from huggingface_hub import constants, errors

    reads, hub = action == "read", constants.ENDPOINT
    if isinstance(error, errors.HFValidationError):
        return f"that is no name of a repository, expected 'user/name' ({_line(error)})"
    cause: Any = error.__cause__
    if isinstance(error, errors.LocalEntryNotFoundError) and hasattr(cause, "response"):
        error = cause  # the hub was reached, and refused
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            unreached = "HF_HUB_OFFLINE is set, so that the hub is not asked"
        else:
            unreached = f"the hub ({hub}) cannot be reached"
        if not reads:
            return f"{unreached}."
        at = f" at revision {revision!r}" if revision else ""
        return (
            f"there is no such folder here, it is not whole{at} in the hub's cache "
            f"({constants.HF_HUB_CACHE}), and {unreached}. Load it once with a connection, or copy "
            "its folder here."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        has = f": it has {there}" if (there := _revisions(repo_id, token)) else ""
        return f"the repository has no revision {revision!r}{has}."
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return f"it is gated. Ask for access on its page, {hub}/{repo_id}. {_LOG_IN}"
    unseen = status == 401 and reads and not _has_token(token)  # the client goes by the address
    if isinstance(error, errors.RepositoryNotFoundError) or unseen:
        here = "there is no such folder here, and " if reads else ""
        who = "this token" if _has_token(token) else "a caller without a token"
        return (
            f"{here}the hub ({hub}) has no such repository, or a private one that {who} may not "
            f"read. Check the name. {_LOG_IN}"
        )
    if status == 401:
        who = "the token is not valid" if _has_token(token) else "no token was given"
        return f"{who}. {_LOG_IN}"
    if status == 403 and not reads:
        return (
            "the token is not allowed to write there. It needs the role `write`, and the right to "
            f"write to {repo_id.partition('/')[0]!r} ({_line(error)})."
        )
    if status is None:
        kind = type(error)
        unreached = f"the hub ({hub}) cannot be reached: " if "httpx" in kind.__module__ else ""
        return f"{unreached}{_line(error)} ({kind.__name__})."
    return f"the hub ({hub}) says: {_line(error)} (status {status})."


def _has_token(token: str | bool | None) -> bool:
    from huggingface_hub import get_token

    return isinstance(token, str) or (token is not False and get_token() is not None)


def _line(error: Exception) -> str:
    """What the hub says of an error, or its own first line."""
    text = getattr(error, "server_message", None) or str(error)
    return " ".join(text.split())[:300].rstrip(".")


def _revisions(repo_id: str, token: str | bool | None) -> str:
    with suppress(Exception):  # the sentence goes without
        refs = _api(token).list_repo_refs(repo_id)
        names = [ref.name for ref in (*refs.branches, *refs.tags)]
        return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return ""
