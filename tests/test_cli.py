"""The command line: help that is instant, JSON that is alone, errors in one line."""

import json
import subprocess
import sys

import pytest

from mmpeft import cli
from mmpeft.train import train

from .conftest import assistant, user


@pytest.fixture
def run(recipe):
    return str(train(recipe))


def command(*arguments, capsys):
    code = cli.main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_ask_prints_one_json_object_and_nothing_else(run, capsys, tmp_path):
    image = str(next(tmp_path.glob("*.png")))
    code, out, _ = command(
        "ask", run, "--image", image, "number 1", "--max_new_tokens", "4", "--json", capsys=capsys
    )
    report = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert report["schema"] == "mmpeft.ask/1" and report["model"] == "bridge"
    speed = {"new_tokens", "first_token_seconds", "tokens_per_second"}
    assert set(report) == {"schema", "run", "model", "question", "images", "reply", *speed}


def test_eval_reports_and_reproduces_to_the_item(run, capsys, tmp_path):
    items = tmp_path / "run/eval/messages.items.jsonl"
    code, out, _ = command("eval", run, "--task", "messages", "--json", capsys=capsys)
    report, first = json.loads(out), items.read_text()
    assert code == 0 and report["n"] == 12
    assert {"schema", "task", "n", "accuracy", "ci95", "by_type", "controls"} <= set(report)
    assert set(report["controls"]) == {"majority", "image_withheld", "image_shuffled"}
    fresh = [sys.executable, "-m", "mmpeft", "eval", run, "--task", "messages", "--json"]
    again = subprocess.run(fresh, capture_output=True, text=True, check=True)
    repeated = json.loads(again.stdout)
    for timed in (report, repeated):
        assert timed.pop("seconds") > 0 and timed.pop("replies_per_second") > 0
    assert repeated == report and items.read_text() == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "RUN", "--image", "gone.jpg", "what?"], "gone.jpg does not exist"),
        (["ask", "RUN", "x" * 600], "do not fit the context of 512"),
        (["ask", "nowhere", "what?"], "no run at nowhere"),
        (["eval", "RUN", "--task", "easy_vqua"], "Did you mean 'easy_vqa'"),
        (["eval", "RUN", "--task", "messages", "--samples", "few"], "a number or 'all'"),
        (["eval", "RUN", "--task", "messages", "--samples", "0"], "--samples is 0; it must be 1"),
        (
            ["eval", "RUN", "--task", "messages", "--batch_size", "-2"],
            "--batch_size is -2; it must",
        ),
        (["retain", "RUN", "--samples", "0"], "--samples is 0; it must be 1 or more"),
        (["retain", "RUN", "--output", __file__], "test_cli.py is a file; name a folder"),
        (["data", "check", "x", "--output", __file__], "test_cli.py is a file; name a folder"),
        (["chat", "RUN", "--port", "99999"], "--port is 99999; it must lie in 0 to 65535"),
        (["replay", "x", "--output", "y", "--batch_size", "0"], "--batch_size is 0; it must be 1"),
        (["train", "gone.yaml"], "recipe gone.yaml does not exist"),
        (["starter", "easyvqa"], "easy-vqa"),
    ],
)
def test_a_mistake_is_one_line_and_a_non_zero_exit(run, capsys, arguments, message):
    arguments = [run if a == "RUN" else a for a in arguments]
    code, out, err = command(*arguments, capsys=capsys)
    last = err.strip().splitlines()[-1]
    assert code == 2 and not out
    assert last.startswith("mmpeft: error: ") and message in last


@pytest.mark.parametrize(
    "name", ["train", "compare", "eval", "retain", "replay", "ask", "chat", "starter"]
)
def test_help_teaches(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    examples = capsys.readouterr().out.split("\nexample")[1]
    assert stop.value.code == 0 and f"mmpeft {name}" in examples


def test_the_module_has_the_exit_code_of_the_command(tmp_path):
    missing = [sys.executable, "-m", "mmpeft", "data", "check", str(tmp_path / "gone.jsonl")]
    assert subprocess.run(missing, capture_output=True, cwd=tmp_path).returncode == 2


def test_help_is_instant():
    slow = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mmpeft", "--help"],
        capture_output=True, text=True, check=True,
    ).stderr  # fmt: skip
    assert not any(f" {m}\n" in slow for m in ("torch", "transformers", "peft", "timm"))


@pytest.mark.skipif(sys.platform == "win32", reason="pipes end otherwise there")
def test_a_reader_that_leaves_is_no_error(jsonl):
    """``mmpeft data check FILE | head``."""
    path = jsonl([{"messages": [user("?"), assistant("yes")]}])
    command = subprocess.Popen(
        [sys.executable, "-m", "mmpeft", "data", "check", str(path), "--json"],
        text=True, cwd=path.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    command.stdout.close()
    said = command.stderr.read()
    assert command.wait() == 141 and "error" not in said.lower()


def test_options_are_spelt_either_way():
    for spelt in ("--no_sharing", "--no-sharing"):
        given = cli.build_parser().parse_args(["eval", "run", "--task", "easy_vqa", spelt])
        assert given.no_sharing


@pytest.mark.parametrize(
    ("fail_on", "verdicts", "code"),
    [
        ([], ["degraded"], 0),
        (["--fail-on", "degraded"], ["retained", "inconclusive"], 0),
        (["--fail-on", "degraded"], ["retained", "degraded"], 1),
        (["--fail_on", "inconclusive"], ["retained", "inconclusive"], 1),
        (["--fail_on", "inconclusive"], ["degraded"], 1),
        (["--fail_on", "inconclusive"], ["not_judgeable"], 1),
        (["--fail_on", "degraded"], ["not_judgeable"], 0),
    ],
)
def test_a_verdict_can_fail_a_pipeline(monkeypatch, capsys, fail_on, verdicts, code):
    import mmpeft.retention.report as report
    import mmpeft.retention.terminal as terminal

    modes = {str(i): {"verdict": verdict} for i, verdict in enumerate(verdicts)}
    monkeypatch.setattr(report, "retain_pair", lambda *args, **options: {"modes": modes})
    monkeypatch.setattr(terminal, "render", lambda report: "")
    found, _, err = command("retain", "--base", "a", "--tuned", "b", *fail_on, capsys=capsys)
    assert found == code and not err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a RUN, or both --base and --tuned"),
        (["run", "--base", "a"], "give a RUN, or both"),
        (["--base", "a"], "give a RUN, or both"),
        (["--base", "a", "--tuned", "b", "--scales", "0,1"], "--scales needs a RUN"),
        (["run", "--scales", "0;1"], "give numbers and commas"),
        (["run", "--dtype", "float32"], "--dtype is for --base and --tuned"),
        (["run", "--suite", "standard", "--tasks", "piqa"], "not both"),
    ],
)
def test_retain_says_what_it_needs(capsys, arguments, message):
    code, out, err = command("retain", *arguments, capsys=capsys)
    assert code == 2 and not out and message in err
