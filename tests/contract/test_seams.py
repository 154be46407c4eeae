"""What layerrl needs of other packages, one by one taken away or changed, as an upgrade would."""

import ast
import functools
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
import types
import warnings
from pathlib import Path
from unittest import mock

import pytest
import transformers
import trl
from trl.generation.vllm_generation import VLLMGeneration

import layerrl
from layerrl import LayerMaskedGRPOTrainer, seams
from layerrl.errors import FrameworkError
from layerrl.seams import SEAMS, TESTED, check_class, check_made, check_versions, imported
from layerrl.trainer import (
    GiGPOTrainer,
    LayerMaskedDPOTrainer,
    LayerMaskedGiGPOTrainer,
    LayerMaskedKTOTrainer,
    LayerMaskedRLOOTrainer,
    LayerMaskedSFTTrainer,
)
from tests.engines import in_place_of_vllm
from tests.grpo import config, make
from tests.models import tiny

PACKAGE = Path(layerrl.__file__).parent
NEEDS = {
    "transformers.Trainer": LayerMaskedSFTTrainer,
    "trl.GRPOTrainer": LayerMaskedGRPOTrainer,
    "trl.RLOOTrainer": LayerMaskedRLOOTrainer,
    "trl.DPOTrainer": LayerMaskedDPOTrainer,
    "trl.KTOTrainer": LayerMaskedKTOTrainer,
    "layerrl.agents.gigpo.GiGPOTrainer": LayerMaskedGiGPOTrainer,
    "trl.generation.vllm_generation.VLLMGeneration": VLLMGeneration,
}
if hasattr(trl, "DistillationTrainer"):
    from layerrl.trainer import LayerMaskedDistillationTrainer

    NEEDS["trl.DistillationTrainer"] = LayerMaskedDistillationTrainer
TABLE = [seam for seam in SEAMS if seam.by is None or seam.by in NEEDS]
OF_CLASSES = [seam for seam in TABLE if seam.by and not seam.attribute]
OF_OBJECTS = [seam for seam in TABLE if seam.attribute]
IMPORTED = [seam for seam in TABLE if seam.by is None]


def named(chosen):
    return pytest.mark.parametrize("seam", chosen, ids=lambda seam: f"{seam}-{seam.by}")


def refused(seam, check, *given):
    """The sentence that a seam's absence gives."""
    package = seam.of.partition(".")[0]
    with pytest.raises(FrameworkError) as raised:
        check(*given)
    said = str(raised.value)
    assert f"{package} {seams.installed_version(package)} is not as layerrl knows it" in said
    assert seam.name in said
    assert f"which layerrl needs to {seam.use}" in said
    assert f'pip install "{package}>={TESTED[package][0]},<' in said
    assert "or report this message" in said
    return said


def holder(seam):
    """What has the seam as its own, and its last name."""
    place = seams.object_at(seam.of)
    *path, name = seam.name.split(".")
    for step in path:
        place = getattr(place, step)
    if isinstance(place, type):
        place = next((base for base in place.__mro__ if name in vars(base)), place)
    return place, name


def taken_away(monkeypatch, seam):
    place, name = holder(seam)
    if (isinstance(place, type) and place.__module__ != "torch._C") or inspect.ismodule(place):
        monkeypatch.delattr(place, name)
    else:  # an instance's own, or written in C
        real = seams.object_at
        empty = types.SimpleNamespace()
        monkeypatch.setattr(
            seams, "object_at", lambda path: empty if path == seam.of else real(path)
        )


