"""How far log-probabilities move when the frozen prefix is recorded while generating.

    python benchmarks/decode_difference.py

Decoding token by token rounds differently from one pass over whole rows. Printed per dtype: the
largest and the mean difference over all sampled tokens, and the same between that pass and one that
replays what the pass itself recorded, which is exact on a CPU.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from layerrl import select_layers
from layerrl.replay import PrefixReplay

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="SmolLM2-135M-Instruct", help="hub id or path")
    parser.add_argument("--layer", type=int, default=15, help="lowest trained layer")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=64, help="sampled tokens of a row")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "examples"))
    from chain_sum import base_checkpoint

    path = base_checkpoint(options.model, ROOT / "runs")
    for dtype in (torch.float32, torch.bfloat16):
        for recorded in ("while generating", "in a pass"):
            differences_N = measure(path, dtype, options, recorded == "while generating")
            print(
                f"{dtype}, recorded {recorded}: max {differences_N.max():.1e}, mean "
                f"{differences_N.mean():.1e}, {differences_N.numel()} tokens",
                flush=True,
            )


@torch.no_grad()
def measure(
    path: str, dtype: torch.dtype, options: argparse.Namespace, while_generating: bool
) -> torch.Tensor:
    """Differences in log-probability between a plain pass and a replay, shape (tokens,)."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    question = "What is {} times {}, and how do you know?"
    prompts = [question.format(row + 2, 7 * row + 11) for row in range(options.rows)]
    given = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    replay = PrefixReplay(
        model,
        select_layers(model, options.layer),
        2**31,
        record_while_generating=while_generating,
    )
    with replay.generating(training=True) as recording:
        with replay.sampling():
            length = options.length
            ids_BT = model.generate(  # pyright: ignore[reportCallIssue]
                **given, do_sample=True, min_new_tokens=length, max_new_tokens=length
            )
        new = torch.ones(options.rows, length, dtype=torch.long)
        mask_BT = torch.cat([given["attention_mask"], new], dim=1)

        def score() -> tuple[torch.Tensor]:
            logits = model(input_ids=ids_BT, attention_mask=mask_BT).logits[:, -length - 1 : -1]
            scores = logits.float().log_softmax(dim=-1)
            return (scores.gather(-1, ids_BT[:, -length:, None])[..., 0],)

        tokens_BT2 = torch.stack([ids_BT, mask_BT], dim=-1)
        if while_generating:
            assert replay.take_sampled(recording, tokens_BT2)
        [plain_BC] = replay.run(score, tokens_BT2=tokens_BT2, training=True)
        with replay._replaying(recording, None):
            [replayed_BC] = score()
    return (plain_BC - replayed_BC).abs().flatten()


if __name__ == "__main__":
    main()
