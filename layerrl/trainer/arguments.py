"""What a masked trainer is given, before and behind the trainer that it wraps."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig

from layerrl.blocks import is_peft
from layerrl.errors import SelectionError

if TYPE_CHECKING:
    from collections.abc import Iterator


def signature(cls: type, mixin: type) -> inspect.Signature:
    """The signature of the class behind the mixin, with the mixin's own keywords."""
    after = cls.__mro__[cls.__mro__.index(mixin) + 1]
    if after is object:
        raise TypeError(
            f"{cls.__name__}: {mixin.__name__} goes in front of the trainer class, as in "
            f"class MyTrainer({mixin.__name__}, GRPOTrainer)"
        )
    parameters = list(inspect.signature(after).parameters.values())
    own = inspect.signature(mixin.__init__).parameters.values()
    added = [p for p in own if p.kind is inspect.Parameter.KEYWORD_ONLY]
    keep = [p for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    rest = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    return inspect.Signature([*keep, *added, *rest])


def by_name(
    cls: type, mixin: type, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments by the names of the first class behind the mixin that spells them out."""
    for behind in cls.__mro__[cls.__mro__.index(mixin) + 1 :]:
        names = list(inspect.signature(behind.__init__).parameters)[1:]
        if "model" in names:
            return {**dict(zip(names, args, strict=False)), **kwargs}
    return kwargs


def check_keywords(
    *, byte_counts: dict[str, object], switches: dict[str, object], checkpoint_format: object
) -> None:
    """Refuse keywords of the mixin that are of the wrong kind."""
    for name, value in byte_counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise SelectionError(
                f"{name} is {value!r}, expected a number of bytes, an int from 0 up"
            )
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise SelectionError(f"{name} is {value!r}, expected True or False")
    if checkpoint_format not in ("delta", "full"):
        raise SelectionError(
            f'checkpoint_format is {checkpoint_format!r}, expected "delta" or "full"'
        )


def refuse_peft(selection: object, model: object, peft_config: object) -> None:
    """A selection and PEFT both choose what trains."""
    if isinstance(model, nn.Module) and is_peft(model):
        given = "a PEFT model"
    elif peft_config is not None:
        given = "peft_config"
    else:
        return
    raise SelectionError(
        f"selection={selection!r} was given together with {given}: two ways of choosing what "
        "trains. Leave out one of them (PEFT's own layers_to_transform restricts an adapter to "
        "layers)."
    )


def refuse_cast(args: Any, model: nn.Module | None) -> None:  # noqa: ANN401
    """TRL casts the whole model, for good, when it generates with continuous batching."""
    if model is None or not getattr(args, "use_transformers_continuous_batching", False):
        return
    cast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    others = {p.dtype for p in model.parameters()} - {cast}
    if cast is not None and others:
        raise SelectionError(
            f"use_transformers_continuous_batching would cast the model from {others.pop()} to "
            f"{cast} in the first generation, frozen tensors included. Load the model in {cast} "
            f'(model_init_kwargs={{"dtype": "{str(cast).removeprefix("torch.")}"}}), or switch '
            "mixed precision off (bf16=False)."
        )


def config_at(path: Any, args: Any) -> Any:  # noqa: ANN401
    """The config of a model id or path; None where the trainer itself has to say what is wrong."""
    options = dict(getattr(args, "model_init_kwargs", None) or {})
    options.setdefault("trust_remote_code", getattr(args, "trust_remote_code", False))
    try:
        return AutoConfig.from_pretrained(path, **options)
    except (OSError, TypeError, ValueError):
        return None


@contextmanager
def without_reference_model(args: Any) -> Iterator[float]:  # noqa: ANN401
    """Let a trainer be made as if `beta` were 0, so that it loads no second model.

    Yields:
        The `beta` that the args had and have again afterwards.
    """
    beta, sync = getattr(args, "beta", 0.0), getattr(args, "sync_ref_model", False)
    if not beta:
        yield 0.0
        return
    args.beta, args.sync_ref_model = 0.0, False
    try:
        yield beta
    finally:
        args.beta, args.sync_ref_model = beta, sync
