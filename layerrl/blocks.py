"""Where a model keeps its decoder layers, head and embedding.

Layer = one decoder block (attention, MLP and their norms); index 0 is nearest the embedding. The
layers are found by structure, never by matching names: `layers.1` is not `layers.10`, and an
expert's index is not a layer's.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import device, nn

from layerrl.checks import check_kind, shown, whole_number
from layerrl.errors import ModelError
from layerrl.seams import imported

# Modules that wrap a whole model, or one submodule, under these names: torch.compile, DDP and
# DataParallel, FSDP1, activation-checkpoint wrappers.
_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPER_IN_NAME = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


_COMPILED = "_compiled_call_impl"

# What else configs call a number of layers.
_OTHER_COUNTS = ("num_layers", "n_layers", "n_layer", "num_decoder_layers", "num_blocks")


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """The decoder layers of one model."""

    path: str
    """Dotted name of the layer list in the unwrapped model, `"model.layers"` for a Llama."""
    modules: tuple[nn.Module, ...]
    """One module per layer, 0 nearest the embedding."""
    part: nn.Module
    """The module whose forward calls them: the unwrapped model, or its vision tower."""

    def named_parameters(self, layer: int) -> Iterator[tuple[str, nn.Parameter]]:
        """Tensors of one layer by their name inside the block (`"mlp.down_proj.weight"`)."""
        for name, parameter in self.modules[layer].named_parameters(remove_duplicate=False):
            yield plain_name(name), parameter


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP, FSDP, DeepSpeed, `torch.compile` and PEFT wrappers."""
    check_kind("model", model, nn.Module, "a model, that is a torch.nn.Module", ModelError)
    while True:
        if is_peft(model):
            model = model.get_base_model()  # pyright: ignore[reportCallIssue]
            continue
        inner = next((model._modules[name] for name in _WRAPPERS if name in model._modules), None)
        if inner is None:
            return model
        model = inner


def is_peft(model: nn.Module) -> bool:
    """Whether the model is wrapped by PEFT."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def embedding_of(model: nn.Module) -> Any:
    """The token embedding, by transformers' own getter; None where there is none."""
    return _asked(model, "get_input_embeddings")


def head_of(model: nn.Module) -> Any:
    """The head that makes tokens, by transformers' own getter; None where there is none."""
    return _asked(model, "get_output_embeddings")


def _asked(model: nn.Module, getter: str) -> Any:
    try:
        return getattr(unwrap(model), getter)()
    except (AttributeError, NotImplementedError):
        return None


def plain_name(name: str) -> str:
    """A tensor's name without the parts that wrappers around submodules put into it."""
    return _WRAPPER_IN_NAME.sub("", name)


@contextmanager
def replaced_forwards(
    modules: Sequence[nn.Module], wrap: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Let modules run something around their `forward`; afterwards each has its own again.

    `wrap(index, forward)` returns the new forward of a module, given the one that it has now. What
    others put in its place inside stays there, and finds the module's own in it afterwards. Of a
    module compiled in place (`module.compile()`) what is wrapped is the compiled call.
    """
    # A compiled call traces the forward: what is put there would be compiled, anew each time.
    names = ["forward" if m._compiled_call_impl is None else _COMPILED for m in modules]
    own = [vars(module).get(name) for module, name in zip(modules, names, strict=True)]
    ours: list[_Forward] = []
    try:
        for index, (module, name) in enumerate(zip(modules, names, strict=True)):
            forward = getattr(module, name)
            ours.append(_Forward(forward, wrap(index, forward)))
            setattr(module, name, ours[-1])
        yield
    finally:
        for module, name, forward, mine in zip(modules, names, own, ours, strict=False):
            mine.end()
            if vars(module).get(name) is not mine:
                continue
            if forward is None:
                delattr(module, name)
            else:
                setattr(module, name, forward)


def is_accelerates(forward: Any) -> bool:
    """Whether a module's forward is what accelerate has put around its own, and no other code."""
    function = getattr(forward, "__func__", forward)
    return str(getattr(function, "__globals__", {}).get("__name__")).startswith("accelerate.")


class _Forward:
    """Stands in for a module's `forward`, for which generation and accelerate ask its signature."""

    def __init__(self, forward: Callable[..., Any], run: Callable[..., Any]) -> None:
        functools.update_wrapper(self, forward)
        self._forward, self._run = forward, run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)

    def end(self) -> None:
        """Call the module's own forward from now on: other code may have kept this object."""
        self._run = self._forward

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        """The copied module's own forward: a teacher copied meanwhile is no longer the model."""
        return deepcopy(self._forward, memo)


def own_forward(function: Any) -> Any:  # any callable
    """The forward that `replaced_forwards` has put others around; any other function itself."""
    while isinstance(function, _Forward):
        function = function._forward
    return function


def with_fused_siblings(names: Iterable[str], trained: Iterable[str]) -> list[str]:
    """Return the tensors that an inference engine has to be sent when some were trained, in order.

    vLLM fuses projections that have one parent (q, k and v; gate and up; an expert's, and the
    experts of a layer; others in other families), and its server replaces a fused module whole,
    weights and biases: what does not arrive is undefined. So everything under the same parent
    travels together, which for whole layers adds nothing.
    """
    parents = {_parent(name) for name in trained}
    return [name for name in names if _parent(name) in parents]


