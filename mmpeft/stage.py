"""Settings of a training stage."""

import os
from dataclasses import dataclass

import torch
from transformers import TrainingArguments

ELSEWHERE = {  # keys of transformers that something else of a recipe decides
    "learning_rate": "connector_learning_rate and adapter_learning_rate",
    "seed": "seed of the recipe",
    "data_seed": "seed of the recipe",
    "output_dir": "output_dir of the recipe",
}


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
        if self.kl_weight < 0:
            raise ValueError(f"kl_weight is {self.kl_weight}; it must be 0 or more.")
        if self.train_sampling_strategy == "batch_rebalance":
            raise ValueError(
                "train_sampling_strategy batch_rebalance evens out several processes, training "
                "runs in one; use group_by_length."
            )
        for key, instead in ELSEWHERE.items():
            if getattr(self, key) != type(self).__dataclass_fields__[key].default:
                raise ValueError(f"{key} of a stage would change nothing; set {instead}.")
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
        if (self.activation_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "activation_checkpointing_kwargs.use_reentrant true walks back through what layers "
                "share (prompts, masks) once for each; leave it out."
            )


def _free_cores() -> int:
    """CPU cores for each training process of this machine, beside its own."""
    if hasattr(os, "sched_getaffinity"):  # a container may be given fewer than there are
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1