class TestClasses:
    @named([seam for seam in OF_CLASSES if seam.name != "__init__"])
    def test_what_was_renamed_is_one_sentence(self, monkeypatch, seam):
        cls = NEEDS[seam.by]
        check_class(cls)
        taken_away(monkeypatch, seam)
        refused(seam, check_class, cls)

    @named([s for s in OF_CLASSES if s.takes is not None and s.takes != ("...",)])
    def test_what_takes_other_parameters_is_one_sentence(self, monkeypatch, seam):
        place, name = holder(seam)
        names = [text for text in seam.takes if text != "..."]
        first = "" if inspect.ismodule(place) else "self, "
        other = ", ".join([*(f"{text}_" for text in names), "another"])
        monkeypatch.setattr(place, name, eval(f"lambda {first}{other}: None"))
        said = refused(seam, check_class, NEEDS[seam.by])
        assert f"takes ({other}), expected ({', '.join(seam.takes)})" in said

    @named([s for s in OF_CLASSES if s.takes and s.takes[-1] != "..." and s.takes[0] != "..."])
    def test_a_parameter_more_of_what_is_overridden_is_one_sentence(self, monkeypatch, seam):
        place, name = holder(seam)
        first = "" if inspect.ismodule(place) else "self, "
        other = ", ".join([*seam.takes, "another=None"])
        monkeypatch.setattr(place, name, eval(f"lambda {first}{other}: None"))
        assert "another), expected (" in refused(seam, check_class, NEEDS[seam.by])

    def test_any_parameters_are_taken_for_the_right_ones(self, monkeypatch):
        """Tools that patch trainers wrap their methods."""
        monkeypatch.setattr(transformers.Trainer, "_save_checkpoint", lambda *args, **kwargs: None)
        check_class(LayerMaskedGRPOTrainer)

    @pytest.mark.parametrize(
        "patch",
        [
            lambda *args: None,
            functools.partialmethod(lambda self, model, trial: None),
            property(lambda self: None),
            mock.Mock(),
            lambda self, model, **others: None,
        ],
        ids=["*args", "partialmethod", "property", "a mock", "**others"],
    )
    def test_patches_of_any_kind_are_taken(self, monkeypatch, patch):
        monkeypatch.setattr(transformers.Trainer, "_save_checkpoint", patch)
        check_class(LayerMaskedGRPOTrainer)

    def test_other_names_beside_any_more_are_one_sentence(self, monkeypatch):
        monkeypatch.setattr(
            transformers.Trainer, "_save_checkpoint", lambda self, trial, model, **others: None
        )
        with pytest.raises(FrameworkError, match=r"takes \(trial, model\), expected"):
            check_class(LayerMaskedGRPOTrainer)

    def test_an_experimental_trainer_of_the_same_name_is_another(self, monkeypatch):
        other = type("GRPOTrainer", (transformers.Trainer,), {"__module__": "trl.experimental.x"})
        check_class(type("Masked", (other,), {}))

    def test_a_hook_that_wants_a_whole_model_is_not_known_from_here(self, monkeypatch):
        monkeypatch.setattr(
            transformers.PreTrainedModel,
            "enable_input_require_grads",
            lambda self: self.model.embed_tokens,
        )
        check_class(LayerMaskedSFTTrainer)

    def test_a_hook_of_another_name_is_one_sentence(self, monkeypatch):
        def enable_input_require_grads(self):
            self.get_input_embeddings().register_forward_hook(lambda *_: None)

        monkeypatch.setattr(
            transformers.PreTrainedModel, "enable_input_require_grads", enable_input_require_grads
        )
        with pytest.raises(FrameworkError, match=r"hook <lambda>, expected make_inputs_require"):
            check_class(LayerMaskedSFTTrainer)

    def test_several_are_one_error(self, monkeypatch):
        monkeypatch.delattr(transformers.Trainer, "_load_best_model")
        monkeypatch.delattr(trl.GRPOTrainer, "_generate_and_score_completions")
        with pytest.raises(FrameworkError) as raised:
            check_class(LayerMaskedGRPOTrainer)
        assert "Trainer has no _load_best_model, which" in str(raised.value)
        assert "GRPOTrainer has no _generate_and_score_completions, which" in str(raised.value)

    def test_what_a_class_does_not_need_may_be_missing(self, monkeypatch):
        monkeypatch.delattr(trl.GRPOTrainer, "_generate_and_score_completions")
        check_class(LayerMaskedSFTTrainer)

    def test_a_class_that_a_tool_has_put_in_trl_s_place_is_checked_as_trl_s(self, monkeypatch):
        class Patched(transformers.Trainer):
            pass

        monkeypatch.setattr(trl, "GRPOTrainer", Patched)
        with pytest.raises(FrameworkError, match="has no _generate_and_score_completions"):
            check_class(type("Masked", (Patched,), {}))

    def test_before_weights_are_loaded(self, monkeypatch, tmp_path):
        monkeypatch.delattr(transformers.Trainer, "_load_best_model")
        with pytest.raises(FrameworkError, match="_load_best_model"):
            LayerMaskedGRPOTrainer("no/such-model", None, args=config(tmp_path), selection=1)

    def test_of_gigpo_without_a_mask_too(self, monkeypatch):
        monkeypatch.delattr(trl.GRPOTrainer, "_log_metric")
        with pytest.raises(FrameworkError, match="_log_metric"):
            GiGPOTrainer("no/such-model", rollout_func=print)


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    """A trainer of its own generation, and one with a stand-in for vLLM that sleeps."""
    patch = pytest.MonkeyPatch()
    with in_place_of_vllm(patch):
        vllm = {"use_vllm": True, "vllm_mode": "colocate", "vllm_enable_sleep_mode": True}
        return [
            make(tiny("llama", 4), tmp_path_factory.mktemp("run"), selection=1, **changes)
            for changes in ({}, vllm)
        ]


