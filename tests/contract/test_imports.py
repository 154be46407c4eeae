import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import layerrl
from layerrl import errors

ROOT = Path(layerrl.__file__).parents[1]
PUBLIC = [
    "ContributionReport",
    "LayerMaskedGRPOTrainer",
    "LayerMaskedMixin",
    "LayerRLError",
    "LayerSelection",
    "contribution_probe",
    "load_delta",
    "merge_delta",
    "published_contributions",
    "save_delta",
    "select_layers",
]
BUILTIN_BASE = {
    "ModelError": TypeError,
    "SelectionError": ValueError,
    "TrainerError": TypeError,
    "LauncherError": RuntimeError,
    "FrozenTensorError": RuntimeError,
    "DeltaError": ValueError,
    "ReportError": ValueError,
    "JournalError": RuntimeError,
    "ProbeError": ValueError,
    "EpisodeError": ValueError,
    "FrameworkError": ImportError,
}


def run_python(code):
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import layerrl", {"torch", "transformers", "trl", "peft", "matplotlib"}),
        (
            "from layerrl import LayerSelection, select_layers",
            {"transformers", "trl", "peft", "matplotlib"},
        ),
        (
            "from layerrl import LayerRLError",
            {"torch", "transformers", "trl", "peft", "matplotlib"},
        ),
        (
            "from layerrl import ContributionReport, published_contributions",
            {"transformers", "trl", "peft", "matplotlib"},
        ),
    ],
)
def test_import_leaves_heavy_packages_unloaded(statement, heavy):
    loaded = run_python(f"{statement}; import sys; print(*sys.modules)")
    assert "layerrl" in loaded
    assert heavy.isdisjoint(loaded)


def test_import_costs_little_beside_torch():
    code = (
        "import torch, time; start = time.process_time(); import layerrl; "
        "print(time.process_time() - start)"
    )
    assert any(float(run_python(code)[0]) < 0.15 for _ in range(3))


def test_public_names_are_the_documented_ones():
    assert layerrl.__all__ == PUBLIC


def test_dir_lists_the_public_names_before_they_are_loaded():
    listed = run_python("import layerrl; print(*dir(layerrl))")
    assert set(PUBLIC) <= set(listed)
    assert listed == sorted(set(listed))


def test_each_name_is_the_one_of_its_module():
    from layerrl import selection

    assert layerrl.LayerRLError is errors.LayerRLError
    assert layerrl.LayerSelection is selection.LayerSelection
    assert layerrl.select_layers is selection.select_layers


def test_unknown_name_is_an_attribute_error_that_lists_the_known_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'select_layer'.*'select_layers'"):
        layerrl.select_layer  # noqa: B018 - reading it is the test


def test_typing_marker_is_packaged():
    assert (Path(layerrl.__file__).parent / "py.typed").is_file()


def own_errors():
    return [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and value.__module__ == errors.__name__
    ]


def test_all_errors_are_known():
    assert {error.__name__ for error in own_errors()} == {"LayerRLError", *BUILTIN_BASE}


@pytest.mark.parametrize("name", BUILTIN_BASE)
def test_error_is_caught_as_layerrl_error_and_as_its_builtin(name):
    error = getattr(errors, name)
    assert issubclass(error, errors.LayerRLError)
    assert issubclass(error, BUILTIN_BASE[name])


@pytest.mark.parametrize("error", own_errors(), ids=lambda error: error.__name__)
def test_error_is_the_same_after_pickling(error):
    raised = error("layer 31 does not exist")
    copy = pickle.loads(pickle.dumps(raised))
    assert type(copy) is error
    assert copy.args == raised.args
    assert str(copy) == "layer 31 does not exist"
