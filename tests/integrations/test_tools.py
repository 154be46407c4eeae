"""Selections as settings, read by ms-swift and axolotl themselves (`make test-integrations`)."""

import importlib.util

import pytest

from layerrl import select_layers
from tests.models import tiny

LAYERS = 12  # so that layer 1 could be taken for 10 and 11


def needs(package):
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None,
        reason=f"{package} is not installed here: `make test-integrations` tests it where it is",
    )


def read_by_axolotl(settings, model):
    from axolotl.utils.freeze import freeze_layers_except
    from axolotl.utils.schemas.config import AxolotlInputConfig

    field = AxolotlInputConfig.model_fields["unfrozen_parameters"]
    assert field.annotation == list[str] | None
    freeze_layers_except(model, settings["unfrozen_parameters"])


def read_by_ms_swift(settings, model):
    from swift.arguments import SftArguments
    from swift.utils.transformers_utils import activate_parameters, freeze_parameters
    from transformers import HfArgumentParser

    words = [
        word
        for name, value in settings.items()
        for word in [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    ]
    read = HfArgumentParser(SftArguments).parse_args(words)
    assert read.tuner_type == "full"
    # As swift/pipelines/train/tuner.py does for this tuner.
    freeze_parameters(
        model, read.freeze_parameters_ratio, read.freeze_parameters, read.freeze_parameters_regex
    )
    activate_parameters(model, read.trainable_parameters, read.trainable_parameters_regex)


@pytest.mark.parametrize("modules", [None, "mlp*"], ids=["layers", "parts"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "gemma3", "qwen2_5_vl"])
@pytest.mark.parametrize(
    ("tool", "read"),
    [
        pytest.param("axolotl", read_by_axolotl, marks=needs("axolotl")),
        pytest.param("ms-swift", read_by_ms_swift, marks=needs("swift")),
    ],
)
def test_tool_trains_what_the_selection_trains(tool, read, family, modules):
    model = tiny(family, LAYERS, vision_layers=LAYERS)
    selection = select_layers(model, [1, 4], modules=modules)
    read(selection.to_config(tool, model), model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [*selection.parameters(model)]
