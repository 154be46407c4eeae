"""What layerrl needs of torch, transformers, accelerate and TRL beside their documented interfaces.

One table says what it is, where it lives, with which parameters, and what it is for. A masked
trainer is checked against it when it is made, as far as possible before weights are loaded: what an
upgrade has renamed or changed is one error, and never a safeguard that does nothing.
"""

from __future__ import annotations

import inspect
import re
import sys
import traceback
import warnings
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, NamedTuple

from layerrl.errors import FrameworkError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

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


class Seam(NamedTuple):
    """A name of another package that layerrl overrides, calls, reads or sets."""

    of: str
    """Where it lives: a class or a module; `torch.nn.Module()` for an instance's attribute."""
    name: str
    """The name; of a trainer's attribute, the path to it."""
    takes: tuple[str, ...] | None
    """The parameters that it is called with, or overridden with, in their order; `...` for any, as
    the last for any more, as the first for any before. None: it is no function."""
    use: str
    """What it is needed to do."""
    by: str | None
    """The class that needs it, and all that are derived from it; None: whoever imports it."""
    when: Callable[[Any], bool] | None = None
    """Of an attribute: whether this trainer has it; None: every one."""
    attribute: bool = False
    """Whether it is there when the trainer has been made, and not before."""

    def __str__(self) -> str:
        """As in the table."""
        takes = "" if self.takes is None else f"({', '.join(self.takes)})"
        return f"{self.of}.{self.name}{takes}"


def _seams(of: str, uses: Mapping[str, str], by: str | None = "", **more: Any) -> Iterator[Seam]:
    """Rows of the table; by default, it is the trainers of that class that need them."""
    for text, use in uses.items():
        name, bracket, takes = text.rstrip(")").partition("(")
        parameters = tuple(filter(None, takes.split(", "))) if bracket else None
        yield Seam(of, name, parameters, use, of if by == "" else by, **more)


_EVERY = "transformers.Trainer"
_VLLM = "trl.generation.vllm_generation.VLLMGeneration"
_GENERATING = {
    "_generate_and_score_completions(inputs)": "tell the passes over a batch from other calls",
}
_REWARDING = {
    **_GENERATING,
    "_get_per_token_logps_and_entropies(model, ...)": "replay the prefix where completions are "
    "scored",
    "_calculate_rewards(inputs, ...)": "choose layers by what is rewarded",
}
_REWARDING_ATTRIBUTES = {
    "beta": "put the reference back that the trainer is made without",
    "_metrics": "keep the probe's metrics apart from the training's",
    "num_generations": "tell a prompt's completions from another's",
    "num_generations_eval": "evaluate each prompt once where it is decoded greedily",
    "num_iterations": "have log-probabilities kept with a batch",
    "reward_weights": "weigh rewards as the trainer does",
    "reward_func_names": "name rewards",
    "max_completion_length": "say which completions were cut off",
}
_REFERENCE = {"__init__(..., ref_model)": "take the model that was passed for the reference"}
_REFERENCE_ARGS = {
    "sync_ref_model": "let the reference follow the policy",
    "precompute_ref_log_probs": "leave a reference alone that is computed once",
}


