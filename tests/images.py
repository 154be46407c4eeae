"""Processors of images and text for tiny vision-language models, and a run on images."""

from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from transformers import Gemma3Processor, PreTrainedModel, ProcessorMixin, Qwen3VLProcessor
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.grpo import tokenizer
from tests.models import tiny, tiny_config

# Letters that no prompt has, by the names that processors and configs have for these tokens.
GEMMA = {"boi_token": "X", "eoi_token": "Y", "image_token": "Z"}
QWEN = {"vision_start_token": "X", "vision_end_token": "Y", "image_token": "Z", "video_token": "W"}
_IMAGE = {"gemma3": "X", "qwen2_5_vl": "XZY", "qwen3_vl": "XZY"}
_TEMPLATE = (
    "{%% for m in messages %%}{%% if m['content'] is string %%}{{ m['content'] }}{%% else %%}"
    "{%% for c in m['content'] %%}{{ '%s' if c['type'] == 'image' else c['text'] }}{%% endfor %%}"
    "{%% endif %%}{%% endfor %%}"
)
COLOURS = [(40 * i, 10, 200 - 30 * i) for i in range(4)]


class _QwenProcessor(Qwen3VLProcessor):
    """Without its processor of videos, which needs torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str):
        super().__init__(image_processor, tokenizer, None, chat_template)


def _marks(family: str) -> dict[str, str]:
    return GEMMA if family == "gemma3" else QWEN


def processor(family: str) -> ProcessorMixin:
    """Images of 8 x 8 pixels, letters for tokens."""
    words = tokenizer()
    for name, letter in _marks(family).items():
        setattr(words, name, letter)
        setattr(words, f"{name}_id", words.convert_tokens_to_ids(letter))
    template = _TEMPLATE % _IMAGE[family]
    if family == "gemma3":
        images = Gemma3ImageProcessorPil(size={"height": 8, "width": 8})
        return Gemma3Processor(images, words, chat_template=template, image_seq_length=4)
    size = {"shortest_edge": 64, "longest_edge": 64}
    return _QwenProcessor(Qwen2VLImageProcessorPil(size=size, patch_size=4), words, template)


def tiny_with_images(family: str, num_layers: int = 3, **changes: Any) -> PreTrainedModel:
    """As `tiny`, with the tokens that `processor` knows."""
    model, config = tiny(family, num_layers, **changes), tiny_config(family, num_layers, **changes)
    for name, letter in _marks(family).items():
        index = family == "gemma3" and name != "image_token"
        key = name.replace("token", "token_index" if index else "token_id")
        setattr(config, key, tokenizer().convert_tokens_to_ids(letter))
    model.config = model.model.config = config
    if family == "gemma3":  # zeros, below which there would be no gradient
        weight = model.model.multi_modal_projector.mm_input_projection_weight
        weight.data.copy_(torch.linspace(-0.3, 0.3, weight.numel()).reshape(weight.shape))
    return model


def reward(completions: list[Any], **_: Any) -> list[float]:
    """Differs between the completions of any group."""
    return [float(sum(map(ord, completion[0]["content"])) % 17) for completion in completions]


def arguments(family: str, *, images: bool = True) -> dict[str, Any]:
    """A trainer's own arguments: four prompts, each with an image, or without."""
    rows = {
        "prompt": [[{"role": "user", "content": text}] for text in ("abc", "defg", "hi", "jklm")],
        "image": [Image.new("RGB", (8, 8), colour) for colour in COLOURS],
    }
    if not images:
        del rows["image"]
    return {
        "train_dataset": Dataset.from_dict({name: values * 4 for name, values in rows.items()}),
        "processing_class": processor(family),
        "reward_funcs": reward,
    }


def no_image(family: str) -> dict[str, Any]:
    """Arguments of a run whose completions have no images, which older TRL would look for."""
    words = tokenizer()
    marks = [words.convert_tokens_to_ids(letter) for letter in _marks(family).values()]
    return {"generation_kwargs": {"suppress_tokens": marks}}
