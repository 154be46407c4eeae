"""vLLM keeps up with a model when only the tensors that were trained, and their siblings, are sent.

The engine is the real one behind TRL's `VLLMGeneration`, in its CPU build; where vLLM is missing,
all of this is skipped. Two things are set otherwise than TRL sets them:

* no compilation, which takes minutes on a CPU, and float32 weights, which can be compared closely;
* plain weights: on a CPU vLLM packs them into oneDNN's form and drops the originals, and then
  TRL's `sync_weights` fails (`'Parameter' object has no attribute 'weight_loader'`). On a GPU
  unquantized weights stay as they are.
"""

import importlib.util
import os
from functools import partial

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed (make test-vllm)", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("written for the CPU build of vLLM", allow_module_level=True)

# Read when vLLM is imported, or when the engine starts.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # leaves the cores to whoever shares them
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from accelerate import Accelerator
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl.generation import vllm_generation
from vllm import _custom_ops
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from layerrl import select_layers
from layerrl.blocks import with_fused_siblings
from layerrl.trainer.sync import WeightSync

LAYER = "model.layers.2."
PROMPTS = [[5, 6, 7, 8], [40, 3], [9, 30, 11, 22, 33, 44, 1]]
NEW_TOKENS = 12
# Of a log-probability. In float32 the two differ by up to 1e-4; with other weights, by more than 1.
CLOSE = 1e-3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny model with biases in q, k and v, and any tokenizer: vLLM will not start without."""
    path = tmp_path_factory.mktemp("qwen2")
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,  # of 32 numbers: the least that vLLM's CPU attention takes
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen2ForCausalLM(config).save_pretrained(path)
    vocabulary = {f"t{index}": index for index in range(64)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def engine(checkpoint):
    """One for all tests: vLLM starts once in a process."""
    model = Qwen2ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_custom_ops, "_supports_onednn", False)
        eager = partial(vllm_generation.LLM, dtype="float32", enforce_eager=True)
        patch.setattr(vllm_generation, "LLM", eager)
        yield vllm_generation.VLLMGeneration(
            model,
            Accelerator(cpu=True),
            PreTrainedTokenizerFast.from_pretrained(checkpoint),
            mode="colocate",
            gpu_memory_utilization=0.1,
            max_model_length=64,
            max_num_seqs=4,
            temperature=0.0,
            max_completion_length=NEW_TOKENS,
        )


@pytest.fixture
def model(engine, checkpoint):
    """The model behind the engine, with the checkpoint's weights in both."""
    engine.model.load_state_dict(Qwen2ForCausalLM.from_pretrained(checkpoint).state_dict())
    # Not `sync`: the biases of layers that a server's update did not touch ignore TRL's direct one
    # until the next server's update. No engine is used both ways outside of these tests.
    sync_as_a_server(engine, everything(engine.model))
    for cache in runner(engine).kv_caches:
        cache.zero_()  # NaN, once there, would reach later tests
    assert agrees(engine)
    return engine.model


def everything(model):
    """Names of all parameters."""
    return [name for name, _ in model.named_parameters()]


def change(model, part, *, seed):
    """Change the tensors with `part` in their names, as training would, and give their names."""
    generator = torch.Generator().manual_seed(seed)
    names = [name for name in everything(model) if part in name]
    with torch.no_grad():
        for name in names:
            tensor = model.get_parameter(name)
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return names


