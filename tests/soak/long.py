"""Thousands of steps: memory and open files stay where they were after the first ones.

``make soak`` runs it. ``SOAK_STEPS`` is the number of steps (3,000 by default).
"""

import json
import os
import time

from transformers import TrainerCallback

from mmpeft.train import train

from ..conftest import assistant, user

STEPS = int(os.environ.get("SOAK_STEPS", 3000))
PAGE = os.sysconf("SC_PAGE_SIZE")
MAY_GROW = 16e6  # bytes: a logged row for each step, and the allocator's moods


class Usage(TrainerCallback):
    """Resident bytes and open files, a hundred times over the training."""

    def __init__(self):
        self.resident, self.files = [], []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % max(1, STEPS // 100) == 0:
            with open("/proc/self/statm") as file:
                self.resident.append(int(file.read().split()[1]) * PAGE)
            self.files.append(len(os.listdir("/proc/self/fd")))


def test_memory_is_flat(recipe, jsonl, tmp_path):
    text = [{"messages": [user(f"say {i}"), assistant("words " * 4)]} for i in range(50)]
    usage, began = Usage(), time.time()
    train(recipe, [
        "--align", "null", "--instruct.max_steps", str(STEPS), "--instruct.logging_steps", "10",
        "--instruct.save_steps", str(STEPS // 10), "--instruct.per_device_train_batch_size", "1",
        "--speed.feature_cache", "on", "--speed.feature_cache_dir", str(tmp_path / "cache"),
        "--data.replay", "Messages", "--data.replay.init_args.train",
        str(jsonl(text, "replay.jsonl")), "--model.gate", "none", "--instruct.kl_weight", "0.1",
        "--speed.compile", "off",
    ], callbacks=[usage])  # fmt: skip
    fifth = len(usage.resident) // 5
    first, last = max(usage.resident[fifth : 2 * fifth]), max(usage.resident[-fifth:])
    found = {
        "what": "long", "steps": STEPS, "mb_from_20_to_40_percent": round(first / 1e6, 1),
        "mb_at_the_end": round(last / 1e6, 1), "open_files": [usage.files[fifth], usage.files[-1]],
        "seconds": round(time.time() - began),
    }  # fmt: skip
    print(json.dumps(found), flush=True)
    assert last - first < MAY_GROW
    assert usage.files[-1] <= usage.files[fifth]
