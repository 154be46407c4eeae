"""Tiny random models of the families people train, built from their configs without a download.

A family is called by transformers' own `model_type`.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {"hidden_size": 16, "intermediate_size": 32, "patch_size": 4}
_QWEN_VISION = _VISION | {"num_heads": 2, "out_hidden_size": 16}
_CLIP_VISION = _VISION | {"num_attention_heads": 2, "image_size": 8}
_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}


def _rope(**mrope: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **mrope}}


@dataclass(frozen=True, kw_only=True)
class Family:
    """How to build one family, and where it keeps its decoder layers."""

    path: str = "model.layers"
    """Dotted name of the layer list in the model that `tiny` builds."""
    text: dict[str, Any] = field(default_factory=dict)
    """What its text config needs beyond the values all families share."""
    vision: dict[str, Any] | None = None
    """Vision config; None: a text model."""
    vision_depth: str = "num_hidden_layers"
    """What the vision config calls its number of layers."""
    composite: dict[str, Any] = field(default_factory=dict)
    """What the config around text and vision needs."""
    tower: str = ""
    """Dotted name of the layer list of its vision tower."""
    projectors: tuple[str, ...] = ()
    """Beginnings of the names of the tensors between the tower and the text."""


_VL_PATH = "model.language_model.layers"
_MERGER = "model.visual.merger."
_BESIDE = "model.multi_modal_projector."

TEXT_FAMILIES = {
    "llama": Family(),
    "qwen2": Family(),
    "qwen3": Family(text={"head_dim": 8}),
    "mistral": Family(),
    "gemma2": Family(text={"head_dim": 8}),
    "gemma3_text": Family(text={"head_dim": 8}),
    "phi3": Family(),
    "gpt2": Family(path="transformer.h"),
    "gpt_neox": Family(path="gpt_neox.layers"),
    "olmo2": Family(),
    "falcon": Family(path="transformer.h"),
    "qwen3_moe": Family(text={"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 8}),
    "mixtral": Family(text=_EXPERTS),
    "gpt_oss": Family(text=_EXPERTS | {"head_dim": 8, **_rope()}),
}
VISION_FAMILIES = {
    "qwen2_5_vl": Family(
        path=_VL_PATH,
        text=_rope(mrope_section=[1, 1, 2]),
        vision=_QWEN_VISION | {"fullatt_block_indexes": [0]},
        vision_depth="depth",
        tower="model.visual.blocks",
        projectors=(_MERGER,),
    ),
    "qwen3_vl": Family(
        path=_VL_PATH,
        text={"head_dim": 8, **_rope(mrope_section=[2, 1, 1])},
        vision=_QWEN_VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        vision_depth="depth",
        tower="model.visual.blocks",
        projectors=(_MERGER, "model.visual.deepstack_merger_list."),
    ),
    "gemma3": Family(
        path=_VL_PATH,
        text={"head_dim": 8},
        vision=_CLIP_VISION,
        composite={"mm_tokens_per_image": 4},
        tower="model.vision_tower.encoder.layers",
        projectors=(_BESIDE,),
    ),
    "llava": Family(
        path=_VL_PATH,
        text={"model_type": "llama"},
        vision=_CLIP_VISION | {"model_type": "clip_vision_model"},
        tower="model.vision_tower.encoder.layers",
        projectors=(_BESIDE,),
    ),
}
FAMILIES = TEXT_FAMILIES | VISION_FAMILIES


def tiny_config(
    name: str, num_layers: int = 3, *, vision_layers: int = 2, **text: Any
) -> PretrainedConfig:
    """Config of a tiny model; further keywords go to its (text) config."""
    family = FAMILIES[name]
    text = {**TEXT, **family.text, "num_hidden_layers": num_layers, **text}
    if family.vision is None:
        return AutoConfig.for_model(name, **text)
    vision = {**family.vision, family.vision_depth: vision_layers}
    return AutoConfig.for_model(name, text_config=text, vision_config=vision, **family.composite)


def tiny(
    name: str, num_layers: int = 3, *, seed: int = 0, vision_layers: int = 2, **text: Any
) -> PreTrainedModel:
    """A tiny random model of a family: the same weights for the same arguments, global RNG kept."""
    config = tiny_config(name, num_layers, vision_layers=vision_layers, **text)
    auto = AutoModelForImageTextToText if name in VISION_FAMILIES else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return auto.from_config(config)


class Plain(nn.Module):
    """Any module with named children, for stacks that no transformers model has."""

    def __init__(self, **children: nn.Module):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def linears(count: int) -> nn.ModuleList:
    """A stack of `count` one-tensor layers."""
    return nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(count))
