"""`LayerSelection`: a selection as a frozen value, what it gives for a model, and its JSON."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from layerrl.adapters import adapter_tensors
from layerrl.blocks import Blocks, meta_model, unwrap
from layerrl.errors import SelectionError
from layerrl.plan import Plan, make_plan
from layerrl.quantisation import is_bitsandbytes, skipped_by_default
from layerrl.selection.exports import config_for
from layerrl.selection.fields import as_json, checked, selection_in
from layerrl.selection.masked import Masked
from layerrl.selection.parsing import ranges
from layerrl.selection.parts import ABOVE
from layerrl.selection.rates import Boost, shown
from layerrl.selection.rows import NEW_TOKENS, names_rows, rows_of
from layerrl.selection.tensors import trained_tensors
from layerrl.selection.towers import STACKS, blocks_of
from layerrl.stored import parsed, refused_as
from layerrl.tables import as_html


def _without_adapters(model: Any) -> nn.Module:
    """A model as it is without PEFT, or that of a config on `meta`."""
    base = unwrap(model) if isinstance(model, nn.Module) else meta_model(model)
    return meta_model(getattr(base, "config", None)) if adapter_tensors(base) else base


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSelection:
    """Which decoder layers of a model train, and how fast. Made by `select_layers`.

    Equal selections are equal values: frozen, hashable, and the same after a JSON round trip.
    """

    num_layers: int
    """Decoder layers of the model it was made for, or layers of its vision tower."""
    layers: tuple[int, ...]
    """Layers that train, ascending, 0 nearest the embedding."""
    learning_rate_scale: tuple[float, ...] = ()
    """Factor on the learning rate, one per entry of `layers`. Left out: 1.0 for each."""
    modules: tuple[str, ...] | None = None
    """Globs inside the block; only tensors that match one train. None: the whole block."""
    full: bool = False
    """Every parameter trains, embeddings, final norm and head included."""
    also: tuple[str, ...] = ()
    """Parts outside the layers that train, too, as `select_layers` takes them, rows of the
    embedding by their numbers (`"new_tokens:49152-49153"`). With some, `layers` may be empty."""
    boosts: tuple[Boost, ...] = ()
    """Factors that take the place of the layer's: `(layer or None, glob or part of also, factor)`,
    ascending, with None for every layer."""
    stack: str = "text"
    """Whose layers they are: `"text"`, the decoder's, or `"vision"`, those of the vision tower."""

    def __post_init__(self) -> None:
        for name, value in checked(self).items():
            object.__setattr__(self, name, value)

    def _described(self) -> dict[str, str]:
        kind = "" if self.stack == "text" else f"{self.stack} "
        if self.full:
            text = f"every parameter ({self.num_layers} layers)"
        elif not self.layers:
            text = f"no {kind}layer of {self.num_layers}"
        else:
            word = "layers" if len(self.layers) > 1 else "layer"
            text = f"{kind}{word} {ranges(self.layers)} of {self.num_layers}"
        rest = {"modules": self.modules or (), "also": self.also}
        described = {"trains": text} | {name: ", ".join(parts) for name, parts in rest.items()}
        described["learning rate scaled by"] = str(shown(self) or "")
        return {name: text for name, text in described.items() if text}

    def __str__(self) -> str:
        (_, text), *rest = self._described().items()
        return ", ".join([text, *(f"{name} {parts}" for name, parts in rest)])

    def _repr_html_(self) -> str:
        described = self._described()
        return as_html([[*described], [*described.values()]])

    @property
    def first(self) -> int:
        """Lowest layer that trains; the number of layers where none does."""
        return self.layers[0] if self.layers else self.num_layers

    @property
    def is_boosted(self) -> bool:
        """Whether something trains at another rate than the optimizer's."""
        factors = [*self.learning_rate_scale, *(factor for _, _, factor in self.boosts)]
        return any(factor != 1 for factor in factors)

    @property
    def token_rows(self) -> tuple[int, ...]:
        """Rows of the embedding, and of an untied head, that train without the others."""
        return tuple(row for part in self.also if names_rows(part) for row in rows_of(part))

    @property
    def awaits_rows(self) -> bool:
        """Whether it trains new tokens and does not say yet which rows these have."""
        return NEW_TOKENS in self.also

    @property
    def trains_below(self) -> bool:
        """Whether something below the layers trains, or may: a glob of `also` can name it."""
        return self.full or bool({*self.also} - ABOVE[self.stack])

    @property
    def frozen_prefix(self) -> range:
        """Layers of the text below all that trains: what they compute never changes."""
        # What enters a tower are images, several of a row or of many sizes in one: no rows.
        return range(0 if self.trains_below or self.stack != "text" else self.first)

    def blocks(self, model: nn.Module) -> Blocks:
        """All layers of the stack that the selection is of.

        Args:
            model: A model, wrapped or not, on any device. Not changed.

        Returns:
            The layers and where they are.

        Raises:
            ModelError: If they cannot be found.
        """
        return blocks_of(model, self.stack)

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The tensors that train, by name, in the model's own order.

        Args:
            model: A model with `num_layers` decoder layers, wrapped or not, on any device. If it
                has active PEFT adapters, what trains is those of the selected layers and parts.

        Returns:
            Name in the unwrapped model to parameter; a tensor shared by two modules appears once.
            Of new tokens, the whole tensors that have their rows.

        Raises:
            SelectionError: If the model has another number of layers, a glob matches nothing in
                them, a tensor cannot take gradients, or one also belongs to something frozen; if a
                boost matches nothing that trains, or two disagree on a tensor.
            ModelError: If the model's layers cannot be found.
        """
        return trained_tensors(self, unwrap(model))

    def masked(self, model: nn.Module) -> AbstractContextManager[dict[str, nn.Parameter]]:
        """Let only the selected tensors train; afterwards every flag is as it was found.

        Of new tokens the whole embedding requires a gradient, and that of its other rows is zero.
        An optimizer of your own must not decay them (`weight_decay=0` for that tensor).

        Args:
            model: As for `parameters`. Its `requires_grad` flags are set on entry and restored on
                exit, also after an exception.

        Returns:
            A context manager that gives the tensors that train, by name. Entering it raises what
            `parameters` raises, and `ModelError` for a model made inside `torch.inference_mode()`,
            before anything is changed.
        """
        return Masked(self, model)

    def plan(
        self,
        model: Any,  # a model or a config
        *,
        dtype: torch.dtype | None = None,
        beta: float = 0.0,
        num_iterations: int = 1,
        quantization_config: Any = None,  # transformers is not imported for a type
    ) -> Plan:
        """What training this selection takes, before anything is loaded.

        Args:
            model: A model, or a config: its names and shapes then come from a model on `meta`.
            dtype: The weights' dtype; None: each tensor's own (of a config, what it names).
            beta: As in the trainer's args. Above 0, there is a reference policy.
            num_iterations: As in the trainer's args: policy passes over a batch.
            quantization_config: The `BitsAndBytesConfig` that the base will be loaded with; None:
                the model's own, if it is one; other methods' bytes are not known, and such a model
                is planned as if it were not quantised. Full training stays unquantised.

        Returns:
            Bytes of weights, gradients, optimizer, reference, checkpoint and weight sync, and the
            cost of a step relative to full training; the same for LoRA on these layers and for full
            training. Activations are left out: they depend on the batch. The optimizer is AdamW,
            with two moments in the dtype that is stepped on. A selection in 16 bits is stepped on
            in float32, by master copies of 4 more bytes; full training as TRL does it is stepped on
            in the weights' dtype, LoRA's adapters in float32.

        Raises:
            SelectionError: If the selection does not fit the model, `dtype` is no floating-point
                dtype, `beta` is negative, or `num_iterations` not positive; if a selected tensor
                would be quantised, or not by bitsandbytes.
            ModelError: If the model's layers cannot be found.

        Example:
            >>> from layerrl import select_layers
            >>> from transformers import LlamaConfig
            >>> config = LlamaConfig(num_hidden_layers=32)
            >>> plan = select_layers(config, 16).plan(config, beta=0.04)
            >>> plan.reference * 33 < plan.full.reference
            True
        """
        base = _without_adapters(model)
        config = getattr(base, "config", None)
        if quantization_config is None:
            own = getattr(config, "quantization_config", None)
            quantization_config = own if is_bitsandbytes(own) else None
        if getattr(base, "is_quantized", False):
            base = meta_model(config)  # as it was: names and shapes
        return make_plan(
            base,
            self.parameters(base),
            self.layers,
            blocks=self.blocks(base),
            num_below=len(self.frozen_prefix),
            dtype=dtype,
            beta=beta,
            num_iterations=num_iterations,
            quantization_config=quantization_config,
        )

    def quantization_skip_modules(self, model: Any) -> list[str]:
        """What to leave out of a quantisation so that this selection can be trained.

        Args:
            model: A model, or a config: its names then come from a model on `meta`.

        Returns:
            Names for `llm_int8_skip_modules` of transformers' `BitsAndBytesConfig`: the modules
            that hold a selected tensor, one by one, since transformers before 5.23 takes
            `layers.1` for the beginning of `layers.10`; and the head with what is tied to it,
            which transformers leaves out only where it is given no names.

        Raises:
            SelectionError: If the selection does not fit the model, or is `"full"`.
            ModelError: If the model's layers cannot be found.

        Example:
            >>> from layerrl import select_layers
            >>> from transformers import LlamaConfig
            >>> config = LlamaConfig(num_hidden_layers=32)
            >>> select_layers(config, 16, modules="*.q_proj").quantization_skip_modules(config)
            ['lm_head', 'model.layers.16.self_attn.q_proj']
        """
        base = _without_adapters(model)
        trained = self.parameters(base)
        if self.full:
            raise SelectionError(
                '"full" trains every parameter, which leaves nothing to quantise. Select layers.'
            )
        layers = {f"{self.blocks(base).path}.{layer}" for layer in self.layers}
        holders = dict.fromkeys(name.rpartition(".")[0] for name in trained)
        # What a layer holds itself is no module's, and is not quantised.
        named = (name for name in holders if name not in layers)
        return [*dict.fromkeys([*skipped_by_default(base), *named])]

    def to_config(self, tool: str, model: Any) -> dict[str, Any]:
        """The same choice in the settings of another tool, which trains without layerrl.

        Args:
            tool: `"peft"`: arguments of a `LoraConfig`, which adapts the linear modules of these
                layers instead of training them; `"slime"`: command-line options, for pipelines of
                one stage, since Megatron numbers the layers of each stage from 0; `"ms-swift"`:
                command-line options; `"axolotl"`: entries of its YAML.
            model: A model, or a config: its names then come from a model on `meta`.

        Returns:
            Name of a setting to its value. Parts of layers (`modules`) are named one by one.

        Raises:
            SelectionError: If the selection does not fit the model, or the tool cannot express it:
                no tool takes boosts or `"full"`, slime no parts of layers and no vision-language
                model, and PEFT nothing without a linear module, nor the shared experts and dense
                MLPs of models whose experts it adapts by the same names.
            ModelError: If the model's layers cannot be found.

        Example:
            >>> from layerrl import select_layers
            >>> from transformers import LlamaConfig
            >>> config = LlamaConfig(num_hidden_layers=32)
            >>> select_layers(config, 16).to_config("axolotl", config)
            {'unfrozen_parameters': ['^model.layers.16.']}
        """
        base = _without_adapters(model)
        return config_for(tool, self, base)

    def to_json(self) -> str:
        """One line of JSON that `from_json` turns back into an equal selection."""
        return as_json(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> LayerSelection:
        """The selection that `to_json` wrote.

        Args:
            text: What `to_json` returned, or that in UTF-8.

        Returns:
            A selection equal to the one that was written.

        Raises:
            SelectionError: If the text is not JSON, has other fields, or says something impossible.
        """
        with refused_as(SelectionError, "not the JSON of a LayerSelection"):
            return selection_in(cls, parsed(text))

    def check_num_layers(self, num_layers: int, of: str) -> None:
        """Refuse a model with another number of layers.

        Args:
            num_layers: Its decoder layers.
            of: What it is, in a clause.

        Raises:
            SelectionError: If the selection was made for another number.
        """
        if num_layers != self.num_layers:
            raise SelectionError(
                f"the selection was made for {self.num_layers} {STACKS[self.stack]} layers, but "
                f"{of}. "
                "Make a new one with select_layers(model, ...)."
            )
