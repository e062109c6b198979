"""What keeps text as it was while training: the KL to the base, and starts that leave the base."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from peft import AdaLoraConfig, EvaConfig, LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import get_eva_state_dict
from transformers import AutoModelForCausalLM

import mmpeft
from mmpeft import checkpoint, starts
from mmpeft.adapters import adapter_parameters, attach_adapter, set_trainable
from mmpeft.attention import serve_packed_rows
from mmpeft.data import Collator
from mmpeft.text_kl import TextKL, summed_kl, summed_kl_in_chunks
from mmpeft.train import train

from .conftest import model_inputs, user
from .test_packing import samples_of
from .test_train import losses, replay  # noqa: F401 (a fixture)

# ---------------------------------------------------------------------- KL to the base on text


def kl_of(model, batches, weight=1.0):
    """The term alone of some micro-batches of one step, and its gradients by name."""
    set_trainable(model, connector=True, adapter=True)
    model.train().zero_grad()
    kl, total = TextKL(weight), 0
    kl.positions = kl.count(batches)
    for batch in batches:
        both = []
        for model.text_kl in (None, kl):
            both.append(model(**batch, num_items_in_batch=10).loss)
        term = both[1] - both[0]
        if term.requires_grad:
            term.backward()
        total += term.item()
    model.text_kl = None
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return total, grads, kl


def by_hand(model, samples):
    """Mean of torch's kl_div over the learned tokens of each text sample, one at a time."""
    nats = []
    for sample in samples:
        if 1 in sample["mm_token_type_ids"]:
            continue
        ids = torch.tensor([sample["input_ids"]])
        ours = model.language_model(ids).logits[0, :-1]
        with torch.no_grad(), model.disable_adapter():
            base = model.language_model(ids).logits[0, :-1]
        learned = torch.tensor(sample["labels"][1:]) != -100
        ours, base = ours[learned].log_softmax(-1), base[learned].softmax(-1)
        nats.append(F.kl_div(ours, base, reduction="none").sum(-1))
    return torch.cat(nats).mean()


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("supervised_logits", [False, True])
def test_the_term_and_its_gradient_are_those_computed_by_hand(
    make_bridge, images, packing, chunk, supervised_logits
):
    model, processor = make_bridge("none")
    model.logits_chunk, model.supervised_logits = chunk, supervised_logits
    samples = samples_of(processor, images)
    expected = by_hand(model.train(), samples)
    set_trainable(model, connector=True, adapter=True)
    model.zero_grad()
    by_hand(model, samples).mul(0.5).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    if packing:
        assert serve_packed_rows(model) is None
    batch = Collator(0, packing, 32)(samples)
    total, found, kl = kl_of(model, [batch], weight=0.5)
    assert expected > 0.01
    assert total == pytest.approx(0.5 * expected.item(), rel=1e-3, abs=1e-4)
    nats, positions = kl.take().tolist()
    assert nats / positions == pytest.approx(expected.item(), rel=1e-4)
    assert kl.take().tolist() == [0, 0]
    # the connector took part in the loss that was subtracted, not in the term
    assert all(g.abs().max() < 1e-6 for n, g in found.items() if "connector" in n)
    found = {n: g for n, g in found.items() if "connector" not in n}
    assert found.keys() == grads.keys() and all("lora_" in name for name in found)
    torch.testing.assert_close(found, grads, atol=1e-4, rtol=1e-2)


def test_it_does_not_depend_on_how_a_step_is_cut(make_bridge, images):
    model, processor = make_bridge("none")
    samples = samples_of(processor, images)
    whole = kl_of(model, [Collator(0)(samples)])
    cut = kl_of(model, [Collator(0)(part) for part in (samples[:1], samples[1:3], samples[3:])])
    assert cut[0] == pytest.approx(whole[0], rel=1e-4)
    torch.testing.assert_close(cut[1], whole[1], atol=1e-5, rtol=1e-3)


