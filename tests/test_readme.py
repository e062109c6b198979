"""What the README says runs."""

import re
import shlex
from pathlib import Path

import pytest

from mmpeft import cli, config

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.starter
def test_python_blocks_run(starter_path, tmp_path):
    for asset in ("efficientnet-lite0", "smollm2-135m-instruct", "easy-vqa"):
        starter_path(asset)
    build, use = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(build, names)
    run = tmp_path / "run"
    names["model"].save_pretrained(run)
    names["processor"].save_pretrained(run)
    assert '"runs/quickstart"' in use
    exec(use.replace("runs/quickstart", str(run)), {})


def test_every_command_exists():
    lines = re.findall(r"^(mmpeft [^\n]*)$", README, re.MULTILINE)
    assert len(lines) >= 2
    for line in lines:
        arguments, rest = cli.build_parser().parse_known_args(shlex.split(line)[1:])
        if arguments.command is cli._train:
            config.load(ROOT / arguments.recipe, rest)
        else:
            assert not rest


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
