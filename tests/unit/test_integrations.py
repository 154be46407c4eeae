"""What the integrations share; the frameworks themselves are tested in `tests/integrations`."""

import importlib
import importlib.util
import warnings
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from layerrl import integrations, select_layers
from layerrl.errors import FrameworkError, SelectionError
from layerrl.integrations import given, mask, read_selection, require
from tests.models import tiny


@pytest.mark.parametrize(("framework", "tested"), [("verl", "0.9.1"), ("openrlhf", "0.11.2")])
def test_a_missing_framework_is_an_error_that_says_what_to_install(framework, tested):
    if importlib.util.find_spec(framework) is not None:
        pytest.skip(f"{framework} is installed")
    with pytest.raises(FrameworkError, match=f"pip install {framework}=={tested}"):
        importlib.import_module(f"layerrl.integrations.{framework}")


def test_another_version_is_a_warning_that_names_both(monkeypatch):
    monkeypatch.setattr(integrations, "version", lambda name: "0.10.0")
    with pytest.warns(UserWarning, match=r"tested with verl 0\.9\.1, and 0\.10\.0 is installed"):
        require("verl", "0.9.1")


def test_the_tested_version_is_no_warning(monkeypatch):
    monkeypatch.setattr(integrations, "version", lambda name: "0.9.1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        require("verl", "0.9.1")


def test_require_asks_for_the_package(monkeypatch):
    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(integrations, "version", version)
    with pytest.raises(FrameworkError, match="plugs into torch, which is not installed"):
        require("torch", "1.0")


@pytest.mark.parametrize("value", [None, "", "  "])
def test_no_selection_is_an_error_that_names_the_variable(value, monkeypatch):
    monkeypatch.delenv("LAYERRL_SELECTION", raising=False)
    if value is not None:
        monkeypatch.setenv("LAYERRL_SELECTION", value)
    with pytest.raises(SelectionError, match="LAYERRL_SELECTION is not set"):
        given()


@pytest.mark.parametrize(
    ("text", "layers"),
    [("1", [1]), ("-1", [-1]), (" 1, 3 ", [1, 3]), ("0,-1", [0, -1]), ("middle:2", "middle:2")],
)
def test_text_is_read_as_select_layers_would(text, layers):
    model = tiny("llama", 4)
    assert read_selection(model, text.strip()) == select_layers(model, layers)


def test_json_holds_boosts_and_parts():
    model = tiny("llama", 4)
    selection = select_layers(model, [1, 2], modules="mlp.*", boost={2: 3.0})
    assert read_selection(model, selection.to_json()) == selection


@pytest.mark.parametrize("text", ["4", "1,1", "1;2", "1-2", "middel", '{"layers": [1]}'])
def test_text_that_means_nothing_is_refused(text):
    with pytest.raises(SelectionError):
        read_selection(tiny("llama", 4), text)


def test_a_selection_of_another_depth_is_refused():
    selection = select_layers(tiny("llama", 3), 1)
    with pytest.raises(SelectionError, match=r"made for 3 decoder layers, but.* 4 decoder layers"):
        read_selection(tiny("llama", 4), selection.to_json())


def test_mask_is_undone_when_it_is_closed():
    model = tiny("llama", 4)
    model.lm_head.weight.requires_grad_(False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    flags = [layer.gradient_checkpointing for layer in model.model.layers]
    assert all(flags)
    selection = select_layers(model, 2)
    with mask(model, selection):
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trained == [*selection.parameters(model)]
        checkpointed = [layer.gradient_checkpointing for layer in model.model.layers]
        assert checkpointed == [False, False, True, True]
        assert not model.get_input_embeddings()(torch.tensor([[3]])).requires_grad
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert [layer.gradient_checkpointing for layer in model.model.layers] == flags
