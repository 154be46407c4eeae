"""Download layerrl's wheel and the wheels that it needs, for a machine without a network.

`make bundle PYTHON=3.12 WITHOUT="torch transformers==5.17.0 accelerate"` runs it, with `EXTRA=gpu`
for what `make gpu` needs as well. What the folder holds is for a system like this one, with that
Python.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LIMIT = 64  # MB, of what layerrl itself needs
# With the newest of these, the bundle is larger than the limit.
BOUNDS = ["pyarrow<25", "pandas<3.1", "xxhash<3.6", "python-dateutil<3", "filelock<4"]


def main() -> None:
    """Read the command line, resolve, download, and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("python", help="the target's Python, as 3.12")
    parser.add_argument("--without", default="", help="what the target has, with versions or not")
    parser.add_argument("--extra", default="", help="one of layerrl's, bundled too")
    options = parser.parse_args()
    if not re.fullmatch(r"3\.\d+", options.python):
        sys.exit(f"PYTHON is {options.python!r}, expected the target's version, as PYTHON=3.12")
    try:
        there = [Requirement(text) for text in options.without.split()]
    except InvalidRequirement as error:
        why = str(error).partition("\n")[0]
        sys.exit(f"WITHOUT is {options.without!r}, expected names or name==version: {why}")
    folder = ROOT / "dist" / f"bundle-{options.python}"
    shutil.rmtree(folder, ignore_errors=True)
    with TemporaryDirectory() as made:
        download(Path(made), options.python, there, options.extra)
        shutil.copytree(made, folder)
    sizes = {file.name: file.stat().st_size / 1e6 for file in folder.iterdir()}
    where = folder.relative_to(ROOT)
    print(f"{where}: {len(sizes)} wheels, {sum(sizes.values()):.1f} MB. On the target:")
    print(f"    pip install --no-index --find-links {where.name} layerrl")
    if not options.extra and sum(sizes.values()) > LIMIT:
        largest = sorted(sizes, key=sizes.__getitem__)[:-4:-1]
        sys.exit(
            f"That is more than {LIMIT} MB, of which {', '.join(largest)} are the largest: "
            'name what the target has, as WITHOUT="torch transformers accelerate".'
        )


def download(folder: Path, python: str, there: list[Requirement], extra: str) -> None:
    """Build layerrl's wheel into a folder, and download those that the target lacks."""
    build = ["wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True)
    [wheel] = folder.glob("*.whl")
    resolved = resolve(wheel, python, there, extra)
    if extra not in ["", *resolved["layerrl"].get("provides_extra", ())]:
        there_are = ", ".join(resolved["layerrl"]["provides_extra"])
        sys.exit(f"EXTRA is {extra!r}, which layerrl does not have: expected one of {there_are}")
    left_out = [canonicalize_name(requirement.name) for requirement in there]
    for name in left_out:
        if name not in resolved:
            close = get_close_matches(name, resolved) or ["torch", "transformers", "accelerate"]
            sys.exit(
                f"WITHOUT has {name}, which layerrl does not need: expected {', '.join(close)}"
            )
    wanted = bundled(resolved, left_out, python, extra) - {"layerrl"}
    pins = [f"{name}=={resolved[name]['version']}" for name in sorted(wanted)]
    pip(python, "download", "--no-deps", "--dest", str(folder), *pins)


def pip(python: str, command: str, *arguments: str) -> None:
    """Run a command of pip for another Python; exit with what it says if it fails."""
    options = ["--progress-bar=off", "--only-binary=:all:", "--python-version", python]
    ended = subprocess.run(
        [sys.executable, "-m", "pip", command, *options, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if ended.returncode:
        causes = re.findall(r"(?:is caused by|your environment):\n((?: +.*\n)+)", ended.stdout)
        lines = [line.strip() for cause in causes for line in cause.splitlines()]
        if len(causes) == 2:
            lines = [f"no wheel fits of {lines.pop()}", *lines]
        lines = lines or re.findall(r"^ERROR: (.*)", ended.stdout, re.MULTILINE)[-1:]
        sys.exit(f"no bundle for Python {python}: {'; '.join(lines) or ended.stdout}")


def resolve(
    wheel: Path, python: str, there: list[Requirement], extra: str
) -> dict[str, dict[str, Any]]:
    """The metadata of all that would be installed beside what is there, by name."""
    report, constraints = wheel.with_name("report.json"), wheel.with_name("constraints.txt")
    constraints.write_text("\n".join([*BOUNDS, *map(str, there)]), encoding="utf-8")
    try:
        pip(
            python, "install", "--dry-run", "--ignore-installed", "--target", str(wheel.parent),
            "--report", str(report), "--constraint", str(constraints),
            f"{wheel}[{extra}]" if extra else str(wheel),
        )  # fmt: skip
        installed = json.loads(report.read_text(encoding="utf-8"))["install"]
    finally:
        report.unlink(missing_ok=True)
        constraints.unlink()
    return {canonicalize_name(one["metadata"]["name"]): one["metadata"] for one in installed}


def bundled(
    resolved: dict[str, dict[str, Any]], left_out: Iterable[str], python: str, extra: str
) -> set[str]:
    """The names of what the target lacks.

    What comes with the packages left out is left out, unless layerrl itself asks for it or another
    bundled package pins it: the target may have a version that does not fit.
    """
    environment = default_environment() | {
        "python_version": python, "python_full_version": f"{python}.0"
    }  # fmt: skip

    def requirements(name: str, extra: str) -> Iterator[Requirement]:
        for one in map(Requirement, resolved[name].get("requires_dist", ())):
            if one.marker is None or one.marker.evaluate({**environment, "extra": extra}):
                yield one

    def needed(
        roots: Iterable[tuple[str, str]], there: Collection[tuple[str, str]] = ()
    ) -> set[tuple[str, str]]:
        """Names with each extra that is asked for."""
        seen, waiting = set(), [*roots]
        while waiting:
            name, extra = waiting.pop()
            if (name, extra) not in seen and (name, extra) not in there:
                seen.add((name, extra))
                for one in requirements(name, extra):
                    waiting += [(canonicalize_name(one.name), e) for e in ("", *one.extras)]
        return seen

    lacking = needed([("layerrl", ""), ("layerrl", extra)], needed((name, "") for name in left_out))
    pinned = {
        canonicalize_name(one.name)
        for name, extra in lacking
        for one in requirements(name, extra)
        if name == "layerrl" or {part.operator for part in one.specifier} & {"==", "<=", "~="}
    }
    return {name for name, _ in lacking} | (pinned - {*left_out})


if __name__ == "__main__":
    main()
