"""TRL's asynchronous trainers on a CPU: stand-ins for the attention kernel, NCCL and vLLM's server.

Everything of TRL is the real thing, from the trainer to what it sends over the wire. The server
takes what was announced to it and nothing else, and its engine answers the prompts.
"""

import os
import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from importlib import import_module
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainerCallback

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

from layerrl import LayerMaskedMixin
from tests.engines import Engine
from tests.grpo import PROMPTS, QUIETLY, reward, tokenizer
from tests.runs import freeze_by_hand

TRAINERS = import_module(AsyncGRPOTrainer.__module__)
_SAMPLE = import_module(TRAINERS.AsyncRolloutWorker.__module__).RolloutSample
LAYER = 2
_ROWS, _GROUP, _LENGTH = 4, 2, 6


class Server:
    """What TRL uses of its client of a server, and the server behind it."""

    latest: "Server"

    def __init__(self, *_: Any, **__: Any) -> None:
        Server.latest = self
        self.engine = Engine()
        self.announced: list[list[str]] = []
        self._wire: queue.Queue[Any] = queue.Queue()

    def wait_for_server_ready(self) -> None:
        pass

    def get_world_size(self) -> int:
        return 1

    def get_dtype(self) -> str:
        return "float32"

    def init_weight_transfer_engine(self, init_info: Any, timeout: float) -> None:
        pass

    def pause(self, timeout: float = 0) -> None:
        pass

    def resume(self, timeout: float = 0) -> None:
        pass

    def start_weight_update(self, timeout: float = 0) -> None:
        self._wire = queue.Queue()

    def update_weights(self, info: dict[str, Any], timeout: float = 0) -> None:
        """Receive exactly what was announced, in that order."""
        self.announced.append(info["names"])
        described = zip(info["names"], info["dtype_names"], info["shapes"], strict=True)
        for name, dtype, shape in described:
            tensor = self._wire.get(timeout=600)
            assert tensor is not None, f"{name} was announced and not sent"
            assert (str(tensor.dtype), [*tensor.shape]) == (f"torch.{dtype}", shape), name
            self.engine.load_weights([(name, tensor)])
        assert self._wire.get(timeout=600) is None, "more was sent than announced"

    def finish_weight_update(self, timeout: float = 0) -> None:
        self.engine.reset_prefix_cache()

    @classmethod
    def nccl(cls, iterator: Iterator[tuple[str, Tensor]], trainer_args: Any) -> None:
        """Send tensors, which go without their names."""
        for _, tensor in iterator:
            cls.latest._wire.put(tensor.clone())
        cls.latest._wire.put(None)


class Worker:
    """Answers prompts with what the server's engine has."""

    def __init__(self) -> None:
        self.rollout_buffer: queue.Queue[Any] = queue.Queue()
        self.metrics_queue: queue.Queue[Any] = queue.Queue()
        self._prompts = enumerate(cycle(PROMPTS))
        self._version = 0
        self._started = False

    def start(self) -> None:
        self._started = True
        self._fill(2 * _ROWS)  # TRL asks for a batch more than it trains on

    def stop(self) -> None:
        self._started = False

    def update_model_version(self, model_version: int) -> None:
        self._version = model_version
        if self._started:
            self._fill(_ROWS)

    def check_health(self, stale_after_s: float) -> None:
        raise RuntimeError("all rollouts have been trained on")

    def _fill(self, num_rows: int) -> None:
        for _ in range(num_rows // _GROUP):
            group, prompt = next(self._prompts)
            ids = tokenizer()(prompt)["input_ids"]
            [*outputs] = Server.latest.engine.generate(
                [{"prompt_token_ids": ids}] * _GROUP, SimpleNamespace(max_tokens=_LENGTH), False
            )
            answers = [output.outputs[0] for output in outputs]
            rewards = np.array(reward([tokenizer().decode(a.token_ids) for a in answers]))
            for answer, advantage in zip(answers, rewards - rewards.mean(), strict=True):
                logprobs = [next(iter(each.values())).logprob for each in answer.logprobs]
                values = {
                    "prompt": [{"role": "user", "content": prompt}],
                    "completion": [{"role": "assistant", "content": "?"}],
                    "input_ids": np.array(ids + answer.token_ids),
                    "completion_mask": np.array([0] * len(ids) + [1] * _LENGTH),
                    "old_log_probs": np.array([0.0] * len(ids) + logprobs, dtype=np.float32),
                    "advantage": float(advantage),
                    "model_version": self._version,
                    "group_id": group,
                    "metrics": {"reward": float(rewards.mean())},
                }
                known = {each.name for each in fields(_SAMPLE)}
                sample = {name: value for name, value in values.items() if name in known}
                self.rollout_buffer.put(_SAMPLE(**sample))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *_: Any,
    softmax_scale: float,
    **__: Any,
) -> Tensor:
    """FlashAttention's `flash_attn_varlen_func`, causal: segments one by one."""
    outputs = []
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(ends_q) - 1):
        q = query[ends_q[i] : ends_q[i + 1]].transpose(0, 1)
        k, v = (x[ends_k[i] : ends_k[i + 1]].transpose(0, 1) for x in (key, value))
        sees = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        output = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=sees, scale=softmax_scale, enable_gqa=True
        )
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)


