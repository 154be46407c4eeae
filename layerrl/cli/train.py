"""`layerrl train`: a masked trainer in the place of that of TRL's script."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path

from layerrl.cli.options import add_selection, in_a_sentence, selection_of
from layerrl.cli.scripts import (
    METHODS,
    add_trl,
    first_word,
    model_config,
    own_parser,
    read_options,
    trainer_arguments,
    trainer_name,
)
from layerrl.errors import LayerRLError

KEYWORDS = ("prefix_cache_bytes", "master_weights", "checkpoint_format")
"""Options that are keywords of every masked trainer."""
_DOES = "Train chosen layers with TRL's trainer and options, and save them as a delta."
_MORE = """\
All options of TRL's script, as those that it needs:
  --model_name_or_path Qwen/Qwen3-0.6B   --output_dir runs/layer-10
  --dataset_name FOLDER|FILE|HUB_ID      --reward_funcs my_module.reward (grpo, rloo)
The delta is written to OUTPUT_DIR/delta. Several processes:
  accelerate launch -m layerrl train grpo --layers 10 --config run.yaml"""


def _add(parser: ArgumentParser) -> None:
    add_selection(parser, "; auto, auto:2, auto:2:step")
    parser.add_argument("--prefix_cache_bytes", type=int, metavar="N", help="0: replay nothing")
    parser.add_argument("--no_master_weights", dest="master_weights", action="store_false")
    parser.add_argument("--checkpoint_format", choices=("delta", "full"))


def run(argv: list[str]) -> None:
    """Train, save the delta and say where."""
    parser = own_parser("train METHOD --layers LAYERS", _DOES, _MORE)
    parser.add_argument("method", metavar="METHOD", choices=METHODS, help=", ".join(METHODS))
    add_trl(parser)
    _add(parser)
    options = read_options(first_word(parser, argv, "METHOD"), parser, argv, _add)
    given, model, args = options.own, options.model, options.args
    if model.model_name_or_path is None:
        raise LayerRLError("no model is named: give --model_name_or_path FOLDER or a hub id")
    if options.script.ignore_bias_buffers:
        raise LayerRLError("--ignore_bias_buffers has no effect with layerrl: leave it out")
    selection = given.layers
    if str(selection).partition(":")[0] != "auto":
        selection = selection_of(model_config(options), given)
    elif given.modules or given.also or given.boost or given.stack:
        raise LayerRLError(f"--layers {selection} chooses whole layers: give no other of its kind")

    from layerrl import trainer as masked
    from layerrl.delta.folder import refuse_existing

    delta = Path(args.output_dir) / "delta"
    refuse_existing(delta)  # before the training
    kind = getattr(masked, f"LayerMasked{trainer_name(options.method)}")
    arguments = trainer_arguments(options)
    own = {name: value for name in KEYWORDS if (value := getattr(given, name)) is not None}
    with in_a_sentence():
        trainer = kind(**arguments, selection=selection, **own)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if arguments.get("peft_config") is None:
        saved = trainer.save_delta(delta)
        whole = f"layerrl merge {model.model_name_or_path} {delta} OUT writes a whole model."
    else:
        trainer.save_model(args.output_dir)
        saved, whole = Path(args.output_dir), "PeftModel.from_pretrained loads the adapters."
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=options.script.dataset_name)
    if saved and trainer.accelerator.is_main_process:
        print(f"Saved {trainer.selection} to {saved}. {whole}", file=sys.stderr)
    if hasattr(trainer, "end"):  # transformers 5.18: trackers and the process group
        trainer.end()
