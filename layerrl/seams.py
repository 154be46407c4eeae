"""Whether torch, transformers, accelerate and TRL have what layerrl needs of them.

A masked trainer is checked against the table of seams when it is made, as far as possible before
weights are loaded: what an upgrade has renamed or changed is one error, and never a safeguard that
does nothing.
"""

from __future__ import annotations

import inspect
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from layerrl.errors import FrameworkError
from layerrl.seam import Seam, has, object_at, short_name
from layerrl.seam_table import SEAMS
from layerrl.warning import warn

TESTED = {
    "torch": ("2.11", "2.13"),
    "transformers": ("5.9", "5.23"),
    "accelerate": ("1.10.1", "1.15"),
    "trl": ("1.9", "1.16"),
}
"""Package to the lowest version that layerrl works with, and the highest it was tested with."""
INPUT_GRAD_HOOKS = ("make_inputs_require_grads", "make_inputs_require_grad")
"""Names of the functions with which transformers and TRL make an embedding's output require a
gradient: the only mark that these hooks have."""


_Gone = tuple[Seam, str]
"""A seam that is not as the table says, and its problem."""


def check_class(cls: type) -> None:
    """Compare what a class needs, a trainer's or that of its vLLM, with what is installed."""
    check_versions()
    gone = []
    for seam in SEAMS:
        owner = None if seam.by is None or seam.attribute else _base(cls, seam.by)
        if owner is None:
            continue
        place = owner if seam.of == seam.by else object_at(seam.of)
        problem = seam.problem(place)
        if seam.name == "enable_input_require_grads" and not problem:
            problem = _problem_of_hook(place)
        if problem:
            gone.append((seam, problem))
    _refuse(gone)


def check_made(trainer: Any) -> None:
    """Compare what is set in a trainer that was made, or in its vLLM, with what its class needs."""
    gone = []
    for seam in SEAMS:
        if not seam.attribute or seam.by is None or _base(type(trainer), seam.by) is None:
            continue
        if (seam.when is None or seam.when(trainer)) and not has(trainer, seam.name):
            gone.append((seam, f"{short_name(seam.of)} has no attribute {seam.name}"))
    _refuse(gone)


@contextmanager
def imported() -> Iterator[None]:
    """Inside, names are looked up that may have gone, or that an old version does not have yet."""
    check_versions()
    try:
        yield
    except RuntimeError as error:
        # What their lazy modules make of any error in an import.
        cause = error.__cause__
        if not isinstance(cause, ImportError) or isinstance(cause, FrameworkError):
            raise
        message = _message(cause) or f"{error} Install what is named there."
        raise FrameworkError(message) from error
    except (ImportError, AttributeError) as error:
        message = None if isinstance(error, FrameworkError) else _message(error)
        if message is None:
            raise
        raise FrameworkError(message) from error


def _message(error: ImportError | AttributeError) -> str | None:
    """The message for a name that a package of `TESTED` lacks; None for any other package."""
    of, name = _missing(error)
    asking = _packages(error)
    package = of.partition(".")[0] or ["", *asking][-1]  # lazy modules do not always say which
    if package not in TESTED:
        return None
    found = installed_version(package)
    if found is None:
        requirement = _requirement(package)
        return f'{package} is not installed, and layerrl needs it: pip install "{requirement}"'
    importer = next((name for name in reversed(asking) if name != package), "layerrl")
    theirs = installed_version(importer)
    if importer != "layerrl" and theirs:
        return (
            f"{importer} {theirs} cannot be imported beside {package} {found}: "
            f"{str(error).rstrip('.')}. Install versions that go together: pip install --upgrade "
            f"{importer} {package} layerrl"
        )
    use = next((s.use for s in SEAMS if f"{s.of}.{s.name}".endswith(f".{name}")), "")
    problem = f"there is no {of}" if of else str(error)
    if name:
        problem = f"{short_name(of)} has no {name}"
    return _sentence([(Seam(of, name, None, use, None), problem)])


def _packages(error: BaseException) -> list[str]:
    """The packages whose code an error went through, the one that raised it last."""
    frames = traceback.walk_tb(error.__traceback__)
    names = (frame.f_globals.get("__name__", "").partition(".")[0] for frame, _ in frames)
    return [name for name in names if name not in ("", "importlib")]


