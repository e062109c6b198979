"""Training: build the parts, hand them to transformers.Trainer, stage by stage."""

import json
import math
import os
import platform
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, set_seed

from mmpeft import adapters, checkpoint, starts, text_kl
from mmpeft.adapter_steps import AdapterSteps, steps_of
from mmpeft.calibration import calibrate
from mmpeft.config import STAGES, RunConfig, load
from mmpeft.data import Collator, ConversationDataset
from mmpeft.feature_cache import FlushFeatures
from mmpeft.feature_setup import prepare
from mmpeft.model import BridgeForConditionalGeneration
from mmpeft.processing import BridgeProcessor
from mmpeft.speed import can_pack, choose_logits, compile_layers, compiled
from mmpeft.training_data import TrainingData

STEPS = "adapter_steps.safetensors"  # what a PEFT method remembers from step to step
COMPLETE = "complete"  # written last into a Trainer checkpoint; one without it is torn


def train(recipe, overrides: list[str] = (), resume: bool = False, callbacks=()) -> Path:
    """Run a recipe from start to end, or on from its last complete checkpoint.

    Args:
        recipe: YAML file, see ``configs/``.
        overrides: command-line style, for example ``["--instruct.max_steps", "50"]``.
        resume: continue an interrupted run; the configuration must be the one it began with.
        callbacks: further ``TrainerCallback``s, for every stage.

    Returns:
        the run folder.

    Raises:
        FileExistsError: the run folder exists and ``resume`` is off.
        ValueError: a bad configuration or a bad row, named.
    """
    config, resolved = load(recipe, overrides)
    run = Path(config.output_dir)
    check_run_folder(run, resolved, resume)
    set_seed(config.seed)
    model, processor = build(config)
    choose_logits(model, config.speed)
    packing = config.speed.packing and can_pack(model, processor.max_length)
    collator = Collator(processor.tokenizer.pad_token_id, packing, config.speed.pad_to_multiple_of)
    data = TrainingData.load(model, processor, config)
    place_encoder(model, config)
    cache = prepare(model, processor, config, data.sources)
    if config.model.start_from is None:  # else it brings its statistics
        calibrate(model, data.align, cache=cache)
    watch = watch_retention(model, data.vision, config)
    also = [*callbacks, *([watch] if watch else [])]  # in stage instruct
    if not resume:  # only now: a mistake found so far leaves no folder behind
        start_run_folder(run, resolved)
    stages = [name for name in STAGES if getattr(config, name) is not None]
    for stage in stages:
        last = stage == stages[-1]
        final = run / "checkpoint" if last else run / "stages" / stage / "final"
        if stage == "instruct" and config.model.rank == "auto":
            from mmpeft.rank import settle_rank

            settle_rank(model, data.vision, collator, config, cache)
        if final.exists():
            if not last:
                checkpoint.load_trained(model, final)
            continue
        folder = run / "stages" / stage
        if stage == "instruct":
            begun = last_complete_checkpoint(folder) if resume else None
            start_adapter(model, config, data, cache, begun)
        # stage align trains the connector alone, which text never meets
        rows, watching = (data.align, callbacks) if stage == "align" else (data.instruct, also)
        train_stage(model, rows, collator, config, stage, folder, resume, cache, watching)
        save_final(model, processor, final)
    print(f"trained: {run}", file=sys.stderr)
    return run


def start_adapter(model, config: RunConfig, data: TrainingData, cache, begun: str | None) -> None:
    """Start the adapter from data if it asks for that, or as in the checkpoint that goes on."""
    if begun is None:
        starts.start_from_data(model, config, data, cache)
    elif starts.start_of(config.model.adapter) in starts.FROM_DATA:  # may have moved ranks
        model.replace_adapter(checkpoint.adapter_config(begun), new=False)


def check_run_folder(run: Path, resolved: str, resume: bool) -> None:
    """Refuse to write into another run's folder, or to resume with another configuration."""
    recorded = run / "config.yaml"
    if not resume:
        if run.exists():
            raise FileExistsError(
                f"run folder {run} exists; continue it with --resume, choose another "
                "--output_dir, or remove it."
            )
    elif not recorded.is_file():
        raise FileNotFoundError(f"nothing to resume: {recorded} does not exist.")
    elif (was := recorded.read_text()) != resolved:
        changed = set(was.splitlines()) ^ set(resolved.splitlines())
        keys = sorted({line.strip().split(":")[0] for line in changed})
        raise ValueError(f"{run} was begun with another configuration: {', '.join(keys)} differ.")


