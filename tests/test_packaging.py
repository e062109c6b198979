"""The package as a user gets it: wheel equals tree, nothing heavy, nothing generic, no cycles."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import mmpeft

ROOT = Path(__file__).resolve().parent.parent
MAPPED = ("connectors", "tasks", "configs", "demos")
SOURCES = [p for folder in ("mmpeft", *MAPPED) for p in sorted((ROOT / folder).rglob("*.py"))]

pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").is_file(), reason="needs a checkout, not an installed wheel"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT],
        check=True, capture_output=True,
    )  # fmt: skip
    return next(out.glob("*.whl"))


def test_wheel_holds_the_tree_and_nothing_generic(wheel):
    with zipfile.ZipFile(wheel) as archive:
        shipped = {n for n in archive.namelist() if ".dist-info/" not in n}
    tree = set()
    for folder in ("mmpeft", *MAPPED):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                relative = str(path.relative_to(ROOT))
                tree.add(relative if folder == "mmpeft" else f"mmpeft/{relative}")
    assert shipped == tree


def test_wheel_works_from_elsewhere(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, 'site'); import mmpeft; "
        "assert mmpeft.__file__.startswith(sys.argv[1]), mmpeft.__file__; "
        "import mmpeft.connectors.mlp as m, mmpeft.tasks.easy_vqa; "
        "assert m.__file__.startswith(sys.argv[1]), m.__file__; "
        "from mmpeft import config; from importlib.resources import files; "
        "config.load(str(files('mmpeft.configs') / 'quickstart.yaml'))"
    )
    site = str(tmp_path / "site")
    subprocess.run([sys.executable, "-c", code, site], cwd=tmp_path, check=True)


@pytest.mark.parametrize("name", MAPPED)
def test_mapped_folders_refuse_their_generic_name(name):
    code = f"import {name}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and f"import this package as mmpeft.{name}" in done.stderr


def test_module_runs_from_the_checkout():
    done = subprocess.run(
        [sys.executable, "-m", "mmpeft", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == mmpeft.__version__


def test_public_names_resolve_and_importing_is_light():
    code = (
        "import mmpeft, sys; heavy = {'torch', 'transformers'} & set(sys.modules); "
        "assert not heavy, heavy; [getattr(mmpeft, n) for n in mmpeft.__all__]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_package_is_listed_for_the_wheel():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join((() if p.relative_to(ROOT).parts[0] == "mmpeft" else ("mmpeft",))
                 + p.relative_to(ROOT).parent.parts)
        for p in SOURCES if p.name == "__init__.py"
    }  # fmt: skip
    assert found == set(listed)


def imports(path: Path, top_level_only: bool) -> set[str]:
    """Names of mmpeft modules and outside packages that a file imports."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def outside(names):
    return {n.split(".")[0] for n in names} - set(sys.stdlib_module_names) - {"mmpeft"}


@pytest.mark.parametrize("contract", ["encoder/contract", "connector", "task"])
def test_contracts_import_torch_and_the_standard_library_only(contract):
    names = imports(ROOT / "mmpeft" / f"{contract}.py", top_level_only=True)
    assert outside(names) <= {"torch"}
    assert not any(n.startswith("mmpeft.") for n in names)


@pytest.mark.parametrize(
    ("folder", "contract"),
    [("connectors", "mmpeft.connector"), ("tasks", ("mmpeft.task", "mmpeft.text_task"))],
)
def test_parts_import_their_contract_and_never_each_other(folder, contract):
    for path in (ROOT / folder).glob("*.py"):
        names = {n for n in imports(path, top_level_only=True) if n.startswith("mmpeft")}
        assert all(n.startswith(contract) for n in names), path


def test_nothing_imports_the_top():
    for path in SOURCES:
        inside = path.relative_to(ROOT).parts
        if inside[0] == "demos" or inside[-1] in ("cli.py", "__main__.py"):
            continue
        names = imports(path, top_level_only=False)
        assert not any(n.startswith(("mmpeft.cli", "mmpeft.demos")) for n in names), path


def test_only_config_knows_all_parts():
    for path in (ROOT / "mmpeft").glob("*.py"):
        names = imports(path, top_level_only=True)
        if path.name != "config.py":
            assert not any(n.startswith(("mmpeft.connectors", "mmpeft.tasks")) for n in names), path
