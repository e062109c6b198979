"""Settings of a training stage."""

import os
from dataclasses import dataclass

import torch
from transformers import TrainingArguments

from mmpeft.config_errors import did_you_mean

AS_THEY_ARE = {  # keys of transformers that have no effect here, or a wrong one
    "learning_rate": "set connector_learning_rate and adapter_learning_rate",
    "seed": "set seed of the recipe",
    "data_seed": "set seed of the recipe",
    "output_dir": "set output_dir of the recipe",
    "label_smoothing_factor": "the bridge's own loss has no smoothing",
    "neftune_noise_alpha": "a frozen LLM's embeddings take no noise",
    "save_only_model": "--resume needs the optimizer; save_total_limit bounds what is kept",
    "remove_unused_columns": "samples are made of rows, not of columns",
    "eval_strategy": "retention of the recipe watches while it trains, mmpeft eval scores it",
    "eval_on_start": "retention of the recipe watches while it trains, mmpeft eval scores it",
    "ignore_data_skip": "--resume would learn from the first samples again",
    "load_best_model_at_end": "retention of the recipe keeps the best as RUN/best",
}
AT_LEAST = {
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "save_total_limit": 1,
    "dataloader_num_workers": 0, "connector_learning_rate": 0, "adapter_learning_rate": 0,
    "warmup_steps": 0, "kl_weight": 0,
}  # fmt: skip
ORDERS = ("random", "sequential", "group_by_length")


@dataclass
class StageConfig(TrainingArguments):
    """One training stage: transformers' TrainingArguments, and a learning rate per part.

    Attributes:
        connector_learning_rate: peak learning rate of the connector.
        adapter_learning_rate: peak learning rate of the adapter.
        freeze_connector: train the adapter alone; nothing below its first layer then has a graph.
        kl_weight: weight of the KL to the base in the loss, in nats a token: in rows of text alone,
            of data.replay and of any other task that has some, where the LLM speaks, the bridge is
            held to what the LLM says with its adapter off. metrics.jsonl has the divergence as
            kl_to_base; loss is the sum of both.
        bf16: as transformers' (autocast to bfloat16), also where there is a CPU alone.
        train_sampling_strategy: order of the samples: random, sequential, or group_by_length, whose
            batches are all with pictures or all without, but for the last one or two of a pass, and
            about equally long; less padding where there is no packing, and steps of one kind.
        dataloader_num_workers: processes that make samples; null is up to 4 for a CUDA device, as
            far as there are CPU cores beside the one that trains, and otherwise 0: on a CPU,
            samples are a hundredth of the work, and workers would take its cores.
        dataloader_pin_memory: page-locked batches, copied while the device computes; null is: for
            a CUDA device.
        dataloader_persistent_workers: keep the workers from epoch to epoch; null is: if any.
    """

    output_dir: str | None = None  # set from the run folder
    connector_learning_rate: float = 1e-3
    adapter_learning_rate: float = 2e-4
    freeze_connector: bool = False
    kl_weight: float = 0.0
    logging_steps: float = 10
    save_steps: float = 100
    save_total_limit: int | None = 2
    lr_scheduler_type: str = "cosine"
    report_to: str | list[str] = "none"
    remove_unused_columns: bool = False
    dataloader_num_workers: int | None = None
    dataloader_pin_memory: bool | None = None
    dataloader_persistent_workers: bool | None = None
    disable_tqdm: bool | None = False

    def __post_init__(self):
        self._check()
        if self.torch_compile:
            raise ValueError(
                "torch_compile would compile the whole bridge anew for every length; set "
                "speed.compile: on, which compiles the LLM's layers for all of them."
            )
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        cuda = torch.cuda.is_available() and not self.use_cpu
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = max(0, min(4, _free_cores())) if cuda else 0
        if self.dataloader_pin_memory is None:
            self.dataloader_pin_memory = cuda
        if self.dataloader_persistent_workers is None:
            self.dataloader_persistent_workers = self.dataloader_num_workers > 0
        if self.dataloader_num_workers:  # a tokenizer with threads warns when it is forked
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        super().__post_init__()
        self._check_reports()
        if (self.activation_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "activation_checkpointing_kwargs.use_reentrant true walks back through what layers "
                "share (prompts, masks) once for each; leave it out."
            )

    def _check(self):
        """Refuse what would do nothing, or something else than it says."""
        for key, why in AS_THEY_ARE.items():
            value = getattr(self, key)
            if value != type(self).__dataclass_fields__[key].default:
                raise ValueError(f"{key} of a stage is {value!r}; leave it out: {why}.")
        for key, least in AT_LEAST.items():
            if (value := getattr(self, key)) is not None and value < least:
                raise ValueError(f"{key} is {value}; it must be {least} or more.")
        if self.max_steps != -1 and self.max_steps < 1:
            raise ValueError(f"max_steps is {self.max_steps}; it must be 1 or more, or left out.")
        if self.max_steps == -1 and self.num_train_epochs <= 0:
            raise ValueError(f"num_train_epochs is {self.num_train_epochs}; it must be above 0.")
        if self.train_sampling_strategy not in ORDERS:
            raise ValueError(
                f"train_sampling_strategy is {self.train_sampling_strategy!r}; use "
                f"{' or '.join(ORDERS)}.{did_you_mean(self.train_sampling_strategy, ORDERS)}"
            )
        if floors := {"min_lr", "lr_end"} & {*(self.lr_scheduler_kwargs or {})}:
            raise ValueError(
                f"lr_scheduler_kwargs.{min(floors)} is a learning rate, and a stage has two; use a "
                "schedule with min_lr_rate, a share of both."
            )
        if getattr(self.save_strategy, "value", self.save_strategy) == "best":
            raise ValueError("save_strategy best needs an evaluation; use steps, epoch or no.")

    def _check_reports(self):
        from transformers.integrations.integration_utils import get_available_reporting_integrations

        there = get_available_reporting_integrations()
        asked = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        if missing := [name for name in asked if name not in (*there, "none", "all")]:
            raise ValueError(
                f"report_to is {missing[0]!r}, whose package is not installed here; use "
                f"{', '.join([*there, 'none'])}."
            )


def _free_cores() -> int:
    """CPU cores for each training process of this machine, beside its own."""
    if hasattr(os, "sched_getaffinity"):  # a container may be given fewer than there are
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1
