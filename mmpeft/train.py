"""Training: build the parts, hand them to transformers.Trainer, stage by stage."""

import sys
from pathlib import Path

from transformers import TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from mmpeft import adapters, checkpoint, durable, starts, text_kl
from mmpeft.adapter_steps import AdapterSteps, check_schedule, steps_of
from mmpeft.calibration import calibrate
from mmpeft.config import STAGES, RunConfig, load
from mmpeft.data import Collator, ConversationDataset
from mmpeft.feature_cache import FlushFeatures
from mmpeft.feature_setup import prepare
from mmpeft.language_model import check_context
from mmpeft.metrics_file import MetricsFile
from mmpeft.model import BridgeForConditionalGeneration
from mmpeft.nonfinite import KeepRows, NonFinite, report
from mmpeft.processing import BridgeProcessor
from mmpeft.run_folder import check_run_folder, finished, keeps_features, start_run_folder
from mmpeft.speed import can_pack, choose_logits, compile_layers, compiled
from mmpeft.stopping import how_to_go_on, no_worker_left, resumable
from mmpeft.streaming import StreamDataset
from mmpeft.trainer import BridgeTrainer, CarryOn, check_optimizer, total_steps
from mmpeft.training_data import TrainingData


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


def check_stages(config: RunConfig, data: TrainingData, model) -> None:
    """Refuse a stage without optimizer or batch, or too short for AdaLoRA or retention."""
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
    if config.instruct is None:
        return
    streamed = isinstance(data.instruct, StreamDataset)
    steps = total_steps(config.instruct, 0 if streamed else len(data.instruct))
    check_schedule(getattr(model.language_model, "peft_config", {}).get("default"), steps)
    every = config.retention.every_steps if config.retention is not None else 0
    if every > steps:
        raise ValueError(
            f"retention.every_steps is {every}, but stage instruct has {steps} steps; nothing "
            "would be measured. Lower it, or set retention to null."
        )


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