@contextmanager
def in_place_of_a_gpu(monkeypatch: Any, trainer: type = AsyncGRPOTrainer) -> Iterator[None]:
    """One of TRL's asynchronous trainers works on `Server` and plain torch inside."""
    kernels = SimpleNamespace(flash_attn_varlen_func=_attend)
    nccl = SimpleNamespace(trainer_init=lambda _: object(), trainer_send_weights=Server.nccl)
    trainers = import_module(trainer.__module__)
    transfer = import_module(trainers.WeightTransferClient.__module__)
    with monkeypatch.context() as patch:
        patch.setattr(trainers, "VLLMClient", Server)
        patch.setattr(trainers, "get_peak_flops_per_device", lambda *_: None, raising=False)
        for module in (trainers, transfer):
            patch.setattr(module, "is_vllm_available", lambda **_: True, raising=False)
        patch.setattr(transfer, "NCCLWeightTransferEngine", nccl, raising=False)
        patch.setattr(transfer, "NCCLTrainerSendWeightsArgs", SimpleNamespace, raising=False)
        patch.setattr(transfer, "get_ip", str, raising=False)
        patch.setattr(transfer, "get_open_port", int, raising=False)
        patch.setattr(transfer.WeightTransferClient, "destroy", lambda _: None)
        if hasattr(
            trainers, "register_tree_attention"
        ):  # TRL's own attention, of rollouts in trees
            packing = import_module(trainers.register_tree_attention.__module__)
            patch.setattr(packing, "_flash_attn", lambda: kernels)
        elif hasattr(trainers, "create_model_from_path"):
            load = partial(_with_eager_attention, trainers.create_model_from_path)
            patch.setattr(trainers, "create_model_from_path", load)
        else:
            load = partial(_with_eager_attention, AutoModelForCausalLM.from_pretrained)
            auto = SimpleNamespace(from_pretrained=load)
            patch.setattr(trainers, "AutoModelForCausalLM", auto)
        yield


def _with_eager_attention(load: Callable[..., Any], path: Any, **kwargs: Any) -> Any:
    return load(path, **(kwargs | {"attn_implementation": "eager"}))


class _ByHand(TrainerCallback):
    """All that a user of plain TRL can do before it announces what it will send."""

    def on_init_end(self, *_: Any, model: nn.Module, **__: Any) -> None:
        freeze_by_hand(model, [LAYER])


def make(
    folder: Path,
    output_dir: Path,
    selection: Any = None,
    *,
    trainer: type = AsyncGRPOTrainer,
    arguments: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """A trainer on the model in the folder, masked if there is a selection.

    `"by hand"`: TRL's, with all but one layer frozen, and a server that has the model. Further
    keywords change the config; `arguments` are the trainer's own.
    """
    values = {
        "per_device_train_batch_size": _ROWS,
        "token_budget": 0,
        "max_steps": 5,
        "ignore_data_skip": True,  # as later versions have it
        **QUIETLY,
    }
    own: dict[str, Any] = {"rollout_worker": Worker()}
    if selection == "by hand":
        own["callbacks"] = [_ByHand()]
    elif selection is not None:
        trainer = type("Masked", (LayerMaskedMixin, trainer), {})
        own["selection"] = selection
    made = trainer(
        model=str(folder),
        reward_funcs=reward,
        args=AsyncGRPOConfig(output_dir=str(output_dir), **(values | changes)),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer(),
        **(own | (arguments or {})),
    )
    if selection == "by hand":
        Server.latest.engine.model.load_state_dict(made.model.state_dict())
    return made