def _of_generating_trainers() -> Iterator[Seam]:
    for name in ("GRPO", "RLOO", "Distillation"):
        trainer = f"trl.{name}Trainer"
        yield from _seams(trainer, _GENERATING if name == "Distillation" else _REWARDING)
        settings = {"use_vllm": "find out whether vLLM has to be sent anything"}
        yield from _seams(f"trl.{name}Config", settings, by=trainer)
        yield from _seams(
            trainer,
            {"vllm_generation": "send vLLM what was trained, and no more"},
            attribute=True,
            when=lambda trainer: trainer.args.use_vllm,
        )
    for name in ("GRPO", "RLOO"):
        trainer = f"trl.{name}Trainer"
        yield from _seams(trainer, _REWARDING_ATTRIBUTES, attribute=True)
        yield from _seams(
            trainer,
            {"generation_config": "evaluate greedily"},
            attribute=True,
            when=lambda trainer: not trainer.args.use_vllm,
        )
        settings = {
            "beta": "make the trainer without a second model for its reference",
            "sync_ref_model": "let the reference follow the policy",
            "use_transformers_continuous_batching": "refuse to have the model cast",
        }
        yield from _seams(f"trl.{name}Config", settings, by=trainer)
    yield from _seams(
        "trl.GRPOTrainer",
        {"use_adaptive_entropy": "hold the entropy's coefficient while layers are chosen"},
        attribute=True,
    )
    yield from _seams(
        "trl.GRPOTrainer",
        {
            "__init__(..., rollout_func)": "play episodes",
            "_log_metric(name, value)": "log what happened in episodes",
            "_tokenize_prompts(prompts)": "start episodes",
            "_generate_single_turn(prompt_ids, images, multimodal_fields, ...)": "play turns",
        },
        by="layerrl.agents.gigpo.GiGPOTrainer",
    )
    yield from _seams(
        "trl.GRPOTrainer",
        {
            "_tokenizer": "read actions and write observations",
            "chat_template": "write observations",
            "chat_template_kwargs": "write observations",
            "scale_rewards": "scale the steps' advantages",
        },
        by="layerrl.agents.gigpo.GiGPOTrainer",
        attribute=True,
    )