def start_run_folder(run: Path, resolved: str) -> None:
    """Create the run folder with the resolved configuration and the environment."""
    run.mkdir(parents=True)
    (run / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
    (run / "config.yaml").write_text(resolved)


def build(config: RunConfig):
    """Model and processor of a configuration."""
    parts = config.model
    if parts.start_from is not None:
        model = BridgeForConditionalGeneration.from_pretrained(
            parts.start_from, dtype=parts.dtype, adapter=parts.adapter, gate=parts.gate
        )
    else:
        model = BridgeForConditionalGeneration.from_parts(
            parts.vision_encoder, parts.connector, parts.language_model, adapter=parts.adapter,
            gate=parts.gate or "none", dtype=parts.dtype or "float32", revision=parts.revision,
            resolution=parts.resolution,
        )  # fmt: skip
    print(f"images: {model.layout}", file=sys.stderr)
    text_kl.check(config, model.config.gate)
    starts.check(config)
    for stage in (name for name in STAGES if getattr(config, name) is not None):
        adapters.set_trainable(model, **config.trained_parts(stage))
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                f"stage {stage} has nothing to train: this connector has no parameters or is frozen"
                + (f"; set {stage} to null." if stage == "align" else "; set model.adapter.")
            )
    processor = BridgeProcessor.from_model(model, config.data.max_length, parts.chat_template)
    if parts.start_from is not None and parts.chat_template is None:  # goes on as it was taught
        max_length = processor.max_length
        processor = BridgeProcessor.from_pretrained(checkpoint.find_checkpoint(parts.start_from))
        processor.max_length = max_length
    return model, processor


def place_encoder(model, config: RunConfig) -> None:
    """Move the vision encoder to the device that will train, before it first encodes."""
    stages = [getattr(config, name) for name in STAGES if getattr(config, name) is not None]
    if stages:
        model.vision_encoder.to(stages[0].device)


def train_stage(
    model, dataset, collator, config: RunConfig, stage: str, folder: Path, resume: bool,
    cache=None, callbacks=(),
) -> None:  # fmt: skip
    """One stage on ``transformers.Trainer``."""
    arguments = getattr(config, stage)
    if arguments.n_gpu > 1 or arguments.world_size > 1:
        raise ValueError(
            f"training runs in one process on one device, here are {arguments.world_size} "
            f"processes with {arguments.n_gpu} GPUs each; start one with `mmpeft train`, and "
            "choose its GPU by CUDA_VISIBLE_DEVICES."
        )
    arguments.output_dir = str(folder)
    arguments.seed = arguments.data_seed = config.seed
    adapters.set_trainable(model, **config.trained_parts(stage))
    plan = adapters.render_freeze_plan(adapters.freeze_plan(model))
    print(f"\nstage {stage}\n{plan}", file=sys.stderr)
    trainer = BridgeTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collator,
        callbacks=[MetricsFile(folder.parent.parent, stage), *callbacks],
    )
    for callback in callbacks:
        callback.trainer = trainer  # to log through
    if cache is not None:
        trainer.feature_cache = cache
        trainer.add_callback(FlushFeatures(cache))
    steps = steps_of(model.language_model)
    if steps is not None and config.trained_parts(stage)["adapter"]:
        trainer.adapter_steps = steps
        trainer.add_callback(AdapterSteps(steps))
    if arguments.kl_weight:
        trainer.text_kl = model.text_kl = text_kl.TextKL(arguments.kl_weight)
    trainer.compiled = compile_layers(
        model, config.speed.compile, trainer.total_steps(), arguments.device
    )
    try:
        with compiled(model, False):  # only steps, not what callbacks measure between them
            trainer.train(
                resume_from_checkpoint=last_complete_checkpoint(folder) if resume else None
            )
    finally:
        model.text_kl = None
        if cache is not None:
            cache.flush()


def watch_retention(model, dataset: ConversationDataset, config: RunConfig):
    """The callback that measures text skills, None without ``config.retention``."""
    if config.retention is None:
        return None
    from mmpeft.retention.callback import RetentionCallback

    return RetentionCallback(
        config.retention, Path(config.output_dir), model, dataset.processor, dataset.task,
        [dataset.rows[number] for number in dataset.held_out], config.seed,
    )  # fmt: skip


