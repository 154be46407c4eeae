"""Run where only layerrl and its dependencies are installed: what works, and what is said."""

import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path

import layerrl

OPTIONAL = ["bitsandbytes", "gguf", "gymnasium", "matplotlib", "peft", "ray", "reasoning_gym"]
FRAMEWORKS = ["layerrl.integrations.openrlhf", "layerrl.integrations.verl"]


def said_by(call, *arguments, **keywords) -> str:
    """The message of the error that a call ends with."""
    try:
        call(*arguments, **keywords)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError(f"{call} raised nothing")


assert Path(sys.prefix) in Path(layerrl.__file__).parents
there = [name for name in OPTIONAL if importlib.util.find_spec(name)]
assert not there, there

for module in pkgutil.walk_packages(layerrl.__path__, "layerrl."):
    if module.name in FRAMEWORKS:
        framework = module.name.rpartition(".")[2]
        assert f"pip install {framework}==" in said_by(importlib.import_module, module.name)
    else:
        importlib.import_module(module.name)

from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from trl import GRPOConfig  # noqa: E402

characters = Tokenizer(models.WordLevel({c: i for i, c in enumerate("?_abcdef")}, unk_token="?"))
characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="_", eos_token="?")
config = LlamaConfig(
    vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
)
model = LlamaForCausalLM(config)
model.save_pretrained("base")
shared = {
    "reward_funcs": lambda completions, **_: [float(len(text)) for text in completions],
    "args": GRPOConfig(
        output_dir="out", max_steps=1, max_completion_length=4, report_to="none", use_cpu=True
    ),
    "train_dataset": Dataset.from_dict({"prompt": [*"abcdef"] * 4}),
    "processing_class": tokenizer,
}

trainer = layerrl.LayerMaskedGRPOTrainer(model, selection=1, **shared)
trainer.train()
trainer.save_delta("delta")
layerrl.merge_delta("base", "delta", "merged")
layerrl.load_delta(LlamaForCausalLM.from_pretrained("base"), "delta")
assert isinstance(layerrl.contribution_probe(model, **shared), layerrl.ContributionReport)
report = layerrl.published_contributions("Qwen3-1.7B-Base")
quantised = BitsAndBytesConfig(load_in_8bit=True)
selection = layerrl.select_layers(config, 1)
assert "LoRA" in str(selection.plan(config))
assert selection.to_config("peft", model)["target_modules"]

assert 'pip install "layerrl[plot]"' in said_by(report.plot)
many = {"method": "train", "executor": "ray", "output_dir": "sweep"}
many |= {"eval_dataset": Dataset.from_dict({"prompt": ["ab", "cd"]})}
assert 'pip install "layerrl[ray]"' in said_by(layerrl.contribution_probe, model, **shared, **many)
message = said_by(
    layerrl.LayerMaskedGRPOTrainer, "base", selection=1, quantization_config=quantised, **shared
)
assert "bitsandbytes" in message, message
print("all of it")
