"""Print the pins of constraints.txt, but for those that the given files name otherwise.

Without any dependency, since it runs before anything is installed.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def pins(path: Path) -> dict[str, str]:
    """`name==version` by name, as pip compares names."""
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return {
        re.split("[=<>!~;[]", line)[0].strip().lower().replace("_", "-"): line
        for line in lines
        if line
    }


def merged(paths: list[Path]) -> list[str]:
    """Where two name one package, the later file counts."""
    found: dict[str, str] = {}
    for path in [ROOT / "constraints.txt", *paths]:
        found |= pins(path)
    return [found[name] for name in sorted(found)]


if __name__ == "__main__":
    print(*merged([Path(name) for name in sys.argv[1:]]), sep="\n")