SEAMS: tuple[Seam, ...] = (
    # Overridden in every trainer.
    *_seams(
        _EVERY,
        {
            "train(resume_from_checkpoint, ...)": "mask the model while it trains",
            "call_model_init(trial)": "mask the models that model_init makes",
            "create_optimizer(...)": "give the optimizer what trains, and nothing else",
            "create_scheduler(...)": "follow the tensors when the model has been sharded",
            "compute_loss(model, inputs, ...)": "end the backward at the first trained layer",
            "log(logs, ...)": "log the layers' metrics",
            "add_callback(callback)": "refuse callbacks that take a delta for a model",
            "save_model(output_dir, _internal_call)": "write deltas and check what is frozen",
            "create_model_card(...)": "say how to load a delta",
            "_save_checkpoint(model, trial)": "write a checkpoint whole or not at all",
            "_load_optimizer_and_scheduler(checkpoint)": "load the optimizer beside a delta",
            "_load_from_checkpoint(resume_from_checkpoint, model)": "resume from a delta",
            "_load_best_model()": "load the best delta",
        },
    ),
    # Called in every trainer.
    *_seams(
        _EVERY,
        {
            "_save(output_dir, state_dict, ...)": "write what goes with a model beside a delta",
            "_get_output_dir(trial)": "know a checkpoint's folder before it is written",
            "_move_model_to_device(model, device)": "move the models that model_init makes",
            "_prepare_inputs(...)": "evaluate prompts",
            "get_train_dataloader()": "choose layers on the first batches",
            "get_eval_dataloader(eval_dataset, ...)": "evaluate prompts",
            "is_world_process_zero()": "write once where several processes train",
            "remove_callback(callback)": "replace the callback that lets the reference follow",
        },
    ),
    *_seams(
        _EVERY,
        {
            "is_fsdp_enabled": "save the optimizer of FSDP2 as any other beside a delta",
            "place_model_on_device": "move the models that model_init makes",
            "optimizer": "give the optimizer what trains, and nothing else",
            "optimizer_cls_and_kwargs": "refuse optimizers that update in the backward",
            "model_init": "mask the models that it makes",
            "processing_class": "check its tokens, and save it with a delta",
            "callback_handler.callbacks": "refuse callbacks that frozen tensors would break",
            "accelerator.state": "know the launcher",
        },
        attribute=True,
    ),
    *_seams(
        _EVERY,
        {"model.is_quantized": "know a quantised base"},
        attribute=True,
        when=lambda trainer: getattr(trainer.model, "hf_quantizer", None) is not None,
    ),
    *_seams(
        _EVERY,
        {"model.hf_quantizer": "know by what a base is quantised"},
        attribute=True,
        when=lambda trainer: getattr(trainer.model, "is_quantized", False),
    ),
    *_seams(
        "transformers.TrainerCallback",
        {
            "on_init_end(args, state, control, ...)": "mask a model before it is announced",
            "on_train_begin(args, state, control, ...)": "check what is frozen when it was loaded",
            "on_train_end(args, state, control, ...)": "check what is frozen at the end",
            "on_step_begin(args, state, control, ...)": "let layers take turns",
            "on_pre_optimizer_step(args, state, control, ...)": "measure the layers' gradients",
            "on_push_begin(args, state, control, ...)": "push a delta where readers look for it",
        },
        by=_EVERY,
    ),
    *_seams(
        "transformers.trainer",
        {
            "validate_quantization_for_training(model)": "train on a quantised base",
        },
        by=_EVERY,
    ),
    *_seams(
        "transformers.PreTrainedModel",
        {
            "enable_input_require_grads()": "end the backward at the first trained layer",
            "_hf_peft_config_loaded": "refuse adapters beside a selection",
        },
        by=_EVERY,
    ),
    *_seams(
        "transformers.modeling_layers.GradientCheckpointingLayer",
        {"gradient_checkpointing": "recompute only layers that the backward visits"},
        by=_EVERY,
    ),
    *_seams(
        "accelerate.state.AcceleratorState",
        {
            "__init__(..., fsdp_plugin)": "know FSDP2, and refuse FSDP1",
            "deepspeed_plugin": "know DeepSpeed",
        },
        by=_EVERY,
    ),
    *_of_generating_trainers(),
    *_seams("trl.DPOTrainer", _REFERENCE),
    *_seams("trl.KTOTrainer", _REFERENCE),
    *_seams("trl.DPOConfig", _REFERENCE_ARGS, by="trl.DPOTrainer"),
    *_seams("trl.KTOConfig", _REFERENCE_ARGS, by="trl.KTOTrainer"),
    *_seams(
        "trl.trainer.callbacks.SyncRefModelCallback",
        {
            "sync_target_model(model, target_model, alpha)": "let the reference follow the policy",
        },
        by=_EVERY,
    ),
    # Of what TRL sends weights with.
    *_seams(
        _VLLM,
        {
            "sync_weights()": "send vLLM what was trained, and no more",
            "generate(...)": "send vLLM everything after a checkpoint was loaded",
        },
    ),
    *_seams(
        _VLLM,
        {
            "model": "send vLLM what was trained, and no more",
            "mode": "know whether the engine sleeps",
            "enable_sleep_mode": "send vLLM everything after it slept",
            "_dist.fsdp_version": "send vLLM everything under FSDP1",
        },
        attribute=True,
    ),
    *_seams(
        _VLLM,
        {"_weight_metadata": "announce to vLLM what is sent, and no more"},
        attribute=True,
        # An older TRL (1.9) pushes tensor by tensor, and announces nothing.
        when=lambda vllm: not hasattr(vllm, "_push_param_to_vllm"),
    ),
    # Of torch.
    *_seams(
        "torch.nn.Module()",
        {
            "_forward_hooks": "take the hook off that lengthens the backward",
            "_non_persistent_buffers_set": "compare the buffers that are saved",
            "_parameters": "compare what is frozen",
            "_buffers": "compare what is frozen",
            "_modules": "find the model in a launcher's wrapper",
        },
        by=_EVERY,
    ),
    *_seams("torch.Tensor", {"_version": "notice when a frozen tensor is written to"}, by=_EVERY),
    *_seams(
        "torch._C",
        {
            "_swap_tensor_impl(...)": "update half-precision weights in float32",
            "_are_functorch_transforms_active(...)": "replay nothing where tensors have no values",
            "_autograd._top_saved_tensors_default_hooks(...)": "checkpoint layers reentrantly",
        },
        by=_EVERY,
    ),
    *_seams(
        "torch.distributed.tensor.DTensor",
        {
            "_local_tensor": "update sharded half-precision weights in float32",
            "_spec": "update sharded half-precision weights in float32",
        },
        by=_EVERY,
    ),
    # Imported.
    *_seams("torch.nn.modules.module", {"_IncompatibleKeys": "load the reference's values"}, None),
    *_seams(
        "torch.nn.modules.module",
        {
            f"_global_{kind}_hooks": "replay nothing that a hook has to see"
            for kind in ("forward", "forward_pre", "backward", "backward_pre")
        },
        None,
    ),
    *_seams("torch.nn.modules.dropout", {"_DropoutNd": "replay nothing random"}, None),
    *_seams("torch.nn.modules.batchnorm", {"_BatchNorm": "replay nothing that is counted"}, None),
    *_seams(
        "transformers.core_model_loading",
        {
            "revert_weight_conversion(model, state_dict)": "name a delta's tensors as on disk",
            "WeightConverter": "find a delta's tensors in a base",
            "WeightRenaming": "find a delta's tensors in a base",
            "dot_natural_key(...)": "find a delta's tensors in a base",
            "rename_source_key(...)": "find a delta's tensors in a base",
        },
        None,
    ),
    *_seams(
        "transformers.conversion_mapping",
        {"get_model_conversion_mapping(model, ...)": "find a delta's tensors in a base"},
        None,
    ),
    *_seams(
        "accelerate.optimizer", {"AcceleratedOptimizer": "find the optimizer in its wrapper"}, None
    ),
    *_seams("transformers.pytorch_utils", {"Conv1D": "know GPT-2's linear layers"}, None),
    *_seams(
        "transformers.PreTrainedModel",
        {"_from_config(config, ...)": "make a model of names and shapes without weights"},
        None,
    ),
    *_seams(
        "transformers.quantizers.base",
        {
            "HfQuantizer": "know what stays in full precision",
            "get_keys_to_not_convert(model)": "know what stays in full precision",
        },
        None,
    ),
    *_seams(
        "transformers.quantizers.base.HfQuantizer",
        {"get_modules_to_not_convert(...)": "know what stays in full precision"},
        None,
    ),
    *_seams(
        "transformers.quantizers.quantizers_utils",
        {"should_convert_module(...)": "know what is quantised"},
        None,
    ),
)
"""The table. What is imported at the top of `layerrl.trainer` and is public there is not in it."""


