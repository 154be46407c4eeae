"""Whatever a model or its user's code does, results are the plain ones, and a line says why."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from layerrl.reference import ReferenceModel
from layerrl.replay.prefix import _computed_in
from layerrl.replay.recordings import Recording, gathered
from tests.devices import DEVICE, on_any_device
from tests.devices import generator as draws
from tests.models import tiny, tiny_config
from tests.replays import FIRST, B, H, Pair, T, assert_unpatched, call, eager, ids, warnings

pytestmark = [on_any_device, pytest.mark.usefixtures("made_on_device")]


def llama(**changes: Any) -> Any:
    return tiny("llama", 4, initializer_range=0.3, **changes).eval()


class Layer(nn.Module):
    """A layer that does as it is told beside its work."""

    def __init__(self, act: Any = None) -> None:
        super().__init__()
        self.inside = nn.Linear(H, H)
        self.act = act

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = hidden + self.inside(hidden).tanh()
        return output if self.act is None else self.act(self, hidden, output, *args, **kwargs)


class Own(nn.Module):
    """A model of somebody's own; `between` and `arguments` decide how its layers are called."""

    def __init__(self, act: Any = None, between: Any = None, arguments: Any = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, H)
        self.layers = nn.ModuleList(Layer(act) for _ in range(4))
        self.head = nn.Linear(H, 8)
        self.between, self.arguments = between, arguments

    def forward(self, input_ids: Tensor) -> Any:
        hidden = self.embed(input_ids)
        kwargs = self.arguments(hidden) if self.arguments else {}
        for index, layer in enumerate(self.layers):
            if self.between is not None:
                hidden = self.between(self, index, hidden)
            hidden = layer(hidden, **kwargs)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return {"logits": self.head(hidden), **{n: v for n, v in kwargs.items() if n == "sums"}}


def own(model: Any) -> Any:
    return model(input_ids=ids())


def functional_dropout(_: Any, __: Any, output: Tensor) -> Tensor:
    return nn.functional.dropout(output, 0.5)


def in_place(_: Any, hidden: Tensor, output: Tensor) -> Tensor:
    return output if output.requires_grad else hidden.copy_(output)


def counting(self: Any, _: Any, output: Tensor) -> Tensor:
    self.calls = getattr(self, "calls", 0) + 1
    return output * self.calls


