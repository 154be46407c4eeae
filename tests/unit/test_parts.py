"""Where the parts that `also=` names lie, in every family of these tests."""

import pytest
import torch

from layerrl import select_layers
from layerrl.errors import SelectionError
from tests.models import FAMILIES, tiny

# As the families' authors have named them, and not as layerrl finds them.
NORMS = ("norm.weight", "ln_f.weight", "ln_f.bias", "final_layer_norm.weight")
NORMS += ("final_layer_norm.bias",)
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


def outside(model, family, part):
    """Names of what trains outside the layers."""
    path = FAMILIES[family].path
    found = select_layers(model, also=part).parameters(model)
    assert all(not name.startswith(f"{path}.") for name in found)
    return [*found]


@pytest.mark.parametrize("family", FAMILIES)
class TestNames:
    def test_final_norm_is_what_the_head_is_given(self, family):
        # Of as many experts as these have.
        model = tiny(family, **({"num_experts_per_tok": 2} if family == "qwen3_moe" else {}))
        names = outside(model, family, "final_norm")
        assert names
        assert all(name.endswith(NORMS) for name in names)
        # What reaches the head comes out of it.
        module = model.get_submodule(names[0].rpartition(".")[0])
        left, entered = [], []
        module.register_forward_hook(lambda *given: left.append(given[2]))
        model.get_output_embeddings().register_forward_pre_hook(
            lambda _, given: entered.append(given[0])
        )
        with torch.no_grad():
            model(torch.tensor([[4, 5, 6]]))
        assert torch.equal(left[-1], entered[-1])

    def test_embeddings_and_head_are_transformers_own(self, family):
        model = tiny(family)
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        tied = embedding is head
        for part, weight, ends in (
            ("embeddings", embedding, EMBEDDINGS),
            ("head", head, ("lm_head.weight", "embed_out.weight")),
        ):
            if tied:
                with pytest.raises(SelectionError, match=r'also=\("embeddings", "head"\)'):
                    select_layers(model, also=part)
                continue
            [(name, parameter)] = select_layers(model, also=part).parameters(model).items()
            assert parameter is weight
            assert name.endswith(ends)
        both = select_layers(model, also=["embeddings", "head"]).parameters(model)
        assert {id(p) for p in both.values()} == {id(embedding), id(head)}
