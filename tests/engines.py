"""Stand-ins for vLLM, which needs a GPU: a second transformers model behind the calls TRL makes.

They start from weights of their own, so that nothing is right before it was sent, and a module that
vLLM would have fused must come whole.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl.generation import vllm_generation

from tests.models import tiny

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FUSED = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]


class Engine:
    """What TRL uses of `vllm.LLM`."""

    latest: "Engine"

    def __init__(self, **settings: Any) -> None:
        Engine.latest = self
        for name in LAUNCHER:  # set for vLLM's processes; accelerate would take them for its own
            os.environ.pop(name, None)
        self.settings = settings
        self.model = tiny("llama", 4)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(1.0)
        self.syncs: list[list[str]] = []
        """Names received, for each sync."""
        self.num_bytes: list[int] = []
        """Bytes received, for each sync."""
        self.fails = False
        self._sync_open = False
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self.load_weights))
        worker = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(
            model_executor=worker, model_config=SimpleNamespace(max_model_len=64)
        )

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            if not self._sync_open:
                self.syncs.append([])
                self.num_bytes.append(0)
                self._sync_open = True
            if self.fails:
                raise RuntimeError("the engine is gone")
            self.syncs[-1].append(name)
            self.num_bytes[-1] += tensor.nbytes
            self.model.get_parameter(name).copy_(tensor)

    def reset_prefix_cache(self) -> None:
        self._sync_open = False
        received = set(self.syncs[-1])
        for name in received:
            for group in _FUSED:
                for member in group:
                    if f".{member}." in name:
                        siblings = {name.replace(member, other) for other in group}
                        assert siblings <= received, f"{name} came without its siblings"

    def sleep(self, level: int) -> None:
        assert level == 2
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(torch.nan)

    def wake_up(self, tags: list[str]) -> None:
        pass

    def collective_rpc(self, method: str) -> None:
        """How TRL before 1.15 gets weights back that slept."""
        assert method == "reload_weights"
        self.model.load_state_dict(tiny("llama", 4).state_dict())

    def generate(self, prompts: list[Any], sampling_params: Any, use_tqdm: bool) -> list[Any]:
        """Sampled one by one."""
        return [self._complete(p["prompt_token_ids"], sampling_params.max_tokens) for p in prompts]

    @torch.no_grad()
    def _complete(self, ids: list[int], num_tokens: int) -> Any:
        tokens, logprobs = [], []
        for _ in range(num_tokens):
            logits = self.model(torch.tensor([ids + tokens])).logits[0, -1]
            assert not logits.isnan().any(), "generated without weights"
            tokens.append(int(logits.softmax(-1).multinomial(1)))
            logprob = float(logits.log_softmax(-1)[tokens[-1]])
            logprobs.append({tokens[-1]: SimpleNamespace(rank=1, logprob=logprob)})
        output = SimpleNamespace(token_ids=tokens, logprobs=logprobs)
        return SimpleNamespace(prompt_token_ids=ids, outputs=[output])


class Client:
    """What TRL uses of its own `VLLMClient`."""

    def __init__(self, **settings: Any) -> None:
        self.engine = Engine()

    def init_communicator(self, device: Any = 0) -> None:
        pass

    def get_server_info(self) -> Any:
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata: list[Any], named_params: Iterator[Any]) -> None:
        """Refuses tensors that were not announced, in the order announced."""
        for announced, (name, tensor) in zip(metadata, named_params, strict=True):
            dtype = str(tensor.dtype).removeprefix("torch.")
            assert tuple(announced) == (name, dtype, list(tensor.shape))
            self.engine.load_weights([(name, tensor)])

    def update_named_param(self, name: str, weights: Tensor) -> None:
        """Before TRL 1.11, one by one and without an announcement."""
        self.engine.load_weights([(name, weights)])

    def reset_prefix_cache(self) -> None:
        self.engine.reset_prefix_cache()

    def generate(self, prompts: list[list[int]], n: int, max_tokens: int, **_: Any) -> Any:
        outputs = [self.engine._complete(ids, max_tokens) for ids in prompts for _ in range(n)]
        logprobs, tokens = vllm_generation.extract_logprobs(outputs)
        return {
            "prompt_ids": prompts,
            "completion_ids": [output.outputs[0].token_ids for output in outputs],
            "logprobs": logprobs,
            "logprob_token_ids": tokens,
        }


@contextmanager
def in_place_of_vllm(monkeypatch: Any) -> Iterator[None]:
    """TRL's `VLLMGeneration` works on `Engine` and `Client` inside."""
    with monkeypatch.context() as patch:
        patch.setattr(vllm_generation, "is_vllm_available", lambda: True)
        patch.setattr(vllm_generation, "LLM", Engine, raising=False)
        patch.setattr(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)
        patch.setattr(vllm_generation, "VLLMClient", Client)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        yield