def extra(_: Any, hidden: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    return output, hidden.sum()


def adding_up(_: Any, hidden: Tensor, output: Tensor, sums: Tensor) -> Tensor:
    sums += hidden.detach().sum(dim=-1)
    return output


def appending(_: Any, hidden: Tensor, output: Tensor, sums: list[Tensor]) -> Tensor:
    sums.append(hidden.detach())
    return output


def stored(self: Any, _: Any, output: Tensor) -> Tensor:
    self.seen = output.detach()
    return output


def scaling(model: Any, index: int, hidden: Tensor) -> Tensor:
    return hidden * 1.5 if index else hidden


def in_place_between(model: Any, index: int, hidden: Tensor) -> Tensor:
    return hidden.mul_(1.5) if index == 1 else hidden


def in_place_on_another_view(model: Any, index: int, hidden: Tensor) -> Tensor:
    return hidden.detach().mul_(1.5) if index == 1 else hidden


def turned(model: Any, index: int, hidden: Tensor) -> Tensor:
    """The same memory, in another order."""
    return hidden.as_strided(hidden.shape, (H, len(hidden) * H, 1)) if index == 1 else hidden


def skipping(model: Any, index: int, hidden: Tensor) -> Tensor:
    """Layer 1's input reaches the last trained layer."""
    if index == 1:
        model.early = hidden
    return hidden + model.early if index == 3 else hidden


class TestModels:
    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"act": functional_dropout}, "draw random numbers"),
            ({"act": in_place}, "writes into its arguments"),
            ({"act": counting}, "changes its own tensors or settings"),
            ({"act": stored}, "changes its own tensors or settings"),
            ({"act": extra}, "returns more than hidden states"),
            (
                {"act": adding_up, "arguments": lambda h: {"sums": torch.zeros(h.shape[:2])}},
                "writes into its arguments",
            ),
            ({"act": appending, "arguments": lambda _: {"sums": []}}, "writes into its arguments"),
            ({"between": scaling}, "computes something between its layers"),
            ({"between": in_place_between}, "computes something between its layers"),
            ({"between": in_place_on_another_view}, "computes something between its layers"),
            ({"between": turned}, "computes something between its layers"),
            ({"between": skipping}, "results differ by"),
            ({"act": lambda _, __, output, x: output, "arguments": lambda _: {"x": object()}},
             "layers are called with x, a object"),
        ],
    )  # fmt: skip
    def test_that_are_no_function_of_what_enters_run_plainly(self, caplog, changes, why):
        pair = Pair(Own(**changes))
        with pair.batch():
            for grad in (False, False, True, True):
                assert not pair.same(own, grad=grad)
        [warning] = warnings(caplog)
        assert why in warning
        assert_unpatched(pair.model)

    @pytest.mark.parametrize("act", [None, lambda _, __, output: (output, None)])
    def test_of_ones_own_are_replayed(self, act):
        pair = Pair(Own(act))
        with pair.batch():
            assert pair.replays(own, own, own) == [0, 1, 1]
            assert pair.replays(own, own, grad=True) == [1, 1]

    def test_whose_layers_hand_on_other_tensors_over_the_same_memory_are_replayed(self):
        """As ZeRO-3's hooks have them do."""
        pair = Pair(Own(between=lambda _, index, hidden: hidden.detach() if index < 2 else hidden))
        with pair.batch():
            assert pair.replays(own, own, own) == [0, 1, 1]
            assert pair.replays(own, own, grad=True) == [1, 1]

    @pytest.mark.parametrize("made", [SimpleNamespace, dataclass(type("Out", (), {
        "__annotations__": {"logits": Tensor}}))])  # fmt: skip
    def test_are_compared_in_whatever_they_return(self, caplog, made):
        class Wrapped(Own):
            def forward(self, input_ids: Tensor) -> Any:
                return made(**super().forward(input_ids))

        pair = Pair(Wrapped(between=skipping))

        def logits(model: Any) -> Any:
            return model(ids()).logits

        with pair.batch():
            assert pair.replays(logits, logits, logits) == [False] * 3
        assert not pair.replay.enabled
        [warning] = warnings(caplog)
        assert ("no floating-point tensor" if made is SimpleNamespace else "differ") in warning

    def test_with_rows_second_are_replayed_as_a_whole_alone(self, caplog):
        class Turned(Own):  # attends backwards along the tokens, which are first
            def __init__(self) -> None:
                super().__init__(lambda _, __, output: output.cumsum(0))

            def forward(self, input_ids: Tensor) -> Any:
                hidden = self.embed(input_ids).transpose(0, 1)
                for layer in self.layers:
                    hidden = layer(hidden)
                return self.head(hidden)

        pair, a, b = Pair(Turned()), ids(0), ids(1)
        mixed = torch.cat([a[:, :2], b[:, 2:]], dim=1)
        runs = [lambda model, rows=rows: model(rows) for rows in (a, b, a, b, mixed)]
        with pair.batch():
            assert pair.replays(*runs) == [0, 0, 1, 1, 0]
        assert "of shape (5, 6, 16)" in warnings(caplog)[0]

    def test_whose_rows_depend_on_their_neighbours_are_found_out(self, caplog):
        pair = Pair(Own(lambda _, __, output: output - output.mean(0)))
        with pair.batch():
            assert pair.replays(own, own, own) == [0, 1, 1]
            assert not pair.same(lambda model: model(ids()[:3]))
        assert "results differ" in warnings(caplog)[-1]

    def test_that_skip_layers_at_random(self):
        config = AutoConfig.for_model(
            "opt", vocab_size=64, hidden_size=H, word_embed_proj_dim=H, ffn_dim=32, dropout=0.0,
            num_attention_heads=2, num_hidden_layers=4, layerdrop=0.5, max_position_embeddings=64,
        )  # fmt: skip
        pair = Pair(AutoModelForCausalLM.from_config(config).train())
        with pair.batch():
            for grad in (False, True) * 4:
                pair.same(call(), grad=grad)

    def test_that_go_through_their_layers_several_times(self):
        class Recurrent(Own):
            def forward(self, input_ids: Tensor) -> Any:
                hidden = self.embed(input_ids)
                for _ in range(2):
                    for layer in self.layers:
                        hidden = layer(hidden)
                return self.head(hidden)

        pair = Pair(Recurrent())
        with pair.batch():
            assert pair.replays(*[own] * 4) == [0, 1, 1, 1]
            assert pair.replays(own, own, grad=True) == [1, 1]
            pair.both(lambda model: [p.data.mul_(2) for p in model.layers[2].parameters()])
            for _ in range(2):
                pair.same(own, grad=True)

    def test_with_images_between_the_layers(self):
        """Qwen3-VL adds image features to what leaves its lower layers."""
        pair = Pair(tiny("qwen3_vl", 4).eval())
        config, tokens = pair.model.config, ids(0, 2, 8)
        tokens[:, 2:6] = config.image_token_id = 60
        pair.plain.config.image_token_id = 60

        def seen(seed: int) -> Any:
            generator = draws(seed)
            pixels = torch.randn(32, 3 * 2 * 4 * 4, generator=generator)
            return call(
                tokens, pixel_values=pixels, image_grid_thw=torch.tensor([[1, 4, 4]] * 2),
                mm_token_type_ids=(tokens == 60).int(),
            )  # fmt: skip

        with pair.batch():
            for seed in (0, 1, 0, 1):
                for grad in (False, True):
                    pair.same(seen(seed), grad=grad)

    def test_with_another_head(self):
        config = tiny_config("llama", 4, num_labels=3)
        pair = Pair(AutoModelForSequenceClassification.from_config(config).eval())
        with pair.batch():
            assert pair.replays(*[call()] * 3) == [0, 1, 1]
            # The first time, the model notes in its config what kind of labels it has.
            assert pair.replays(*[call(labels=torch.arange(B) % 3)] * 3, grad=True) == [0, 1, 1]

    def test_with_packed_sequences(self):
        pair, packed = Pair(llama()), ids(0, 1, 12)
        starts = [torch.tensor([[*range(n), *range(12 - n)]]) for n in (5, 7)]
        with pair.batch():
            runs = [call(packed, position_ids=positions) for positions in starts]
            assert pair.replays(*runs, *runs) == [0, 0, 1, 1]


