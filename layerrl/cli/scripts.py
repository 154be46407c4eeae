"""TRL's training scripts: their options, their YAML, and what they give their trainer."""

from __future__ import annotations

import re
from argparse import SUPPRESS, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Collection
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from layerrl.cli.config_file import read_file
from layerrl.cli.options import config_of, first_line, in_a_sentence
from layerrl.errors import FrameworkError, LayerRLError
from layerrl.replacing import replaced
from layerrl.seams import imported

_KINDS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
"""How a file's name may end, and what the datasets library calls its kind."""
METHODS = ("grpo", "rloo", "dpo", "kto", "sft")
"""Scripts that have a masked trainer."""


def trainer_name(method: str) -> str:
    """TRL's name of the trainer that a script makes."""
    return f"{method.upper()}Trainer"


class Options(NamedTuple):
    """The options of one of TRL's scripts, read."""

    method: str
    script: Any
    """TRL's `ScriptArguments`."""
    args: Any
    """The trainer's, as TRL's `GRPOConfig`."""
    model: Any
    """TRL's `ModelConfig`."""
    datasets: Any
    """TRL's `DatasetMixtureConfig`."""
    own: Namespace
    """Those of layerrl."""


def own_parser(usage: str, does: str, more: str) -> ArgumentParser:
    """The parser of a command's own options, whose help fits a screen."""
    return ArgumentParser(
        prog=f"layerrl {usage.partition(' ')[0]}",
        usage=f"layerrl {usage} [--config FILE] [options of TRL]",
        description=does,
        epilog=more,
        formatter_class=RawDescriptionHelpFormatter,
        argument_default=SUPPRESS,
        allow_abbrev=False,
    )


def add_trl(parser: ArgumentParser) -> None:
    """Add the options that say where those of TRL come from."""
    parser.add_argument("--config", metavar="FILE", help="YAML of options, TRL's and these")
    parser.add_argument("--help-all", action="store_true", help="every option of TRL's script, too")


def first_word(parser: ArgumentParser, argv: list[str], name: str) -> str:
    """The positional argument, which comes first: options of TRL take any number of words."""
    [word] = [getattr(parser.parse_known_args(argv)[0], name.lower())]
    if argv[0] != word:
        parser.error(f"{name} comes first, before options")
    return word


class _Made(Exception):
    pass


def read_options(
    method: str, short: ArgumentParser, argv: list[str], add: Callable[[ArgumentParser], None]
) -> Options:
    """Read the command line of one of TRL's scripts with options of layerrl among them.

    `short` is the command's own parser, which knows layerrl's options, `--config` and `--help-all`;
    `add` adds layerrl's options to a parser.

    Returns:
        The options: those on the command line before those of the YAML file.

    Raises:
        SystemExit: If an option or a key of the file is not known, or a value makes no sense.
    """
    given, rest = short.parse_known_args(argv)
    with imported():
        from trl import TrlParser

        script = import_module(f"trl.scripts.{method}")
        kinds = script.make_parser().dataclass_types
    parser = TrlParser(kinds, prog=short.prog, usage=short.usage, allow_abbrev=False)
    add(parser)
    if vars(given).get("help_all"):
        parser.print_help()
        raise SystemExit(0)
    known = {*vars(parser.parse_args([]))}
    config, unknown = getattr(given, "config", None), []
    if config is not None:
        try:
            unknown = [key for key in read_file(config) if key not in {*known, "env"}]
        except ValueError as error:
            short.error(f"--config {config}: {error}")
    _, left = parser.parse_known_args(rest)
    unknown += [word for word in left if word.startswith("-")] or left
    if unknown:
        short.error(_what_is_known(unknown, known, kinds[1].__name__))
    words = rest if config is None else ["--config", config, *rest]
    try:
        *values, own = parser.parse_args_and_config(words)
    except (TypeError, ValueError, ImportError, OSError) as error:  # in the classes' own checks
        short.error(f"{first_line(error)}")
    return Options(method, *values, own=Namespace(**vars(own) | vars(given)))


def _what_is_known(unknown: list[str], known: Collection[str], kind: str) -> str:
    """Names that neither TRL nor layerrl has, and the nearest that one of them has."""
    said = []
    for word in unknown:
        name = word.partition("=")[0].lstrip("-").replace("-", "_")
        near = get_close_matches(name, known, n=3, cutoff=0.6)
        said.append(f"{word} ({'nearest: ' + ', '.join(near) if near else 'nothing is like it'})")
    return (
        f"neither layerrl nor TRL's {kind}, ModelConfig and script have: {'; '.join(said)}. "
        "--help-all lists every option. Options of accelerate come after accelerate launch."
    )


def model_config(options: Options) -> Any:
    """The config of the model that the options name."""
    return config_of(
        options.model.model_name_or_path,
        revision=options.model.model_revision,
        trust_remote_code=options.args.trust_remote_code,
    )


def trainer_arguments(options: Options) -> dict[str, Any]:
    """Name to value of what TRL's script makes its trainer with; no weights are loaded."""
    _name_file_as_dataset(options)
    _name_rewards(options)
    import trl
    from datasets.exceptions import DatasetsError

    script, name = import_module(f"trl.scripts.{options.method}"), trainer_name(options.method)

    def stand_in(**arguments: Any) -> NoReturn:
        raise _Made(arguments)

    try:
        with in_a_sentence(), replaced(trl, **{name: stand_in}):
            script.main(options.script, options.args, options.model, options.datasets)
    except _Made as made:
        return made.args[0]
    except KeyError as error:
        raise LayerRLError(
            f"{options.script.dataset_name or 'the data'} has no split {error}: name those to use "
            "with --dataset_train_split and --dataset_test_split"
        ) from error
    except DatasetsError as error:
        said = f"{type(error).__name__}: {first_line(error.__cause__ or error)}"
        raise LayerRLError(f"cannot read {options.script.dataset_name}: {said}") from error
    raise FrameworkError(f"trl.scripts.{options.method} does not make a {name} from trl any more")


def _name_file_as_dataset(options: Options) -> None:
    """TRL's `dataset_name` is a folder or on the hub; a file is the mixture of one."""
    name = options.script.dataset_name
    file = Path(name or "")
    if name and file.is_file() and not options.datasets.datasets:
        kind = _KINDS.get(file.suffix.lower())
        if kind is None:  # its suffix would be looked for on the hub
            known = ", ".join(_KINDS)
            raise LayerRLError(f"--dataset_name {name}: expected a file that ends in {known}")
        entry = {"path": kind, "data_files": name}
        options.datasets.datasets.append(entry)
        options.datasets.__post_init__()
        options.script.dataset_name = None


def _name_rewards(options: Options) -> None:
    """One reward function in a YAML file is a text, of which TRL would take each character."""
    names = vars(options.script).get("reward_funcs")
    if isinstance(names, str):
        options.script.reward_funcs = names = [names]
    for name in names or []:
        if not isinstance(name, str) or not re.fullmatch(r"\w+(\.\w+)*", name):
            raise LayerRLError(
                f"reward_funcs has {name!r:.80}, expected a function's name: one of TRL's, or "
                "module.function, such as rewards.correct of rewards.py here"
            )
