"""Training: build the parts, hand them to transformers.Trainer, stage by stage."""

import io
import json
import math
import os
import platform
import re
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.training_args import OptimizerNames

from mmpeft import adapters, checkpoint, durable, starts, text_kl
from mmpeft.adapter_steps import AdapterSteps, steps_of
from mmpeft.bad_rows import KEY as BAD_ROWS
from mmpeft.calibration import calibrate
from mmpeft.config import STAGES, RunConfig, load
from mmpeft.data import STREAM, Collator, ConversationDataset
from mmpeft.feature_cache import FlushFeatures
from mmpeft.feature_setup import prepare
from mmpeft.language_model import check_context
from mmpeft.model import BridgeForConditionalGeneration
from mmpeft.nonfinite import KeepRows, NonFinite, report
from mmpeft.processing import BridgeProcessor
from mmpeft.sampling import PassSampler
from mmpeft.speed import can_pack, choose_logits, compile_layers, compiled
from mmpeft.stage import StageConfig
from mmpeft.stopping import how_to_go_on, leave_signals_to_trainer, no_worker_left, resumable
from mmpeft.streaming import StreamDataset, StreamSampler
from mmpeft.training_data import TrainingData
from mmpeft.yaml_file import read_yaml

STEPS = "adapter_steps.safetensors"  # what a PEFT method remembers from step to step
NO_DECAY = re.compile(r"(bias|ia3_l)(\.|$)")  # besides what has one dimension
CARRIED = "carried.json"  # what is logged later of the steps so far
ENVIRONMENT = "environment.json"
# what may change when a run goes on: no loss depends on it
FREE = (
    "output_dir",  # by which the run was found
    "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_pin_memory",
    "dataloader_prefetch_factor", "save_steps", "save_strategy", "save_total_limit",
    "feature_cache_dir", "feature_cache_gb", "on_bad_row", "max_bad_rows", "check_rows",
)  # fmt: skip


def train(recipe, overrides: list[str] = (), resume: bool = False, callbacks=()) -> Path:
    """Run a recipe from start to end, or on from its last whole checkpoint.

    Args:
        recipe: YAML file, see ``configs/``.
        overrides: command-line style, for example ``["--instruct.max_steps", "50"]``.
        resume: continue an interrupted run; the configuration must be the one it began with, but
            for what no loss depends on (``FREE``).
        callbacks: further ``TrainerCallback``s, for every stage.

    Returns:
        the run folder.

    Raises:
        FileExistsError: the run folder exists, or another run makes it, and ``resume`` is off.
        ValueError: a bad configuration or a bad row, named; a loss that is no number.
        NotWritten: the disk is full; what was whole is whole.
        Stopped: SIGTERM or SIGINT came, and a checkpoint was written.
    """
    config, resolved = load(recipe, overrides)
    run = Path(config.output_dir)
    check_run_folder(run, resolved, resume)
    set_seed(config.seed)
    model, processor = build(config)
    choose_logits(model, config.speed)
    packing = config.speed.packing and can_pack(model, processor.max_length)
    check_context(model.language_model, processor.max_length)
    collator = Collator(processor.tokenizer.pad_token_id, packing, config.speed.pad_to_multiple_of)
    data = TrainingData.load(model, processor, config)
    place_encoder(model, config)
    kept = keeps_features(run) if resume else None
    cache = prepare(model, processor, config, data.sources, kept)
    if config.model.start_from is None:  # else it brings its statistics
        calibrate(model, data.align, cache=cache)
    watch = watch_retention(model, data.vision, config)
    also = [*callbacks, *([watch] if watch else [])]  # in stage instruct
    check_stages(config, data, model)
    if not resume:  # only now: a mistake found so far leaves no folder behind
        start_run_folder(run, resolved, cache)
    data.bad_rows.keep_in(run)
    stages = [name for name in STAGES if getattr(config, name) is not None]
    for stage in stages:
        last = stage == stages[-1]
        final = run / "checkpoint" if last else run / "stages" / stage / "final"
        if finished(final):
            if not last:
                checkpoint.load_trained(model, final)
            continue
        set_seed(config.seed)  # a stage begins alike, whatever was done before it
        if stage == "instruct" and config.model.rank == "auto":
            from mmpeft.rank import settle_rank

            settle_rank(model, data, collator, config, cache)
        folder = run / "stages" / stage
        begun = durable.last_good(folder) if resume else None
        if stage == "instruct":
            start_adapter(model, config, data, cache, begun)
        # stage align trains the connector alone, which text never meets
        rows, watching = (data.align, callbacks) if stage == "align" else (data.instruct, also)
        train_stage(model, rows, collator, config, stage, folder, begun, cache, watching)
        data.bad_rows.say()
        with resumable(stage, folder), durable.whole_folder(final) as new:
            model.save_pretrained(new)
            processor.save_pretrained(new)
    print(f"trained: {run}", file=sys.stderr)
    return run