class TestUsers:
    def test_write_frozen_weights(self):
        pair = Pair(llama())
        with pair.batch(), torch.no_grad():
            assert pair.replays(call(), call(), call()) == [0, 1, 1]
            pair.both(lambda model: model.model.layers[1].mlp.up_proj.weight.mul_(1.5))
            assert pair.replays(call(), call()) == [0, 1]
            for factor in (2, 3):  # one after the other may be given the same address

                def scale(model: Any, factor: int = factor) -> None:
                    model.model.layers[0].mlp.up_proj.weight.data = torch.ones(32, H) * factor

                pair.both(scale)
                assert pair.replays(call(), call()) == [0, 1]

    def test_train_the_embedding_or_let_frozen_layers_have_gradients(self, caplog):
        pair = Pair(llama())
        with pair.batch():
            assert pair.replays(call(), call(), grad=True) == [0, 1]
            pair.both(lambda model: model.model.layers[0].requires_grad_(True))
            assert not pair.same(call(), grad=True)
            assert pair.same(call())
            pair.both(lambda model: model.model.layers[0].requires_grad_(False))
            pair.both(lambda model: model.model.embed_tokens.requires_grad_(True))
            assert not pair.same(call(), grad=True)
        assert "a gradient of the layers or of what enters them" in warnings(caplog)[0]

    def test_ask_for_a_gradient_of_what_they_put_in(self):
        pair = Pair(llama())
        embeddings = torch.randn(B, T, H)

        def saliency(model: Any) -> Tensor:
            given = embeddings.clone().requires_grad_()
            logits = model(inputs_embeds=given, use_cache=False).logits
            return torch.autograd.grad(logits.pow(2).sum(), given)[0]

        with pair.batch():
            known = lambda model: model(inputs_embeds=embeddings, use_cache=False)  # noqa: E731
            assert pair.replays(known, known) == [0, 1]
            assert not pair.same(saliency, grad=True)

    def test_differentiate_twice(self):
        def penalty(model: Any) -> Tensor:
            weight = model.model.layers[2].mlp.up_proj.weight
            logits = model(input_ids=ids(), use_cache=False).logits
            [grad] = torch.autograd.grad(logits.pow(2).mean(), weight, create_graph=True)
            return grad.pow(2).sum()

        pair = Pair(tiny("llama", 4, attn_implementation="eager").eval())
        with pair.batch():
            assert pair.replays(penalty, penalty, penalty, grad=True) == [0, 1, 1]

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpoint_the_whole_call(self, use_reentrant):
        def checkpointed(model: Any) -> Tensor:
            given = torch.zeros((), requires_grad=True)
            return checkpoint(
                lambda _: model(input_ids=ids(), use_cache=False).logits, given,
                use_reentrant=use_reentrant,
            )  # fmt: skip

        def backward(model: Any) -> dict[str, Any]:
            model.zero_grad()
            checkpointed(model).pow(2).mean().backward()
            return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

        pair = Pair(llama())
        with pair.batch():
            assert pair.replays(call(), backward, backward, grad=True)[-1]

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpoint_layers(self, use_reentrant):
        pair = Pair(llama().train())

        def enable(model: Any) -> None:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            for layer in model.model.layers[:2]:
                layer.gradient_checkpointing = False
            if not use_reentrant:
                model.disable_input_require_grads()

        pair.both(enable)

        def backward(model: Any) -> dict[str, Any]:
            model.zero_grad()
            model(input_ids=ids()).logits.pow(2).mean().backward()
            return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

        with pair.batch():
            replayed = pair.replays(*[backward] * 3, grad=True)
        assert replayed == ([0, 0, 0] if use_reentrant else [0, 1, 1])

    @pytest.mark.parametrize("where", ["model.layers.0", "model.layers.1.mlp", "global"])
    def test_hook_frozen_layers(self, caplog, where):
        pair, seen = Pair(llama()), {}

        def noting(model: Any) -> Any:
            seen[model] = []
            register = (
                nn.modules.module.register_module_forward_hook
                if where == "global"
                else model.get_submodule(where).register_forward_hook
            )
            hook = register(lambda *args: seen[model].append(args[0]) or None)
            try:
                return model(input_ids=ids(), use_cache=False)
            finally:
                hook.remove()

        with pair.batch():
            assert pair.replays(call(), call(), noting, call()) == [0, 1, 0, 1]
        assert len(seen[pair.model]) == len(seen[pair.plain]) > 0
        assert "hook" in warnings(caplog)[0]

    def test_hook_trained_layers_and_see_each_pass_once(self):
        pair, seen = Pair(llama()), {}

        def hook(model: Any) -> None:
            seen[model] = []
            model.model.layers[3].register_forward_hook(
                lambda *args: seen[model].append(args[-1].detach().clone())
            )

        pair.both(hook)
        with pair.batch():
            assert pair.replays(call(), call(), call()) == [0, 1, 1]
        assert [len(states) for states in seen.values()] == [3, 3]
        assert all(map(torch.equal, *seen.values()))

    def test_hook_trained_tensors_and_see_each_gradient_once(self):
        """The comparison asks for gradients of its own, which no optimizer will step along."""
        pair, seen = Pair(llama()), {}

        def hook(model: Any) -> None:
            seen[model] = gradients = []
            model.model.layers[FIRST].mlp.up_proj.weight.register_hook(
                lambda gradient: gradients.append(gradient.clone()) or gradient * len(gradients)
            )

        def backward(model: Any) -> dict[str, Any]:
            model.zero_grad()
            call()(model).logits.pow(2).mean().backward()
            return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

        pair.both(hook)
        with pair.batch():
            assert pair.replays(*[backward] * 3, grad=True) == [0, 1, 1]
        assert [len(gradients) for gradients in seen.values()] == [3, 3]
        assert all(map(torch.equal, *seen.values()))

    def test_copy_the_model_in_the_middle(self):
        """A teacher of one's own, made in the loss, must not be the policy ever after."""
        pair, teachers = Pair(llama()), {}

        def copied(model: Any) -> Any:
            teachers.setdefault(model, deepcopy(model))
            return teachers[model](input_ids=ids(), use_cache=False)

        with pair.batch():
            assert pair.replays(call(), copied, call()) == [0, 0, 1]
            pair.both(lambda model: [p.data.add_(1) for p in model.lm_head.parameters()])
            pair.same(copied)
        pair.same(copied)

    def test_generate_in_the_middle(self):
        pair, mask = Pair(llama()), torch.arange(T).expand(B, T).ge(2).long()
        with pair.batch():
            for use_cache in (True, False) * 2:
                pair.same(call())
                pair.same(
                    lambda model, use_cache=use_cache: model.generate(
                        ids(),
                        attention_mask=mask,
                        max_new_tokens=3,
                        use_cache=use_cache,
                        do_sample=True,
                    )
                )

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_change_how_attention_is_computed(self, implementation):
        pair = Pair(tiny("llama", 4, attn_implementation="sdpa").eval())
        with pair.batch():
            assert pair.replays(call(), call()) == [0, 1]
            pair.both(lambda model: model.set_attn_implementation(implementation))
            assert pair.replays(call(), call()) == [implementation == "sdpa", 1]

    @pytest.mark.parametrize("kernel", ["flash", "mem_efficient", "math", "cudnn"])
    def test_switch_a_kernel_of_attention_off(self, kernel):
        pair, enable = Pair(llama()), getattr(torch.backends.cuda, f"enable_{kernel}_sdp")
        before = getattr(torch.backends.cuda, f"{kernel}_sdp_enabled")()
        with pair.batch():
            assert pair.replays(call(), call()) == [0, 1]
            enable(not before)
            try:
                assert pair.replays(call(), call()) == [0, 1]
            finally:
                enable(before)
            assert pair.same(call())

    def test_multiply_in_tf32_as_transformers_sets_it(self):
        """After which torch refuses to tell its `float32_matmul_precision`."""
        pair, before = Pair(llama()), torch.backends.fp32_precision
        with pair.batch():
            assert pair.replays(call(), call()) == [0, 1]
            torch.backends.fp32_precision = "tf32"
            try:
                assert pair.replays(call(), call()) == [0, 1]
                elsewhere = torch.empty(1, device="meta")
                assert _computed_in(elsewhere) == torch.bfloat16
            finally:
                torch.backends.fp32_precision = before
            assert _computed_in(elsewhere) == torch.float32
            assert pair.same(call())

    def test_change_a_setting_of_a_frozen_layer(self):
        pair = Pair(llama())
        with pair.batch():
            assert pair.replays(call(), call()) == [0, 1]
            pair.both(lambda model: setattr(model.model.layers[1].self_attn, "scaling", 0.1))
            assert pair.replays(call(), call()) == [0, 1]

    @pytest.mark.parametrize("where", ["", ".mlp"])
    def test_patch_the_forward_of_a_frozen_layer_for_a_while(self, where):
        def patch(model):
            module = model.get_submodule(f"model.layers.0{where}")
            forward = type(module).forward
            module.forward = lambda *args, **kwargs: forward(module, *args, **kwargs) + 1.0

        def unpatch(model):
            del model.get_submodule(f"model.layers.0{where}").forward

        pair = Pair(llama())
        with pair.batch():
            assert pair.replays(call(), call()) == [0, 1]
            pair.both(patch)
            assert pair.replays(call(), call()) == [0, 1]
            pair.both(unpatch)
            assert pair.replays(call()) == [1]

    @pytest.mark.parametrize("opts", [{"scale": 3.0}, (3.0,), [3.0]])
    def test_change_a_setting_inside_a_container(self, opts):
        class Scaled(nn.Module):
            opts: Any = (1.0,)

            def forward(self, x):
                values = self.opts.values() if isinstance(self.opts, dict) else self.opts
                return x * next(iter(values))

        model = llama()
        model.model.layers[0].mlp = Scaled()
        pair = Pair(model)
        with pair.batch():
            assert pair.replays(call(), call()) == [0, 1]
            pair.both(lambda model: setattr(model.model.layers[0].mlp, "opts", opts))
            assert pair.replays(call(), call()) == [0, 1]

    def test_write_frozen_weights_where_torch_does_not_count_it(self):
        def write(model):
            model.model.layers[1].mlp.up_proj.weight.data.add_(1.0)

        pair = Pair(llama())
        with pair.batch():
            assert pair.replays(call(), call()) == [0, 1]
            pair.both(write)
            assert pair.replays(call(), call()) == [0, 1]

    @pytest.mark.parametrize("as_buffer", [True, False])
    def test_count_passes_in_a_trained_layer(self, as_buffer):
        class Counting(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                if as_buffer:
                    self.register_buffer("passes", torch.zeros(()), persistent=False)
                else:
                    self.passes = 0

            def forward(self, x):
                self.passes += 1
                return x * self.passes

        model = llama()
        model.model.layers[FIRST].mlp = Counting()
        pair = Pair(model)
        with pair.batch():
            assert pair.replays(call(), call(), call()) == [0, 1, 1]

    def test_raise_a_dropout_that_was_zero(self):
        pair = Pair(llama().train())
        with pair.batch():
            assert pair.replays(call(), call(), call()) == [0, 1, 1]
            pair.both(
                lambda model: setattr(model.model.layers[1].self_attn, "attention_dropout", 0.5)
            )
            assert pair.replays(call(), call(), call()) == [0, 0, 0]

    def test_step_the_trained_layer_and_score_with_the_reference(self):
        pair = Pair(llama())
        trained = [
            ReferenceModel(model, {n: p for n, p in model.named_parameters() if p.requires_grad})
            for model in (pair.model, pair.plain)
        ]
        reference = dict(zip((pair.model, pair.plain), trained, strict=True))
        with pair.batch():
            for _ in range(3):
                pair.same(call(), grad=True)
                pair.same(lambda model: reference[model](input_ids=ids(), use_cache=False))
                pair.both(lambda model: model.model.layers[2].mlp.up_proj.weight.data.mul_(1.1))
        assert pair.replay.num_replayed >= 4

    @pytest.mark.parametrize("what", ["output_hidden_states", "output_attentions"])
    @pytest.mark.parametrize("through_config", [True, False])
    def test_ask_for_more(self, caplog, what, through_config):
        pair = Pair(tiny("llama", 4, attn_implementation="eager").eval())
        more = call(None, **{what: True})
        if through_config:

            def more(model: Any) -> Any:
                setattr(model.config, what, True)
                try:
                    return call()(model)
                finally:
                    setattr(model.config, what, False)

        with pair.batch():
            assert pair.replays(call(), call(), more, call(), more) == [0, 1, 0, 1, 0]
            assert pair.replays(call(), more, call(), grad=True) == [1, 0, 1]
            assert pair.replays(*[call(None, **{what: False})] * 2) == [
                0,
                1,
            ]  # which layers are told
        [warning] = warnings(caplog)
        assert f"asks for more than its output ({what})" in warning

    def test_ask_for_router_logits_and_their_loss(self):
        pair = Pair(tiny("qwen3_moe", 4, num_experts_per_tok=2).eval())
        more = call(output_router_logits=True, labels=ids())
        with pair.batch():
            assert pair.replays(call(), call(), more, more) == [0, 1, 0, 0]
            assert pair.replays(call(), more, call(), grad=True) == [1, 0, 1]

    def test_compile(self):
        pair = Pair(llama())
        compiled = {m: torch.compile(m, backend="eager") for m in (pair.model, pair.plain)}
        with pair.batch():
            for grad in (False, False, True, True):
                pair.same(
                    lambda model: compiled[model](input_ids=ids(), use_cache=False), grad=grad
                )
            assert pair.replays(call(), call()) == [0, 1]
        assert_unpatched(pair.model)

    @pytest.mark.parametrize("layers", [[0, 1, 2, 3], [0], [1]])
    def test_compile_layers_in_place(self, layers):
        pair = Pair(llama())
        pair.both(
            lambda model: [
                model.model.layers[k].compile(backend="eager", dynamic=True) for k in layers
            ]
        )
        compiled = [module._compiled_call_impl for module in pair.model.modules()]
        with pair.batch():
            assert pair.replays(call(), call(), call()) == [0, 1, 1]
            assert pair.replays(call(), call(), grad=True) == [1, 1]
        assert_unpatched(pair.model)
        assert [module._compiled_call_impl for module in pair.model.modules()] == compiled

    @pytest.mark.parametrize("name", ["whole", "inner"])
    @pytest.mark.parametrize("way", ["in place", "forward"])
    def test_compile_around_the_layers(self, name, way, caplog):
        def compile_it(model: Any) -> None:
            part = model if name == "whole" else model.model
            if way == "in place":
                part.compile(backend="eager", dynamic=True)
            else:
                part.forward = torch.compile(part.forward, backend="eager", dynamic=True)

        pair = Pair(llama())
        pair.both(compile_it)
        self.runs_layers(pair, caplog)

    def test_compile_the_inner_model(self, caplog):
        model = llama()
        model.model = torch.compile(model.model, backend="eager", dynamic=True)
        self.runs_layers(Pair(model), caplog)

    def test_compile_what_a_forward_calls(self, caplog):
        pair, times = Pair(llama()), CompileCounter()

        def compile_it(model: Any) -> None:
            backend: Any = times if model is pair.model else "eager"
            compiled = torch.compile(model.model.forward, backend=backend, dynamic=True)
            model.model.forward = lambda *args, **kwargs: compiled(*args, **kwargs)

        pair.both(compile_it)
        self.runs_layers(pair, caplog)
        num_compiled = times.frame_count
        assert num_compiled
        with pair.batch():
            assert not any(pair.replays(call(), call()))
        assert times.frame_count == num_compiled

    @staticmethod
    def runs_layers(pair: Pair, caplog: Any) -> None:
        with pair.batch():
            assert not any(pair.replays(call(), call()))
            pair.same(call(), grad=True)
        for layer in pair.model.get_decoder().layers:
            assert_unpatched(layer)
        [said] = warnings(caplog)
        assert "is compiled around" in said

    def test_differentiate_forwards(self):
        def tangent(model: Any) -> Any:
            name = "model.layers.2.mlp.up_proj.weight"

            def scores(weight: Tensor) -> Tensor:
                kwargs = {"input_ids": ids(), "use_cache": False}
                return torch.func.functional_call(model, {name: weight}, (), kwargs).logits

            weight = model.get_parameter(name)
            return torch.func.jvp(scores, (weight,), (torch.ones_like(weight),))

        pair = Pair(tiny("llama", 4, attn_implementation="eager").eval())
        with pair.batch():
            pair.replays(call(), call(), tangent, call())


@contextmanager
def autocast(*, enabled: bool) -> Iterator[None]:
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled):
        yield


