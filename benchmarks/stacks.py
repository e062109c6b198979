"""One model, one data set, two stacks: ours, and the one a user of transformers and peft builds.

Each runs in a process of its own, on ``transformers.Trainer``, and trains when told to:
``python -m benchmarks.stacks SETTING.json`` reads a number of steps a line and answers each with
one line of JSON. Both begin with the same weights, see the same rows in the same order, and compute
in the same precision.
"""

import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

LLM, VIT = "starter:smollm2-135m-instruct", "starter:vit-small-saliency"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
LEARNING_RATE = 1e-3


@dataclass
class Setting:
    """What a stack trains.

    Attributes:
        stack: ``ours`` or ``theirs``.
        data: folder in the form of easy-VQA.
        folder: where the process may write.
        image_size: pixels a side; the encoder's patches are of 14.
        questions: about each image, in one step.
        chats: theirs has the questions about an image as turns of one chat, not in a row each.
        images: a step.
        steps: of the whole schedule.
        seed: draws the weights and the order of the rows.
        dtype: of the frozen parts and of the computation; what trains is float32.
        overrides: keys of a recipe, for ours.
        measure_body: at the end, see :func:`body_share`.
    """

    stack: str
    data: str
    folder: str
    image_size: int = 168
    questions: int = 8
    chats: bool = False
    images: int = 1
    steps: int = 200
    dtype: str = "bfloat16"
    seed: int = 0
    llm: str = LLM
    vit: str = VIT
    overrides: dict = field(default_factory=dict)
    measure_body: bool = False


class Stack:
    """A stack in a process of its own."""

    def __init__(self, setting: Setting):
        folder = Path(setting.folder)
        folder.mkdir(parents=True)
        path = folder / "setting.json"
        path.write_text(json.dumps(asdict(setting)))
        self.log = (folder / "log.txt").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.stacks", str(path)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self.log, text=True, cwd=Path(__file__).parents[1],
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")},
        )  # fmt: skip
        self.learned = self._answer()["learned"]  # tokens an epoch

    def run(self, steps: int) -> dict:
        """Train that many steps: ``{"seconds", "losses", "peak_bytes"}``; the peak so far."""
        print(steps, file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> dict:
        """End it; what :func:`body_share` measured, if it was to."""
        print(0, file=self.process.stdin, flush=True)
        answer = self._answer()
        self.process.stdin.close()
        self.process.wait()
        self.log.close()
        return answer["body"]

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            log = Path(self.log.name).read_text()[-3000:]
            raise RuntimeError(f"the process ended ({self.process.returncode}): {log}")
        return json.loads(line)


# ------------------------------------------------------------------------------ in the process


def work(path: str) -> None:
    """Train the stack of a setting as told on standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints goes to the log
    setting = Setting(**json.loads(Path(path).read_text()))
    (ours if setting.stack == "ours" else theirs)(setting, _commands(setting, answers))


def _commands(setting: Setting, answers):
    import torch
    from transformers import TrainerCallback

    def answer(**message):
        print(json.dumps(message), file=answers, flush=True)

    class Commands(TrainerCallback):
        """Before a step, waits for the number of steps to come, and says how the last ones went."""

        def wait(self, control):
            self.left, self.losses = int(sys.stdin.readline()), []
            control.should_training_stop = self.left == 0
            self.began = time.perf_counter()

        def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
            same_start(model, setting.seed)
            answer(learned=learned_tokens(train_dataloader.dataset))
            self.wait(control)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                self.losses.append(float(logs["loss"]))

        def on_step_begin(self, args, state, control, **kwargs):
            if self.left == 0:  # the loss of the last step is logged, the next batch is read
                self.report(control)

        def on_step_end(self, args, state, control, **kwargs):
            self.left -= 1

        def report(self, control):
            seconds = time.perf_counter() - self.began
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            if torch.cuda.is_available():
                peak = torch.cuda.max_memory_allocated()
            answer(seconds=seconds, losses=self.losses, peak_bytes=peak)
            self.wait(control)

        def on_train_end(self, args, state, control, model=None, train_dataloader=None, **kwargs):
            body = None
            if setting.stack == "ours" and setting.measure_body:
                body = body_share(model, next(iter(train_dataloader)), setting.dtype)
            answer(body=body)

    return Commands()


def ours(setting: Setting, commands) -> None:
    """A recipe, as ``mmpeft train`` runs it."""
    from mmpeft.train import train

    vit = {"name": setting.vit, "image_size": setting.image_size, "layers": [-2]}
    lora = {"r": 16, "lora_alpha": 32, "target_modules": TARGETS}
    recipe = {
        "seed": setting.seed,
        "output_dir": f"{setting.folder}/run",
        "model": {
            "vision_encoder": {
                "class_path": "TransformersEncoderConfig",
                "init_args": vit | {"dtype": setting.dtype},
            },
            "connector": {"class_path": "MLPConnectorConfig", "init_args": {"standardize": False}},
            "language_model": setting.llm,
            "dtype": setting.dtype,
            "adapter": {"class_path": "LoraConfig", "init_args": lora},
        },
        "data": {
            "task": {"class_path": "EasyVQA", "init_args": {"path": setting.data}},
            "chats_per_sample": setting.questions,
        },
        "speed": {
            "feature_cache": "on", "feature_cache_dir": f"{setting.folder}/features",
            "compile": "on",
        },
        "instruct": arguments(setting)
        | {"connector_learning_rate": LEARNING_RATE, "adapter_learning_rate": LEARNING_RATE},
    }  # fmt: skip
    path = Path(setting.folder) / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    overrides = [word for key, value in setting.overrides.items() for word in (f"--{key}", value)]
    train(path, overrides, callbacks=[commands])


def theirs(setting: Setting, commands) -> None:
    """LlavaForConditionalGeneration, peft, Trainer and a padding collator, as tutorials have it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    model, processor = llava(setting)
    model = get_peft_model(
        model,
        LoraConfig(
            r=16, lora_alpha=32, modules_to_save=["multi_modal_projector"],
            target_modules=r".*language_model.*\.(q|k|v|o)_proj",
        ),
    )  # fmt: skip
    for parameter in model.parameters():  # the projector's copy, too, trains in float32
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=f"{setting.folder}/run", learning_rate=LEARNING_RATE,
            remove_unused_columns=False, report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(), **arguments(setting),
        ),
        train_dataset=Questions(setting, processor, model.config.image_token_id),
        data_collator=collate,
        callbacks=[commands],
    )  # fmt: skip
    trainer.train()


