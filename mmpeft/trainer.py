"""transformers.Trainer for a bridge."""

import json
import math
import re
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback
from transformers.training_args import OptimizerNames

from mmpeft import adapters, checkpoint, durable
from mmpeft.bad_rows import KEY as BAD_ROWS
from mmpeft.data import STREAM
from mmpeft.nonfinite import NonFinite
from mmpeft.sampling import PassSampler
from mmpeft.speed import compiled
from mmpeft.stage import StageConfig
from mmpeft.stopping import leave_signals_to_trainer
from mmpeft.streaming import StreamDataset, StreamSampler

STEPS = "adapter_steps.safetensors"  # what a PEFT method remembers from step to step
NO_DECAY = re.compile(r"(bias|ia3_l)(\.|$)")  # besides what has one dimension
CARRIED = "carried.json"  # what is logged later of the steps so far


class BridgeTrainer(Trainer):
    """Trainer whose checkpoints hold what trains, and which has a learning rate per part."""

    compiled = False
    feature_cache = None  # looks up, or makes, what the frozen encoder would
    adapter_steps = None  # what a PEFT method does besides being trained
    text_kl = None  # the KL to the base on text
    step_rows = ()  # what the batches of the step are made of
    stream = None  # draws the samples of rows that are streamed

    def total_steps(self) -> int:
        """Optimizer steps of the whole stage."""
        streamed = isinstance(self.train_dataset, StreamDataset)  # which has max_steps
        return total_steps(self.args, 0 if streamed else len(self.train_dataset))

    def _get_train_sampler(self, train_dataset=None):
        own, dataset = self.args, self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, StreamDataset):
            batch = own.train_batch_size * own.gradient_accumulation_steps
            self.stream = StreamSampler(dataset, own.max_steps * batch)
            return self.stream
        return PassSampler(
            dataset,
            own.seed if own.data_seed is None else own.data_seed,
            own.train_sampling_strategy, own.train_batch_size,
        )  # fmt: skip

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        own = loader.base_dataloader  # accelerate wraps it
        own.worker_init_fn = partial(leave_signals_to_trainer, own.worker_init_fn)
        # else each new iterator draws from what dropout draws from; persistent workers need fewer
        own.generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def _prepare_inputs(self, inputs):
        inputs = {key: value for key, value in inputs.items() if key != "rows"}
        inputs = super()._prepare_inputs(inputs)
        return inputs if self.feature_cache is None else self.feature_cache.resolve(inputs)

    def training_step(self, model, inputs, *args, **kwargs):
        with compiled(self.model, self.compiled):
            loss = super().training_step(model, inputs, *args, **kwargs)
        self.step_rows += inputs["rows"]
        if not torch.isfinite(loss):
            raise NonFinite("loss", loss.item(), inputs["rows"])
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None and not math.isfinite(norm):  # a scaler skips the step
            raise NonFinite("gradient", float(norm), self.step_rows)
        return norm

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.adapter_steps is not None:
            penalty = self.adapter_steps.penalty(self.model, inputs)
            if penalty is not None:
                loss = loss + penalty * self._share(inputs, num_items_in_batch)
        if not loss.requires_grad and model.training:  # text alone teaches a connector nothing
            loss = loss + 0.0 * sum(p.sum() for p in model.parameters() if p.requires_grad)
        return (loss, outputs) if return_outputs else loss

    def _share(self, inputs: dict, num_items_in_batch) -> torch.Tensor | float:
        """The part of a step's learned tokens that is in this micro-batch: a step's sum to 1."""
        if num_items_in_batch is None:
            return 1.0
        return (inputs["labels"][:, 1:] != -100).sum() / num_items_in_batch

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.step_rows = []
        for batch in samples:
            self.train_dataset.bad_rows.add(batch.pop(BAD_ROWS, []))
            if self.stream is not None:
                self.stream.place = batch.pop(STREAM)
        if self.text_kl is not None:  # counted as transformers counts ``items``
            self.text_kl.positions = self.text_kl.count(samples)
        return samples, items

    def log(self, logs, start_time=None):
        if self.text_kl is not None and "loss" in logs:
            nats, positions = self.text_kl.take()
            if positions:
                logs["kl_to_base"] = (nats / positions).item()
        super().log(logs, start_time)

    def create_optimizer(self, model=None):
        groups = [
            (self.model.connector.parameters(), self.args.connector_learning_rate),
            (
                adapters.adapter_parameters(self.model.language_model),
                self.args.adapter_learning_rate,
            ),
        ]
        groups = [
            {"params": own, "lr": lr, "weight_decay": self.args.weight_decay if decays else 0.0}
            for parameters, lr in groups
            for decays, own in _by_decay(self.model, parameters)
        ]
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        # schedules divide by the first, where an optimizer's own default may be none
        options["lr"] = max(self.args.connector_learning_rate, self.args.adapter_learning_rate)
        self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def _save_checkpoint(self, model, trial):
        """Whole or not at all; only then are older ones removed."""
        if self.feature_cache is not None:  # later pictures must meet the same ones as now
            self.feature_cache.flush()
        folder = Path(self.args.output_dir)
        with durable.whole_folder(folder / f"checkpoint-{self.state.global_step}") as new:
            self._writing_to = new.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._writing_to = None
            if state := self.adapter_steps and self.adapter_steps.state():
                save_file(state, new / STEPS)
            (new / CARRIED).write_text(json.dumps(self.carried()))
        durable.prune(folder, self.args.save_total_limit)

    _writing_to = None

    def _get_output_dir(self, trial):
        return str(self._writing_to or super()._get_output_dir(trial))

    def _save(self, output_dir=None, state_dict=None):
        self.model.save_pretrained(output_dir)  # Trainer would pickle its arguments beside it

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        checkpoint.load_trained(self.model, resume_from_checkpoint)
        if self.adapter_steps and (file := Path(resume_from_checkpoint, STEPS)).is_file():
            self.adapter_steps.load_state(load_file(file))

    def carried(self) -> dict:
        """What steps that were made add to what is logged next."""
        return {
            "loss": self._tr_loss.item(),
            "logged_at": self._globalstep_last_logged,
            "kl": None if self.text_kl is None else self.text_kl.seen.tolist(),
            "stream": self.stream and self.stream.place,
        }

    def carry_on(self, carried: dict) -> None:
        """Go on from what :meth:`carried` gave."""
        self._tr_loss += carried["loss"]
        self._globalstep_last_logged = carried["logged_at"]
        self._total_loss_scalar = -carried["loss"]  # the summary is of the steps from here on
        if self.text_kl is not None:
            self.text_kl.seen = torch.tensor(carried["kl"])
        if self.stream is not None:
            self.stream.place = carried["stream"]


