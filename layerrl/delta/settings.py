"""Which settings of a model's config make it compute otherwise."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

# Names, dtypes, how a model is trained or generates: none of them changes what a pass computes.
_NO_COMPUTATION = re.compile(
    r"_.*|architectures|auto_map|(torch_)?dtype|transformers_version|name_or_path|tokenizer_class"
    r"|use_cache|gradient_checkpointing|torchscript|return_dict.*|output_.*|prefix|num_labels"
    r"|id2label|label2id|problem_type|finetuning_task|task_specific_params|quantization_config"
    r"|compression_config|distributed_config|(attn|experts)_implementation|initializer_.*|init_.*"
    r"|(pad|bos|eos|sep|cls|unk|decoder_start|forced_\w+)_token_id"
    r"|.*(dropout|drop_path|drop_rate|_pdrop|layerdrop|jitter|loss).*|chunk_size_feed_forward"
)


def computing_settings(config: Any) -> dict[str, Any]:
    """Settings of a config, or of its JSON, that change what its model computes: key to value."""
    values = config if isinstance(config, dict) else config.to_dict()
    kept = _kept(json.loads(json.dumps(values, default=str)))
    return {key: value for key, value in kept.items() if key != "model_type"}  # compared apart


def _kept(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _kept(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if not _NO_COMPUTATION.fullmatch(key)
    }


def differing_settings(now: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, str]:
    """Return by dotted name the settings that two configs both have with different values.

    A key that one of them lacks belongs to another version of transformers. Inside of a setting
    that is a dict itself (rope), a key that is left out counts as None.
    """
    return dict(_differing(now, recorded, "", lenient=True))


def _differing(
    now: Mapping[str, Any], then: Mapping[str, Any], path: str, *, lenient: bool
) -> Iterator[tuple[str, str]]:
    for key in sorted({*now} & {*then} if lenient else {*now} | {*then}):
        value, recorded = now.get(key), then.get(key)
        if isinstance(value, dict) and isinstance(recorded, dict):
            is_config = "model_type" in value and "model_type" in recorded
            yield from _differing(value, recorded, f"{path}{key}.", lenient=is_config)
        elif value != recorded:
            yield f"{path}{key}", f"{path}{key} is {value!r}, was {recorded!r}"