class TestObjects:
    @named([s for s in OF_OBJECTS if s.by != "trl.RLOOTrainer" and s.by in NEEDS])
    def test_what_is_not_set_is_one_sentence(self, monkeypatch, trainers, seam):
        own, served = trainers
        made = served if "vllm" in f"{seam.of}{seam.name}" else own
        made = made.vllm_generation if seam.of.endswith("VLLMGeneration") else made
        if seam.name == "model.is_quantized":
            monkeypatch.setattr(made.model, "hf_quantizer", object(), raising=False)
        elif seam.name == "model.hf_quantizer":
            monkeypatch.setattr(made.model, "is_quantized", True, raising=False)
        else:
            if seam.when and not seam.when(made):
                pytest.skip("an older TRL does without it")
            check_made(made)
            *path, name = seam.name.split(".")
            place = made
            for step in path:
                place = getattr(place, step)
            monkeypatch.delattr(place if name in vars(place) else type(place), name)
        if seam.by in ("trl.DistillationTrainer", "layerrl.agents.gigpo.GiGPOTrainer"):
            monkeypatch.setattr(seams, "_base", lambda cls, path: cls if path == seam.by else None)
        refused(seam, check_made, made)

    def test_is_checked_when_a_trainer_is_made(self, monkeypatch, tmp_path):
        init = trl.GRPOTrainer.__init__

        def renaming(self, *args, **kwargs):
            init(self, *args, **kwargs)
            self.kl_coef = self.__dict__.pop("beta")

        monkeypatch.setattr(trl.GRPOTrainer, "__init__", renaming)
        model = tiny("llama", 2)
        with pytest.raises(FrameworkError, match="GRPOTrainer has no attribute beta, which"):
            make(model, tmp_path, selection=1)
        assert all(parameter.requires_grad for parameter in model.parameters())