class _Gone(NamedTuple):
    """A seam that is not as the table says."""

    seam: Seam
    problem: str


def check_class(cls: type) -> None:
    """Compare what a class needs with what is installed.

    Args:
        cls: A trainer's, masked or to be masked, or that of what it sends vLLM weights with.

    Raises:
        FrameworkError: If something was renamed or takes other parameters, or a package is too old.
    """
    check_versions()
    gone = []
    for seam in SEAMS:
        owner = None if seam.by is None or seam.attribute else _base(cls, seam.by)
        if owner is None:
            continue
        place = owner if seam.of == seam.by else _place(seam.of)
        problem = _problem(seam, place)
        if seam.name == "enable_input_require_grads" and not problem:
            problem = _problem_of_hook(place)
        if problem:
            gone.append(_Gone(seam, problem))
    _refuse(gone)


def check_made(trainer: Any) -> None:
    """Compare what is set in a trainer, when it has been made, with what its class needs.

    Args:
        trainer: The trainer, or what it sends vLLM weights with.

    Raises:
        FrameworkError: If an attribute has another name.
    """
    gone = []
    for seam in SEAMS:
        if not seam.attribute or seam.by is None or _base(type(trainer), seam.by) is None:
            continue
        if (seam.when is None or seam.when(trainer)) and not _has(trainer, seam.name):
            gone.append(_Gone(seam, f"{_short(seam.of)} has no attribute {seam.name}"))
    _refuse(gone)


