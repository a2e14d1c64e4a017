"""Imports point one way, and one place touches each delicate thing."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent / "revlib"
LAYERS = [
    ["tensors"],
    ["couplings", "replay", "modules", "streams", "watch"],
    ["held"],
    ["loop", "step"],
    ["chunks", "encoder", "program", "recurrences", "saved"],
    ["record", "sweep"],
    ["functional", "tape"],
    ["engine"],
    ["schedulers"],
    ["sequence"],
    ["models", "testing", "diagnostics", "convert"],
    ["checkpoints"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def layer(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "revlib":
            parts = node.module.split(".")
            names |= {parts[1]} if len(parts) > 1 else {a.name for a in node.names if a.name in LEVEL}
    return names


def test_imports_point_one_way():
    for path in ROOT.rglob("*.py"):
        if layer(path) == "__init__":
            continue
        for name in imported(path) - {layer(path)}:
            assert LEVEL[name] < LEVEL[layer(path)], f"{path.name} imports {name}"


def test_research_uses_the_public_api_only():
    for path in (ROOT.parent / "research").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("revlib."):
                assert node.module.split(".")[1] in {"couplings", "schedulers", "models", "testing"}, path.name


def test_one_place_touches_random_generators_and_one_autograd():
    users = {
        "rng_state": {"replay.py"},
        "saved_tensors_hooks(": {"record.py", "tape.py"},
        "autograd.Function)": {"saved.py", "additive.py", "functional.py"},
        "torch.cuda": {"streams.py"},
    }
    for word, allowed in users.items():
        found = {p.name for p in ROOT.rglob("*.py") if word in p.read_text()}
        assert found == allowed, word


def test_files_stay_short():
    for path in ROOT.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 250, path.name