def agrees(engine):
    """Whether the engine's greedy completions and log-probabilities are the model's own."""
    _, completions, logprobs, _ = engine.generate(PROMPTS, None, num_generations=1)
    for prompt, completion, of_tokens in zip(PROMPTS, completions, logprobs, strict=True):
        assert len(completion) == NEW_TOKENS
        tokens = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            rows = engine.model(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        best, chosen = rows.max(-1)
        # None stands for NaN.
        served = torch.tensor([float("nan") if p is None else p for [p] in of_tokens])
        if chosen.tolist() != list(completion) or not torch.allclose(served, best, atol=CLOSE):
            return False
    return True


def runner(engine):
    """What holds the model inside vLLM."""
    return engine.llm.llm_engine.model_executor.driver_worker.model_runner


def weights(engine):
    """Copies of the tensors that vLLM computes with."""
    return {name: tensor.clone() for name, tensor in runner(engine).model.named_parameters()}


def sync(engine, names):
    """TRL's own sync to an engine in the same process, of some tensors only."""
    with pytest.MonkeyPatch.context() as patch:
        only = [(name, tensor) for name, tensor in engine._iter_named_params() if name in names]
        patch.setattr(engine, "_iter_named_params", lambda: iter(only))
        engine.sync_weights()


def sync_as_a_server(engine, names):
    """What a vLLM server does with the tensors that TRL sends it (NCCLWeightTransferEngine)."""
    holder = runner(engine)
    tensors = ((name, tensor.data) for name, tensor in engine.model.named_parameters())
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills memory that nothing was written to with NaN
    try:
        with set_current_vllm_config(holder.vllm_config), torch.no_grad():
            initialize_layerwise_reload(holder.model)
            holder.model.load_weights(item for item in tensors if item[0] in names)
            finalize_layerwise_reload(holder.model, holder.model_config)
    finally:
        torch.use_deterministic_algorithms(deterministic)
    engine.llm.reset_prefix_cache()


def test_the_first_sync_brings_every_weight(engine):
    change(engine.model, "", seed=1)
    assert not agrees(engine)

    engine.sync_weights()

    assert agrees(engine)


def test_the_masked_trainers_sync_sends_everything_and_then_the_layer(engine, model, monkeypatch):
    sent = []
    walk = type(engine)._iter_named_params

    def noting(self):
        for name, tensor in walk(self):
            sent.append(name)
            yield name, tensor

    monkeypatch.setattr(type(engine), "_iter_named_params", noting)
    monkeypatch.setattr(engine, "sync_weights", engine.sync_weights)  # WeightSync replaces it
    WeightSync(engine, model, select_layers(model, 2))
    for part in ("", LAYER, LAYER):
        changed = change(model, part, seed=6)
        sent.clear()

        engine.sync_weights()

        assert sent == changed
        assert agrees(engine)


@pytest.mark.parametrize("send", [sync, sync_as_a_server])
@pytest.mark.parametrize(
    "trained",
    ["", "self_attn.q_proj.weight", "self_attn.v_proj.bias", "mlp.up_proj", "mlp.down_proj"],
    ids=lambda part: part or "layer",
)
def test_a_part_of_a_layer_is_as_good_as_everything(engine, model, trained, send):
    changed = change(model, LAYER + trained, seed=2)
    assert not agrees(engine)

    send(engine, with_fused_siblings(everything(model), changed))

    assert agrees(engine)
    after_part = weights(engine)
    send(engine, everything(model))
    for name, tensor in weights(engine).items():
        assert torch.equal(after_part[name], tensor), name


def test_other_layers_are_not_sent(engine, model):
    changed = change(model, LAYER, seed=3)
    change(model, "model.layers.1.", seed=4)

    sync(engine, with_fused_siblings(everything(model), changed))

    assert not agrees(engine)


def test_a_direct_sync_needs_no_siblings(engine, model):
    changed = change(model, LAYER + "self_attn.q_proj", seed=5)

    sync(engine, changed)

    assert agrees(engine)


def test_a_server_loses_the_siblings_that_are_not_sent(engine, model):
    """Why siblings travel together. Should this fail, vLLM no longer needs them."""
    changed = change(model, LAYER + "self_attn.q_proj", seed=5)

    sync_as_a_server(engine, changed)

    lost = [name for name, tensor in weights(engine).items() if tensor.isnan().any()]
    assert lost == [LAYER + "self_attn.qkv_proj.weight"]
    assert not agrees(engine)