def test_one_autocast_around_policy_and_reference():
    pair = Pair(llama())
    references = {
        model: ReferenceModel(model, {n: p for n, p in model.named_parameters() if p.requires_grad})
        for model in (pair.model, pair.plain)
    }
    with torch.no_grad(), autocast(enabled=True):
        before = pair.plain(input_ids=ids()).logits
    pair.both(lambda model: model.model.layers[2].mlp.up_proj.weight.data.mul_(3))
    with pair.batch(), autocast(enabled=True):
        for _ in range(2):
            pair.same(call())
            with torch.no_grad():
                for reference in references.values():
                    logits = reference(input_ids=ids(), use_cache=False).logits
                    assert torch.equal(logits, before)
    assert pair.replay.num_replayed


@pytest.mark.parametrize(
    ("weights", "computes"),
    [
        pytest.param(torch.float16, torch.bfloat16, id="float16 under bfloat16"),
        pytest.param(torch.bfloat16, torch.float16, id="bfloat16 under float16"),
    ],
)
def test_an_autocast_to_another_16_bit_dtype_than_that_of_the_weights(weights, computes):
    pair = Pair(llama().to(weights))
    with pair.batch(), torch.autocast(DEVICE.type, computes):
        assert pair.replays(call(), call(), call(ids().flip(0))) == [False, True, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rows_are_gathered_whatever_autocast_computes_in(dtype):
    rows = Recording(torch.rand(4, 2, 3, device=DEVICE).to(dtype), (), (), b"", ())
    for computes in (torch.float16, torch.bfloat16):
        with torch.autocast(DEVICE.type, computes):
            found = gathered([(rows, 2), (rows, 0)])
        assert found.dtype == dtype
        assert torch.equal(found, rows.hidden_BTH[[2, 0]])


@pytest.fixture
def another_kernel_for_few_rows(monkeypatch):
    """As GPUs have several, chosen by the shapes and masks of a call."""
    fused = nn.functional.scaled_dot_product_attention

    def chosen(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return (eager if len(query) < B else fused)(query, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", chosen)


def in_bfloat16(model: Any) -> Any:
    return model.to(torch.bfloat16), autocast(enabled=False)


def under_autocast(model: Any) -> Any:
    return model, autocast(enabled=True)


def in_float32(model: Any) -> Any:
    return model, autocast(enabled=False)


@pytest.mark.usefixtures("another_kernel_for_few_rows")
class TestTwoKernels:
    """They round differently, which 16 bits show; what rows are replayed as may not be wrong."""

    @pytest.mark.parametrize("precision", [in_bfloat16, under_autocast, in_float32])
    @pytest.mark.parametrize("grad", [False, True])
    def test_differ_no_more_than_may_be(self, caplog, precision, grad):
        model, cast = precision(llama())
        pair, few = Pair(model, 3), call(ids()[[4, 1]])
        with cast, pair.batch():
            recorded = pair.plain(input_ids=ids()).logits[[4, 1]]
            gap = (pair.plain(input_ids=ids()[[4, 1]]).logits - recorded).abs().max()
            assert (gap > 1e-3) == (precision is not in_float32)  # else there is nothing to allow
            pair.same(call())
            assert pair.same(few, grad=grad, atol=0.3)
        assert warnings(caplog) == []

    @pytest.mark.parametrize("precision", [in_bfloat16, under_autocast, in_float32])
    def test_hide_no_wrong_replay(self, caplog, precision):
        def mixed(_: Any, __: Any, output: Tensor) -> Tensor:
            return output + 0.2 * output.mean(0)  # of all rows, which are others now

        model, cast = precision(Own(mixed))
        pair = Pair(model)
        with cast, pair.batch():
            pair.same(own)
            assert not pair.same(lambda model: model(input_ids=ids()[[4, 1]]))
        assert not pair.replay.enabled
        assert "results differ" in warnings(caplog)[-1]
