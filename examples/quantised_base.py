"""Train one layer of a base in 4 bits, and merge it into the base in full precision.

    python examples/quantised_base.py                   # SmolLM2-135M, layer 10, ten minutes
    python examples/quantised_base.py --layers middle:5 --seed 1

Frozen layers are NF4 with double quantisation (bitsandbytes), everything else is bfloat16. The
trained policy has rounded weights around its layer, the merged model does not. Prints how the two
compare and how many bytes the frozen weights take. Writes `runs/quantised`: the delta, the merged
model and `summary.json`.
"""

import argparse
import shutil
from collections.abc import Collection
from typing import Any

import torch
from chain_sum import answers, distinct, reward
from training import arguments, layers, parser, show, start, train, write_json
from transformers import AutoConfig, BitsAndBytesConfig

from layerrl import LayerSelection, merge_delta, select_layers
from layerrl.blocks import find_blocks, meta_model
from layerrl.quantisation import is_quantised, keep_layout
from layerrl.statistics import bootstrap, interval_of
from layerrl.tables import in_units

TRAINED = "4-bit trained"


def main() -> None:
    """Quantise, measure, train, measure, merge, measure."""
    options = parse()
    setup = start(options)
    delta, merged = options.output / "delta", options.output / "merged"
    for made in (delta, merged):
        shutil.rmtree(made, ignore_errors=True)
    config = AutoConfig.from_pretrained(setup.base)
    selection = select_layers(config, options.layers)
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=selection.quantization_skip_modules(config),
    )
    plan = selection.plan(config, dtype=torch.bfloat16, quantization_config=quantisation)
    print(f"{options.model}: {selection}, {options.steps} steps, seed {options.seed}")
    held_out = distinct(setup.data.held_out)

    def scores(model: Any) -> list[float]:
        texts = answers(model, setup.tokenizer, held_out, options.tokens)
        return reward(texts, held_out["answer"])

    found = {"base": scores(setup.model())}
    model = setup.model(dtype=torch.bfloat16, quantization_config=quantisation)
    keep_layout(model)  # evaluated before it is trained
    sizes = frozen_bytes(model, selection)
    sizes["all, planned"] = plan.weights - plan.gradients, plan.full.weights - plan.gradients
    found["4-bit base"] = scores(model)
    trainer = train(setup, model, selection, arguments(options), "training")
    found[TRAINED] = scores(model)
    merge_delta(setup.base, trainer.save_delta(delta), merged)
    found["merged"] = scores(setup._replace(base=str(merged)).model())
    write_json(options.output / "summary.json", {"scores": found, "frozen_bytes": sizes})
    report(found, sizes)


def frozen_bytes(model: Any, selection: LayerSelection) -> dict[str, tuple[int, int]]:
    """Bytes of frozen tensors as they are, with scales and tables, and in bfloat16."""
    state, trained = model.state_dict(), selection.parameters(model)
    frozen = {name: p for name, p in model.named_parameters() if name not in trained}
    full = dict(meta_model(model.config).named_parameters())
    inside = f"{find_blocks(model).path}."

    def sizes(names: Collection[str]) -> tuple[int, int]:
        taken = sum(t.nbytes for key, t in state.items() if any(owns(name, key) for name in names))
        return taken, sum(full[name].numel() * torch.bfloat16.itemsize for name in names)

    return {
        "linear modules": sizes([name for name, p in frozen.items() if is_quantised(p)]),
        "decoder layers": sizes([name for name in frozen if name.startswith(inside)]),
        "all": sizes(frozen),
    }


def owns(name: str, key: str) -> bool:
    """Whether an entry of a state dict is this tensor or one of its scales and tables."""
    return key == name or key.startswith(f"{name}.")


def report(found: dict[str, list[float]], sizes: dict[str, tuple[int, int]]) -> None:
    """Print what was measured."""
    show(found, against=TRAINED)
    merged, ours = found["merged"], found[TRAINED]
    interval = interval_of(bootstrap({TRAINED: [ours]})[TRAINED])
    place = "inside" if sum(merged) / len(merged) in interval else "OUTSIDE"
    same = sum(a == b for a, b in zip(merged, ours, strict=True))
    print(f"merged is {place} the interval of {TRAINED}; alike on {same} of {len(ours)} problems")
    print(f"\n{'frozen weights':16}{'4 bit':>10}{'bf16':>10}   ratio")
    for name, (taken, in_bf16) in sizes.items():
        amounts = f"{in_units(taken):>10}{in_units(in_bf16):>10}"
        print(f"{name:16}{amounts}{taken / in_bf16:8.3f}")


def parse() -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__.splitlines()[0], "runs/quantised")
    options.add_argument("--layers", type=layers, default=10, help="10, 10,12, middle:5, ...")
    return options.parse_args()


if __name__ == "__main__":
    main()
