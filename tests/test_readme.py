"""The README's code runs, and its file tour is true."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_code_blocks_run_in_order():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 5
    namespace: dict = {}
    for block in blocks:
        if "with torch 2.14" in block and torch.__version__ < "2.12":
            continue
        exec(compile(block, "<a block of README.md>", "exec"), namespace)


def test_every_path_exists():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path


def test_the_file_tour_is_complete():
    told = set(re.findall(r"^\| `(revlib/[\w/.]+)` \|", README, re.MULTILINE))
    files = {str(p.relative_to(ROOT)) for p in (ROOT / "revlib").rglob("*.py") if len(p.read_text().splitlines()) > 60}
    assert files <= told
    assert all((ROOT / path).exists() for path in told)
