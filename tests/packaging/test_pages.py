"""The snippets of the README and the documentation run from the wheel."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.grpo import tokenizer
from tests.models import tiny
from tests.packaging.conftest import BARE, ROOT, output_of

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def add_to_hub(cache: Path, name: str, model: PreTrainedModel) -> None:
    """Put a model where the hub's client looks before it downloads."""
    repository, commit = cache / f"models--{name.replace('/', '--')}", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    chat = tokenizer()
    chat.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    for part in (model, chat):
        part.save_pretrained(repository / "snapshots" / commit)


@pytest.mark.slow
def test_all_snippets_run(install: Callable[..., Path], tmp_path: Path) -> None:
    # Tiny models, of as many layers as those that the pages name.
    add_to_hub(tmp_path / "hub", "HuggingFaceTB/SmolLM2-135M-Instruct", tiny("llama", 28))
    add_to_hub(tmp_path / "hub", "Qwen/Qwen3-8B", tiny("qwen3", 36))
    environment = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    environment |= {"MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
    python = install("matplotlib", "peft", "bitsandbytes")
    program = Path(__file__).parent / "run_pages.py"
    output_of(python, program, *PAGES, cwd=tmp_path, env=BARE | environment)
