"""Imports point one way, and one place touches each delicate thing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from revlib import _torch

ROOT = Path(__file__).parent.parent / "revlib"
# What stands lower may be imported by what stands higher. A folder is one entry.
LAYERS = [
    ["_torch", "_numbers"],
    ["tensors", "couplings", "keywords", "refusals"],
    ["step", "cuda_streams"],
    ["core", "bijections"],
    ["guards"],
    ["look_ahead", "functional"],
    ["engine"],
    ["schedulers"],
    ["uncompiled"],
    ["sequence", "chunks", "encoder", "recurrences"],
    ["models", "testing", "diagnostics", "convert"],
    ["checkpoints"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
WHILE_TRACING = {("schedulers", "uncompiled"), ("functional", "uncompiled")}  # inside functions, see uncompiled.py


def layer(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "revlib":
            parts = node.module.split(".")
            names |= {parts[1]} if len(parts) > 1 else {a.name for a in node.names if a.name in LEVEL}
    return names


def test_every_module_has_its_place():
    assert {layer(path) for path in ROOT.rglob("*.py")} - {"__init__"} == set(LEVEL)


def test_imports_point_one_way():
    for path in ROOT.rglob("*.py"):
        if layer(path) == "__init__":
            continue
        for name in imported(path) - {layer(path)}:
            below = LEVEL[name] < LEVEL[layer(path)] or (layer(path), name) in WHILE_TRACING
            assert below, f"{path.name} imports {name}"


def test_the_core_knows_no_guard():
    for path in (ROOT / "core").glob("*.py"):
        assert imported(path) <= {"_torch", "tensors", "refusals", "step", "couplings", "core"}, path.name


RESEARCH = ROOT.parent / "research"
# Each may import from those before it. Commands, the files beside the folders, import from folders only.
FOLDERS = ["shared", "data", "recipes", "settings", "training", "benchmarking", "studies", "examples"]


def imports_of_research(path: Path) -> set[str]:
    """The modules of research that a file imports anywhere in it, such as {"training.log", "gpu"}."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if module_file(name) else str(node.module) for name in inner}
    return {name.removeprefix("research.") for name in names if name.split(".")[0] == "research"}


def module_file(name: str) -> Path | None:
    """The file of a module of research, or None if there is no such module."""
    path = ROOT.parent / name.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def test_every_folder_of_research_has_its_place_and_is_small():
    folders = {path.parent.name for path in RESEARCH.rglob("*.py")} - {"research"}
    assert folders == set(FOLDERS)
    for folder in FOLDERS:
        assert len(list((RESEARCH / folder).glob("*.py"))) <= 12, folder


def test_imports_of_research_point_one_way():
    for path in RESEARCH.rglob("*.py"):
        place = FOLDERS.index(path.parent.name) if path.parent != RESEARCH else len(FOLDERS)
        for name in imports_of_research(path):
            folder = name.split(".")[0]
            assert folder in FOLDERS[: place + 1], f"{path.relative_to(RESEARCH)} imports {name}"


def test_no_imports_of_research_go_in_a_circle():
    found = {path: imports_of_research(path) for path in RESEARCH.rglob("*.py")}
    edges = {path: {module_file(f"research.{name}") for name in names} - {path} for path, names in found.items()}
    done: set[Path | None] = set()

    def visit(path: Path, above: tuple[Path, ...]) -> None:
        assert path not in above, " imports ".join(str(p.relative_to(RESEARCH)) for p in (*above, path))
        for other in edges[path] - done:
            visit(other, (*above, path))
        done.add(path)

    for path in edges:
        visit(path, ())


def test_each_file_beside_the_folders_of_research_is_a_command():
    for path in RESEARCH.glob("*.py"):
        # The lesson is a notebook, and runs from top to bottom.
        is_command = '\nif __name__ == "__main__":\n' in path.read_text()
        assert is_command or path.name in ("__init__.py", "tutorial.py"), path.name
    for path in RESEARCH.glob("*/*.py"):
        example = path.parent.name == "examples" and path.name != "__init__.py"  # each of which is a command, too
        assert ("__main__" in path.read_text()) == example, path


def test_research_uses_the_public_api_only():
    for path in RESEARCH.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("revlib."):
                assert node.module.split(".")[1] in {"bijections", "couplings", "schedulers", "models", "testing"}, (
                    path.name
                )


@pytest.mark.parametrize(
    ("word", "allowed"),
    [
        ("rng_state", {"randomness.py"}),
        ("saved_tensors_hooks(", {"record.py", "tape.py", "purity.py"}),
        ("autograd.Function)", {"saved_tensors.py", "additive.py", "autograd_function.py"}),
        ("torch.cuda", {"cuda_streams.py"}),
        ("torch._C.", {"_torch.py"}),
        ("._version", {"_torch.py"}),
        ("._base", {"_torch.py"}),
        ("_fix_weakref", {"_torch.py"}),
        ("_execution_engine", {"_torch.py"}),
        ("_functorch", {"_torch.py"}),
        ("_pytree", {"_torch.py"}),
        ("_python_dispatch", {"_torch.py"}),
    ],
)
def test_one_place_touches_each_delicate_thing(word, allowed):
    assert {p.name for p in ROOT.rglob("*.py") if word in p.read_text()} == allowed


def test_no_private_interface_of_torch_is_missing():
    assert _torch.missing() == ()


def test_a_missing_interface_is_named_with_the_version(monkeypatch):
    import torch

    from revlib import ReversibleSequence, engine

    monkeypatch.setattr(engine, "missing", lambda: ("torch._C._gone",))
    x = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match=rf"torch {torch.__version__.split('+')[0]}.* lacks torch._C._gone"):
        ReversibleSequence([(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))])(x, x)


def test_the_import_loads_no_compiler_and_nothing_distributed():
    heavy = ["torch._dynamo", "sympy", "torch.distributed.tensor", "torch._subclasses.fake_tensor", "timm"]
    code = "import sys, torch; before = set(sys.modules); import revlib; print(*set(sys.modules) - before)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert "revlib" in found.stdout.split() and not set(heavy) & set(found.stdout.split())
