"""`layerrl probe`: `contribution_probe`."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from typing import TYPE_CHECKING, Any

from layerrl.checks import check_path
from layerrl.cli.options import add_layers, config_of, in_a_sentence
from layerrl.cli.scripts import (
    Options,
    add_trl,
    first_word,
    model_config,
    own_parser,
    read_options,
    trainer_arguments,
)
from layerrl.errors import LayerRLError
from layerrl.seams import imported

if TYPE_CHECKING:
    from torch import nn

_DOES = "Score each layer of a model with TRL's GRPO options, and print the report."
_MORE = """\
All options of TRL's GRPO script, as those that it needs:
  --dataset_name FOLDER|FILE|HUB_ID      --reward_funcs my_module.reward
--method train measures exactly, race the best three for half a run each: hours.
Both continue in --output_dir, and score on --dataset_test_split, which
--eval_strategy steps loads."""


def _add(parser: ArgumentParser) -> None:
    methods = "gradient (default), step, race, train, position, published"
    parser.add_argument("--method", help=methods)
    parser.add_argument("--budget", type=int, metavar="N", help="prompts (default: 256)")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="not --seed (default: 0)")
    parser.add_argument("--out", metavar="FILE", help="write the report's JSON there, too")
    add_layers(parser)


def run(argv: list[str]) -> None:
    """Score layers and print the report."""
    parser = own_parser("probe MODEL [--out FILE]", _DOES, _MORE)
    parser.add_argument("model", metavar="MODEL", help="folder or hub id")
    add_trl(parser)
    _add(parser)
    model = first_word(parser, argv, "MODEL")
    own, of_trl = parser.parse_known_args(argv)
    options = None
    if of_trl or "config" in own or "help_all" in own:  # not for methods that generate nothing
        options = read_options("grpo", parser, [*argv, "--model_name_or_path", model], _add)
        own = options.own
    given = {name: value for name, value in vars(own).items() if value is not None}
    out = check_path("--out", given["out"], LayerRLError) if "out" in given else None
    there = out is not None and os.path.lexists(out)
    if out is not None and (there or not os.path.isdir(out.parent)):
        problem = "it exists already" if there else f"there is no folder {out.parent}"
        raise LayerRLError(f"--out {out}: {problem}. Name a new file for the report.")

    from layerrl import contribution_probe
    from layerrl.files import written_whole
    from layerrl.selection.select import layers_in
    from layerrl.stored import refused_as

    if isinstance(given.get("layers"), str):
        given["layers"] = layers_in(given["layers"])
    asked = {name: given[name] for name in _ASKED if name in given}
    on = {"model": _alone(model, given)} if options is None else _on(options)
    report = contribution_probe(**on, **asked)
    print(report)
    if out is not None:
        with refused_as(LayerRLError, f"cannot write --out {out}"), written_whole(out) as file:
            file.write_text(report.to_json(), encoding="utf-8")
        print(f"Wrote {out}: layerrl show {out} --plot FILE draws it.", file=sys.stderr)


_ASKED = ("method", "budget", "seeds", "layers", "modules")


def _alone(model: str, given: dict[str, Any]) -> nn.Module:
    """The model of a method that generates nothing, with its weights if it reads them."""
    from layerrl.blocks import meta_model
    from layerrl.probe import method_of

    config = config_of(model)
    method, _ = method_of(given.get("method", "gradient"))
    if method.needs or not method.reads_weights:  # what it needs is missing, and it says so
        return meta_model(config)
    with imported():
        from trl.trainer.utils import create_model_from_path

    with in_a_sentence():
        return create_model_from_path(model)


def _on(options: Options) -> dict[str, Any]:
    """The model, loaded, and with what it generates."""
    model_config(options)  # a sentence where there is no such model
    given = trainer_arguments(options)
    if given.pop("peft_config", None) is not None:
        raise LayerRLError("--use_peft: a probe scores the layers themselves. Leave it out.")
    args = given["args"]
    loading, args.model_init_kwargs = args.model_init_kwargs, None
    if (quantised := given.pop("quantization_config", None)) is not None:
        loading["quantization_config"] = quantised
    with imported():
        from trl.trainer.utils import create_model_from_path

    with in_a_sentence():
        model = create_model_from_path(given.pop("model"), **loading)
    return {**given, "model": model, "output_dir": args.output_dir}
