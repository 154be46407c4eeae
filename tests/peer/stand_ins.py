"""Local folders in place of the hub's repositories that TRL's tests load.

    python stand_ins.py TRL FOLDER

makes them in FOLDER, from which the tests are run: transformers and datasets take a folder of a
repository's name for the repository. The tiny models and the data are what the scripts in a
checkout of TRL make of them; only what the scripts download themselves is made here: for each
large model a config and a small tokenizer, with the chat template that TRL has for the family.
"""

import importlib
import re
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedTokenizerFast
from trl import chat_template_utils

OWNER = "trl-internal-testing"
VOCABULARY = 1024


@dataclass(frozen=True)
class Family:
    """What a large model's repository holds beside its weights."""

    config: str
    """The type of model."""
    template: str | None = None
    """The name of its chat template in TRL."""
    bos: str | None = None
    eos: str = "<|endoftext|>"
    pad: str | None = "<|endoftext|>"


_QWEN = {"eos": "<|im_end|>"}
_LLAMA = {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>", "pad": None}
_S = {"bos": "<s>", "eos": "</s>", "pad": None}
_GEMMA = {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>"}
_COHERE = {"bos": "<BOS_TOKEN>", "eos": "<|END_OF_TURN_TOKEN|>", "pad": "<PAD>"}
_DEEPSEEK = {
    "bos": "<begin_of_sentence>",
    "eos": "<end_of_sentence>",
    "pad": "<end_of_sentence>",
}
_LFM = {"bos": "<|startoftext|>", "eos": "<|im_end|>", "pad": "<|pad|>"}
_NEMOTRON = {"bos": "<s>", "eos": "<|im_end|>", "pad": "<|im_end|>"}

FAMILIES = {
    "Qwen/Qwen2.5-32B-Instruct": Family("qwen2", "qwen2_5", **_QWEN),
    "Qwen/Qwen2.5-Coder-0.5B": Family("qwen2", "qwen2_5", **_QWEN),
    "Qwen/Qwen3-4B": Family("qwen3", "qwen3", **_QWEN),
    "Qwen/Qwen3-8B": Family("qwen3", "qwen3", **_QWEN),
    "Qwen/Qwen3-30B-A3B": Family("qwen3_moe", "qwen3", **_QWEN),
    "Qwen/Qwen3-4B-Instruct-2507": Family("qwen3", "qwen3_instruct_2507", **_QWEN),
    "meta-llama/Llama-3.2-1B-Instruct": Family("llama", "llama3_2", **_LLAMA),
    "meta-llama/Llama-3.1-8B-Instruct": Family("llama", "llama3_1", **_LLAMA),
    "meta-llama/Meta-Llama-3-8B-Instruct": Family("llama", "llama3", **_LLAMA),
    "mistralai/Mistral-7B-Instruct-v0.1": Family("mistral", "qwen2_5", **_S),
    "mistralai/Mistral-7B-Instruct-v0.2": Family("mistral", "qwen2_5", **_S),
    "google/gemma-2-2b-it": Family("gemma2", "gemma", **_GEMMA),
    "google/gemma-7b-it": Family("gemma", "gemma", **_GEMMA),
    "CohereLabs/aya-expanse-8b": Family("cohere", "cohere", **_COHERE),
    "CohereLabs/tiny-aya-earth": Family("cohere2", "cohere2", **_COHERE),
    "openai/gpt-oss-20b": Family("gpt_oss", "gptoss", bos="<|startoftext|>", eos="<|return|>"),
    "zai-org/GLM-4.5": Family("glm4_moe", "glm4moe"),
    "EleutherAI/pythia-14m": Family("gpt_neox", pad=None),
    "openai-community/gpt2": Family("gpt2", pad=None),
    "facebook/opt-1.3b": Family("opt", bos="</s>", eos="</s>", pad="<pad>"),
    "tiiuae/falcon-7b-instruct": Family("falcon_mamba", pad=None),
    "microsoft/Phi-3-mini-4k-instruct": Family("phi3", "phi3", bos="<s>"),
    "microsoft/Phi-3.5-mini-instruct": Family("phi3", "phi3_5", bos="<s>"),
    "deepseek-ai/DeepSeek-R1": Family("deepseek_v3", "deepseekv3", **_DEEPSEEK),
    "deepseek-ai/DeepSeek-R1-0528": Family("deepseek_v3", "deepseekv3", **_DEEPSEEK),
    "LiquidAI/LFM2-1.2B": Family("lfm2", "lfm2", **_LFM),
    "LiquidAI/LFM2.5-230M": Family("lfm2", "lfm2_2_5", **_LFM),
    "allenai/Olmo-3-7B-Think": Family("olmo3", "qwen3", **_QWEN),
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": Family(
        "nemotron_h", "nemotron_3_nano", **_NEMOTRON
    ),
    "google/flan-t5-small": Family("t5", eos="</s>", pad="<pad>"),
}
# Models that tests load whole, and the tiny ones that are enough for what they test.
IN_PLACE_OF = {"Qwen/Qwen2.5-0.5B-Instruct": "tiny-Qwen2ForCausalLM-2.5"}
SCRIPTS = ("for_causal_lm", "for_sequence_classification")
OTHER_SCRIPTS = ("for_conditional_generation.t5_for_conditional_generation",)
DATA = ("zen", "toolcall", "harmony", "zen_image", "zen_multi_image")


def tokenizer(family: Family, texts: list[str]) -> PreTrainedTokenizerFast:
    """Bytes and what is frequent in texts; each mark of the chat template is one token."""
    template = None
    if family.template is not None:
        template = getattr(chat_template_utils, f"{family.template}_chat_template")
    marks = re.findall(r"<[^\s<>{}'\"\\]{1,30}>", template or "")
    special = dict.fromkeys(mark for mark in (family.bos, family.eos, family.pad) if mark)
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False
    )
    words.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=family.pad,
        model_max_length=32768,
    )
    made.add_tokens([mark for mark in dict.fromkeys(marks) if mark not in special])
    if template is not None:
        made.chat_template = template
    return made


