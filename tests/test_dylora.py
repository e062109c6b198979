"""DyLoRA and AdaLoRA: ranks that are cut, and ranks that move."""

import re

import pytest
import torch
import torch.nn.functional as F
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback

from mmpeft.adapter_steps import AdapterSteps, steps_of
from mmpeft.adapters import attach_adapter, set_adapter_mode
from mmpeft.train import train
from mmpeft.tuners.dylora import DyLoraConfig, DyLoraLayer

from .conftest import model_inputs, user

TARGETS = ["q_proj", "v_proj"]


def filled(rank=6, frozen=False, bias=True):
    torch.manual_seed(0)
    layer = DyLoraLayer(
        nn.Linear(8, 5, bias=bias), "default", DyLoraConfig(r=rank, lora_alpha=12, frozen=frozen)
    )
    nn.init.normal_(layer.dylora_B["default"].weight)
    return layer


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_values_of_every_rank_by_hand(rank):
    layer = filled().eval()
    layer.deploy(rank)
    x = torch.randn(2, 4, 8)
    down, up = layer.dylora_A["default"].weight, layer.dylora_B["default"].weight
    update = sum(torch.outer(up[:, i], down[i]) for i in range(rank)) * 12 / rank
    expected = F.linear(x, layer.base_layer.weight + update, layer.base_layer.bias)
    torch.testing.assert_close(layer(x), expected)
    before = layer.base_layer.weight.clone()
    merged = (layer.merge(), layer(x))[1]
    torch.testing.assert_close(merged, expected)
    layer.merge()  # once is all
    torch.testing.assert_close(layer(x), expected)
    layer.enable_adapters(False)
    assert torch.equal(layer.base_layer.weight, before)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_trains_the_directions_up_to_its_rank_or_the_last_alone(frozen):
    layer = filled(frozen=frozen).train()
    layer.draw(3)
    layer(torch.randn(2, 4, 8)).square().sum().backward()
    reached = layer.dylora_A["default"].weight.grad.abs().sum(1) > 0
    assert reached.tolist() == [not frozen, not frozen, True, False, False, False]
    assert ((layer.dylora_B["default"].weight.grad.abs().sum(0) > 0) == reached).all()


def test_until_a_rank_is_drawn_the_deployed_one_is_in_use():
    """A stage that trains the connector alone must see what will be deployed."""
    layer = filled()
    layer.deploy(2)
    x = torch.randn(2, 4, 8)
    deployed = layer.eval()(x)
    assert torch.equal(layer.train()(x), deployed)
    layer.draw(5)
    assert not torch.allclose(layer(x), deployed) and torch.equal(layer.eval()(x), deployed)


def test_a_step_draws_one_rank_for_all_layers_and_every_rank_in_time(make_bridge):
    model, _ = make_bridge("none", adapter=DyLoraConfig(r=4, target_modules=TARGETS))
    steps, seen = steps_of(model.language_model), set()
    layers = [m for m in model.modules() if isinstance(m, DyLoraLayer)]
    for step in range(60):
        steps.begin_step(step, 60)
        (drawn,) = {layer.drawn for layer in layers}
        seen.add(drawn)
    assert seen == {1, 2, 3, 4}


def test_training_is_cut_to_the_rank_that_was_drawn(recipe, monkeypatch):
    """Through the whole of ``mmpeft train``, whose ``model.train()`` comes after the draw."""
    drawn, found = [], []

    def draw(layer, rank):
        drawn.append(rank)
        plain(layer, rank)

    plain = DyLoraLayer.draw
    monkeypatch.setattr(DyLoraLayer, "draw", draw)

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            for name, parameter in model.named_parameters():
                if "dylora_B" in name and parameter.requires_grad:  # not in stage align
                    found.append(int((parameter.grad.abs().sum(0) > 0).sum()))

    train(recipe, ["--model.adapter", "DyLoraConfig", "--model.adapter.r", "7",
                   "--model.adapter.target_modules", "[q_proj]"], callbacks=[Watch()])  # fmt: skip
    assert found == drawn and len(set(found)) > 1


