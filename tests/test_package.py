"""The package as a whole: what importing it costs, what it exports, what its wheel holds."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from PIL import Image

import ddpm_codec
from ddpm_codec.codec import decoder, encoder, stops

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "ddpm_codec").rglob("*.py"))
MODULES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
    for p in SOURCES
}
HEAVY = ("torch", "constriction", "PIL", "safetensors")
SCRIPT = f"""
import sys
from ddpm_codec.cli.main import main
status = main(sys.argv[1:])
loaded = [name for name in {HEAVY} if name in sys.modules]
sys.exit(f"loaded {{loaded}}" if loaded else status)
"""


@pytest.mark.parametrize("command", [["--help"], ["encode", "--help"], ["--version"], ["info"]])
def test_help_and_info_are_quick(
    command: list[str], tmp_path: Path, tiny_model: Path, picture: Image.Image
) -> None:
    """They load nothing heavy; a timed test would be a test of the machine."""
    if command == ["info"]:
        data = encoder.encode(picture, model=tiny_model, stop_at="t=500")
        (tmp_path / "x.ddpm").write_bytes(data)
        command = ["info", str(tmp_path / "x.ddpm"), "--plot", str(tmp_path / "x.svg")]
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *command], capture_output=True, text=True, cwd=ROOT
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout


@pytest.mark.parametrize(
    ("line", "completions"),
    [
        ("ddpmc dec", ["plain,decode"]),
        ("ddpmc encode --tu", ["plain,--tune"]),
        ("ddpmc encode --tune ", ["plain,visual", "plain,even"]),
        ("ddpmc encode REA", ["file,REA"]),
        ("ddpmc decode --stop-at t=500 --format png -v --recon m", ["plain,mean"]),
        ("ddpmc decode --stop-at b", ["plain,bpp=", "plain,bytes="]),
        ("ddpmc decode --format j", ["plain,jpg"]),
        ("ddpmc decode -o x", ["file,x"]),
        ("ddpmc train --parts ", ["dir,"]),
        ("ddpmc train --device c", ["plain,cpu", "plain,cuda"]),
    ],
)
def test_a_shell_completes_quickly(line: str, completions: list[str]) -> None:
    """Commands, options, files and values; nothing but Pillow is loaded for that."""
    asked = {"_DDPMC_COMPLETE": "bash_complete", "COMP_WORDS": line}
    script = SCRIPT.replace("'PIL', ", "")
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | asked | {"COMP_CWORD": str(len(line.split(" ")) - 1)},
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.split() == completions


@pytest.mark.parametrize(("shell", "says"), [("zsh", "#compdef ddpmc"), ("fish", "complete")])
def test_a_shell_is_told_how_to_complete(shell: str, says: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"_DDPMC_COMPLETE": f"{shell}_source"},
    )  # fmt: skip
    assert run.returncode == 0 and says in run.stdout


def test_importing_the_package_loads_nothing_heavy() -> None:
    script = f"import sys, ddpm_codec; sys.exit(any(name in sys.modules for name in {HEAVY}))"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("front", ["codec.decoder", "codec.encoder", "pillow", "compressai"])
def test_encoding_and_decoding_load_no_training(front: str) -> None:
    """Which needs a newer torch."""
    script = f"import sys, ddpm_codec.{front}; sys.exit('ddpm_codec.training' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


def test_the_oldest_versions_are_those_that_are_promised() -> None:
    """`make test-oldest` tests the lower bounds."""
    project = (ROOT / "pyproject.toml").read_text()
    listed = project.partition("\ndependencies = [")[2].partition("\n]")[0]
    bounds = dict(re.findall(r'"(\w+)>=([\d.]+)', listed))
    pinned = dict(re.findall(r"^(\w+)==(.*)$", (ROOT / "constraints-oldest.txt").read_text(), re.M))
    assert bounds.keys() == pinned.keys()
    for name, bound in bounds.items():
        assert f"{pinned[name]}.".startswith(f"{bound}."), name


def test_exports() -> None:
    for name in ddpm_codec.__all__:
        assert getattr(ddpm_codec, name) is not None
    assert set(ddpm_codec.__all__) <= set(dir(ddpm_codec))
    assert ddpm_codec.encode is encoder.encode and ddpm_codec.decode is decoder.decode
    assert ddpm_codec.info is stops.info and ddpm_codec.truncate is stops.truncate
    assert issubclass(ddpm_codec.ConversionWarning, ddpm_codec.DdpmcWarning)
    assert not hasattr(ddpm_codec, "AgreementError")  # which is caught before it leaves
    with pytest.raises(AttributeError, match="nonesuch"):
        ddpm_codec.nonesuch  # noqa: B018


@pytest.mark.parametrize(
    ("arguments", "status", "out", "err"),
    [
        (["--version"], 0, f"ddpmc, version {ddpm_codec.__version__}\n", ""),
        (["info", "none"], 1, "", "ddpmc: none: No such file or directory\n"),
    ],
)
def test_module_runs(arguments: list[str], status: int, out: str, err: str) -> None:
    """As the command does: `python -m ddpm_codec` says and returns the same."""
    command = [sys.executable, "-m", "ddpm_codec", *arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (status, out, err)


@pytest.mark.skipif(importlib.util.find_spec("hatchling") is None, reason="needs hatchling")
def test_the_wheel_holds_the_models(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("ddpmc-*.whl")
    with zipfile.ZipFile(wheel) as z:
        names = set(z.namelist())
    models = [p.name for p in (ROOT / "models").glob("*.safetensors")]
    assert "photo.safetensors" in models
    assert {f"ddpm_codec/models/{name}" for name in models} <= names
    assert {"ddpm_codec/py.typed", *(str(p.relative_to(ROOT)) for p in SOURCES)} <= names
    assert "ddpm_codec/view/page.html" in names
    assert not [n for n in names if n.split("/")[0] in ("tests", "benchmarks", "runs", "demo")]
    assert f"ddpmc-{ddpm_codec.__version__}.dist-info/licenses/LICENSE" in names


def test_the_theory_page_names_what_there_is() -> None:
    """`module.name` in docs/theory.md is a function, class or constant; `file.py` is a file."""
    text = (ROOT / "docs" / "theory.md").read_text()
    modules = {p.stem: ".".join(p.relative_to(ROOT).with_suffix("").parts) for p in SOURCES}
    names = [n for n in re.findall(r"`(\w+)\.(\w+)[`(]", text) if n[1] != "py"]
    assert len(names) > 20
    for module, name in names:
        assert module in modules, (module, name)
        assert hasattr(importlib.import_module(modules[module]), name), (module, name)
    others = [p for folder in ("tests", "benchmarks") for p in (ROOT / folder).glob("*.py")]
    paths = [f"/{p.relative_to(ROOT)}" for p in [*SOURCES, *others]]
    for path in re.findall(r"`((?:\w+/)*\w+\.py)`", text):
        assert any(p.endswith(f"/{path}") for p in paths), path


def statements(body: list[ast.AST]) -> Iterator[ast.AST]:
    """All that run when a module is imported, and those for type checkers."""
    for statement in body:
        yield statement
        if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            for part in ("body", "handlers", "orelse", "finalbody"):
                yield from statements(getattr(statement, part, []))


def imported(module: str) -> set[str]:
    """The package's modules that a module imports."""
    path, found = MODULES[module], set()
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    for statement in statements([ast.parse(path.read_text())]):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            name = "." * statement.level + (statement.module or "")
            base = importlib.util.resolve_name(name, package)
            names = {f"{base}.{alias.name}" for alias in statement.names}
            found |= {name if name in MODULES else base for name in names}
    return found & MODULES.keys()