def _parent(name: str) -> str:
    """What holds a parameter's module; for anything of an expert, the experts of its layer."""
    parts = name.split(".")
    if "experts" in parts:  # an engine fuses all experts of a layer into one tensor
        return ".".join(parts[: parts.index("experts") + 1])
    # Outside all lists of layers, an engine fuses nothing: a module travels alone.
    end = len(parts) - (2 if any(part.isdigit() for part in parts) else 1)
    return ".".join(parts[:end])


def find_blocks(model: nn.Module) -> Blocks:
    """Return the one stack of decoder layers in a model; of a vision-language model, the text's.

    A stack is an `nn.ModuleList` that lies in no other. Where there are several, transformers'
    own `get_decoder()` says which part holds the text, and the config how many layers it has.

    Raises:
        ModelError: If there is no such stack, if several are left, or if the model is an
            encoder-decoder, where "layer 3" could mean either side.
    """
    base = unwrap(model)
    stacks = dict(outermost_lists(base))
    described = ", ".join(f"{path!r} ({len(stack)})" for path, stack in stacks.items()) or "none"
    config = getattr(base, "config", None)
    name = type(base).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} is an encoder-decoder: layer numbers could mean either stack. Stacks of "
            f"layers found: {described}. layerrl selects layers of decoder-only models."
        )
    if not stacks:
        raise ModelError(
            f"{name} has no decoder layers: none of its {sum(1 for _ in base.modules())} modules "
            "is an nn.ModuleList of blocks. Expected a decoder-only transformers model, such as "
            "AutoModelForCausalLM.from_pretrained(...) gives."
        )
    if config is not None:
        count_layers(config)
    if len(stacks) > 1:
        stacks = _text_stacks(base, stacks)
    if len(stacks) != 1:
        raise ModelError(
            f"{name} has no unambiguous stack of decoder layers. Candidates (layers): {described}. "
            "Pass the submodule that has the one you mean as its only stack."
        )
    [(path, stack)] = stacks.items()
    return Blocks(path=path, modules=tuple(stack), part=base)


def count_layers(config: Any) -> int:  # transformers is not imported for a type
    """Number of decoder layers that a config describes; of vision-language ones, the text's."""
    name = type(config).__name__
    if not hasattr(config, "get_text_config") or isinstance(config, type):
        raise ModelError(
            f"model is {shown(config)}, expected a transformers model or config, got {name}. "
            "Load one first: AutoConfig.from_pretrained(...) is enough, no weights are needed."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} describes an encoder-decoder: layer numbers could mean either stack. "
            "layerrl selects layers of decoder-only models."
        )
    given = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    num_layers = whole_number(given, least=1)
    if num_layers is None:
        raise ModelError(
            f"{name} has no decoder layers: its num_hidden_layers is {shown(given)}, expected "
            "a positive integer."
        )
    return num_layers


def layers_described(config: Any) -> int:
    """Return the number of decoder layers that the model of a config has.

    Configs usually say it. Some count otherwise than their model (LongCat's, each layer twice): one
    that derives its number, or has another number of the kind, or comes from outside transformers,
    is not believed where the model can be made on the `meta` device.

    Raises:
        ModelError: As of `count_layers`; or if the config counts two ways, and no model can be made
            that shows which is right.
    """
    counted = count_layers(config)
    text = config.get_text_config(decoder=True)
    aliases = getattr(text, "attribute_map", {})
    others = {
        name: getattr(text, name)
        for name in _OTHER_COUNTS
        if name not in aliases and type(getattr(text, name, None)) is int
    }
    counts_twice = isinstance(getattr(type(text), "num_hidden_layers", None), property) or any(
        count != counted for count in others.values()
    )
    if not counts_twice and type(config).__module__.startswith("transformers.models."):
        return counted
    try:
        return len(find_blocks(meta_model(config)).modules)
    except Exception as error:  # whatever a model's code needs
        if not counts_twice:
            return counted
        raise ModelError(
            f"{type(config).__name__} has num_hidden_layers {counted}, beside {others}, and its "
            f"model, which would say how many layers it has, cannot be made from it ({error}). "
            "Give the model instead of the config."
        ) from error


def meta_model(config: Any) -> nn.Module:
    """The model a config describes, on the `meta` device: every name and shape, no weights."""
    count_layers(config)
    import transformers

    mappings: tuple[Any, ...] = (
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )
    classes = [getattr(transformers, name, None) for name in config.architectures or ()]
    classes += [mapping.get(type(config), None) for mapping in mappings]
    for model_class in classes:
        if model_class is not None:
            with imported():  # public doors take other classes, or make weights of another dtype
                make = model_class._from_config
            with device("meta"):
                return make(config)
    raise ModelError(
        f"transformers has no language model for {type(config).__name__} alone. Give the model, "
        "or the whole model's config."
    )


def outermost_lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    """Lists of modules that lie in no other, by their plain names, after a prefix."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            if len(child):
                yield plain_name(prefix + name), child
        else:
            yield from outermost_lists(child, f"{prefix}{name}.")


def _text_stacks(base: nn.Module, stacks: dict[str, nn.ModuleList]) -> dict[str, nn.ModuleList]:
    if hasattr(base, "get_decoder"):
        decoder_modules = set(base.get_decoder().modules())  # pyright: ignore[reportCallIssue]
        stacks = {path: stack for path, stack in stacks.items() if stack in decoder_modules}
    if len(stacks) > 1 and hasattr(base, "config"):
        num_layers = count_layers(base.config)
        stacks = {path: stack for path, stack in stacks.items() if len(stack) == num_layers}
    return stacks