def test_it_is_zero_for_an_untrained_adapter_and_without_text(make_bridge, images):
    model, processor = make_bridge("none")
    samples = samples_of(processor, images)
    total, grads, kl = kl_of(model, [Collator(0)(samples[:2])])  # pictures in all
    assert total == 0 and kl.take().tolist() == [0, 0]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    total, grads, kl = kl_of(model, [Collator(0)(samples)])
    assert abs(total) < 1e-6 and kl.seen[1] > 0
    assert all(grad.abs().max() < 1e-5 for grad in grads.values())


def test_chunks_are_the_whole():
    torch.manual_seed(0)
    table = torch.nn.Linear(6, 40, bias=False).requires_grad_(False)
    base, ours = torch.randn(2, 11, 6).unbind()
    ours.requires_grad_()
    expected = F.kl_div(
        table(ours).log_softmax(-1), table(base).log_softmax(-1), reduction="sum", log_target=True
    )
    (wanted,) = torch.autograd.grad(expected, ours)
    assert summed_kl(table(ours), table(base)) == expected
    for chunk in (3, 100):
        total = summed_kl_in_chunks(ours, base, table, chunk)
        (found,) = torch.autograd.grad(total, ours)
        torch.testing.assert_close(total, expected)
        torch.testing.assert_close(found, wanted)


def logged(run, key="kl_to_base"):
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row[key] for row in rows if key in row]


KL = ["--model.gate", "none", "--align", "null", "--instruct.kl_weight"]


def test_a_run_holds_text_to_the_base_and_logs_how_far_it_is(recipe, replay):  # noqa: F811
    runs, folder = {}, recipe.parent
    for name, weight, options in (
        ("off", "0", []), ("tiny", "1e-9", []), ("on", "30", []),
        ("padded", "30", ["--speed.packing", "false"]),
        ("cut", "30", ["--instruct.per_device_train_batch_size", "1",
                       "--instruct.gradient_accumulation_steps", "2"]),
        ("bf16", "30", ["--instruct.bf16", "true", "--model.dtype", "bfloat16",
                        "--instruct.gradient_checkpointing", "true"]),
    ):  # fmt: skip
        output = ["--output_dir", str(folder / name), "--instruct.adapter_learning_rate", "3e-2"]
        runs[name] = train(recipe, [*replay, *KL, weight, *output, *options])
    assert not logged(runs["off"])
    free, held = logged(runs["tiny"]), logged(runs["on"])
    assert free[0] < 1e-6 and held[0] < 1e-6
    assert 0 < held[-1] < 0.5 * free[-1]
    off, tiny = losses(runs["off"]), losses(runs["tiny"])
    torch.testing.assert_close(list(off.values()), list(tiny.values()), atol=1e-5, rtol=1e-5)
    for other in ("padded", "cut"):
        torch.testing.assert_close(logged(runs[other]), held, atol=2e-3, rtol=0.05)
    assert logged(runs["bf16"])[-1] < free[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.gate", "sample", "--data.replay", "null"], "under gate 'sample' text never"),
        (["--model.gate", "sample"], "under gate 'sample' text never reaches the adapter"),
        (["--model.gate", "after_image"], "under gate 'after_image' text never reaches"),
        (["--model.gate", "none", "--data.replay", "null"], "is 1.0, but data.replay, whose rows"),
        (["--align.kl_weight", "1"], "stage align does not train the adapter"),
        (["--instruct.kl_weight", "-1"], "kl_weight is -1.0; it must be 0 or more"),
    ],
)  # fmt: skip
def test_a_term_that_could_not_act_is_refused(recipe, replay, options, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        train(recipe, [*replay, "--instruct.kl_weight", "1", *options])
    assert not (recipe.parent / "run").exists()


# -------------------------------------------------------------- starts out of weights and of data

TARGETS = ["q_proj", "v_proj", "down_proj"]
WAYS = ["pissa", "pissa_niter_4", "olora", "corda"]


def lora(how, **options):
    return LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=how, **options)


def reads(model, samples):
    """What the data-driven starts read."""
    return samples, starts._Ask(model)


