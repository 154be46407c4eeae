"""Train an agent over several turns with GiGPO: one layer, compared with the whole model.

    python examples/agent_gigpo.py                   # six trainings, 6 minutes on one CPU core
    python examples/agent_gigpo.py --steps 10 --seeds 0 --layers 1 --output runs/short
    python examples/agent_gigpo.py --omega 0 --output runs/grpo  # GRPO on the same episodes

The agent is a small Llama. The environment is gymnasium's FrozenLake as text: an observation says
where the agent is and what is around it, an action is a letter. The base is trained here to
imitate a guide that knows the way and errs every other step. Imitation, training and evaluation
use different maps. Writes `runs/agent/results.json`. If it is stopped, the same command continues.
"""

import argparse
import json
import random
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import torch
from datasets import Dataset
from gymnasium.envs.toy_text.frozen_lake import generate_random_map
from tqdm.auto import trange
from training import RewardBar, check_settings, layers, letters, small_llama, write_json
from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    set_seed,
)
from transformers.utils import logging

from layerrl.scores.evaluation import prompt_scores
from layerrl.statistics import bootstrap, interval_of
from layerrl.trainer import GiGPOConfig, LayerMaskedGiGPOTrainer, TextRollout

ACTIONS = "LDRU"  # as gymnasium numbers them
MAX_TURNS = 10
ACTION_TOKENS, SEEN_TOKENS = 2, 7  # a letter and its end; an observation such as 03F#FH>
MOVES = {"L": (0, -1), "D": (1, 0), "R": (0, 1), "U": (-1, 0)}


class FrozenLake:
    """Walk from the upper left to G without falling into H: reward 1, at the end."""

    def reset(self, map: str, **_: object) -> str:  # noqa: A002 - the column of the row
        self.rows = map.split("/")
        self.lake = gymnasium.make("FrozenLake-v1", desc=self.rows, is_slippery=False)
        self.at, _ = self.lake.reset(seed=0)
        return self.text()

    def step(self, action: str) -> tuple[str, float, bool, bool]:
        if len(action) != 1 or action not in ACTIONS:
            return self.text(), 0.0, False, False
        self.at, reward, ended, _, _ = self.lake.step(ACTIONS.index(action))
        return self.text(), float(reward), bool(ended), True

    def text(self) -> str:
        """Row and column of the agent, then what lies in the direction of each action."""
        y, x = divmod(int(self.at), len(self.rows))
        around = (square(self.rows, y + down, x + right) for down, right in MOVES.values())
        return f"{y}{x}{''.join(around)}>"


def square(rows: list[str], y: int, x: int) -> str:
    """Frozen, hole, goal, or # for the edge."""
    inside = 0 <= y < len(rows) and 0 <= x < len(rows)
    return rows[y][x].replace("S", "F") if inside else "#"


def main() -> None:
    """Imitate, train, evaluate, compare."""
    options = parse()
    warnings.filterwarnings("ignore", module="(trl|transformers|torch|layerrl)")
    logging.disable_progress_bar()
    options.output.mkdir(parents=True, exist_ok=True)
    check_settings(options)
    shown, train, held_out = maps(options.shown_maps, 512, options.held_out)
    base = options.output / "base"
    if not base.exists():
        imitate(shown, options.imitation_steps).save_pretrained(base)
    path = options.output / "results.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for selection in dict.fromkeys([*options.layers, "full"]):
        for seed in options.seeds:
            run = f"{selection}, seed {seed}"
            if run in found:
                continue
            trainer = make(base, selection, seed, train, options)
            if "base" not in found:
                found["base"] = {"success": success(trainer, held_out)}
            trainer.train()
            rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
            found[run] = {"success": success(trainer, held_out), "rewards": rewards}
            write_json(path, found)
    show(found, options)


