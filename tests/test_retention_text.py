"""Running prose: bits per byte, divergence, agreement."""

import math

import numpy as np
import pytest
import torch

from mmpeft.retention.sides import BridgeSides, RetentionError
from mmpeft.retention.text import compare_text, embedded_text


def test_bits_per_byte_and_divergence_by_hand(make_bridge):
    model, processor = make_bridge(gate="none")
    text = "Grüße! " + "The quick brown fox jumps over the lazy dog. " * 3
    result = compare_text(BridgeSides(model, processor), text, window=40)
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    nats, kl, agree = {"base": 0.0, "bridge": 0.0}, [], []
    for start in range(0, len(ids), 40):
        piece = ids[start : start + 40]
        inputs = torch.tensor([[processor.tokenizer.bos_token_id, *piece[:-1]]])
        with torch.no_grad():
            q = model(input_ids=inputs).logits[0].double().log_softmax(-1)
            with model.disable_adapter():
                p = model(input_ids=inputs).logits[0].double().log_softmax(-1)
        for name, logs in (("base", p), ("bridge", q)):
            nats[name] -= logs[range(len(piece)), piece].sum().item()
        kl += (p.exp() * (p - q)).sum(-1).tolist()
        agree += (p.argmax(-1) == q.argmax(-1)).tolist()
    size = len(text.encode())
    assert result["source"]["tokens"] == len(ids) and result["source"]["bytes"] == size
    for name in nats:
        expected = nats[name] / math.log(2) / size
        assert result["bits_per_byte"][name] == pytest.approx(expected, rel=1e-5)
    assert result["kl"]["mean"] == pytest.approx(np.mean(kl), rel=1e-4)
    assert result["kl"]["p95"] == pytest.approx(np.percentile(kl, 95), rel=1e-4)
    assert result["kl"]["max"] == pytest.approx(max(kl), rel=1e-4)
    assert result["top1_agreement"] == pytest.approx(np.mean(agree))


def test_closed_gate_leaves_prose_untouched(tiny):
    model, processor = tiny
    result = compare_text(BridgeSides(model, processor), embedded_text(), max_tokens=300, window=64)
    assert result["max_abs_dlogit"] == 0 and {
        result["kl"][key] for key in ("mean", "p95", "max")
    } == {0}
    assert result["bits_per_byte"]["base"] == result["bits_per_byte"]["bridge"] > 0
    assert result["top1_agreement"] == 1 and result["source"]["tokens"] == 300


def test_divergence_by_position_averages_to_the_whole(make_bridge):
    sides = BridgeSides(*make_bridge(gate="none"))
    result = compare_text(sides, "The quick brown fox jumps. " * 10, max_tokens=128, window=64)
    places = result["kl"]["by_position"]
    assert [place["from"] for place in places] == list(range(0, 64, 4))
    assert [place["to"] for place in places] == list(range(4, 68, 4))
    mean = np.mean([place["mean"] for place in places])  # two full windows: equal shares
    assert mean == pytest.approx(result["kl"]["mean"], rel=1e-4)


def test_no_prose_is_refused(tiny):
    with pytest.raises(RetentionError, match="the text to measure on is empty"):
        compare_text(BridgeSides(*tiny), "")
