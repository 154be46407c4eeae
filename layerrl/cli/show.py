"""`layerrl show`: what a delta, a report or a selection holds."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerrl.errors import LayerRLError, ReportError

if TYPE_CHECKING:
    from layerrl.delta.folder import Delta

_DOES = "Print a delta, a report or a selection; draw a report."
_PATH = "folder of a delta or a sweep, delta on the hub, or JSON of a report or a selection"


def run(argv: list[str]) -> str:
    """Return the contents of a folder or file of layerrl, as text."""
    parser = ArgumentParser(prog="layerrl show", description=_DOES)
    parser.add_argument("path", metavar="PATH", help=_PATH)
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw a report: .png, .pdf, .svg")
    parser.add_argument("--json", action="store_true", help="print its JSON, and no table")
    parser.add_argument("--revision", metavar="REV", help="of a delta on the hub")
    given = parser.parse_args(argv)
    file = _file_of(given.path, given.revision)
    if file.name == "delta.json":
        from layerrl.delta.folder import Delta

        held: Any = Delta.read(file.parent)
        shown, text = _table(held), _text(file)
    else:
        text = _text(file)
        held = shown = _read(file, text)
    if given.plot:
        _draw(held, given.plot)
        print(f"Wrote {given.plot}", file=sys.stderr)
    return text.strip() if given.json else str(shown)


def _file_of(path: str, revision: str | None) -> Path:
    """The JSON of a folder or repository, which is a delta's unless there is a report."""
    from layerrl.delta.hub import delta_folder

    if path.endswith(".json") and revision is None:
        return Path(path)
    folder = delta_folder(path, revision=revision)
    if not os.path.isdir(folder):  # of any text, while is_dir() raises for one that is too long
        return folder
    report = folder / "report.json"
    return report if report.is_file() else folder / "delta.json"


def _text(file: Path) -> str:
    from layerrl.stored import bytes_of, refused_as

    with refused_as(LayerRLError, f"cannot read {file}", f"Expected the {_PATH}."):
        return bytes_of(file).decode(errors="replace")


def _read(file: Path, text: str) -> Any:
    from layerrl import ContributionReport, LayerSelection
    from layerrl.stored import parsed, refused_as

    with refused_as(LayerRLError, f"cannot read {file}", f"Expected the {_PATH}."):
        data = parsed(text)
    fields = {*data} if isinstance(data, dict) else set()
    if "method" in fields:
        return ContributionReport.from_json(text)
    if "num_layers" in fields:
        return LayerSelection.from_json(text)
    raise LayerRLError(
        f"{file} holds neither a report nor a selection: it has {sorted(fields)!r:.100}. Expected "
        f"the {_PATH}."
    )


def _table(delta: Delta) -> str:
    from layerrl.tables import in_units

    base = delta.base
    size = (delta.path / "delta.safetensors").stat().st_size
    lines = {
        "trained": delta.selection,
        "base": base.name or "not known",
        "revision": base.revision or "not known",
        "model": base.model_type or "not known",
        "tensors": f"{len(delta.dtypes)} in {', '.join(sorted({*delta.dtypes.values()}))}",
        "size": in_units(size),
        "files": ", ".join(sorted(delta.files)) or "none",
    }
    return "\n".join(f"{name:10}{value}" for name, value in lines.items())


def _draw(held: Any, file: Path) -> None:
    from layerrl import ContributionReport
    from layerrl.files import written_whole
    from layerrl.plotting import axes_of_a_file

    if not isinstance(held, ContributionReport):
        raise ReportError(f"--plot {file}: only a report is drawn, and this is none")
    axes = held.plot(axes_of_a_file())
    # The format is the name's, which is not yet that of what is written.
    format_of = file.suffix.removeprefix(".") or None
    try:
        with written_whole(file) as temporary, temporary.open("wb") as stream:
            axes.figure.savefig(stream, dpi=150, format=format_of)
    except (OSError, ValueError) as error:
        raise ReportError(f"cannot write {file}: {error}") from error