class CarryOn(TrainerCallback):
    """When training goes on, gives the trainer what its checkpoint carried."""

    def __init__(self, trainer: BridgeTrainer, begun: Path):
        self.trainer, self.begun = trainer, begun

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.carry_on(json.loads((self.begun / CARRIED).read_text()))


def _by_decay(model, parameters) -> list[tuple[bool, list]]:
    """What trains of ``parameters``: what decays, and what does not.

    Biases and norms do not, as in transformers, AdaMix's of all experts among them, and no scales
    of (IA)^3: without effect they are 1, not 0.
    """
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    parts = {True: [], False: []}
    for parameter in parameters:
        if parameter.requires_grad:
            decays = parameter.dim() > 1 and not NO_DECAY.search(named[id(parameter)])
            parts[decays].append(parameter)
    return [(decays, own) for decays, own in parts.items() if own]


def total_steps(arguments, samples: int) -> int:
    """Optimizer steps of a stage on so many samples, as Trainer counts them: in whole passes."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    cut = math.floor if arguments.dataloader_drop_last else math.ceil
    batches = cut(samples / arguments.train_batch_size)
    steps = max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
    return math.ceil(steps * arguments.num_train_epochs)


def check_optimizer(name: str, stage: StageConfig, model) -> None:
    """Refuse an optimizer that is not installed, or has no place for two learning rates."""
    key = f"{name}.optim {OptimizerNames(stage.optim).value}"
    try:
        _, options = Trainer.get_optimizer_cls_and_kwargs(stage, model)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{key}: {error}") from None
    if options.keys() & {"params", "optimizer_dict", "model"}:
        raise ValueError(
            f"{key} groups parameters in its own way, which leaves no place for the learning rates "
            "of connector and adapter; use another."
        )