def arguments(setting: Setting) -> dict:
    """TrainingArguments that both have."""
    return {
        "max_steps": setting.steps, "per_device_train_batch_size": setting.images,
        "logging_steps": 1, "seed": setting.seed, "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 10, "max_grad_norm": 1.0, "bf16": setting.dtype == "bfloat16",
        "use_cpu": not _cuda(), "save_strategy": "no", "dataloader_num_workers": 0,
    }  # fmt: skip


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def llava(setting: Setting):
    """The same parts as a LLaVA, and the processor that makes its rows."""
    import torch
    from transformers import (
        AutoImageProcessor,
        AutoModel,
        AutoModelForCausalLM,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    from mmpeft import BridgeProcessor
    from mmpeft.image_processing import BridgeImageProcessor
    from mmpeft.language_model import load_tokenizer
    from mmpeft.starter import resolve

    dtype = getattr(torch, setting.dtype)
    vit = AutoModel.from_pretrained(resolve(setting.vit), dtype=dtype)
    llm = AutoModelForCausalLM.from_pretrained(resolve(setting.llm), dtype=dtype)
    config = LlavaConfig(
        vision_config=vit.config, text_config=llm.config, vision_feature_layer=-2,
        image_token_id=len(llm.get_input_embeddings().weight) - 1,  # stands for images, never read
    )  # fmt: skip
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower, model.model.language_model, model.lm_head = (
        vit,
        llm.model,
        llm.lm_head,
    )
    projector = model.model.multi_modal_projector.to_empty(device="cpu").to(dtype)
    model.model.multi_modal_projector = projector
    tokens = (setting.image_size // vit.config.patch_size) ** 2
    how = AutoImageProcessor.from_pretrained(resolve(setting.vit))
    images = BridgeImageProcessor(
        size={"height": setting.image_size, "width": setting.image_size}, resample=how.resample,
        image_mean=how.image_mean, image_std=how.image_std,
        resolutions=[[setting.image_size, setting.image_size, tokens]],
    )  # fmt: skip
    tokenizer = load_tokenizer(setting.llm, None)
    return model, BridgeProcessor(images, tokenizer, chat_template=tokenizer.chat_template)


class Questions:
    """The rows of our samples, one question each; an item is the rows of a sample."""

    def __init__(self, setting: Setting, processor, image_token_id: int):
        from mmpeft.data import ConversationDataset
        from mmpeft.tasks.easy_vqa import EasyVQA

        task = EasyVQA(setting.data)
        self.rows = ConversationDataset(task, "train", processor)
        self.items = ConversationDataset(task, "train", processor, setting.questions).samples
        self.image_token_id, self.chats = image_token_id, setting.chats

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        import torch

        found = []
        for row in self._chat(index) if self.chats else map(self._row, self.items[index]):
            ids, is_image = torch.tensor(row["input_ids"]), torch.tensor(row["mm_token_type_ids"])
            found.append({
                "input_ids": ids.masked_fill(is_image == 1, self.image_token_id),
                "labels": torch.tensor(row["labels"]), "pixel_values": row["pixel_values"],
            })  # fmt: skip
        return found

    def _row(self, number):
        return self.rows[number]

    def _chat(self, index):
        """The questions as turns of one chat: the picture stands before the first."""
        chats = [self.rows.task.messages(self.rows.rows[n]) for n in self.items[index]]
        turns = [[chat[0] | {"content": chat[0]["content"][-1:]}, *chat[1:]] for chat in chats[1:]]
        messages = [message for chat in (chats[0], *turns) for message in chat]
        row, pictures = self.rows.processor.encode_chat(messages)
        return [row | self.rows.processor.image_inputs(pictures)]


def collate(items: list[list[dict]]) -> dict:
    """Rows padded on the right."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    rows = [row for item in items for row in item]
    return {
        "input_ids": pad_sequence([row["input_ids"] for row in rows], batch_first=True),
        "attention_mask": pad_sequence(
            [torch.ones_like(row["input_ids"]) for row in rows], batch_first=True
        ),
        "labels": pad_sequence(
            [row["labels"] for row in rows], batch_first=True, padding_value=-100
        ),
        "pixel_values": torch.cat([row["pixel_values"] for row in rows]),
    }


def learned_tokens(dataset) -> int:
    """Supervised tokens of all rows."""
    found = 0
    for index in range(len(dataset)):
        rows = dataset[index]
        for row in rows if isinstance(rows, list) else [rows]:
            found += sum(int(label) != -100 for label in row["labels"])
    return found


def same_start(model, seed: int) -> None:
    """Give what trains the weights that both stacks begin with."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    down = {_layer(name): p for name, p in trained.items() if "lora_A" in name}
    projector = [p for name, p in trained.items() if "lora_" not in name]  # in order of use
    for parameter in [*projector, *(down[key] for key in sorted(down))]:
        scale = parameter.shape[-1] ** -0.5 * (parameter.dim() > 1)
        drawn = torch.randn(parameter.shape, generator=generator) * scale
        parameter.data.copy_(drawn.to(parameter.dtype))
    for name, buffer in model.named_buffers():
        if name.endswith("connector.output_scale"):
            buffer.fill_(1.0)


def _layer(name: str) -> str:
    return re.search(r"layers\.\d+\..*_proj", name)[0]


def body_share(model, batch, dtype: str) -> dict:
    """FLOP/s of the LLM's layers, forward and backward, beside those of plain matrix products.

    Returns:
        ``{"flops", "ceiling", "share", "shapes", "positions"}``: products a second of the body on
        one batch (those of attention that a mask throws away are not counted), of the fastest large
        square product, their ratio, of products of the body's own shapes, the length of the row.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from mmpeft.speed import compiled

    body = model.language_model.get_base_model().model
    kind, device = getattr(torch, dtype), model.device
    batch = {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    call = {"inputs_embeds": embeds, "position_ids": batch["position_ids"], "use_cache": False}
    packed = batch.get("packed")
    if packed is not None:
        from mmpeft.attention import NO_MASK

        call |= {"packed": packed, "attention_mask": NO_MASK}
    model._gate.mask = None

    def run():
        with torch.autocast(device.type, kind, enabled=kind != torch.float32):
            states = body(**call).last_hidden_state
        states.backward(torch.ones_like(states))

    with FlopCounterMode(display=False) as counter, compiled(model, False):
        run()
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    linear = sum(n for op, n in counts.items() if "bmm" not in op and "attention" not in op)
    needed = linear + (sum(counts.values()) - linear) * seen_share(packed)
    with compiled(model, True):
        body_flops = needed / median_seconds(run)

    def product(rows, inner, columns):
        a = torch.randn(rows, inner, dtype=kind, device=device)
        b = torch.randn(columns, inner, dtype=kind, device=device)
        seconds = median_seconds(lambda: torch.nn.functional.linear(a, b))
        return 2 * rows * inner * columns / seconds

    ceiling = max(product(n, n, n) for n in (2048, 4096))
    config, positions = model.config.get_text_config(), batch["input_ids"].shape[1]
    wide, narrow = config.intermediate_size, config.hidden_size
    shapes = max(product(positions, narrow, wide), product(positions, wide, narrow))
    return {
        "flops": body_flops, "ceiling": ceiling, "share": body_flops / ceiling, "shapes": shapes,
        "positions": positions,
    }  # fmt: skip


def seen_share(packed) -> float:
    """Of the products of attention, the share that no mask throws away."""
    if packed is None:
        return 0.5
    seen = every = 0
    for block in packed.blocks:
        size = block.length * (block.root[1] + block.length)
        every += size
        causal = block.length * (block.length + 1) // 2
        seen += causal if block.mask is None else int(block.mask.sum())
    return seen / every


def median_seconds(run, repeats: int = 9) -> float:
    """Of one call, after two to warm up."""
    seconds = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        run()
        if _cuda():
            import torch

            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


if __name__ == "__main__":
    work(sys.argv[1])
