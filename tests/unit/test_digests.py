"""Digests that lie on disk must stay what they were: in deltas, journals, reports."""

import pytest
from torch import nn

from layerrl.delta import DeltaBase
from layerrl.digests import json_digest
from layerrl.scores.identity import digest as digest_of_run
from layerrl.sweep.harness import weights_digest

VALUE = {"b": 1, "a": [1.5, None, "é"], "c": {"y": True, "x": {}}}
MARKS = {"layers.1.w": "00112233aabbccdd", "layers.0.w": "ffeeddccbbaa9988"}


def test_of_a_deltas_description():
    expected = "e8c7114776d6b3a25ea955c0d732eb1f1e0330f3ae93190a7f05fb683375b477"
    assert json_digest(VALUE) == json_digest(dict(reversed(VALUE.items()))) == expected


def test_of_a_deltas_base():
    nothing = dict.fromkeys(("name", "revision", "model_type", "vocabulary", "config"))
    base = DeltaBase(
        **nothing, trained=(), dtypes={}, shapes={}, fingerprints=MARKS, tied={}, quantised=()
    )
    assert base.digest == "9f969e54819af5aba97aa2edf52312827901fa8f40865f83939a9e8973301562"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((), "e3b0c44298fc1c14"),
        ((None,), "74234e98afe7498f"),
        (("x", "y"), "2f51c6b5f4cb95c2"),
        (({"p": object},), "7c81337b4c50fa3c"),
        ((VALUE, MARKS, {1: 2}.keys()), "28491fbe58d7bb1d"),
    ],
)
def test_of_a_runs_settings(values, expected):
    assert digest_of_run(*values) == expected


def test_of_a_sweeps_base_follows_the_models_order():
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(11)))  # "10" comes before "2" if sorted
    for number, parameter in enumerate(model.parameters()):
        nn.init.constant_(parameter, number)
    assert weights_digest(model) == "c3f3915d272efa3f"