@contextmanager
def imported() -> Iterator[None]:
    """Inside, names are looked up that may have gone, or that an old version does not have yet.

    Yields:
        Nothing.

    Raises:
        FrameworkError: If a package is too old, or not installed, or lacks a name.
        ImportError: If it is of another package, as it is.
        AttributeError: The same.
        RuntimeError: The same.
    """
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
        problem = f"{_short(of)} has no {name}"
    return _sentence([_Gone(Seam(of, name, None, use, None), problem)])


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
    """Refuse versions below the lowest that works; warn, once, of those above the tested range.

    A package that is not installed is not needed until it is imported.

    Raises:
        FrameworkError: If one is too old, as pip does not find out with `--no-deps`.
    """
    untested = []
    for package, (lowest, highest) in TESTED.items():
        installed = installed_version(package)
        if installed is None:
            continue
        if not _numbers(installed):  # built from source
            untested.append(f"{package} {installed} (tested with {lowest} to {highest})")
        elif _numbers(installed) < _numbers(lowest):
            raise FrameworkError(
                f"{package} {installed} is installed, and layerrl needs {package} {lowest} or "
                f'later: pip install "{_requirement(package)}"'
            )
        elif _numbers(installed)[:2] > _numbers(highest):
            untested.append(f"{package} {installed} (tested with {lowest} to {highest})")
    if untested:
        warnings.warn(
            f"layerrl was not tested with {', '.join(untested)}. What it needs of a trainer is "
            "checked when one is made; what else may differ is not.",
            stacklevel=3,
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


def _place(path: str) -> Any:
    """The module or class of that path, or an instance; None where there is none."""
    names = path.removesuffix("()").split(".")
    for length in range(len(names), 0, -1):
        module = ".".join(names[:length])
        try:
            found = import_module(module)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):
                raise  # it is there, and imports what is not
            continue
        for name in names[length:]:
            found = getattr(found, name, None)
        return found() if path.endswith("()") and callable(found) else found
    return None


def _has(place: Any, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(place, name):
            return False
        place = getattr(place, name)
    return True


def _problem(seam: Seam, place: Any) -> str:
    """What is not as the table says; empty where all is."""
    if place is None:
        return f"there is no {seam.of}"
    if not _has(place, seam.name):
        return f"{_short(seam.of)} has no {seam.name}"
    if seam.takes is None or seam.takes == ("...",):
        return ""
    names, takes_any = _parameters(place, seam.name)
    expected = [name for name in seam.takes if name != "..."]
    if seam.takes[:1] == ("...",):
        fits = takes_any or {*expected} <= {*names}
    elif takes_any:  # what it does not name itself
        shorter = min(len(names), len(expected))
        fits = names[:shorter] == expected[:shorter]
    else:
        fits = expected == (names[: len(expected)] if seam.takes[-1:] == ("...",) else names)
    if fits:
        return ""
    short = f"{_short(seam.of)}.{seam.name}"
    return f"{short} takes ({', '.join(names)}), expected ({', '.join(seam.takes)})"


def _parameters(place: Any, path: str) -> tuple[list[str], bool]:
    """The names of a function's parameters, and whether it takes any others by name."""
    holder, found = None, place
    for name in path.split("."):
        holder, found = found, inspect.getattr_static(found, name)
    function = inspect.unwrap(getattr(found, "__func__", found))
    try:
        parameters = [*inspect.signature(function).parameters.values()]
    except (TypeError, ValueError):  # a descriptor or a callable that does not say
        return [], True
    if parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return [], True  # a wrapper that hands on what it is given
    if isinstance(holder, type) and not isinstance(found, staticmethod):
        parameters = parameters[1:]
    named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


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


def _short(path: str) -> str:
    """A class without its module; a module whole."""
    last = path.removesuffix("()").rpartition(".")[2]
    return last if last[:1].isupper() else path


def _refuse(gone: list[_Gone]) -> None:
    if gone:
        raise FrameworkError(_sentence(gone))


def _sentence(gone: list[_Gone]) -> str:
    """What is not as it was, by package, and what to do."""
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