class TestImports:
    @named(IMPORTED)
    def test_what_was_renamed_is_one_sentence(self, monkeypatch, seam):
        taken_away(monkeypatch, seam)

        module, _, cls = seam.of.rpartition(".")

        def look_up():
            with imported():
                if cls[0].isupper():
                    getattr(getattr(importlib.import_module(module), cls), seam.name)
                else:
                    exec(f"from {seam.of} import {seam.name}")

        refused(seam, look_up)

    def test_at_the_top_of_the_trainers_too(self):
        code = (
            "import trl; trl.GRPOTrainer; import trl.trainer.callbacks as module; "
            "del module.BEMACallback; import layerrl.trainer"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        [*_, said] = done.stderr.strip().splitlines()
        assert said.startswith("layerrl.errors.FrameworkError: trl ")
        assert "trl.trainer.callbacks has no BEMACallback, which layerrl needs" in said

    def test_a_module_that_cannot_import_is_not_taken_for_missing(self, monkeypatch, tmp_path):
        (tmp_path / "broken_module.py").write_text("import no_such_module", encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ModuleNotFoundError, match="no_such_module"):
            seams.object_at("broken_module.Trainer")
        assert seams.object_at("no_such_module.Trainer") is None

    def test_a_package_that_is_not_there_is_named(self, monkeypatch):
        monkeypatch.setattr(seams, "installed_version", lambda package: None)
        expected = r"trl is not installed.*pip install \"trl>=1"
        with pytest.raises(FrameworkError, match=expected), imported():
            raise ModuleNotFoundError("No module named 'trl'", name="trl")

    def test_what_another_package_misses_is_not_laid_at_layerrl_s_door(self):
        code = (
            "import transformers.trainer as module; del module.Trainer; import transformers; "
            "transformers.__dict__.pop('Trainer', None); import layerrl.trainer"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        [*_, said] = done.stderr.strip().splitlines()
        assert re.search(r"FrameworkError: trl .* cannot be imported beside transformers", said)

    def test_errors_of_other_packages_stay_what_they_are(self):
        for error in (ModuleNotFoundError("no", name="vllm"), AttributeError("no")):
            with pytest.raises(type(error)) as raised, imported():
                raise error
            assert raised.value is error


class TestVersions:
    @pytest.fixture(autouse=True)
    def _anew(self):
        check_versions.cache_clear()
        yield
        check_versions.cache_clear()

    def installed(self, monkeypatch, **versions):
        monkeypatch.setattr(seams, "installed_version", lambda package: versions.get(package))

    @pytest.mark.parametrize(
        ("package", "version"),
        [
            ("torch", "2.10.1+cu128"),
            ("transformers", "4.57.6"),
            ("accelerate", "1.10.0"),
            ("trl", "1.8.2"),
        ],
    )
    def test_below_the_lowest_is_an_error(self, monkeypatch, package, version):
        self.installed(monkeypatch, **{package: version})
        lowest = TESTED[package][0]
        expected = f"{package} {version} is installed, and layerrl needs {package} {lowest} or"
        for check in (check_versions, lambda: check_class(LayerMaskedGRPOTrainer)):
            with pytest.raises(FrameworkError, match=re.escape(expected)):
                check()

    @pytest.mark.parametrize("edge", [0, 1], ids=["lowest", "highest"])
    @pytest.mark.parametrize("suffix", ["", ".0", ".0+cpu", ".3.dev0"])
    def test_in_the_range_nothing_is_said(self, monkeypatch, edge, suffix):
        self.installed(monkeypatch, **{p: limits[edge] + suffix for p, limits in TESTED.items()})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_versions()

    def test_above_the_highest_there_is_one_warning_in_a_process(self, monkeypatch):
        self.installed(monkeypatch, transformers="5.999.0", trl="1.999")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            check_class(LayerMaskedGRPOTrainer)
            check_class(LayerMaskedSFTTrainer)
        [warning] = said
        assert warning.filename == __file__
        assert "transformers 5.999.0 (tested with 5.9 to" in str(warning.message)
        assert "trl 1.999 (tested with 1.9 to" in str(warning.message)

    def test_lowest_are_those_that_pip_is_told(self):
        project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
        told = dict(re.match(r"(\w+)>=([\d.]+)", text).groups() for text in project["dependencies"])
        assert {package: told[package] for package in TESTED} == {
            package: lowest for package, (lowest, _) in TESTED.items()
        }


# Attributes that may be missing for reasons of their own, and are looked for with a default.
MAY_BE_MISSING = {
    "only an error of the hub's client that has an answer has it": {
        "response",
        "status_code",
        "server_message",
    },
    "only a trainer that pushes, or one of TRL, has it; a model card goes without": {
        "jobs",
        "push_in_progress",
        "train_dataset",
        "_name",
        "_tag_names",
        "info",
        "download_checksums",
    },
    "trainers of transformers 5.18 have it": {"end"},
    "a transformers model or config has it, others do not": {
        "config",
        "_attn_implementation",
        "name_or_path",
        "model_type",
        "get_text_config",
        "attribute_map",
        "base_model",
        "base_model_prefix",
        "generation_config",
        "get_decoder",
        "get_encoder",
        "weight",
        "is_encoder_decoder",
        "num_experts",
        "num_experts_per_tok",
        "num_hidden_layers",
        "num_local_experts",
        "quantization_config",
        "quant_method",
        "save_pretrained",
        "vision_feature_layer",
        "vocab_size",
        "_commit_hash",
        "_keep_in_fp32_modules",
    },
    "only a model that torch has compiled has it": {"_orig_mod"},
    "a tokenizer, a processor or a reward has it": {
        "tokenizer",
        "get_vocab",
        "chat_template",
        "__len__",
        "__name__",
        "__code__",
    },
    "only some trainers generate, take a reference or an environment": {
        "environment_factories",
        "rollout_func",
        "model_init_kwargs",
        "num_generations",
        "num_generations_eval",
        "num_iterations",
        "ref_model",
        "steps_per_generation",
        "trust_remote_code",
        "weight_sync_steps",
        "hub_model_id",
    },
    "only some optimizers, data loaders or wrappers have it": {
        "batch_sampler",
        "sampler",
        "optimizer_dict",
        "param_groups",
        "state",
        "value",
    },
    "only under a launcher, which tests/launchers starts": {
        "ds_inflight_param_registry",
        "ds_shape",
        "ds_tensor",
        "partition",
        "reshard",
        "unshard",
    },
    "without it, more is computed than has to be, with the same result": {
        "_gradient_checkpointing_func",
        "keywords",
        "_original_forward",
    },
    "only tensors or layers of bitsandbytes have it": {"quant_state", "support_avx512bf16_for_cpu"},
    "only an older or a newer TRL has it": {
        "_push_param_to_vllm",
        "eos_token_ids",
        "liger_loss",
        "DistillationTrainer",
        "LayerMaskedDistillationTrainer",
    },
    "only models that were loaded, and some conversions in that, have it": {
        "_weight_conversions",
        "hf_quantizer",
        "operations",
    },
    "only PEFT's wrapper has it": {"peft_config", "get_base_model"},
    "only some of PEFT's configs, layers or models have it": {
        "bias",
        "disable_adapters",
        "frozen_peft_weight_names",
        "init_lora_weights",
        "layer_replication",
        "layers_to_transform",
        "modules_to_save",
        "original_module",
        "parameter_name",
        "target_modules",
        "targeted_module_names",
        "targeted_parameter_names",
        "trainable_token_indices",
    },
    "Python's, or layerrl's own": {
        "_fields",
        "__dict__",
        "__func__",
        "__globals__",
        "__qualname__",
        "__version__",
        "checkpoint_format",
        "masked_run",
        "func",
        "rollout_rows",
        "tolist",
    },
}


# Those of TRL's asynchronous trainers, of which layerrl.trainer.announced says itself what is gone.
ANNOUNCED = {"_streaming_iter", "weight_transfer"}


MISSING = "give each a line in layerrl/seam_table.py: its name, and what layerrl needs it for"


class TestTable:
    """That nothing is missing in it, as far as the sources show."""

    names = frozenset(part for s in SEAMS for part in (*s.name.split("."), *(s.takes or ())))

    @staticmethod
    def nodes(*kinds):
        for path in sorted(PACKAGE.rglob("*.py")):
            if "integrations" not in path.parts:
                for node in ast.walk(ast.parse(path.read_text())):
                    if isinstance(node, kinds):
                        yield path.relative_to(PACKAGE).as_posix(), node

    def test_has_every_method_that_trainers_override(self):
        overridden = {
            node.attr
            for file, node in self.nodes(ast.Attribute)
            if file.endswith(("_hooks.py", "trainer/mixin.py", "agents/gigpo.py"))
            and ast.unparse(node.value) == "super()"
        }
        assert {"_save_checkpoint", "create_optimizer"} <= overridden
        python = {"__new__", "__init__", "__init_subclass__", "__post_init__"}
        assert overridden - python - self.names == set(), MISSING

    def test_has_every_private_attribute_of_others(self):
        own = {"_asdict", "_replace"}  # namedtuples'
        for _, node in self.nodes(ast.FunctionDef, ast.Attribute, ast.Name, ast.Assign):
            if isinstance(node, ast.FunctionDef):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own |= {node.attr} if ast.unparse(node.value) in ("self", "cls") else set()
        used = {
            node.attr
            for _, node in self.nodes(ast.Attribute)
            if re.match(r"_[^_]", node.attr) and node.attr not in own - self.names
        }
        assert {"_metrics", "_weight_metadata"} <= used
        may = {name for names in MAY_BE_MISSING.values() for name in names}
        assert used - {"_C"} - ANNOUNCED - may - self.names == set(), MISSING

    def test_has_every_attribute_that_is_set_in_a_trainer(self):
        found = {
            node.attr
            for _, node in self.nodes(ast.Attribute)
            if isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "trainer"
        }
        found |= {
            keyword.arg
            for _, node in self.nodes(ast.Call)
            if ast.unparse(node.func) == "replaced" and ast.unparse(node.args[0]) == "trainer"
            for keyword in node.keywords
        }
        assert {"_calculate_rewards", "num_generations_eval"} <= found
        # Its own; and what is there while a training runs, see test_upstream.
        known = {"current_gradient_accumulation_steps"} | ANNOUNCED
        assert found - known - self.names == set(), MISSING

    def inner_imports(self):
        """What is imported from a package's modules, or is private, below `layerrl.trainer`."""
        outer = ("trainer/", "agents/", "scores/", "compatibility.py")  # imported through it
        for file, node in self.nodes(ast.ImportFrom):
            package, _, inner = (node.module or "").partition(".")
            names = {alias.name for alias in node.names}
            if package == "torch":  # whose modules are its interface
                names = {name for name in names if name.startswith("_")}
            if package in TESTED and inner and names and not file.startswith(outer):
                yield f"{file}:{node.lineno}", node, names

    def test_has_every_name_that_is_imported_from_inside_a_package(self):
        assert len([*self.inner_imports()]) > 5
        for place, node, names in self.inner_imports():
            known = {seam.name for seam in SEAMS if seam.of == node.module}
            assert names - known == set(), f"{place}: {MISSING}"

    def test_every_such_import_gives_the_sentence(self):
        inside = {
            f"{file}:{statement.lineno}"
            for file, node in self.nodes(ast.With)
            if any(ast.unparse(item.context_expr) == "imported()" for item in node.items)
            for statement in node.body
        }
        for place, *_ in self.inner_imports():
            assert place in inside, "put the import into `with imported():` of layerrl/seams.py"

    def test_tells_of_everything_that_may_be_missing_why(self):
        looked_for = {
            node.args[1].value
            for _, node in self.nodes(ast.Call)
            if ast.unparse(node.func) in ("getattr", "hasattr")
            and (ast.unparse(node.func) == "hasattr" or len(node.args) == 3)
            and isinstance(node.args[1], ast.Constant)
        }
        known = ANNOUNCED | {name for names in MAY_BE_MISSING.values() for name in names}
        said = "say in MAY_BE_MISSING above why it may be; or else, "
        assert looked_for - self.names - known == set(), said + MISSING
        assert known - looked_for == set(), "take it out of MAY_BE_MISSING: nothing looks for it"