@pytest.fixture
def text(make_bridge, images):
    """Samples of text alone, as the processor makes them."""
    samples = samples_of(make_bridge("none")[1], images)
    return [sample for sample in samples if 1 not in sample["mm_token_type_ids"]]


@pytest.fixture
def started(make_bridge, text):
    def make(how, gate="none", **options):
        config = lora(how, **options)
        model, processor = make_bridge(gate, adapter=config)
        if how == "corda":
            starts.corda(model.language_model, *reads(model, text))
        elif how != "eva":  # the fixture fills B of every LoRA, as if it were trained
            for name, layer in starts.lora_layers(model.language_model).items():
                starts._take(name, layer, how.partition("_")[0], how)
                starts.KeptStart.init(layer, "default")
        return model, processor

    return make


def peft_own(llm_dir, how, text, **options):
    """peft as it is: it changes the weights."""
    llm = AutoModelForCausalLM.from_pretrained(llm_dir).requires_grad_(False)
    config = lora(how, **options)
    if how == "corda":
        read = lambda: [llm(torch.tensor([s["input_ids"]])) for s in text]  # noqa: E731
        preprocess_corda(llm, config, read)
    torch.manual_seed(1)
    return get_peft_model(llm, config)


def move(language_model):
    """The same change of every factor, as training would make it."""
    torch.manual_seed(5)
    for name, parameter in sorted(language_model.named_parameters()):
        if "lora_A" in name or "lora_B" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)


@pytest.mark.parametrize("how", WAYS)
def test_the_base_stays_and_the_adapter_begins_as_it(started, llm_dir, how):
    model, _ = started(how)
    base = AutoModelForCausalLM.from_pretrained(llm_dir)
    for name, own in base.named_parameters():
        path = name.rpartition(".")[0]
        wrapped = model.language_model.get_submodule(f"base_model.model.{path}")
        assert getattr(wrapped, "base_layer", wrapped).weight.equal(own)
    ids = torch.arange(20)[None]
    expected = base(ids).logits
    assert model.language_model(ids).logits.equal(expected)
    move(model.language_model)
    assert not model.language_model(ids).logits.allclose(expected, atol=1e-3)
    with model.disable_adapter():
        assert model.language_model(ids).logits.equal(expected)


