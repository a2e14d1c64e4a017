"""The pages are true: their code runs, their links lead somewhere, and their numbers are those of the results."""

import ast
import dataclasses
import json
import re
import socket
from pathlib import Path

import pytest
import torch
from _pytest.mark.expression import Expression
from situations import SITUATIONS

from research.benchmarking.points import Record
from research.settings.config import Config
from research.training.log import read_log

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "research" / "results"
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "revlib/*.md", "research/*.md", "research/recipes/*.md", "research/results/*.md",
                    "research/results/gpu/*.md", "tests/**/*.md")
    for path in ROOT.glob(pattern)
)  # fmt: skip


def page(name):
    return (ROOT / name).read_text()


# ---------------------------------------------------------------------------------------------- code
@pytest.mark.parametrize("name", [name for name in PAGES if "```python" in page(name)])
def test_the_code_blocks_run_in_order_and_print_what_the_text_blocks_say(name, monkeypatch, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for key, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1}.items():
        monkeypatch.setenv(key, str(value))  # as torchrun sets them
    torch.manual_seed(0)
    namespace: dict = {"__name__": "a page"}
    printed = ""
    for kind, block in re.findall(r"```(python|text)\n(.*?)```", page(name), re.DOTALL):
        if kind == "text":
            assert block in printed
            continue
        if "needs torch 2.14" in block and torch.__version__ < "2.12":
            continue
        exec(compile(block, f"<a block of {name}>", "exec"), namespace)
        printed = capsys.readouterr().out


def test_the_first_example_prints_what_it_says(capsys):
    block = re.search(r"```python\n(.*?)```", page("README.md"), re.DOTALL)[1]
    said = re.search(r"# (Naive .*)", block)[1]
    exec(compile(block, "<README.md>", "exec"), {})
    assert capsys.readouterr().out.split("\n")[:-1] == said.split(", ")


# ---------------------------------------------------------------------------------------------- form
def test_the_readme_is_short_and_says_early_when_not_to_use_revlib():
    lines = page("README.md").splitlines()
    assert len(lines) <= 250
    assert lines.index("## When not to use it") < 80, "two screens"
    for mark in ("main", "test"):  # the two commands that are run word for word
        assert re.search(rf"^<!-- {mark} -->\n```bash\n.*\n```$", page("README.md"), re.MULTILINE)


def anchors(text):
    """What GitHub makes of headings: lower case, no punctuation, dashes for spaces."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name):
    text = re.sub(r"```.*?```", "", page(name), flags=re.DOTALL)
    if name.endswith("summary.md"):  # a part of the page beside it
        text = ""
    for link in re.findall(r"\]\(((?!https?:)[^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), f"{name} links {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.read_text()), f"{name} links {link}"


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "tests/situations/README.md"])
def test_paths_exist_and_expressions_of_pytest_can_be_read(name):
    text = page(name)
    paths = re.findall(r"`((?:revlib|research|tests)/[\w/.]*)`", text)
    expressions = re.findall(r"""-k ("[^"]*"|\w+)""", text)
    assert paths or expressions
    assert not [path for path in paths if not (ROOT / path).exists()]
    for expression in expressions:
        Expression.compile(expression.strip('"'))


FOLDERS = [
    "revlib/bijections",
    "revlib/core",
    "revlib/couplings",
    "revlib/functional",
    "revlib/guards",
    "revlib/testing",
    "research",
]
FOLDERS += ["research", *(f"research/{path.parent.name}" for path in sorted((ROOT / "research").glob("*/__init__.py")))]


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_docstring_of_a_folder_tells_of_each_file(folder):
    told = ast.get_docstring(ast.parse(page(f"{folder}/__init__.py"))) or ""
    files = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
    assert files and not [name for name in sorted(files) if not re.search(rf"\b{name}\b", told)]
    assert set(re.findall(r"(\w+)\.py\b", told)) <= files


def test_the_table_of_what_differs_from_minrev_names_flags_that_there_are():
    rows = table("research/recipes/README.md", "| what | minREV's | here | why |")
    ours = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Config)}
    ours |= {f"--no-{name[2:]}" for name in ours}
    assert len(rows) > 15 and all(len(row) == 5 and all(row) for row in rows)
    for what, _, here, _, how in rows:
        named = set(re.findall(r"--[a-z][\w-]*", here + how)) - {"--embed_dim", "--n_head", "--bs"}
        assert named <= ours, (what, named - ours)
    for flag, field in (("--unrolled-windows", "unrolled_windows"), ("--wandb", "wandb")):
        assert sum(flag in row[4] for row in rows) == 1 and hasattr(Config(), field)


# ---------------------------------------------------------------------------------------------- numbers
def table(name, head):
    """The rows of the table whose header starts so, without its markup."""
    lines = page(name).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(head))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return rows


def points(folder, depth, batch=8):
    record = Record.read(RESULTS / folder / "points.json")
    return {p.contender: p for p in record.points if p.depth == depth and p.batch == batch}


def test_memory_and_time_at_48_blocks():
    names = {
        "Naive()": "naive", "Budget(fraction=0.75)": "budget-0.75", "Budget(fraction=0.5)": "budget-0.5",
        "Budget(fraction=0.25)": "budget-0.25", "Checkpoint()": "checkpoint", "Checkpoint(every=2)": "checkpoint-2",
        "Reversible()": "reversible", "Reversible()`, G `positionwise` in 2 parts": "reversible-in-2-parts",
        "torch's checkpoint of the same blocks": "torch-checkpoint", "one stream, stored": "one-stream",
        "one stream, torch's checkpoint": "one-stream-checkpoint",
        "one stream, torch's selective checkpoint keeping attention": "one-stream-selective-attention",
        "revtorch 0.2.4": "revtorch", "invtorch 0.5.0": "invtorch", "memcnn 1.5.2": "memcnn",
    }  # fmt: skip
    found = points("benchmark", 48)
    rows = table("research/results/summary.md", "| 48 blocks |")
    assert [row[0] for row in rows] == list(names)
    for name, *numbers in rows:
        p = found[names[name]]
        want = f"{p.held / p.unit:.1f}", f"{p.peak / p.unit:.1f}", f"{p.to_naive:.2f}", f"{p.to_checkpoint:.2f}"
        assert tuple(numbers) == want, name