def test_no_circle_of_imports() -> None:
    graph = {module: imported(module) for module in MODULES}
    assert graph["ddpm_codec.codec.chain"] >= {
        "ddpm_codec.rec.trellis", "ddpm_codec.codec.header", "ddpm_codec.diffusion.transform",
    }  # fmt: skip
    assert "ddpm_codec.codec.encoder" in graph["ddpm_codec.cli.report"]  # for type checkers
    TopologicalSorter(graph).prepare()  # raises CycleError


# The lowest first.
LEVELS = (
    "diffusion",
    "rec",
    "network",
    "paper",
    "codec",
    "view",
    "batch",
    "training",
    "cli",
)


def test_dependencies_point_downwards() -> None:
    """CONTRIBUTING.md: a level imports from itself, from those below it, and what all may use."""
    for module in MODULES:
        level = [*module.split("."), ""][1]
        if level in LEVELS:
            used = {name.split(".")[1] for name in imported(module) if "." in name}
            allowed = {*LEVELS[: LEVELS.index(level) + 1], "errors", "files", "data"}
            assert used <= allowed, module


def test_modules_and_commands_are_short() -> None:
    for path in SOURCES:
        lines = path.read_text().splitlines()
        assert len(lines) <= 350, path
        for statement in ast.parse("\n".join(lines)).body:
            if isinstance(statement, ast.FunctionDef) and any(
                "command" in ast.dump(decorator) for decorator in statement.decorator_list
            ):
                assert isinstance(statement.body[0], ast.Expr), "its help"
                first, last = statement.body[1].lineno, statement.body[-1].end_lineno or 0
                assert last - first < 20, (path, statement.name)
