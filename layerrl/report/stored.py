"""The JSON of a report."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from layerrl.errors import ReportError
from layerrl.report.entries import Cost, Score

if TYPE_CHECKING:
    from collections.abc import Collection

    from layerrl.report import ContributionReport

VERSION = 1


def as_json(report: ContributionReport) -> str:
    """The text that `arguments_of` reads."""
    return json.dumps({"version": VERSION, **asdict(report)}, separators=(",", ":"))


def arguments_of(text: str, names: Collection[str]) -> dict[str, Any]:
    """The arguments of the report that a text is of.

    Args:
        text: The JSON.
        names: All arguments of a report.

    Returns:
        Argument to value.

    Raises:
        ReportError: If it is no report, or one of a version that this layerrl does not know.
    """
    try:
        data = json.loads(text)
    except (TypeError, ValueError) as error:
        raise ReportError(f"not the JSON of a ContributionReport: {error}") from error
    expected = {*names, "version"}
    version = data.get("version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise ReportError(
            f"a report of version {version}; this layerrl reads up to {VERSION}: update it."
        )
    if version != VERSION or set(data) != expected:
        found = sorted(data) if isinstance(data, dict) else data
        raise ReportError(
            f"not the JSON of a ContributionReport: expected the fields {sorted(expected)}, got "
            f"{found!r:.200}"
        )
    del data["version"]
    try:
        data["layers"] = tuple(Score(**entry) for entry in data["layers"])
        for name, kind in (("base", Score), ("full", Score), ("cost", Cost)):
            data[name] = None if data[name] is None else kind(**data[name])
    except TypeError as error:
        raise ReportError(f"not the JSON of a ContributionReport: {error}") from error
    return data