def test_the_deployed_rank_is_saved_and_exported_as_plain_lora(make_bridge, llm_dir, tmp_path):
    from mmpeft import BridgeForConditionalGeneration

    model, processor = make_bridge("none", adapter=DyLoraConfig(r=4, target_modules=TARGETS))
    for name, parameter in model.named_parameters():
        if "dylora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    batch = model_inputs(processor, [[user("hello")]])
    batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
    whole = model(**batch).logits
    tuner = model.language_model.base_model
    tuner.set_rank(2)
    cut = model(**batch).logits
    assert not torch.allclose(cut, whole, atol=1e-3)
    model.save_pretrained(tmp_path)
    again = BridgeForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again(**batch).logits, cut)
    again.language_model.base_model.set_rank(4)
    assert torch.equal(again(**batch).logits, whole)
    with pytest.raises(ValueError, match="rank 5 must lie in 1 to r, 4"):
        tuner.set_rank(5)

    from peft import set_peft_model_state_dict

    for scale in (1, 0.5):
        model.set_adapter_scale(scale)
        config, state = tuner.as_lora()
        plain = get_peft_model(AutoModelForCausalLM.from_pretrained(llm_dir), config)
        set_peft_model_state_dict(plain, state)
        assert isinstance(plain, PeftModel) and config.r == 2
        torch.testing.assert_close(plain(**batch).logits, model(**batch).logits)


def memorised(llm_dir, adapter, steps=150):
    """An LLM with an adapter that has learned one row by heart, and its loss on it."""
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_pretrained(llm_dir).requires_grad_(False)
    llm = attach_adapter(llm, adapter)
    row = {"input_ids": torch.randint(3, 250, (2, 48), generator=torch.Generator().manual_seed(1))}
    parameters = [p for p in llm.parameters() if p.requires_grad]
    optimizer, hooks = torch.optim.AdamW(parameters, 1e-2), steps_of(llm)
    set_adapter_mode(llm, True)
    for step in range(steps):
        if hooks is not None:
            hooks.begin_step(step, steps)
        loss = llm(**row, labels=row["input_ids"]).loss
        if hooks is not None and (penalty := hooks.penalty(llm, row)) is not None:
            loss = loss + penalty
        loss.backward()
        optimizer.step()
        if hooks is not None:
            hooks.end_step(step + 1)
        optimizer.zero_grad()
    set_adapter_mode(llm, False)
    return llm, lambda: llm(**row, labels=row["input_ids"]).loss.item()


@torch.no_grad()
def cut_lora(whole: dict, rank: int, how: str) -> None:
    """Leave ``rank`` directions of each layer: its first, or those of its greatest values."""
    for layer, (down, up) in whole.items():
        if how == "svd":
            left, values, right = torch.linalg.svd(up @ down, full_matrices=False)
            down, up = right[: len(down)], left[:, : len(down)] * values[: len(down)]
        layer.lora_A["default"].weight.zero_()[:rank] = down[:rank]
        layer.lora_B["default"].weight.zero_()[:, :rank] = up[:, :rank]


def test_cut_to_every_rank_it_beats_lora_cut_after_training(llm_dir):
    options = {"r": 8, "lora_alpha": 8, "target_modules": [*TARGETS, "down_proj"]}
    ours, our_loss = memorised(llm_dir, DyLoraConfig(**options), 400)
    lora, lora_loss = memorised(llm_dir, LoraConfig(**options), 400)
    assert lora_loss() < 1.0
    whole = {
        m: (m.lora_A["default"].weight.clone(), m.lora_B["default"].weight.clone())
        for m in lora.modules() if isinstance(m, LoraLayer)
    }  # fmt: skip
    for rank in range(7, 0, -1):
        ours.base_model.set_rank(rank)
        for how in ("first", "svd"):
            cut_lora(whole, rank, how)
            assert our_loss() < lora_loss(), (rank, how)


def test_adaloras_ranks_move_to_its_budget(llm_dir):
    adapter = AdaLoraConfig(
        init_r=6, target_r=2, tinit=20, tfinal=50, total_step=150, deltaT=5, target_modules=TARGETS
    )
    llm, loss = memorised(llm_dir, adapter)
    ranks = [int((p != 0).sum()) for name, p in llm.named_parameters() if "lora_E" in name]
    assert sum(ranks) <= 2 * len(ranks) and len(set(ranks)) > 1
    assert llm.peft_config["default"].rank_pattern is None  # weights keep their shapes
    with llm.disable_adapter():
        before = loss()
    assert loss() < before - 0.5


