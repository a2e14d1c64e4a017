"""The lesson runs, asserts what it states, and notices where that is not so."""

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

plt = pytest.importorskip("matplotlib.pyplot")
ROOT = Path(__file__).parent.parent
LESSON = ROOT / "research/tutorial.py"
SOURCE = LESSON.read_text()
RESULTS = (ROOT / "research/results/summary.md").read_text()
PAGES = (ROOT / "README.md").read_text() + (ROOT / "revlib/README.md").read_text()
CELLS = re.split(r"^# %% ?", SOURCE, flags=re.MULTILINE)[1:]
PROSE = re.sub(r"\n# ?", " ", "\n".join(cell for cell in CELLS if cell.startswith("[markdown]")))
SECTIONS = re.split(r"(?=^# %% \[markdown\]\n# ## \d)", SOURCE, flags=re.MULTILINE)  # the first has the imports
PICTURES = {"architectures.png", "block.png", "drift.png", "memory.png", "pareprop.png"}


def code_lines(source):
    """Lines with code: neither blank, nor only a comment, nor part of a docstring."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.stmt) and not docstring:
            found.add(node.lineno)
            found.update(n.end_lineno for n in ast.walk(node) if isinstance(n, ast.expr))
    return found


@pytest.fixture
def argv(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["tutorial.py", "--out", str(tmp_path / "pictures")])
    with torch.random.fork_rng(devices=[]):
        yield
    plt.close("all")


@pytest.mark.slow
def test_the_lesson_runs_as_it_stands(argv, tmp_path, capsys):
    lesson = runpy.run_path(str(LESSON))
    assert {p.name for p in (tmp_path / "pictures").iterdir()} == PICTURES
    assert all(5_000 < p.stat().st_size < 150_000 for p in (tmp_path / "pictures").iterdir())

    errors = {name: row[-1] for name, row in lesson["verdicts"].items() if row[-1].startswith("error")}
    assert re.search("weight.* was modified", errors["a weight is edited"])
    assert "inplace operation" in errors["an output is edited"]
    assert "train" in errors["eval() before backward"]

    for name, values in lesson["peak"].items():
        assert values == sorted(values), name
    assert lesson["peak"]["stored"][-1] > 30 * lesson["peak"]["revlib"][-1]
    assert lesson["peak"]["checkpointed"][-1] > 1.5 * lesson["peak"]["reversible, ours"][-1]
    assert [len(errors) for errors in lesson["drift"].values()] == [len(lesson["BLOCKS"])] * 4
    for spans in (lesson["alone"], lesson["side_by_side"]):
        steps = [f"{kind}{k}" for kind in "DR" for k in range(1, lesson["STEPS"] + 1)]
        assert sorted(doing for _, doing, *_ in spans) == steps  # one bar each, and every operation is in one
    printed = capsys.readouterr().out
    assert printed.count("drawn") == len(PICTURES) and "equal in every bit" in printed


CHECK, VERDICTS = "assert_close(found, expected)", "assert {name: [re.split("
DICE = "ctx.states.append(torch.get_rng_state() if replay else None)"
MISTAKES = {  # the sections that run, what stands there, the mistake, and the line that must fail
    "inverse of a block": ("1", "r1 = y1 - F(r2)", "r1 = y1 - F(y2)", "assert_close((r1, r2), (x1, x2))"),
    "inverse of a step": ("2", "y2 - fx.detach(), x.detach()", "y2 + fx.detach(), x.detach()", CHECK),
    "gradient of a step": ("2", "d1, d2 = d2, d1 + dx", "d1, d2 = d2, d1", CHECK),
    "order of gradients": ("2", "gradients = own + gradients", "gradients = gradients + own", CHECK),
    "other dice": ("2", "            torch.set_rng_state(state)\n", "            pass\n", VERDICTS),
    "edits unnoticed": ("2", "ctx.save_for_backward(x1, x2)", "ctx.save_for_backward(x1 + 0, x2 + 0)", VERDICTS),
    "a wrong count": ("23", "2 * (10 + 2 / WIDTH)", "2 * (9 + 2 / WIDTH)", 'a_block(held["stored"])'),
    "inputs kept": ("23", DICE, f"{DICE}; ctx.x = [*getattr(ctx, 'x', ()), x2 * 1]", 'held["reversible, ours"]) == 0'),
    "no grid": ("24", "return torch.round(t * 2**DIGITS) / 2**DIGITS", "return t", "all(error == 0"),
    "too fine a grid": ("24", "DIGITS = 14", "DIGITS = 23", "limit == 1024"),
    "no overlap": ("5", "begins + recovering, begins + gradient\n", "begins + 1, begins + 3\n", "2 * n + 1"),
    "no waiting": ("5", "max([free.get(stream, 0.0), *ready])", "free.get(stream, 0.0)", 'starts[f"R{k}"] >= ends'),
    "no second stream": ("5", "PaReprop(unchecked, trials=0)) for", "unchecked) for", "side by side"),
}


@pytest.mark.some(3)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_lesson_notices(mistake, argv):
    sections, right, wrong, line = MISTAKES[mistake]
    source = "".join(SECTIONS[int(n)] for n in "0" + sections)
    assert source.count(right) == 1
    source = source.replace(right, wrong).replace("[1, 4, 8, 16, 32]", "[2, 3]")
    with pytest.raises(AssertionError) as raised:
        exec(compile(source, str(LESSON), "exec"), {"__name__": "lesson"})
    (failed,) = (entry.lineno for entry in raised.traceback if entry.name == "<module>")
    assert line in source.splitlines()[failed]


def test_from_the_equations_to_a_stack_that_is_checked_takes_under_a_hundred_lines():
    cells = [cell.removeprefix("from scratch") for cell in CELLS if cell.startswith("from scratch")]
    assert len(cells) == 2 and "class Undo" in cells[0] and "assert_close(found, expected)" in cells[1]
    assert 40 < sum(len(code_lines(cell)) for cell in cells) < 100


def test_numbers_from_elsewhere_are_those_of_the_results():
    rows = re.findall(r"^\|(?: 384, bfloat16 autocast)? \| (1|256) \| (\S+) \| \S+ \| (\S+) \|", RESULTS, re.MULTILINE)
    assert [images for images, *_ in rows[:2]] == ["1", "256"]
    times = rows[0][1:] + rows[1][1:]
    assert re.search(r"1 image a step {} under .Rev.* {} under .PaR.* 256 images,.*, {} and {}\.".format(*times), PROSE)


def test_pictures_and_sections_that_the_lesson_points_to_exist():
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", PROSE):
        assert (LESSON.parent / picture).exists(), picture
    committed = ROOT / "research/results/tutorial"
    assert {p.name for p in committed.iterdir()} == PICTURES
    assert all(p.stat().st_size < 150_000 for p in committed.iterdir())
    onwards = re.search(r"Where to go on.*?\.", PROSE)[0]
    sections = re.findall(r"\*(.+?)\*", onwards)
    assert len(sections) == 6 and all(f"\n## {section}\n" in PAGES for section in sections)
