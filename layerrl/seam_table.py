"""What layerrl needs of torch, transformers and TRL beside their documented interfaces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from layerrl.seam import Seam


def _seams(of: str, uses: Mapping[str, str], by: str | None = "", **more: Any) -> Iterator[Seam]:
    """Rows of the table; by default, it is the trainers of that class that need them."""
    for text, use in uses.items():
        name, bracket, takes = text.rstrip(")").partition("(")
        parameters = tuple(filter(None, takes.split(", "))) if bracket else None
        yield Seam(of, name, parameters, use, of if by == "" else by, **more)


def _rows(by: str | None, table: Mapping[str, Mapping[str, str]]) -> Iterator[Seam]:
    for of, uses in table.items():
        yield from _seams(of, uses, by)


_EVERY = "transformers.Trainer"
_VLLM = "trl.generation.vllm_generation.VLLMGeneration"
_GENERATING = {
    "_generate_and_score_completions(inputs)": "tell the passes over a batch from other calls"
}
_REWARDING = {
    **_GENERATING,
    "_get_per_token_logps_and_entropies(model, ...)": "replay the prefix, weigh log-probabilities",
    "_calculate_rewards(inputs, ...)": "choose layers by what is rewarded",
}
_REWARDING_ATTRIBUTES = {
    "beta": "put the reference back that the trainer is made without",
    "_metrics": "keep the probe's metrics apart from the training's",
    "_logs": "log each completion with the step that trains on it",
    "num_generations": "tell a prompt's completions from another's",
    "num_generations_eval": "evaluate each prompt once where it is decoded greedily",
    "num_iterations": "have log-probabilities kept with a batch",
    "reward_weights": "weigh rewards as the trainer does",
    "reward_func_names": "name rewards",
    "max_completion_length": "say which completions were cut off",
}
_REFERENCE = {"__init__(..., ref_model)": "take the model that was passed for the reference"}
_REFERENCE_ARGS = {
    "sync_ref_model": "let the reference follow the policy",
    "precompute_ref_log_probs": "leave a reference alone that is computed once",
}


def _of_generating_trainers() -> Iterator[Seam]:
    for name in ("GRPO", "RLOO", "Distillation"):
        trainer = f"trl.{name}Trainer"
        yield from _seams(trainer, _GENERATING if name == "Distillation" else _REWARDING)
        settings = {"use_vllm": "find out whether vLLM has to be sent anything"}
        yield from _seams(f"trl.{name}Config", settings, by=trainer)
        yield from _seams(
            trainer,
            {"vllm_generation": "send vLLM what was trained, and no more"},
            attribute=True,
            when=lambda trainer: trainer.args.use_vllm,
        )
    for name in ("GRPO", "RLOO"):
        trainer = f"trl.{name}Trainer"
        yield from _seams(trainer, _REWARDING_ATTRIBUTES, attribute=True)
        yield from _seams(
            trainer,
            {"generation_config": "evaluate greedily"},
            attribute=True,
            when=lambda trainer: not trainer.args.use_vllm,
        )
        settings = {
            "beta": "make the trainer without a second model for its reference",
            "sync_ref_model": "let the reference follow the policy",
            "use_transformers_continuous_batching": "refuse to have the model cast",
        }
        yield from _seams(f"trl.{name}Config", settings, by=trainer)
    yield from _seams(
        "trl.GRPOTrainer",
        {"use_adaptive_entropy": "hold the entropy's coefficient while layers are chosen"},
        attribute=True,
    )
    yield from _seams(
        "trl.GRPOTrainer",
        {
            "__init__(..., rollout_func)": "play episodes",
            "_log_metric(name, value)": "log what happened in episodes",
            "_tokenize_prompts(prompts)": "start episodes",
            "_generate_single_turn(prompt_ids, images, multimodal_fields, ...)": "play turns",
        },
        by="layerrl.agents.gigpo.GiGPOTrainer",
    )
    yield from _seams(
        "trl.GRPOTrainer",
        {
            "_tokenizer": "read actions and write observations",
            "chat_template": "write observations",
            "chat_template_kwargs": "write observations",
            "scale_rewards": "scale the steps' advantages",
        },
        by="layerrl.agents.gigpo.GiGPOTrainer",
        attribute=True,
    )


_BESIDE_TRAINERS = {
    "transformers.TrainerCallback": {
        "on_init_end(args, state, control, ...)": "mask a model before it is announced",
        "on_train_begin(args, state, control, ...)": "check what is frozen when it was loaded",
        "on_train_end(args, state, control, ...)": "check what is frozen at the end",
        "on_step_begin(args, state, control, ...)": "let layers take turns",
        "on_pre_optimizer_step(args, state, control, ...)": "measure the layers' gradients",
        "on_push_begin(args, state, control, ...)": "push a delta where readers look for it",
    },
    "transformers.trainer": {
        "validate_quantization_for_training(model)": "train on a quantised base"
    },
    "transformers.PreTrainedModel": {
        "enable_input_require_grads()": "end the backward at the first trained layer",
        "_hf_peft_config_loaded": "refuse adapters beside a selection",
    },
    "transformers.modeling_layers.GradientCheckpointingLayer": {
        "gradient_checkpointing": "recompute only layers that the backward visits"
    },
    "accelerate.state.AcceleratorState": {
        "__init__(..., fsdp_plugin)": "know FSDP2, and refuse FSDP1",
        "deepspeed_plugin": "know DeepSpeed",
    },
}
_OF_TORCH = {
    "torch.nn.Module()": {
        "_forward_hooks": "take the hook off that lengthens the backward",
        "_non_persistent_buffers_set": "compare the buffers that are saved",
        "_parameters": "compare what is frozen",
        "_buffers": "compare what is frozen",
        "_modules": "find the model in a launcher's wrapper",
        "_compiled_call_impl": "run compiled layers, and replay them",
    },
    "torch.Tensor": {
        "_version": "notice when a frozen tensor is written to",
        "_backward_hooks": "show hooks of the user the gradients of the training alone",
    },
    "torch._C": {
        "_swap_tensor_impl(...)": "update half-precision weights in float32",
        "_are_functorch_transforms_active(...)": "replay nothing where tensors have no values",
        "_autograd._top_saved_tensors_default_hooks(...)": "checkpoint layers reentrantly",
    },
    "torch.distributed.tensor.DTensor": dict.fromkeys(
        ("_local_tensor", "_spec"), "update sharded half-precision weights in float32"
    ),
}
_SCRIPT = {
    "make_parser(...)": "take the options of TRL's script",
    "main(script_args, training_args, model_args, dataset_args)": "train with them",
}
_IMPORTED = {
    "torch.nn.modules.module": {
        "_IncompatibleKeys": "load the reference's values",
        **{
            f"_global_{kind}_hooks": "replay nothing that a hook has to see"
            for kind in ("forward", "forward_pre", "backward", "backward_pre")
        },
    },
    "torch.nn.modules.dropout": {"_DropoutNd": "replay nothing random"},
    "torch.nn.modules.batchnorm": {"_BatchNorm": "replay nothing that is counted"},
    "transformers.core_model_loading": {
        "revert_weight_conversion(model, state_dict)": "name a delta's tensors as on disk",
        "WeightConverter": "find a delta's tensors in a base",
        "WeightRenaming": "find a delta's tensors in a base",
        "dot_natural_key(...)": "find a delta's tensors in a base",
        "rename_source_key(...)": "find a delta's tensors in a base",
    },
    "transformers.conversion_mapping": {
        "get_model_conversion_mapping(model, ...)": "find a delta's tensors in a base"
    },
    "accelerate.optimizer": {"AcceleratedOptimizer": "find the optimizer in its wrapper"},
    **{f"trl.scripts.{method}": _SCRIPT for method in ("grpo", "rloo", "dpo", "kto", "sft")},
    "trl.trainer.utils": {"create_model_from_path(path, ...)": "probe as TRL's scripts load"},
    "torch.autograd.grad_mode": {
        "_unsafe_preserve_version_counter(tensors)": "show the base's values for a while"
    },
    "transformers.pytorch_utils": {"Conv1D": "know GPT-2's linear layers"},
    "transformers.PreTrainedModel": {
        "_from_config(config, ...)": "make a model of names and shapes without weights"
    },
    "transformers.quantizers.base": {
        "HfQuantizer": "know what stays in full precision",
        "get_keys_to_not_convert(model)": "know what stays in full precision",
    },
    "transformers.quantizers.base.HfQuantizer": {
        "get_modules_to_not_convert(...)": "know what stays in full precision"
    },
    "transformers.quantizers.quantizers_utils": {
        "should_convert_module(...)": "know what is quantised"
    },
}

SEAMS: tuple[Seam, ...] = (
    # Overridden in every trainer.
    *_seams(
        _EVERY,
        {
            "train(resume_from_checkpoint, ...)": "mask the model while it trains",
            "call_model_init(trial)": "mask the models that model_init makes",
            "create_optimizer(...)": "give the optimizer what trains, and nothing else",
            "create_scheduler(...)": "follow the tensors when the model has been sharded",
            "training_step(model, inputs, ...)": "say why a loss has no gradient",
            "compute_loss(model, inputs, ...)": "end the backward at the first trained layer",
            "log(logs, ...)": "log the layers' metrics",
            "evaluate(...)": "check frozen tensors before an evaluation shards the model",
            "predict(...)": "check frozen tensors before a prediction shards the model",
            "add_callback(callback)": "refuse callbacks that take a delta for a model",
            "save_model(output_dir, _internal_call)": "write deltas and check what is frozen",
            "create_model_card(...)": "say how to load a delta",
            "init_hf_repo(...)": "say why a repository cannot be pushed to",
            "push_to_hub(...)": "say why a repository cannot be pushed to",
            "_save_checkpoint(model, trial)": "write a checkpoint whole, beside a delta",
            "_load_optimizer_and_scheduler(checkpoint)": "load the optimizer beside a delta",
            "_load_from_checkpoint(resume_from_checkpoint, model)": "resume from a delta",
            "_load_best_model()": "load the best delta",
        },
    ),
    # Called in every trainer.
    *_seams(
        _EVERY,
        {
            "_save(output_dir, state_dict, ...)": "write what goes with a model beside a delta",
            "_get_output_dir(trial)": "know a checkpoint's folder before it is written",
            "_move_model_to_device(model, device)": "move the models that model_init makes",
            "_prepare_inputs(...)": "evaluate prompts",
            "get_train_dataloader()": "choose layers on the first batches",
            "get_eval_dataloader(eval_dataset, ...)": "evaluate prompts",
            "is_world_process_zero()": "write once where several processes train",
            "remove_callback(callback)": "replace the callback that lets the reference follow",
        },
    ),
    *_seams(
        _EVERY,
        {
            "is_fsdp_enabled": "save the optimizer of FSDP2 as any other beside a delta",
            "place_model_on_device": "move the models that model_init makes",
            "model_wrapped": "have DDP wrap a model that was evaluated before its training",
            "optimizer": "give the optimizer what trains, and nothing else",
            "optimizer_cls_and_kwargs": "refuse optimizers that update in the backward",
            "model_init": "mask the models that it makes",
            "processing_class": "check its tokens, and save it with a delta",
            "callback_handler.callbacks": "refuse callbacks that frozen tensors would break",
            "accelerator.state": "know the launcher",
            "state.save_to_json": "record a checkpoint's files before it is pushed",
        },
        attribute=True,
    ),
    *_seams(
        _EVERY,
        {"model.is_quantized": "know a quantised base"},
        attribute=True,
        when=lambda trainer: getattr(trainer.model, "hf_quantizer", None) is not None,
    ),
    *_seams(
        _EVERY,
        {"model.hf_quantizer": "know by what a base is quantised"},
        attribute=True,
        when=lambda trainer: getattr(trainer.model, "is_quantized", False),
    ),
    *_rows(_EVERY, _BESIDE_TRAINERS),
    *_of_generating_trainers(),
    *_seams("trl.DPOTrainer", _REFERENCE),
    *_seams("trl.KTOTrainer", _REFERENCE),
    *_seams("trl.DPOConfig", _REFERENCE_ARGS, by="trl.DPOTrainer"),
    *_seams("trl.KTOConfig", _REFERENCE_ARGS, by="trl.KTOTrainer"),
    *_seams(
        "trl.trainer.callbacks.SyncRefModelCallback",
        {"sync_target_model(model, target_model, alpha)": "let the reference follow the policy"},
        by=_EVERY,
    ),
    # Of what TRL sends weights with.
    *_seams(
        _VLLM,
        {
            "sync_weights()": "send vLLM what was trained, and no more",
            "generate(...)": "send vLLM everything after a checkpoint was loaded",
        },
    ),
    *_seams(
        _VLLM,
        {
            "model": "send vLLM what was trained, and no more",
            "mode": "know whether the engine sleeps",
            "enable_sleep_mode": "send vLLM everything after it slept",
            "_dist.fsdp_version": "send vLLM everything under FSDP1",
        },
        attribute=True,
    ),
    *_seams(
        _VLLM,
        {"_weight_metadata": "announce to vLLM what is sent, and no more"},
        attribute=True,
        # An older TRL (1.9) pushes tensor by tensor, and announces nothing.
        when=lambda vllm: not hasattr(vllm, "_push_param_to_vllm"),
    ),
    *_rows(_EVERY, _OF_TORCH),
    *_rows(None, _IMPORTED),
)
"""The table. What is imported at the top of `layerrl.trainer` and is public there is not in it."""