def test_the_numbers_of_the_front_page():
    text = " ".join(page("README.md").split())
    assert f"{len(SITUATIONS)} situations" in text and "tests/situations/README.md" in text
    deep, twelve = points("benchmark", 48), points("benchmark", 12)
    mb = {p.contender: f"{p.peak / 1e6:.0f} MB" for p in deep.values()}
    assert f"needs {mb['reversible']} of activations instead of {mb['naive']}, and takes" in text
    assert f"takes {deep['reversible'].to_naive:.2f} times as long" in text
    recomputing = [
        f"{100 * deep[name].to_naive - 100:.0f}" for name in ("budget-0.75", "reversible-in-2-parts", "reversible")
    ]
    assert "by {} to {} % in the [figure](#schedulers) below, and by {} % under".format(*recomputing) in text
    one, ours = twelve["one-stream-checkpoint"], twelve["reversible"]
    assert f"takes {one.peak / 1e6:.0f} MB where `Reversible()` takes {ours.peak / 1e6:.0f} MB" in text
    assert f"{one.to_naive:.2f} times plain autograd instead of {ours.to_naive:.2f}." in text
    rows = {row[0]: row[1:] for row in table("revlib/README.md", "| | parameters [M] |")}["rev_vit_base"]
    assert (
        f"trains in {rows[6]} MB of activations an image, where timm's ViT-B takes {rows[7]} MB, and {rows[8]}" in text
    )
    plain, reversible, _ = table("research/results/summary.md", "| variant |")
    assert f"one stream had {plain[1].split(' ')[0]} % and two had {reversible[1].split(' ')[0]} %" in text


def test_what_inversion_loses():
    record = json.loads((RESULTS / "drift" / "points.json").read_text())
    kinds = {"float32": "float32", "float32, bfloat16 autocast": "float32, bf16 autocast", "bfloat16": "bfloat16"}
    found = {
        (p["precision"], p["coupling"], p["setting"]["depth"]): p
        for p in record["points"]
        if p["sweep"] == "depth" and p["scheduler"] == "Reversible"
    }
    kind = ""
    for name, what, *numbers in table("revlib/README.md", "| streams, functions |"):
        kind = name or kind
        if what == "both":
            every = [found[k, "ExactAdditive", d] for k in list(kinds.values())[:2] for d in (12, 48, 192, 1000)]
            assert numbers == ["0"] * 4 and not any(p["inversion"] or p["to_naive"] for p in every)
            continue
        key = "inversion" if what == "input" else "to_naive"
        values = [found[kinds[kind], "Additive", depth][key] for depth in (12, 48, 192, 1000)]
        assert numbers == [f"{v:.1e}".replace("e-0", "e-") for v in values], (name, what)


def test_time_on_a_gpu():
    folders = {"384, bfloat16 autocast": "small-amp", "768, bfloat16 autocast": "base-amp", "384, float32": "small"}
    kind = ""
    for name, batch, *numbers in table("research/results/summary.md", "| width, precision |"):
        kind = name or kind
        found = points(f"gpu/pareprop-graphs-{folders[kind]}", 12, int(batch))
        names = "reversible", "reversible-exact", "pareprop-always", "torch-checkpoint"
        assert numbers == [f"{found[n].to_naive:.2f}" for n in names], (kind, batch)


def test_what_compiling_gains():
    found = points("compile", 12)
    for (name, plain, compiled, _, peak), key in zip(
        table("revlib/README.md", "| | seconds a step |"), ("naive", "checkpoint-2", "reversible"), strict=True
    ):
        assert (plain, compiled) == (f"{found[key].seconds:.3f}", f"{found[f'{key}-compiled'].seconds:.3f}"), name
        assert peak == f"{found[key].peak / 1e6:.1f} MB" == f"{found[f'{key}-compiled'].peak / 1e6:.1f} MB"


def test_accuracies():
    summary = "research/results/summary.md"
    per_cent = lambda value: f"{100 * value:.2f} %"  # noqa: E731
    for name, *numbers in table(summary, "| | epoch 1 |"):
        rows = read_log(RESULTS / f"cifar10-vit64-{name.partition('`')[0]}" / "log.jsonl").rows
        assert numbers == [per_cent(row["test_accuracy"]) for row in rows]
    runs = ("cifar10-amp/additive", "cifar10-amp/exact", "cifar10-amp/plain", "cifar10-mvit-amp")
    for (_, epochs, train, test), folder in zip(table(summary, "| run |"), runs, strict=True):
        last = read_log(RESULTS / "gpu" / folder / "log.jsonl").rows[-1]
        assert epochs.split(" ")[0] == str(last["epoch"])
        assert (train, test) == (per_cent(last["train_accuracy"]), per_cent(last["test_accuracy"]))
    parity = (RESULTS / "parity-digits" / "table.md").read_text().replace("%", "")
    for (_, accuracy, loss), name in zip(table(summary, "| variant |"), ("plain", "naive", "exact"), strict=True):
        row = next(line for line in parity.splitlines() if line.startswith(f"| {name} |"))
        assert accuracy.removesuffix(" %") in row and loss in row