def make_sources(folder: Path, texts: list[str]) -> None:
    """The repositories of the large models, without weights."""
    for name, family in FAMILIES.items():
        made = tokenizer(family, texts)
        made.save_pretrained(folder / name)
        ids = {
            f"{kind}_token_id": getattr(made, f"{kind}_token_id") for kind in ("bos", "eos", "pad")
        }
        config = CONFIG_MAPPING[family.config](vocab_size=len(made), **ids)
        config.save_pretrained(folder / name)
        GenerationConfig(**ids).save_pretrained(folder / name)


def execute(name: str, script: Path) -> None:
    """Execute a script that makes a model, with the ids of the tokenizer that there is here."""
    text = re.sub(r"^ *(bos|eos|pad)_token_id=.*\n", "", script.read_text(), flags=re.MULTILINE)
    ids = "".join(f"{kind}_token_id=tokenizer.{kind}_token_id, " for kind in ("bos", "eos", "pad"))
    text = re.sub(r"vocab_size=[^\n]*,\n", f"vocab_size=len(tokenizer), {ids}\n", text)
    namespace = {"__name__": name, "__package__": name.rpartition(".")[0]}
    exec(compile(text, str(script), "exec"), namespace)


def make_models(folder: Path, checkout: Path) -> dict[str, str]:
    """The tiny models, by the checkout's scripts.

    Returns:
        Each script that failed, and how.
    """
    package = "scripts.generate_tiny_models"
    common = importlib.import_module(f"{package}._common")

    def keep(model: Any, words: Any, generation: Any, prefix: str, suffix: str = "") -> None:
        name = f"{prefix}-{type(model).__name__}" + (f"-{suffix}" if suffix else "")
        for part in (model, words, generation):
            if part is not None:
                part.save_pretrained(folder / OWNER / name)

    common.push_to_hub = keep
    for name in ("check_transformers_version", "check_dtype_pattern", "print_config_diff"):
        setattr(common, name, lambda *_, **__: None)
    root = checkout / "scripts" / "generate_tiny_models"
    names = [
        f"{part}.{path.stem}" for part in SCRIPTS for path in sorted((root / part).glob("*_*.py"))
    ]
    failed = {}
    for name in [*names, *OTHER_SCRIPTS]:
        if name.endswith("__init__"):
            continue
        torch.manual_seed(0)
        try:
            execute(f"{package}.{name}", root.joinpath(*name.split(".")).with_suffix(".py"))
        except Exception:  # of any kind: tests that need this model fail on TRL's trainers, too
            failed[name] = traceback.format_exc(limit=-1)
    return failed


def make_data(folder: Path) -> None:
    """The data sets, by the checkout's scripts."""

    def keep(data: DatasetDict, repository: str, config_name: str) -> None:
        home = folder / repository
        home.mkdir(parents=True, exist_ok=True)
        files = []
        for split, rows in data.items():
            path = f"{config_name}/{split}.parquet"
            (home / config_name).mkdir(exist_ok=True)
            rows.to_parquet(str(home / path))
            files.append({"split": str(split), "path": path})
        listed = home / "README.md"
        card = (
            yaml.safe_load(listed.read_text().strip("-\n")) if listed.exists() else {"configs": []}
        )
        card["configs"].append({"config_name": config_name, "data_files": files})
        listed.write_text(f"---\n{yaml.safe_dump(card, sort_keys=False)}---\n")

    DatasetDict.push_to_hub = keep  # pyright: ignore[reportAttributeAccessIssue]
    for name in DATA:
        script = importlib.import_module(f"scripts.generate_{name}_dataset")
        script.main(0.1, True, f"{OWNER}/{name.replace('_', '-')}")


def main(checkout: Path, folder: Path) -> None:
    """Make everything; a folder named `ready` says that it is all there."""
    sys.path.insert(0, str(checkout))
    make_data(folder)
    texts = (checkout / "scripts" / "generate_zen_dataset.py").read_text().splitlines()
    make_sources(folder, [line.strip() for line in texts])
    for script, reason in make_models(folder, checkout).items():
        print(f"{script}: {reason.strip().splitlines()[-1]}", file=sys.stderr)
    for name, tiny in IN_PLACE_OF.items():
        (folder / name).symlink_to(folder / OWNER / tiny)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path.cwd())
