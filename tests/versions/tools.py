"""Ask pip whether layerrl installs beside other tools, and write the table of docs/versions.md.

    python -m tests.versions.tools                # all; minutes each, and nothing is installed
    python -m tests.versions.tools vllm==0.33.0   # one of them; the other lines stay

Asks with the Python that runs it.
"""

import json
import re
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "versions.md"
SHOWN = ("torch", "transformers", "trl", "accelerate")
COLUMNS = ("tool", "installs beside it", *SHOWN, "its versions are tested by", "asked")

# What pip is asked for, and the tests that run with the versions it needs.
TOOLS = {
    "vllm==0.31.0": "`make test-vllm`, `make test-vllm-pins`",
    "vllm==0.32.0": "-",
    "vllm==0.33.0": "-",
    "sglang==0.5.23": "-",
    "unsloth==2026.10.9": "`make test-unsloth`, with TRL 1.14",
    "axolotl==0.19.0": "`make test-axolotl`",
    "openrlhf==0.11.2": "`make test-openrlhf`",
    "verl==0.9.1": "`make test-verl`",
    "ms-swift==4.6.0": "-",
    "llamafactory==0.9.5": "-",
}


def line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def asked(tool: str, wheel: Path) -> str:
    """The table's line of a tool, from what pip would install."""
    found = resolved(str(wheel), tool)
    if isinstance(found, dict):
        answer = "yes"
    elif isinstance(resolved(tool), dict):
        answer, found = f"no: {found}", {}
    else:
        answer, found = f"no, nor without layerrl: {found}", {}
    versions = (found.get(name, "-") for name in SHOWN)
    return line((tool, answer, *versions, TOOLS[tool], date.today().isoformat()))


def resolved(*requirements: str) -> dict[str, str] | str:
    """Name to version of what pip would install, or why it would not, in its words."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
        command += ["--report", report.name, *requirements]
        done = subprocess.run(command, capture_output=True, text=True)
        if not done.returncode:
            entries = (entry["metadata"] for entry in json.load(report)["install"])
            return {entry["name"].lower(): entry["version"] for entry in entries}
    output = done.stdout + done.stderr
    print(output, file=sys.stderr)
    conflict = re.search(r"The conflict is caused by:\n(.*?)\n\n", output, re.DOTALL)
    said = conflict[1] if conflict else [*re.findall("ERROR: (.*)", output), "no reason given"][0]
    said = "; ".join(part.strip() for part in said.splitlines())
    return re.sub(r"layerrl \S+ depends", "layerrl depends", said)  # the same for every release


def main(tools: list[str]) -> None:
    """Ask for each tool, and put its line into the page as soon as it is known."""
    if unknown := {*tools} - {*TOOLS}:
        sys.exit(f"{', '.join(unknown)} is not in the table; expected {', '.join(TOOLS)}")
    python = ".".join(map(str, sys.version_info[:2]))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ROOT]
        subprocess.run(command, check=True)
        [wheel] = Path(folder).glob("*.whl")
        for tool in tools:
            answer = asked(tool, wheel)
            print(answer)
            text = PAGE.read_text(encoding="utf-8")
            before, rest = text.split(line(COLUMNS), 1)
            rows = {row.split(" | ")[0]: row for row in rest.split("\n\n", 1)[0].splitlines()[2:]}
            rows[f"| {tool}"] = answer
            table = [line(COLUMNS), line(("---",) * len(COLUMNS))]
            table += [rows[f"| {name}"] for name in TOOLS if f"| {name}" in rows]
            after = rest.split("\n\n", 1)[1:]
            PAGE.write_text("\n\n".join([before + "\n".join(table), *after]), encoding="utf-8")
    print(f"asked with Python {python}; the table is in {PAGE}")


if __name__ == "__main__":
    main(sys.argv[1:] or list(TOOLS))
