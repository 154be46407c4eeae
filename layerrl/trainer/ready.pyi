"""The arguments of TRL's trainers and of the mixin, written by `make signatures`."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig, PeftModel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import EvalPrediction
from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.distillation_trainer import DistillationTrainer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import EnvironmentFactory, GRPOTrainer, RolloutFunc
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from layerrl.agents.gigpo import Datasets, GiGPOConfig, GiGPOTrainer, Tokenizers
from layerrl.selection import LayerSelection
from layerrl.trainer.mixin import LayerMaskedMixin

class LayerMaskedGRPOTrainer(LayerMaskedMixin, GRPOTrainer):
    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: str
        | PreTrainedModel
        | Callable[..., Any]
        | list[str | PreTrainedModel | Callable[..., Any]]
        | None = None,
        args: GRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase
        | list[PreTrainedTokenizerBase]
        | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[
            torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None
        ] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable] | None = None,
        rollout_func: RolloutFunc | None = None,
        environment_factory: EnvironmentFactory | dict[str, EnvironmentFactory] | None = None,
        *,
        selection: LayerSelection | int | Iterable[int] | slice | str,
        prefix_cache_bytes: int = 2 * 2**30,
        master_weights: bool = True,
        checkpoint_format: Literal["delta", "full"] = "delta",
    ) -> None: ...

class LayerMaskedGiGPOTrainer(LayerMaskedMixin, GiGPOTrainer):
    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: str
        | PreTrainedModel
        | Callable[..., Any]
        | list[str | PreTrainedModel | Callable[..., Any]]
        | None = None,
        args: GiGPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        *,
        rollout_func: Callable[[list[Any], Any], dict[str, Any]],
        eval_dataset: Datasets | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: Tokenizers | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        tools: None = None,
        environment_factory: None = None,
        selection: LayerSelection | int | Iterable[int] | slice | str,
        prefix_cache_bytes: int = 2 * 2**30,
        master_weights: bool = True,
        checkpoint_format: Literal["delta", "full"] = "delta",
    ) -> None: ...

class LayerMaskedRLOOTrainer(LayerMaskedMixin, RLOOTrainer):
    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: str
        | PreTrainedModel
        | Callable[..., Any]
        | list[str | PreTrainedModel | Callable[..., Any]],
        args: RLOOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase
        | list[PreTrainedTokenizerBase]
        | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[
            torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None
        ] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        *,
        selection: LayerSelection | int | Iterable[int] | slice | str,
        prefix_cache_bytes: int = 2 * 2**30,
        master_weights: bool = True,
        checkpoint_format: Literal["delta", "full"] = "delta",
    ) -> None: ...

class LayerMaskedDPOTrainer(LayerMaskedMixin, DPOTrainer):
    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[
            torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None
        ] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        *,
        selection: LayerSelection | int | Iterable[int] | slice | str,
        prefix_cache_bytes: int = 2 * 2**30,
        master_weights: bool = True,
        checkpoint_format: Literal["delta", "full"] = "delta",
    ) -> None: ...

class LayerMaskedKTOTrainer(LayerMaskedMixin, KTOTrainer):
    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: KTOConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[
            torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None
        ] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        *,
        selection: LayerSelection | int | Iterable[int] | slice | str,
        prefix_cache_bytes: int = 2 * 2**30,
        master_weights: bool = True,
        checkpoint_format: Literal["delta", "full"] = "delta",
    ) -> None: ...

class LayerMaskedSFTTrainer(LayerMaskedMixin, SFTTrainer):
    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SFTConfig | TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[
            torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None
        ] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
        | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[dict], str] | None = None,
        *,
        selection: LayerSelection | int | Iterable[int] | slice | str,
        prefix_cache_bytes: int = 2 * 2**30,
        master_weights: bool = True,
        checkpoint_format: Literal["delta", "full"] = "delta",
    ) -> None: ...

class LayerMaskedRewardTrainer(LayerMaskedMixin, RewardTrainer):
    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: RewardConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[
            torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None
        ] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
        | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        *,
        selection: LayerSelection | int | Iterable[int] | slice | str,
        prefix_cache_bytes: int = 2 * 2**30,
        master_weights: bool = True,
        checkpoint_format: Literal["delta", "full"] = "delta",
    ) -> None: ...

class LayerMaskedDistillationTrainer(LayerMaskedMixin, DistillationTrainer):
    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        teacher_model: str | PreTrainedModel | None = None,
        args: DistillationConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[
            torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None
        ] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable] | None = None,
        *,
        selection: LayerSelection | int | Iterable[int] | slice | str,
        prefix_cache_bytes: int = 2 * 2**30,
        master_weights: bool = True,
        checkpoint_format: Literal["delta", "full"] = "delta",
    ) -> None: ...