@pytest.mark.parametrize("how", ["pissa", "olora", "corda"])
@pytest.mark.parametrize("corda_method", ["ipm", "kpm"])
def test_trained_it_is_what_peft_makes_of_changed_weights(
    started, llm_dir, text, how, corda_method
):
    options = {"corda_config": CordaConfig(corda_method=corda_method)} if how == "corda" else {}
    if corda_method == "kpm" and how != "corda":
        return
    model, _ = started(how, **options)
    own, ids = peft_own(llm_dir, how, text, **options), torch.arange(20)[None]
    set_trainable(model, connector=False, adapter=True)
    found = {}
    for llm in (model.language_model, own):
        move(llm)
        logits = llm(ids).logits
        logits.log_softmax(-1)[..., 3].sum().backward()
        grads = {n: p.grad for n, p in llm.named_parameters() if p.grad is not None}
        found[llm] = logits, grads
    assert all("lora_A" in n or "lora_B" in n for n in grads) and len(grads) == 2 * 2 * 3
    torch.testing.assert_close(found[model.language_model], found[own], atol=1e-3, rtol=1e-3)
    merged = model.merge_adapter().language_model(ids).logits
    torch.testing.assert_close(merged, found[own][0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("how", ["olora", "corda"])
@pytest.mark.parametrize("gate", ["none", "sample", "image_tokens", "after_image"])
def test_a_checkpoint_needs_neither_data_nor_decomposition(
    started, images, tmp_path, monkeypatch, how, gate
):
    model, processor = started(how, gate)
    move(model.language_model)
    batch = model_inputs(processor, [[user("text")], [user(images[0], "seen")]])
    expected = model(**batch).logits
    with model.disable_adapter():
        base = model(**batch).logits
    length = batch["attention_mask"][0].sum()
    rows = expected[0, -length:], base[0, -length:]
    assert rows[0].equal(rows[1]) == (gate != "none") and not expected[1].equal(base[1])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for name in ("qr", "svd"):
        monkeypatch.setattr(torch.linalg, name, None)
    again, _ = checkpoint.load(tmp_path)
    assert again.language_model.peft_config["default"].init_lora_weights == how
    assert again(**batch).logits.equal(expected)
    again.save_pretrained(tmp_path / "second")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        first, second = (folder / "adapter" / file for folder in (tmp_path, tmp_path / "second"))
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva_is_pefts_own_on_the_same_activations(started, llm_dir, text, tmp_path, rho):
    options = {"eva_config": EvaConfig(rho=rho, use_label_mask=False)}
    model, processor = started("eva", gate="sample", **options)
    ids = torch.arange(20)[None]
    with model.disable_adapter():
        expected = model.language_model(ids).logits
    starts.eva(model.language_model, *reads(model, text))
    assert model.language_model(ids).logits.equal(expected)  # B is 0 again
    own = AutoModelForCausalLM.from_pretrained(llm_dir)
    config = lora("eva", **options)
    batches = [{"input_ids": torch.tensor([sample["input_ids"]])} for sample in text]
    wanted = get_eva_state_dict(own, batches, config)
    ranks = set()
    for name, a in wanted.items():
        layer = model.language_model.get_submodule(f"base_model.model.{name}")
        if not len(a):  # no rank is left to this layer
            assert isinstance(layer, torch.nn.Linear)
            continue
        found = layer.lora_A["default"].weight.data
        torch.testing.assert_close(found, a.float(), atol=1e-4, rtol=1e-3)
        ranks.add(len(a))
    assert (len(ranks) > 1) == (rho > 1) and max(ranks) <= 4 * rho
    for layer in starts.lora_layers(model.language_model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight)
        assert layer.lora_B["default"]._forward_hooks  # the gate is still on it
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = checkpoint.load(tmp_path)
    seen = {"adapter_mask": torch.ones(1, 1, dtype=torch.bool)}
    assert again(ids, **seen).logits.equal(model(ids, **seen).logits)
    assert model(ids).logits.equal(expected)


def test_eva_with_dora_is_the_base_in_sixteen_bits(make_bridge, text):
    options = {"use_dora": True, "eva_config": EvaConfig(rho=2.0, use_label_mask=False)}
    model, _ = make_bridge("none", adapter=lora("eva", **options), dtype="bfloat16")
    ids = torch.arange(20)[None]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # the fixture filled it
            parameter.data.zero_()
    starts.eva(model.language_model, *reads(model, text))
    layers = starts.lora_layers(model.language_model).values()
    assert len({layer.r["default"] for layer in layers}) > 1  # some moved
    assert all(p.dtype == torch.float32 for p in adapter_parameters(model.language_model))
    adapted = model.language_model(ids).logits
    with model.disable_adapter():
        assert model.language_model(ids).logits.equal(adapted)


def test_olora_of_a_transposed_weight_is_of_the_weight():
    # GPT-2 keeps (in, out); peft's own start takes a square one for (out, in)
    from .test_tuners_layers import tiny_llm

    found = {}
    for name in ("attn.c_proj", "mlp.c_proj"):
        llm = tiny_llm("gpt2")
        config = LoraConfig(r=4, init_lora_weights="olora", target_modules=[name])
        adapted = attach_adapter(llm, config)
        layer = next(iter(starts.lora_layers(adapted).values()))
        weight = layer.get_base_layer().weight.T  # (out, in)
        q, r = torch.linalg.qr(weight)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        found[name] = b @ a
        torch.testing.assert_close(found[name], q[:, :4] @ r[:4], atol=1e-5, rtol=1e-4)
    assert found["mlp.c_proj"].shape == (32, 128)


def test_eva_that_cannot_be_is_refused(started, text):
    model, _ = started("eva", eva_config=EvaConfig())
    with pytest.raises(ValueError, match="EVA wants 32 tokens at least .*, 1 samples have"):
        starts.eva(model.language_model, *reads(model, text[:1]))
    model, _ = started("eva", eva_config=EvaConfig(tau=1.0, use_label_mask=False))
    many = [dict(text[0], input_ids=torch.randint(3, 200, (40,)).tolist(), labels=[1] * 40,
                 mm_token_type_ids=[0] * 40, position_ids=list(range(40)), branch_ids=[0] * 40)
            for _ in range(3)]  # fmt: skip
    with pytest.raises(ValueError, match="EVA has not settled in 50 rounds of 3 samples"):
        starts.eva(model.language_model, *reads(model, many))


def test_eva_reads_every_sample_once(make_bridge, images):
    model, processor = make_bridge("none")
    samples = [s for s in samples_of(processor, images) for _ in range(2)]
    learned = [sum(label != -100 for label in s["labels"]) for s in samples]
    batches = starts._eva_batches(samples, sum(learned[:-1]), True, starts._Ask(model))
    assert len(batches) == 1  # what is left over alone is too little
    assert batches[0]["positions"].sum() == sum(learned)
    batches = starts._eva_batches(samples, 12, True, starts._Ask(model))
    counts = [int(batch["positions"].sum()) for batch in batches]
    assert min(counts) >= 12 and sum(counts) == sum(learned) and len(counts) > 1


@pytest.mark.parametrize(
    ("how", "options"),
    [
        ("pissa", ""), ("eva", "eva_config: {rho: 1.5}"), ("eva", ""), ("corda", ""),
        ("corda", "corda_config: {corda_method: kpm}"),
    ],
)  # fmt: skip
def test_a_recipe_with_a_start(recipe, replay, capsys, monkeypatch, how, options):  # noqa: F811
    written = recipe.read_text()
    recipe.write_text(
        written.replace("r: 4,", f"r: 2, init_lora_weights: {how}, {options and options + ', '}")
    )
    if "kpm" not in options:
        replay = []
    given = [*replay, "--data.start_samples", "8", "--speed.feature_cache", "on",
             "--speed.feature_cache_dir", str(recipe.parent / "features")]  # fmt: skip
    run = train(recipe, given)
    expected = "" if how == "pissa" else f"adapter: starts by {how} from"
    said = capsys.readouterr().err
    assert expected in said
    assert ("replay is read for the adapter's start alone: under gate" in said) == bool(replay)
    model, _ = mmpeft.load(run)
    ids = torch.arange(12)[None]
    trained = model.language_model(ids).logits
    with model.disable_adapter():
        assert not trained.equal(model.language_model(ids).logits)
    weights = (run / "checkpoint" / "adapter" / "adapter_model.safetensors").read_bytes()
    train(recipe, given, resume=True)  # nothing is left to do
    shutil.rmtree(run / "checkpoint")
    monkeypatch.setattr(starts, "corda", None)  # what the start was stands in the checkpoint
    monkeypatch.setattr(starts, "eva", None)
    train(recipe, given, resume=True)
    assert (run / "checkpoint" / "adapter" / "adapter_model.safetensors").read_bytes() == weights
    if "kpm" in options:
        with pytest.raises(ValueError, match="corda_method 'kpm' preserves .* set data.replay"):
            train(recipe, ["--output_dir", str(recipe.parent / "without")])


def test_starts_that_cannot_be_had(make_bridge):
    with pytest.raises(ValueError, match="'pissa' has no start of rank 40 for .*lower r, or set"):
        make_bridge(adapter=LoraConfig(r=40, target_modules=["q_proj"], init_lora_weights="pissa"))
    with pytest.raises(ValueError, match="'olora' serves plain LoRA on linear layers; .*default"):
        make_bridge("none", adapter=lora("olora", use_dora=True))
    with pytest.raises(ValueError, match="'corda' serves a LoraConfig; set init_lora_weights"):
        make_bridge("none", adapter=AdaLoraConfig(init_lora_weights="corda", total_step=9))


# ------------------------------------------------------------------------------------- the dial


def peft_adapters():
    from peft import IA3Config, LoKrConfig, OFTConfig

    from mmpeft.tuners.bottleneck import BottleneckConfig
    from mmpeft.tuners.full import FullTuningConfig

    return {
        "lora": lora(True), "pissa": lora("pissa"), "dora": lora(True, use_dora=True),
        "ia3": IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        "lokr": LoKrConfig(r=2, target_modules=TARGETS),
        "oft": OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
        "bottleneck": BottleneckConfig(), "full": FullTuningConfig(target_modules=["down_proj"]),
    }  # fmt: skip


@pytest.mark.parametrize("name", peft_adapters())
@pytest.mark.parametrize("gate", ["none", "sample"])
def test_the_dial_goes_from_the_base_to_the_adapter(make_bridge, images, name, gate):
    from mmpeft.adapter_scale import scaled
    from mmpeft.retention.sides import adapter_state, hash_weights

    model, processor = make_bridge(gate, adapter=peft_adapters()[name])
    torch.manual_seed(3)
    for parameter in model.language_model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    batch = model_inputs(processor, [[user("text")], [user(images[0], "seen")]])
    llm = model.language_model

    def at(scale):
        with scaled(llm, scale):
            return model(**batch).logits, hash_weights(adapter_state(llm))

    plain, state = model(**batch).logits, hash_weights(adapter_state(llm))
    with model.disable_adapter():
        base = model(**batch).logits
    found = {scale: at(scale) for scale in (0.0, 0.5, 1.0)}
    torch.testing.assert_close(found[0.0][0], base, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1.0][0], plain, atol=1e-5, rtol=1e-4)
    assert (plain - base).abs().max() > 1e-2
    for end in (base, plain):
        assert (found[0.5][0] - end).norm() < 0.9 * (plain - base).norm()
    length = batch["attention_mask"][0].sum()
    if gate == "sample":
        assert all(logits[0, -length:].equal(base[0, -length:]) for logits, _ in found.values())
    assert found[1.0][1] == state and len({key for _, key in found.values()}) == 3
    assert model(**batch).logits.equal(plain) and hash_weights(adapter_state(llm)) == state


def test_the_dial_interpolates_the_weights(make_bridge):
    """For what replaces a layer's weight, as for LoRA."""
    from mmpeft.adapter_scale import scaled
    from mmpeft.tuners.full import FullTuningConfig

    ids = torch.arange(9)[None]
    for adapter in (lora(True), FullTuningConfig(target_modules=["down_proj"])):
        model, _ = make_bridge("none", adapter=adapter)
        llm = model.language_model
        move(llm)
        for parameter in llm.parameters():
            if parameter.requires_grad and parameter.dim() == 2:
                parameter.data += 0.05 * torch.randn_like(parameter)
        with scaled(llm, 0.3):
            expected = llm(ids).logits
        with model.disable_adapter():
            before = {k.replace(".base_layer", ""): v.clone() for k, v in llm.state_dict().items()}
        merged = model.merge_adapter().language_model
        for name, weight in merged.state_dict().items():
            own = before.get(f"base_model.model.{name}")
            if own is not None:
                weight.lerp_(own, 0.7)
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-3)


def test_what_the_dial_cannot_scale(make_bridge):
    from mmpeft.adapter_scale import scalable_layers
    from mmpeft.tuners.llama_adapter import LlamaAdapterConfig
    from mmpeft.tuners.prefix import PrefixConfig

    model, _ = make_bridge("none", adapter=None)
    with pytest.raises(ValueError, match="there is none; leave the scale out"):
        scalable_layers(model.language_model)
    model, _ = make_bridge("none", adapter=LlamaAdapterConfig())
    assert scalable_layers(model.language_model)  # its softmax is its own
    model, _ = make_bridge("none", adapter=PrefixConfig())
    with pytest.raises(ValueError, match="the dial cannot scale PrefixConfig: its learned keys"):
        scalable_layers(model.language_model)
