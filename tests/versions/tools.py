"""Ask pip whether layerrl installs beside other tools, and write the table of docs/versions.md.

    python -m tests.versions.tools                # all; minutes each, and nothing is installed
    python -m tests.versions.tools vllm==0.33.0   # one of them; the other lines stay

Asks with the Python that runs it.
"""

import json
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
    "unsloth==2026.10.9": "`make test-unsloth`",
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
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
        command += ["--quiet", "--report", report.name, str(wheel), tool]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            answer, found = f"no: {reason(done.stderr)}", {}
        else:
            entries = (entry["metadata"] for entry in json.load(report)["install"])
            answer, found = "yes", {entry["name"].lower(): entry["version"] for entry in entries}
    versions = (found.get(name, "-") for name in SHOWN)
    return line((tool, answer, *versions, TOOLS[tool], date.today().isoformat()))


def reason(output: str) -> str:
    """Why pip refused, in its words."""
    lines = [text.strip() for text in output.splitlines() if text.strip()]
    at = [index for index, text in enumerate(lines) if text.startswith("The conflict is caused by")]
    if at:
        end = next(i for i in range(at[0], len(lines)) if lines[i].startswith("To fix this"))
        return "; ".join(lines[at[0] + 1 : end])
    errors = [text for text in lines if text.startswith("ERROR:")]
    return (errors or lines)[0].removeprefix("ERROR: ").replace("|", "/")


def main(tools: list[str]) -> None:
    """Ask for each tool, and put its line into the page as soon as it is known."""
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