def _missing(error: ImportError | AttributeError) -> tuple[str, str]:
    """The module or class that lacks a name, and the name, where these are known."""
    if isinstance(error, AttributeError):
        of = error.obj
        if isinstance(of, type):
            return f"{of.__module__}.{of.__qualname__}", error.name or ""
        return of.__name__ if inspect.ismodule(of) else "", error.name or ""
    found = re.match(r"cannot import name '(\w+)'", str(error))
    return error.name or "", found[1] if found else ""


@cache
def check_versions() -> None:
    """Refuse versions below the lowest that works; warn, once, of those above the tested range."""
    untested = []
    for package, (lowest, highest) in TESTED.items():
        installed = installed_version(package)
        if installed is None:
            continue  # not needed until it is imported
        numbers = _numbers(installed)  # none where it was built from source
        if numbers and numbers < _numbers(lowest):
            raise FrameworkError(  # as pip does not find out with --no-deps
                f"{package} {installed} is installed, and layerrl needs {package} {lowest} or "
                f'later: pip install "{_requirement(package)}"'
            )
        if not numbers or numbers[:2] > _numbers(highest):
            untested.append(f"{package} {installed} (tested with {lowest} to {highest})")
    if untested:
        warn(
            f"layerrl was not tested with {', '.join(untested)}. What it needs of a trainer is "
            "checked when one is made; what else may differ is not."
        )


def installed_version(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return getattr(sys.modules.get(package), "__version__", None)


def installed(package: str) -> tuple[int, ...]:
    """The numbers of the installed version: for what only a version tells."""
    return _numbers(installed_version(package) or "")


def _numbers(text: str) -> tuple[int, ...]:
    """`2.13.0+cpu` as numbers: what comes behind these does not count."""
    return tuple(map(int, re.findall(r"\d+", re.split(r"[^\d.]", text, maxsplit=1)[0])))


def _requirement(package: str) -> str:
    lowest, highest = TESTED[package]
    major, minor = _numbers(highest)
    return f"{package}>={lowest},<{major}.{minor + 1}"


def _base(cls: type, path: str) -> type | None:
    """The class of that path that a trainer's class is derived from, if it is."""
    package, _, name = path.rpartition(".")
    # Tools that patch TRL (Unsloth) put classes of their own in its place.
    root = package.partition(".")[0]
    replaced = vars(sys.modules.get(root, object)).get(name)
    for base in cls.__mro__:
        theirs = (
            base.__module__.partition(".")[0] == root and ".experimental." not in base.__module__
        )
        if base is replaced or (base.__name__ == name and theirs):
            return base
    return None


def _problem_of_hook(model_class: Any) -> str:
    """Whether the hook that makes embeddings require a gradient can be told by its name."""
    from torch import nn

    model, embedding = model_class.__new__(model_class), nn.Identity()
    nn.Module.__init__(model)
    model.get_input_embeddings = lambda: embedding
    try:
        model_class.enable_input_require_grads(model)
        names = {getattr(hook, "__name__", "") for hook in embedding._forward_hooks.values()}
    except Exception:  # a tool's patch that needs a whole model: not to be known from here
        return ""
    if names & {*INPUT_GRAD_HOOKS}:
        return ""
    return (
        f"PreTrainedModel.enable_input_require_grads registers the hook {', '.join(names)}, "
        f"expected {INPUT_GRAD_HOOKS[0]}"
    )


def _refuse(gone: list[_Gone]) -> None:
    if gone:
        raise FrameworkError(_sentence(gone))


def _sentence(gone: list[_Gone]) -> str:
    problems: dict[str, list[str]] = {}
    for seam, problem in gone:
        use = f"which layerrl needs to {seam.use}" if seam.use else "which layerrl needs"
        problems.setdefault(seam.of.partition(".")[0], []).append(f"{problem}, {use}")
    said = [
        f"{package} {installed_version(package)} is not as layerrl knows it: {'; '.join(found)}."
        for package, found in problems.items()
    ]
    pins = " ".join(f'"{_requirement(package)}"' for package in problems)
    return (
        f"{' '.join(said)} Install a version that layerrl was tested with (pip install {pins}), "
        "or report this message to layerrl."
    )
