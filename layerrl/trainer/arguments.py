"""A masked trainer's arguments: found in signatures, refused, warned of, changed for TRL."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Literal, get_args, get_type_hints

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, Trainer

from layerrl.blocks import count_layers, meta_model, unwrap
from layerrl.checks import check_choice, check_count, check_path, check_switch, shown
from layerrl.errors import LayerRLError, ModelError, SelectionError, TrainerError
from layerrl.replacing import replaced
from layerrl.selection import LayerSelection, select_layers
from layerrl.warning import warn

Reference = Literal["beta", "ref_model"] | None

REMOVED = {
    "activation_bytes": "activations are no longer kept beside gradient checkpointing. Leave it "
    "out; gradient_checkpointing=False in the args keeps those of all layers from the first "
    "trained one up.",
    "record_while_generating": "the prefix is recorded in the first pass over a batch. Leave it "
    "out.",
    "method='rollout'": "it ranked layers worse than 'gradient' at 24 times the price. Take "
    "method='gradient', or measure with 'train'.",
}
"""Keywords and values that layerrl took, and what to do instead."""


def behind(cls: type, mixin: type) -> tuple[type, ...]:
    """The classes that follow the mixin and its own bases: the trainer first."""
    *_, last, _ = mixin.__mro__
    return cls.__mro__[cls.__mro__.index(last) + 1 :]


def signature(cls: type, mixin: type) -> inspect.Signature:
    """The signature of the class behind the mixin, with the mixin's own keywords."""
    made_by = next(base for base in behind(cls, mixin) if "__init__" in vars(base))
    parameters = list(inspect.signature(made_by).parameters.values())
    own = inspect.signature(mixin.__init__).parameters.values()
    added = [p for p in own if p.kind is inspect.Parameter.KEYWORD_ONLY]
    keep = [p for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    rest = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    return inspect.Signature([*keep, *added, *rest])


def refuse_other_classes(cls: type, mixin: type) -> None:
    """Behind the mixin there has to be a trainer."""
    *bases, _ = behind(cls, mixin)
    if not any(issubclass(base, Trainer) for base in bases):
        given = ", ".join(base.__name__ for base in bases) or "nothing"
        raise TrainerError(
            f"{cls.__name__} has {given} behind {mixin.__name__}, expected a trainer of TRL or "
            f"transformers. Put the mixin in front of one: class {cls.__name__}({mixin.__name__}, "
            "GRPOTrainer)."
        )


def names(cls: type, mixin: type) -> list[str]:
    """The arguments of the first class behind the mixin that spells them out."""
    for base in behind(cls, mixin):
        found = list(inspect.signature(base.__init__).parameters)[1:]
        if "model" in found:
            return found
    return []


def generates(cls: type, mixin: type) -> bool:
    """Whether the trainer scores completions of its own: the mixin itself has the hook for all."""
    return any(hasattr(base, "_generate_and_score_completions") for base in behind(cls, mixin))


def refuse_removed(given: Iterable[str], error: type[LayerRLError]) -> None:
    """Refuse what layerrl no longer takes, with what stands in its place."""
    for name in filter(REMOVED.__contains__, given):
        raise error(f"{name} was removed: {REMOVED[name]}")


def check_keywords(
    given: Iterable[str],
    *,
    prefix_cache_bytes: object,
    master_weights: object,
    checkpoint_format: object,
) -> None:
    """Refuse keywords that the mixin no longer has, and those of the wrong kind."""
    refuse_removed(given, SelectionError)
    of = "a number of bytes, "
    check_count("prefix_cache_bytes", prefix_cache_bytes, SelectionError, least=0, of=of)
    check_switch("master_weights", master_weights, SelectionError)
    check_choice("checkpoint_format", checkpoint_format, ("delta", "full"), SelectionError)


def check_given(cls: type, mixin: type, given: dict[str, Any]) -> None:
    """Refuse what no trainer takes, before anything is read."""
    model = given.get("model")
    if isinstance(model, str | os.PathLike):
        check_path("model", model, TrainerError)
    elif not isinstance(model, nn.Module) and (
        model is not None or given.get("model_init") is None
    ):
        raise TrainerError(
            f"model is {shown(model)}, expected a model, or the folder or hub id of one"
        )
    check_args(cls, mixin, given.get("args"))


def check_args(cls: type, mixin: type, args: object, name: str = "args") -> None:
    """Refuse arguments that are another trainer's than that behind the mixin, or none."""
    for base in behind(cls, mixin):
        try:
            kinds = get_type_hints(base.__init__).get("args")
        except Exception:  # of names that exist for type checkers alone
            continue
        named = get_args(kinds) or [kinds]
        classes = tuple(kind for kind in named if isinstance(kind, type) and kind is not Any)
        if kinds is not None and classes:
            break
    else:
        return
    if args is not None and not isinstance(args, classes):
        expected = " or ".join(kind.__name__ for kind in classes if kind is not type(None))
        raise TrainerError(
            f"{name} is {shown(args)}, an instance of {type(args).__name__}; {cls.__name__} takes "
            f"a {expected}"
        )


def refuse_cast(args: Any, model: nn.Module | None, by_deepspeed: bool) -> None:
    """TRL casts the whole model, for good, for continuous batching; DeepSpeed for bf16 and fp16."""
    by_trl = getattr(args, "use_transformers_continuous_batching", False)
    if model is None or not (by_trl or by_deepspeed):
        return
    cast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    others = {p.dtype for p in model.parameters()} - {cast}
    if cast is not None and others:
        who = "DeepSpeed" if by_deepspeed else "use_transformers_continuous_batching"
        when = "when training starts" if by_deepspeed else "in the first generation"
        raise SelectionError(
            f"{who} would cast the model from {others.pop()} to {cast} {when}, frozen tensors "
            f'included. Load the model in {cast} (model_init_kwargs={{"dtype": '
            f'"{str(cast).removeprefix("torch.")}"}}), or switch mixed precision off (bf16=False).'
        )


def config_at(path: Any, args: Any) -> Any:
    """The config of a model id or path; None where the trainer itself has to say what is wrong."""
    options = dict(getattr(args, "model_init_kwargs", None) or {})
    options.setdefault("trust_remote_code", getattr(args, "trust_remote_code", False))
    try:
        return AutoConfig.from_pretrained(path, **options)
    except (OSError, TypeError, ValueError):
        return None


def chosen_early(described: Any, selection: Any) -> Any:
    """Return a selection resolved before weights are loaded, to find a mistake in it.

    As it was given where only the loaded model can tell; it is resolved again against that, which
    may have another number of layers than its config says.

    Raises:
        SelectionError: If it does not fit the model.
        ModelError: If the model's layers cannot be found.
    """
    if isinstance(selection, LayerSelection) and selection.awaits_rows:
        described = getattr(described, "config", described)  # the trainer may add the tokens
    try:
        return select_layers(described, selection)
    except (ModelError, SelectionError):
        if isinstance(described, nn.Module):
            raise
    try:
        described = meta_model(described)
    except Exception:  # whatever a model's code needs
        count_layers(described)
        return selection
    return select_layers(described, selection)


class StandIn(nn.Module):
    """Passed to a trainer as its reference model while it is made, so that it loads none."""

    def __init__(self) -> None:
        super().__init__()
        self.config = PreTrainedConfig()  # where TRL looks for a scale of the logits


def second_model(given: dict[str, Any], known: list[str], *, generates: bool) -> Reference:
    """What makes a trainer load a second model for its reference, if it would.

    Args:
        given: The trainer's arguments by name.
        known: The names of all that it takes.
        generates: Whether it scores completions of its own. The `beta` of one that does is that of
            a reference if the reference can follow the policy; a distillation's is something else.

    Returns:
        `"beta"`: its args' beta, where it is not 0; `"ref_model"`: that it was given no such
        argument and computes the reference in each step; None: it needs no second model.
    """
    args = given.get("args")
    if "ref_model" in known:
        own = given.get("ref_model") is None and not getattr(args, "precompute_ref_log_probs", 0)
        return "ref_model" if own else None
    by_beta = generates and hasattr(args, "sync_ref_model") and getattr(args, "beta", 0.0)
    return "beta" if by_beta else None


def with_argument(
    known: list[str], args: tuple[Any, ...], kwargs: dict[str, Any], name: str, value: object
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A trainer's arguments with another value for one, by position if it was given so."""
    if name in known[: len(args)]:
        place = known.index(name)
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, {**kwargs, name: value}


@contextmanager
def without_reference_model(
    trainer: Any, mixin: type, found: Callable[[Reference], None]
) -> Iterator[None]:
    """Inside, TRL's own `__init__` makes `trainer` without loading a reference model.

    Its arguments are changed only while that runs: subclasses around it see the user's `args` and
    `beta`, before and after. `found` is called with how the trainer asks for its reference.
    """
    cls = type(trainer)
    # Not the base class that TRL's trainers share, which has no loss.
    owners = [
        base
        for base in behind(cls, mixin)
        if issubclass(base, Trainer)
        and base is not Trainer
        and "__init__" in vars(base)
        and {"compute_loss", "training_step"} & {*vars(base)}
    ]
    if not owners:
        yield
        return
    owner = owners[-1]
    init = owner.__init__
    takes = inspect.signature(init).parameters.values()
    known = [p.name for p in takes if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD][1:]

    @wraps(init)
    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        if self is not trainer:
            return init(self, *args, **kwargs)
        given = {**dict(zip(known, args, strict=False)), **kwargs}
        reference = second_model(given, known, generates=generates(cls, mixin))
        found(reference)
        config: Any = given.get("args")
        stand_in = StandIn()
        if reference == "ref_model":
            args, kwargs = with_argument(known, args, kwargs, "ref_model", stand_in)
        changes = {"sync_ref_model": False} if hasattr(config, "sync_ref_model") else {}
        changes |= {"beta": 0.0} if reference == "beta" else {}
        with replaced(config, **(changes if reference else {})):
            init(self, *args, **kwargs)
        if reference == "beta" and hasattr(self, "beta"):
            self.beta, self.ref_model = config.beta, stand_in
            if loss := getattr(self, "liger_loss", None):  # of TRL before 1.14, made with its beta
                loss.beta, loss.use_ref_model = self.beta, True
        return None

    with replaced(owner, __init__=make):
        yield


def warn_of_frozen_head(model: nn.Module, selection: LayerSelection) -> None:
    """A classifier's head lies outside the layers, and is random where the base had none."""
    base = unwrap(model)
    if (
        selection.full
        or "head" in selection.also
        or not type(base).__name__.endswith("ForSequenceClassification")
    ):
        return
    prefix = f"{getattr(base, 'base_model_prefix', '')}."
    head = [name for name, _ in base.named_parameters() if not name.startswith(prefix)]
    warn(
        f"{', '.join(head)} of {type(base).__name__} stays as it is: {selection} does not train "
        "it. A head that is still random (of a reward model made from a language model) has to be "
        'trained: select_layers(model, ..., also="head").'
    )


def warn_of_idle_layers(model: nn.Module, selection: LayerSelection) -> None:
    """A model may take features from below the end of its tower: layers above get no gradient."""
    taken = getattr(getattr(unwrap(model), "config", None), "vision_feature_layer", None)
    if selection.stack == "text" or taken is None:
        return
    # Counted as hidden states: first what enters layer 0, then what leaves each.
    states = [
        state % (selection.num_layers + 1)
        for state in ([taken] if isinstance(taken, int) else taken)
    ]
    idle = [layer for layer in selection.layers if layer >= max(states)]
    if idle:
        warn(
            f"{selection}: {idle} will get no gradient, as {type(unwrap(model)).__name__} takes "
            f"its features below (vision_feature_layer={taken} in its config). Leave them out."
        )
