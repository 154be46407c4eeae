"""Layer selections inside frameworks that bring their own trainer.

`layerrl.integrations.verl` and `layerrl.integrations.openrlhf` are imported by who uses those
frameworks, and by nothing else in layerrl. What to train is said in one environment variable, as
both start their workers themselves.
"""

from __future__ import annotations

import atexit
import os
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version

from torch import nn

from layerrl.activations import backward_from_first_trained
from layerrl.blocks import unwrap
from layerrl.checks import check_kind
from layerrl.errors import FrameworkError, SelectionError
from layerrl.selection import LayerSelection, select_layers
from layerrl.selection.select import layers_in
from layerrl.warning import warn

SELECTION = "LAYERRL_SELECTION"


def require(framework: str, tested: str) -> None:
    """Refuse a framework that is not installed; warn of a version that was not tested."""
    try:
        installed = version(framework)
    except PackageNotFoundError:
        raise FrameworkError(
            f"layerrl.integrations.{framework} plugs into {framework}, which is not installed "
            f"here. Install it with `pip install {framework}=={tested}`, the version it was "
            "tested with."
        ) from None
    if installed != tested:
        warn(
            f"layerrl.integrations.{framework} was tested with {framework} {tested}, and "
            f"{installed} is installed. It overrides methods that may have changed: compare a "
            f"first checkpoint with the base, or install {framework}=={tested}."
        )


def given() -> str:
    """The text in `LAYERRL_SELECTION`; a `SelectionError` if it says nothing."""
    text = os.environ.get(SELECTION, "").strip()
    if not text:
        raise SelectionError(
            f"the environment variable {SELECTION} is not set in this process: expected what to "
            "train, such as 10, 10,12, middle:5, full, or the JSON of a selection (its to_json()). "
            "Export it before the command, and where Ray runs already, give it in the runtime "
            "environment too."
        )
    return text


def read_selection(model: nn.Module, text: str) -> LayerSelection:
    """A selection from its text form.

    Args:
        model: The model it is for, on any device. Not changed.
        text: A layer or several with commas between (`"10"`, `"10,-1"`), a word that
            `select_layers` takes (`"middle:5"`, `"40%:60%"`, `"full"`), or `to_json()` of a
            selection, which can also hold boosts and parts of layers.

    Returns:
        The selection.

    Raises:
        SelectionError: If it does not fit the model, or is none of these.
        ModelError: If the model's layers cannot be found.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> import torch
        >>> with torch.device("meta"):
        ...     model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4))
        >>> print(read_selection(model, "1,-1"))
        layers 1, 3 of 4
    """
    check_kind("text", text, str, "layers as text, such as '10,-1' or 'middle:5'", SelectionError)
    return select_layers(model, layers_in(text))


def mask(model: nn.Module, selection: LayerSelection) -> ExitStack:
    """Freeze what a selection does not train, and let the backward end at its first layer.

    Called before the optimizer exists and after checkpointing has been enabled.

    Returns:
        Undoes both when it is closed, at the latest when Python ends.

    Raises:
        SelectionError: If rows of the embedding were to train without the others.
    """
    unwrap(model)  # refuses what is none
    check_kind("selection", selection, LayerSelection, "what select_layers returns", SelectionError)
    if selection.token_rows:
        raise SelectionError(
            f"{selection}: the other rows of the embedding cannot be kept in an optimizer of this "
            'framework. Use a masked trainer, or train all rows (also=("embeddings", "head")).'
        )
    stack = ExitStack()
    atexit.register(stack.close)  # not later, when a half-dismantled Python would complain
    stack.enter_context(selection.masked(model))
    stack.enter_context(backward_from_first_trained(model, selection))
    return stack