def total_steps(arguments, samples: int) -> int:
    """Optimizer steps of a stage on so many samples."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps
    return math.ceil(samples * arguments.num_train_epochs / batch)


class BridgeTrainer(Trainer):
    """Trainer whose checkpoints hold what trains, and which has a learning rate per part."""

    compiled = False
    feature_cache = None  # looks up, or makes, what the frozen encoder would
    adapter_steps = None  # what a PEFT method does besides being trained
    text_kl = None  # the KL to the base on text

    def total_steps(self) -> int:
        """Optimizer steps of the whole stage."""
        return total_steps(self.args, len(self.train_dataset))

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        return inputs if self.feature_cache is None else self.feature_cache.resolve(inputs)

    def training_step(self, *args, **kwargs):
        with compiled(self.model, self.compiled):
            return super().training_step(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.adapter_steps is not None:
            penalty = self.adapter_steps.penalty(self.model, inputs)
            if penalty is not None:  # once a step, however many micro-batches it has
                loss = loss + penalty / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
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
            for decays, own in _by_decay(p for p in parameters if p.requires_grad)
        ]
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        self.optimizer = optimizer_class([options | group for group in groups])
        return self.optimizer

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if state := self.adapter_steps and self.adapter_steps.state():
            save_file(state, folder / STEPS)
        os.sync()
        (folder / COMPLETE).touch()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        checkpoint.load_trained(self.model, resume_from_checkpoint)
        if self.adapter_steps and (file := Path(resume_from_checkpoint, STEPS)).is_file():
            self.adapter_steps.load_state(load_file(file))


def _by_decay(parameters) -> list[tuple[bool, list]]:
    """Parameters that decay, and those that do not: biases and norms, as in transformers."""
    parts = {True: [], False: []}
    for parameter in parameters:
        parts[parameter.dim() > 1].append(parameter)
    return [(decays, own) for decays, own in parts.items() if own]


def last_complete_checkpoint(folder: Path) -> str | None:
    """The newest Trainer checkpoint that was written to its end."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    newest = max(complete, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)
    return None if newest is None else str(newest)


def save_final(model, processor, final: Path) -> None:
    """Write a finished stage whole or not at all."""
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    partial.rename(final)


class MetricsFile(TrainerCallback):
    """Keeps ``metrics.jsonl`` and ``loss.png`` of the run up to date."""

    def __init__(self, run: Path, stage: str):
        self.run, self.stage = run, stage

    def _write(self, state):
        path = self.run / "metrics.jsonl"
        others = []
        if path.is_file():
            others = [r for r in map(json.loads, path.open()) if r["stage"] != self.stage]
        rows = others + [{"stage": self.stage, **entry} for entry in state.log_history]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        draw_loss(rows, self.run / "loss.png")

    def on_save(self, args, state, control, **kwargs):
        self._write(state)

    def on_train_end(self, args, state, control, **kwargs):
        self._write(state)


def draw_loss(rows: list[dict], path: Path) -> None:
    """The loss of every stage over its steps, one after the other; text skills below it."""
    from matplotlib.figure import Figure

    watched = sorted({key for row in rows for key in row if key.startswith("retention/")})
    figure = Figure(figsize=(7, 6 if watched else 3.5), layout="constrained")
    axes, *below = figure.subplots(2 if watched else 1, sharex=True, squeeze=False).flat
    offset = 0
    for stage in dict.fromkeys(row["stage"] for row in rows):
        own = [row for row in rows if row["stage"] == stage]
        points = [(r["step"], r["loss"]) for r in own if "loss" in r]
        for key in watched:
            seen = [(offset + r["step"], 100 * r[key]) for r in own if key in r]
            if seen:
                below[0].plot(*zip(*seen, strict=True), "o-", label=key.removeprefix("retention/"))
        if points:
            steps, losses = zip(*points, strict=True)
            axes.plot([offset + step for step in steps], losses, label=stage)
            offset += steps[-1]
    axes.set(ylabel="loss, with penalties\n(nats per supervised token)", ylim=(0, None))
    axes.grid(alpha=0.3)
    if offset:
        axes.legend()
    if watched:
        below[0].set(ylabel="vision: score, %\ntext: bridge - base, points")
        below[0].axhline(0, color="grey", linewidth=0.8)
        below[0].grid(alpha=0.3)
        below[0].legend()
    figure.axes[-1].set(xlabel="step")
    figure.savefig(path, dpi=120)


def environment() -> dict:
    """Versions and hardware that a result depends on."""
    packages = ("mmpeft", "torch", "transformers", "peft", "timm", "open_clip_torch", "accelerate")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: version(name) for name in packages},
    }