def start_adapter(model, config: RunConfig, data: TrainingData, cache, begun: Path | None) -> None:
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
    else:
        for mark in run.glob("stages/*/*/complete"):  # what stood for checksums.json then
            if not (mark.parent / durable.CHECKSUMS).exists():
                raise ValueError(
                    f"{run} was begun with an older mmpeft, which drew samples in another order; "
                    "finish it with that one, or begin anew with another --output_dir."
                )
        read_yaml(recorded, "config")  # says so where it is none
        keys = differing(yaml.safe_load(recorded.read_text()), yaml.safe_load(resolved))
        if keys:
            raise ValueError(
                f"{run} was begun with another configuration: {', '.join(keys)} differ."
            )


def differing(was, now) -> list[str]:
    """Dotted names of what differs between two configurations, ``FREE`` apart."""
    if isinstance(was, dict) and isinstance(now, dict):
        keys = [key for key in was | now if key not in FREE]
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        keys, was, now = range(len(was)), dict(enumerate(was)), dict(enumerate(now))
    else:
        return [] if was == now else [""]
    below = [(key, differing(was.get(key, ...), now.get(key, ...))) for key in keys]
    return [f"{key}.{name}".removesuffix(".") for key, names in below for name in names]


def check_stages(config: RunConfig, data: TrainingData, model) -> None:
    """Refuse a stage without optimizer or batch, or that ends before retention is measured."""
    for name, rows in (("align", data.align), ("instruct", data.instruct)):
        stage = getattr(config, name)
        if stage is None:
            continue
        check_optimizer(name, stage, model)
        if isinstance(rows, StreamDataset) or not stage.dataloader_drop_last:
            continue
        if len(rows) < stage.train_batch_size:
            raise ValueError(
                f"{name}: {len(rows)} samples are less than a batch of {stage.train_batch_size}, "
                "which dataloader_drop_last drops; lower per_device_train_batch_size."
            )
    if config.retention is not None:
        steps = total_steps(config.instruct, len(data.instruct))
        if (every := config.retention.every_steps) > steps:
            raise ValueError(
                f"retention.every_steps is {every}, but stage instruct has {steps} steps; nothing "
                "would be measured. Lower it, or set retention to null."
            )


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


def start_run_folder(run: Path, resolved: str, cache) -> None:
    """Create the run folder with the resolved configuration and the environment."""
    found = environment() | {"features_kept": cache is not None and cache.store is not None}
    with durable.whole_folder(run, checksums=False, replace=False) as new:
        (new / ENVIRONMENT).write_text(json.dumps(found, indent=2) + "\n")
        (new / "config.yaml").write_text(resolved)


def keeps_features(run: Path) -> bool | None:
    """Whether the run kept features when it began, ``None`` if unknown.

    It was decided by the clock then, and features that are made anew may be rounded otherwise.
    """
    path = run / ENVIRONMENT
    return json.loads(path.read_text()).get("features_kept") if path.is_file() else None