def make(base: Path, selection: Any, seed: int, maps: list[str], options: Any) -> Any:
    """A trainer for a fresh base."""
    full = selection == "full"
    trainer = LayerMaskedGiGPOTrainer(
        LlamaForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=GiGPOConfig(
            output_dir=str(options.output / "trainer"),
            max_steps=options.steps,
            learning_rate=options.full_learning_rate if full else options.learning_rate,
            lr_scheduler_type="constant",
            per_device_train_batch_size=64,
            per_device_eval_batch_size=64,
            num_generations=8,
            max_completion_length=MAX_TURNS * (ACTION_TOKENS + SEEN_TOKENS),
            omega=options.omega,
            seed=seed,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=rows(maps),
        processing_class=tokenizer(),
        rollout_func=TextRollout(
            environment=FrozenLake, max_turns=MAX_TURNS, max_turn_tokens=ACTION_TOKENS
        ),
        selection=selection,
        callbacks=[RewardBar(f"{selection}, seed {seed}")],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def success(trainer: Any, maps: list[str]) -> list[float]:
    """For each map, the share of 8 sampled episodes that reach the goal."""
    penalty, trainer.args.invalid_action_penalty = trainer.args.invalid_action_penalty, 0.0
    try:
        return prompt_scores(trainer, rows(maps), greedy=False)
    finally:
        trainer.args.invalid_action_penalty = penalty


def show(found: dict[str, Any], options: Any) -> None:
    """Print success on held-out maps, with 95 % intervals over seeds and maps."""
    names = ["base", *map(str, dict.fromkeys([*options.layers, "full"]))]
    runs = {
        name: [found[f"{name}, seed {seed}"] for seed in options.seeds] if name != "base" else []
        for name in names
    }
    runs["base"] = [found["base"]]
    scores = {name: [run["success"] for run in of] for name, of in runs.items()}
    draws = bootstrap(scores, seedless=("base",))
    print(f"\n{options.held_out} held-out maps, 8 episodes each, seeds {options.seeds}")
    print(
        f"{'layers':8} success  95 %            to full  95 %              reward, first and last"
    )
    for name in names:
        mean, full = (sum(map(sum, scores[n])) / sum(map(len, scores[n])) for n in (name, "full"))
        own = f"{interval_of(draws[name], mean):.3f}"
        difference = f"{interval_of(draws[name] - draws['full']):+.3f}"
        rewards = [run["rewards"] for run in runs[name] if "rewards" in run]
        ends = [
            f"{sum(sum(part) / len(part) for part in of) / len(of):+.2f}"
            for of in ([row[:5] for row in rewards], [row[-5:] for row in rewards])
            if of
        ]
        line = f"{name:8} {mean:7.3f}  {own}  {mean - full:+7.3f}  {difference}"
        print(f"{line}  {' -> '.join(ends)}".rstrip())


def maps(*sizes: int) -> list[list[str]]:
    """Lists of maps, all different."""
    wanted, found, seed = sum(sizes), {}, 0
    while len(found) < wanted:
        found["/".join(generate_random_map(size=4, p=0.8, seed=seed))] = None
        seed += 1
    each = iter(found)
    return [[next(each) for _ in range(size)] for size in sizes]


def rows(maps: list[str]) -> Dataset:
    """One row for each map, with an empty prompt: the environment gives the first observation."""
    return Dataset.from_dict({"prompt": [""] * len(maps), "map": maps})


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    return letters("0123FHG#>" + ACTIONS)


def imitate(maps: list[str], steps: int) -> LlamaForCausalLM:
    """A small Llama trained to imitate the guide in all turns of an episode."""
    set_seed(0)
    tokens = tokenizer()
    model = small_llama(tokens, max_position_embeddings=128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    draw = random.Random(0)
    for _ in (bar := trange(steps, desc="imitating", unit="step")):
        texts = [guided(draw.choice(maps), draw) for _ in range(32)]
        batch = tokens(texts, padding=True, return_tensors="pt").to(model.device)
        acts = torch.tensor(tokens.convert_tokens_to_ids([*ACTIONS, "<eos>"]))
        labels = batch["input_ids"].masked_fill(~torch.isin(batch["input_ids"], acts), -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    return model.eval()


def guided(map: str, draw: random.Random) -> str:  # noqa: A002
    """The text of an episode with the guide, in the trainer's format."""
    lake, text, ended = FrozenLake(), "", False
    seen = lake.reset(map)
    far = distances(lake.rows)
    for _ in range(MAX_TURNS):
        y, x = divmod(int(lake.at), len(lake.rows))
        to = {a: far.get((y + down, x + right), 99) for a, (down, right) in MOVES.items()}
        best = [action for action, steps in to.items() if steps == min(to.values())]
        action = draw.choice(best if draw.random() < 0.5 else ACTIONS)
        text += f"{seen}{action}<eos>"
        seen, _, ended, _ = lake.step(action)
        if ended:
            break
    return text


def distances(rows: list[str]) -> dict[tuple[int, int], int]:
    """Steps to the goal from each square that has a way to it."""
    goal = (len(rows) - 1, len(rows) - 1)
    found, frontier = {goal: 0}, [goal]
    for y, x in frontier:
        for down, right in MOVES.values():
            beside = (y + down, x + right)
            if beside not in found and square(rows, *beside) == "F":
                found[beside] = found[y, x] + 1
                frontier.append(beside)
    return found


def parse() -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = made.add_argument
    add("--layers", type=layers, nargs="+", default=[2], help="each alone (default: 2, of 0 to 3)")
    add("--steps", type=int, default=80, help="of each training (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    add("--learning-rate", type=float, default=2e-3, help="of layers (default: %(default)s)")
    add("--full-learning-rate", type=float, default=5e-4, help="default: %(default)s")
    add("--omega", type=float, default=1.0, help="of step advantages (default: %(default)s)")
    add("--imitation-steps", type=int, default=200, help="default: %(default)s")
    add("--shown-maps", type=int, default=512, help="for imitation (default: %(default)s)")
    add("--held-out", type=int, default=128, help="maps to evaluate on (default: %(default)s)")
    add("--output", type=Path, default=Path("runs/agent"), help="default: %(default)s")
    return made.parse_args()


if __name__ == "__main__":
    main()
