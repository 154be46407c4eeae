"""What training one layer of large models takes, as `LayerSelection.plan` has it.

    python benchmarks/plans.py

Prints the figures of docs/plans.md. Nothing is downloaded or loaded: the configs are written out
here. All with bf16 weights (but for quantised ones), AdamW and a reference (`beta > 0`), one policy
pass over a batch.
"""

import torch
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from layerrl import select_layers
from layerrl.plan import Plan
from layerrl.tables import in_units

QWEN3 = {"vocab_size": 151936, "head_dim": 128, "tie_word_embeddings": False}
CONFIGS: dict[str, PretrainedConfig] = {
    "Qwen3-8B": Qwen3Config(
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        **QWEN3,
    ),
    "Qwen3-32B": Qwen3Config(
        hidden_size=5120,
        intermediate_size=25600,
        num_hidden_layers=64,
        num_attention_heads=64,
        num_key_value_heads=8,
        **QWEN3,
    ),
    "Llama-3.1-70B": LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    ),
    "Qwen3-30B-A3B": Qwen3MoeConfig(
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        **QWEN3,
    ),
}
LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=False,
)
MISTRAL_7B = MistralConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=False,
)
QUANTISED = {
    "bf16": {},
    "8 bit": {"load_in_8bit": True},
    "4 bit": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
}
CARD = 24 * 2**30
ON_A_CARD = (
    "| model | frozen layers | trains | frozen weights, bf16 = 1 | held in all | left of 24 GiB |",
    "|---|---|---|---|---|---|",
)
HEADING = (
    "| model | trains | held in all | checkpoint | weight sync | step, full = 1 |",
    "|---|---|---|---|---|---|",
)


def main() -> None:
    """A plan as it prints; the middle layer of each model; layers of one from early to late."""
    model, config = next(iter(CONFIGS.items()))
    print(plan(config, select_layers(config, "middle").first))
    print()
    print(*HEADING, sep="\n")
    for name, described in CONFIGS.items():
        layer = select_layers(described, "middle").first
        ours = plan(described, layer)
        print(row(f"{name}, {in_units(ours.weights)}", f"layer {layer}", ours))
        print(row("", f"LoRA r16 on layer {layer}, by layerrl", ours.lora_masked))
        print(row("", f"LoRA r16 on layer {layer}", ours.lora))
        print(row("", "LoRA r16 on all layers", ours.lora_all))
        print(row("", "full", ours.full))
    print()
    print(*HEADING, sep="\n")
    last = config.num_hidden_layers - 1
    for layer in (0, last // 4, last // 2, 3 * last // 4, last):
        print(row(model, f"layer {layer}", plan(config, layer)))
    print()
    print(*ON_A_CARD, sep="\n")
    for name, described in (
        ("Qwen3-8B", config),
        ("Llama-3.1-8B", LLAMA_8B),
        ("Mistral-7B", MISTRAL_7B),
    ):
        for bits in QUANTISED:
            print(row_on_a_card(name, described, bits, "middle"))
        print(row_on_a_card(name, described, "4 bit", "middle:5"))


def plan(config: PretrainedConfig, layer: int) -> Plan:
    """The plan of one layer in the setting of all tables."""
    return select_layers(config, layer).plan(config, dtype=torch.bfloat16, beta=0.04)


def row_on_a_card(model: str, config: PretrainedConfig, bits: str, layers: str) -> str:
    """One line of the table of quantised bases."""
    selection = select_layers(config, layers)
    plain = shown = selection.plan(config, dtype=torch.bfloat16, beta=0.04)
    if QUANTISED[bits]:
        kept = selection.quantization_skip_modules(config)
        quantised = BitsAndBytesConfig(**QUANTISED[bits], llm_int8_skip_modules=kept)
        options = {"quantization_config": quantised}
        shown = selection.plan(config, dtype=torch.bfloat16, beta=0.04, **options)
    frozen = (shown.weights - shown.gradients) / (plain.weights - plain.gradients)
    left = in_units(CARD - shown.total) if shown.total < CARD else "too much"
    return " | ".join(
        (f"| {model}", bits, str(selection), f"{frozen:.2f}", in_units(shown.total), f"{left} |")
    )


def row(model: str, trains: str, shown: Plan) -> str:
    """One line of a table."""
    sizes = (in_units(size) for size in (shown.total, shown.checkpoint, shown.sync))
    return " | ".join((f"| {model}", trains, *sizes, f"{shown.step:.2f} |"))


if __name__ == "__main__":
    main()
