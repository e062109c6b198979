"""What a PEFT method does at every step of training, besides being trained."""

import sys

import torch
from peft.tuners.adalora import AdaLoraConfig, AdaLoraModel
from torch import Tensor
from transformers import TrainerCallback

from mmpeft.tuners.base import Tuner

AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # of peft's RankAllocator


def steps_of(language_model):
    """What has ``begin_step``, ``penalty`` and ``end_step`` for the LLM's adapter, or ``None``."""
    tuner = getattr(language_model, "base_model", None)
    if isinstance(tuner, Tuner):
        return tuner
    return AdaLoraSteps(tuner) if isinstance(tuner, AdaLoraModel) else None


def check_schedule(adapter, steps: int) -> None:
    """Refuse an AdaLoRA whose schedule does not fit a stage; any other adapter has none.

    Raises:
        ValueError: it leaves no step to move ranks in, or no rank to give up.
    """
    if not isinstance(adapter, AdaLoraConfig):
        return
    if adapter.target_r >= adapter.init_r:
        raise ValueError(
            f"adapter: target_r {adapter.target_r} must be less than init_r {adapter.init_r}; "
            "AdaLoRA starts with more ranks than it keeps."
        )
    if adapter.deltaT < 1:
        raise ValueError(f"adapter: deltaT is {adapter.deltaT}; ranks move every 1 step or more.")
    if adapter.tinit >= steps - adapter.tfinal:
        raise ValueError(
            f"adapter: tinit {adapter.tinit} and tfinal {adapter.tfinal} leave none of the {steps} "
            "steps to move ranks in; lower them."
        )


class AdaLoraSteps:
    """AdaLoRA (Zhang et al. 2023, arXiv 2303.10512) as peft has it, told of steps and losses.

    peft leaves it to the training loop to move the ranks, and adds the penalty only to a loss that
    the LLM computes itself. The ranks that were given up stay in the weights as zeros.
    """

    def __init__(self, tuner: AdaLoraModel):
        self.tuner, self.name = tuner, tuner.trainable_adapter_name
        self.config = tuner.peft_config[self.name]
        self._pattern = None
        self._begun = False

    def begin_step(self, step: int, steps: int) -> None:
        """Fit the schedule to the stage.

        Raises:
            ValueError: as :func:`check_schedule`.
        """
        check_schedule(self.config, steps)
        if not self._begun and step >= steps - self.config.tfinal:  # resumed in the last phase
            self._pattern = self._ranks_left()
        self._begun = True
        if steps == self.config.total_step:
            return
        print(f"AdaLoRA: total_step {self.config.total_step} is now {steps}, the steps of this "
              "stage.", file=sys.stderr)  # fmt: skip
        self.config.total_step = steps
        self.tuner.rankallocator.set_total_step(steps)

    def penalty(self, model, inputs: dict) -> Tensor:
        """How far A and B are from orthogonal, weighted (equation 4): peft's own terms."""
        apart = []
        for layer in self._layers():
            for factor in (layer.lora_A[self.name], layer.lora_B[self.name].T):
                gram = factor @ factor.T  # (r, r)
                apart.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram)).to(gram)))
        return self.config.orth_reg_weight * torch.stack(apart).mean()

    def end_step(self, step: int) -> None:
        """Move the ranks; ``step`` counts from 1 as peft's example does."""
        last = self.config.total_step - self.config.tfinal  # when peft settles them, once
        if step > last and self._pattern is None:  # that step was skipped
            step = last
        self.config.rank_pattern = self._pattern
        self.tuner.update_and_allocate(step)
        # peft would cut saved weights by it, and so change their shapes in the middle of a run
        self._pattern, self.config.rank_pattern = self.config.rank_pattern, None

    def state(self) -> dict[str, Tensor]:
        """The running averages that decide which ranks go."""
        kept = self.tuner.rankallocator
        return {
            f"{kind}.{name}": value.contiguous()
            for kind in AVERAGES for name, value in getattr(kept, kind).items()
        }  # fmt: skip

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what :meth:`state` gave."""
        devices = {name: p.device for name, p in self.tuner.model.named_parameters()}
        for key, value in state.items():
            kind, _, name = key.partition(".")
            getattr(self.tuner.rankallocator, kind)[name] = value.to(devices.get(name, "cpu"))

    def _layers(self):
        return (m for m in self.tuner.modules() if hasattr(m, "lora_E"))

    def _ranks_left(self) -> dict[str, list[bool]]:
        return {
            name: (values != 0).flatten().tolist()
            for name, values in self.tuner.model.named_parameters()
            if f"lora_E.{self.name}" in name
        }


class AdapterSteps(TrainerCallback):
    """Tells the adapter of the trainer's steps."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_begin(self, args, state, control, **kwargs):
        self.steps.begin_step(state.global_step, state.max_steps)

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if not getattr(optimizer, "step_was_skipped", False):  # gradients beyond float16
            self.steps.end_step(state.global_step + 1)
