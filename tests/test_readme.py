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


def test_the_table_of_connectors_is_complete():
    from mmpeft.connector import ConnectorConfig

    table = README[README.index("| `connector` |") : README.index("`NAMEConnectorConfig`")]
    named = {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row[:30])}
    ours = [c for c in ConnectorConfig.__subclasses__() if c.__module__.startswith("mmpeft.")]
    assert named - {"connector"} == {c.__name__.removesuffix("ConnectorConfig") for c in ours}


def test_parts_in_the_tables_parse():
    import yaml

    snippets = re.findall(r"`((?:vision_encoder|resolution|model|data): \{.*?\})`", README)
    assert len(snippets) >= 4
    for snippet in snippets:
        ((key, value),) = yaml.safe_load(snippet).items()
        overrides = [f"--{'' if key in ('model', 'data') else 'model.'}{key}"]
        recipe = ROOT / "configs" / "quickstart.yaml"
        if key == "model":  # start_from brings its own parts
            value |= {"vision_encoder": None, "connector": None, "language_model": None}
        config.load(recipe, [*overrides, yaml.safe_dump(value, default_flow_style=True).strip()])
