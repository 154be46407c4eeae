"""A base whose frozen layers are quantised by bitsandbytes, as transformers loads it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from layerrl.blocks import plain_name, unwrap
from layerrl.checks import shown
from layerrl.errors import SelectionError
from layerrl.replacing import replaced
from layerrl.seams import imported

_FLOAT32 = 4  # bytes
_BLOCK, _NESTED_BLOCK = 64, 256  # elements per scale, scales per scale of scales
_TABLE, _NESTED_TABLE = 2**4 * _FLOAT32, 2**8 * _FLOAT32  # what the numbers stand for, per tensor


def is_quantised(parameter: nn.Parameter) -> bool:
    """Whether a tensor holds packed numbers, which no optimizer can step on."""
    is_number = parameter.is_floating_point() or parameter.is_complex()
    # bitsandbytes can store 4-bit numbers in tensors of any dtype, torchao's say they are floats.
    packed = hasattr(parameter, "quant_state") or type(parameter).__module__.startswith("torchao")
    return packed or not is_number


def is_bitsandbytes(config: Any) -> bool:
    """Whether a model's `quantization_config`, an object or a dict, is of this method."""
    method = config.get("quant_method") if isinstance(config, dict) else None
    method = method or getattr(config, "quant_method", None)
    return getattr(method, "value", method) == "bitsandbytes"


def unpacked(method: object) -> str:
    """How transformers loads a model without the quantisation that it was published with."""
    return " (quantization_config=Mxfp4Config(dequantize=True))" if method == "mxfp4" else ""


def skipped_by_default(model: nn.Module) -> list[str]:
    """What transformers leaves out only if it is told nothing: the head and what is tied to it."""
    with imported():
        from transformers.quantizers.base import get_keys_to_not_convert

    return sorted(get_keys_to_not_convert(model))


def quantised_bytes(model: nn.Module, config: Any) -> dict[str, int]:
    """Return bytes by plain name of each tensor that bitsandbytes would quantise, with its scales.

    An element takes 8 bits, and a row one scale in float32; or 4 bits, and 64 elements one scale:
    in float32, or with double quantisation in 8 bits and a float32 for 256 of them.

    Raises:
        SelectionError: If it is the config of another method.
    """
    from torch.nn import Linear
    from transformers import BitsAndBytesConfig

    with imported():
        from transformers.pytorch_utils import Conv1D
        from transformers.quantizers.base import HfQuantizer
        from transformers.quantizers.quantizers_utils import should_convert_module

        not_converted = HfQuantizer.get_modules_to_not_convert

    if isinstance(config, dict) and is_bitsandbytes(config):
        config = BitsAndBytesConfig.from_dict(config)
    if not isinstance(config, BitsAndBytesConfig) or not config.is_quantizable():
        raise SelectionError(
            f"quantization_config is {shown(config)}, expected transformers' BitsAndBytesConfig "
            "with load_in_4bit or load_in_8bit: bytes of other methods are not known here"
        )
    kept = not_converted(
        model,  # pyright: ignore[reportArgumentType]
        config.llm_int8_skip_modules,
        getattr(model, "_keep_in_fp32_modules", None),
    )
    return {
        plain_name(f"{name}.weight"): _size(module.weight, isinstance(module, Conv1D), config)
        for name, module in model.named_modules()
        if (isinstance(module, Conv1D) or type(module) is Linear)
        and should_convert_module(name, kept)
    }


def _size(weight: Tensor, transposed: bool, config: Any) -> int:
    elements, blocks = weight.numel(), math.ceil(weight.numel() / _BLOCK)
    if config.load_in_8bit:
        return elements + weight.shape[transposed] * _FLOAT32
    scales = blocks * _FLOAT32
    if config.bnb_4bit_use_double_quant:
        scales = blocks + math.ceil(blocks / _NESTED_BLOCK) * _FLOAT32 + _NESTED_TABLE
    return math.ceil(elements / 2) + _TABLE + scales


@contextmanager
def quantised_base(args: Any) -> Iterator[None]:
    """Let transformers' trainer take a quantised model without adapters.

    It refuses one, since nothing in it could train; here what trains is not quantised. A model that
    no selection can be trained on raises `SelectionError`.
    """
    from transformers import trainer

    def validate(model: Any) -> None:
        if getattr(model, "is_quantized", False):
            _refuse_others(model, vllm=getattr(args, "use_vllm", False))
            keep_layout(model)

    with replaced(trainer, validate_quantization_for_training=validate):
        yield


def _refuse_others(model: Any, *, vllm: bool) -> None:
    config = model.hf_quantizer.quantization_config
    if not is_bitsandbytes(config):
        method = getattr(config.quant_method, "value", config.quant_method)
        raise SelectionError(
            f"{type(model).__name__} is quantised by {method}: frozen layers may be "
            "quantised by bitsandbytes only. Load the model with quantization_config="
            f"BitsAndBytesConfig(...), or without quantisation{unpacked(method)}."
        )
    head = model.get_output_embeddings()
    if head is not None and is_quantised(head.weight):
        raise SelectionError(
            f"the head of {type(model).__name__} is quantised, and TRL multiplies with its weight "
            "as it is stored. Leave it out of the quantisation: quantization_skip_modules of a "
            "selection names it."
        )
    if vllm:
        raise SelectionError(
            f"use_vllm=True with a quantised {type(model).__name__}: vLLM would be sent packed "
            "weights. Generate with transformers (use_vllm=False), or load the model without "
            "quantisation."
        )


def keep_layout(model: nn.Module) -> None:
    """Keep 4-bit weights as they were loaded; every masked trainer does this when it is made.

    On CPUs that multiply in bfloat16, the first evaluation repacks them, for good: they would have
    other bits, and layers under them no gradient. Unpacking rounds the scales once more, so call it
    before a model is evaluated that will be trained.

    Args:
        model: The model. What is packed is unpacked, and nothing will be packed again.

    Raises:
        ModelError: If it is no model.
    """
    unwrap(model)  # refuses what is none
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.state_dict()  # unpacks
            module.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType]
            state: Any = getattr(module.weight, "quant_state", None)
            if state is not None and state.absmax.dim() > 1:  # 0.50 leaves them transposed
                state.absmax = state.absmax.T.reshape(-1).float()
