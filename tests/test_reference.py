"""The reference: every public name is on it and has a docstring, its links lead somewhere, its examples run."""

import doctest
import importlib
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn

from research import reference

ROOT = Path(__file__).parent.parent


def test_every_public_name_has_a_docstring_and_refers_to_what_exists():
    assert [*reference.undocumented(), *reference.dead_roles()] == []


def test_docstrings_have_example_errors_shapes_and_cost():
    assert reference.lacking() == []


def test_what_docstrings_lack_is_told(monkeypatch):
    def takes(x: torch.Tensor) -> torch.Tensor:
        """Something."""
        raise ValueError(x)

    class Holds(NamedTuple):
        """Something."""

    def drawn():
        """Something."""

    drawn.__module__ = "revlib.testing.strategies"
    things = SimpleNamespace(__all__=["takes", "Holds", "drawn"], takes=takes, Holds=Holds, drawn=drawn)
    monkeypatch.setattr(reference, "PAGES", ["page"])
    monkeypatch.setattr(reference.importlib, "import_module", {"page": things}.__getitem__)
    assert [line.split()[0] + " " + line.split()[3] for line in reference.lacking()] == [
        *(f"page.takes {what}" for what in ("example", "errors", "cost", "shapes")),
        "page.Holds example",
        "page.drawn example",
    ]


def public_modules():
    names = [(page, name) for page in reference.PAGES for name in importlib.import_module(page).__all__]
    found = {getattr(importlib.import_module(page), name) for page, name in names}
    return sorted((c for c in found if isinstance(c, type) and issubclass(c, nn.Module)), key=lambda c: c.__name__)


@pytest.mark.parametrize("cls", public_modules(), ids=lambda cls: cls.__name__)
def test_help_says_something_of_ours(cls):
    """Not what torch says of every module, as it does where a method has no docstring of its own."""
    for method in ("__init__", "forward", "extra_repr"):
        if cls.__init__ is nn.Module.__init__ and method == "__init__":
            continue  # without arguments
        text = inspect.getdoc(getattr(cls, method))
        assert text and text != inspect.getdoc(getattr(nn.Module, method)), f"{cls.__name__}.{method}"


def test_the_pages_have_every_name_and_no_dead_link(tmp_path):
    pytest.importorskip("pdoc")
    reference.build(tmp_path)
    assert reference.dead_links(tmp_path) == []
    for page in reference.PAGES:
        text = (tmp_path / f"{page.replace('.', '/')}.html").read_text()
        for name in importlib.import_module(page).__all__:
            assert f'id="{name}"' in text or f"{page.replace('.', '/')}/{name}.html" in str(
                list(tmp_path.rglob("*.html"))
            )
    couplings = (tmp_path / "revlib" / "couplings.html").read_text()
    assert "<th>resolution</th>" in couplings and "$\\mathrm{merge}(s, f) = s + f$" in couplings


def test_dead_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html">b</a> <a href="#here">c</a> <a href="https://example.org">d</a>')
    found = reference.dead_links(tmp_path)
    assert found == ["a.html links b.html, which does not exist", "a.html links #here, which does not exist"]


def test_tables_become_those_of_markdown():
    text = "before\n====  ===\na     b c\n====  ===\n1     2\n3     4\n====  ===\nafter"
    assert reference.markdown_tables(text) == "before\n| a | b c |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\nafter"


EXAMPLES = sorted(path for path in (ROOT / "revlib").rglob("*.py") if ">>>" in path.read_text())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_in_docstrings_run(path):
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    torch.manual_seed(0)
    found = doctest.testmod(module)
    assert found.failed == 0
    assert found.attempted == path.read_text().count(">>> ")  # it finds all of them