def finished(final: Path) -> bool:
    """Whether a stage has its last checkpoint; a torn one is said to be made again."""
    if not final.exists():
        return False
    if not (final / durable.CHECKSUMS).is_file() or (why := durable.problem(final)) is None:
        return True
    print(f"{final} is torn: {why}; its stage goes on from its own checkpoints.", file=sys.stderr)
    return False


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
    model, dataset, collator, config: RunConfig, stage: str, folder: Path, begun: Path | None,
    cache=None, callbacks=(),
) -> None:  # fmt: skip
    """One stage on ``transformers.Trainer``.

    Args:
        folder: for its checkpoints.
        begun: the one to go on from.
    """
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
    metrics = MetricsFile(folder.parent.parent, stage)
    trainer = BridgeTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=KeepRows(collator),
        callbacks=[metrics, *callbacks],
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
    if begun is not None:
        trainer.add_callback(CarryOn(trainer, begun))
    checkpointing = arguments.activation_checkpointing or arguments.gradient_checkpointing
    trainer.compiled = compile_layers(
        model, config.speed.compile, trainer.total_steps(), arguments.device,
        bool(collator.packing and checkpointing),
    )  # fmt: skip
    try:
        with (
            resumable(stage, folder) as finish,
            no_worker_left(),
            compiled(model, False),  # only steps, not what callbacks measure between them
        ):
            trainer.add_callback(finish)
            if begun is not None and has_ended(begun, trainer.total_steps(), callbacks):
                checkpoint.load_trained(model, begun)  # nothing is left to be done
                metrics.write(TrainerState.load_from_json(str(begun / TRAINER_STATE_NAME)))
            else:
                trainer.train(resume_from_checkpoint=begun and str(begun))
    except NonFinite as found:
        step = trainer.state.global_step + 1
        path = folder.parent.parent / f"nonfinite_{stage}_step_{step}.json"
        report(found, model, dataset.processor.tokenizer, stage, step, path)
        found.args = (
            f"stage {stage}, step {step}: {found}; its rows are in {path}. If they are at fault, "
            f"mend them; {how_to_go_on(stage, folder)} Else begin anew with a lower learning rate.",
        )
        raise
    finally:
        model.text_kl = None
        if cache is not None:
            cache.flush()


def watch_retention(model, dataset: ConversationDataset, config: RunConfig):
    """The callback that measures text skills, None without ``config.retention``."""
    if config.retention is None:
        return None
    from mmpeft.retention.callback import RetentionCallback

    rows = dataset.good_rows(dataset.held_out)
    if not rows:
        raise ValueError(
            f"all {len(dataset.held_out)} rows held out for retention.vision_samples are bad; mend "
            "them, or raise it."
        )
    return RetentionCallback(
        config.retention, Path(config.output_dir), model, dataset.processor, dataset.task, rows,
        config.seed,
    )  # fmt: skip


def has_ended(begun: Path, steps: int, callbacks) -> bool:
    """Whether nothing is left to be done behind a checkpoint."""
    from mmpeft.retention.callback import RetentionCallback

    step = durable.step_of(begun)
    watches = [one for one in callbacks if isinstance(one, RetentionCallback)]
    return step >= steps or any(watch.has_stopped(step) for watch in watches)


def total_steps(arguments, samples: int) -> int:
    """Optimizer steps of a stage on so many samples, as Trainer counts them: in whole passes."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    cut = math.floor if arguments.dataloader_drop_last else math.ceil
    batches = cut(samples / arguments.train_batch_size)
    steps = max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
    return math.ceil(steps * arguments.num_train_epochs)


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
        """The part of a step's learned tokens that is in this micro-batch: a step's sum to 1.

        Over processes, whose gradients are averaged, to their number, as Trainer scales the loss.
        """
        if num_items_in_batch is None:
            return 1.0
        share = (inputs["labels"][:, 1:] != -100).sum() / num_items_in_batch
        across = self.args.average_tokens_across_devices
        return share * self.accelerator.num_processes if across else share

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


class MetricsFile(TrainerCallback):
    """Keeps ``metrics.jsonl`` and ``loss.png`` of the run up to date."""

    def __init__(self, run: Path, stage: str):
        self.run, self.stage = run, stage

    def write(self, state):
        """Everything that was logged, and the picture of it."""
        path = self.run / "metrics.jsonl"
        others = []
        if path.is_file():
            others = [r for r in map(json.loads, path.open()) if r["stage"] != self.stage]
        rows = others + [{"stage": self.stage, **entry} for entry in state.log_history]
        durable.write(path, "".join(json.dumps(row) + "\n" for row in rows))
        draw_loss(rows, self.run / "loss.png")

    def on_save(self, args, state, control, **kwargs):
        self.write(state)

    def on_train_end(self, args, state, control, **kwargs):
        self.write(state)


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
    figure.savefig(picture := io.BytesIO(), dpi=120, format="png")
    durable.write(path, picture.getvalue())


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