def test_adaloras_schedule_follows_the_stage(make_bridge, capsys):
    adapter = AdaLoraConfig(tinit=3, tfinal=3, total_step=1000, target_modules=TARGETS)
    model, _ = make_bridge("none", adapter=adapter)
    steps = steps_of(model.language_model)
    steps.begin_step(0, 10)
    assert steps.config.total_step == steps.tuner.rankallocator.peft_config.total_step == 10
    assert "total_step 1000 is now 10" in capsys.readouterr().err
    with pytest.raises(ValueError, match="tinit 3 and tfinal 3 leave none of the 6 steps"):
        steps.begin_step(0, 6)


def test_adaloras_penalty_is_pefts(make_bridge):
    adapter = AdaLoraConfig(total_step=9, orth_reg_weight=0.3, target_modules=TARGETS)
    model, _ = make_bridge("none", adapter=adapter)
    ids = torch.tensor([[5, 6, 7]])
    without = model.language_model.base_model.model(input_ids=ids, labels=ids).loss
    whole = model.language_model.base_model(input_ids=ids, labels=ids).loss
    penalty = steps_of(model.language_model).penalty(model, {})
    torch.testing.assert_close(penalty, whole - without)


def test_adalora_resumed_equals_uninterrupted(llm_dir):
    """The averages that choose ranks go on, too."""

    def run(stop=None):
        torch.manual_seed(0)
        adapter = AdaLoraConfig(init_r=6, target_r=2, tinit=2, tfinal=3, total_step=14, deltaT=1,
                                target_modules=TARGETS)  # fmt: skip
        llm = AutoModelForCausalLM.from_pretrained(llm_dir).requires_grad_(False)
        llm, steps = attach_adapter(llm, adapter), None
        ids = torch.randint(3, 250, (14, 2, 16), generator=torch.Generator().manual_seed(1))
        for step in range(14):
            if steps is None or step == stop:  # told anew, as after a restart
                kept, steps = steps and steps.state(), steps_of(llm)
                for name in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
                    setattr(steps.tuner.rankallocator, name, {})
                steps.load_state(kept or {})
            steps.begin_step(step, 14)
            llm.zero_grad()
            llm(input_ids=ids[step], labels=ids[step]).loss.backward()
            with torch.no_grad():
                for p in llm.parameters():
                    if p.grad is not None:
                        p -= 0.1 * p.grad
            steps.end_step(step + 1)
        return {n: p.clone() for n, p in llm.named_parameters() if "lora_" in n}

    whole = run()
    for stop in (5, 10, 12):
        torch.testing.assert_close(run(stop), whole, atol=1e-5, rtol=1e-3)


def test_adalora_keeps_fewer_ranks_than_it_begins_with(make_bridge):
    adapter = AdaLoraConfig(init_r=4, target_r=4, total_step=10, target_modules=TARGETS)
    model, _ = make_bridge("none", adapter=adapter)
    with pytest.raises(ValueError, match="target_r 4 must be less than init_r 4"):
        steps_of(model.language_model).begin_step(0, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("init_r: 8, total_step: 9", "target_r 8 must be less than init_r 8"),
        ("init_r: 8, target_r: 2, tinit: 20, total_step: 99", "tinit 20 and tfinal 0 leave none"),
        ("init_r: 8, target_r: 2, deltaT: 0, total_step: 9", "deltaT is 0; ranks move every"),
    ],
)
def test_a_schedule_that_does_not_fit_leaves_no_folder(recipe, options, message):
    ours = f"AdaLoraConfig, init_args: {{{options}, target_modules: [q_proj]}}}}\n"
    recipe.write_text(re.sub(r"LoraConfig, init_args: .*\n", ours, recipe.read_text()))
    with pytest.raises(ValueError, match=message):
        train(recipe)
    assert not (recipe.parent / "run").exists()


@pytest.mark.parametrize("adapter", ["DyLoraConfig", "AdaLoraConfig"])
def test_a_recipe_trains_them(recipe, adapter, monkeypatch):
    calls = []

    def watched(name):
        kept = getattr(AdapterSteps, name)
        return lambda *args, **kwargs: calls.append(name) or kept(*args, **kwargs)

    for name in ("on_step_begin", "on_optimizer_step"):
        monkeypatch.setattr(AdapterSteps, name, watched(name))
    options = {"DyLoraConfig": [], "AdaLoraConfig": ["--model.adapter.total_step", "99"]}[adapter]
    run = train(recipe, ["--model.adapter", adapter, "--model.adapter.target_modules", "[q_proj]",
                         *options])  # fmt: skip
    assert (run / "checkpoint").is_dir() and calls[:2] == ["on_step_begin", "on_optimizer_step"]
