"""The JSON of a report."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import TYPE_CHECKING

from layerrl.errors import ReportError
from layerrl.schema import fitted
from layerrl.stored import parsed, refused_as, version_of

if TYPE_CHECKING:
    from layerrl.report import ContributionReport

VERSION = 1


def as_json(report: ContributionReport) -> str:
    """The text that `report_in` reads; a `ReportError` of what it could not read."""
    try:
        text = json.dumps({"version": VERSION, **asdict(report)}, separators=(",", ":"))
        json.dumps(report.settings, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ReportError(
            f"the settings of a report are no JSON values, which a file could hold: {error!s:.200}"
        ) from error
    try:
        report_in(type(report), text)
    except ReportError as error:
        raise ReportError(f"this report could not be read again: {error}") from error
    return text


def report_in(kind: type[ContributionReport], text: str | bytes) -> ContributionReport:
    """The report that a JSON text is of."""
    with refused_as(ReportError, "not the JSON of a ContributionReport"):
        data = parsed(text)
        version_of(data, "version", VERSION, ReportError, "the JSON of a ContributionReport")
        values = {name: value for name, value in data.items() if name != "version"}
        return fitted(kind, values, required=[each.name for each in fields(kind)])
