"""Build the reference: all public names of revlib, a page for each kind, from their docstrings.

    python -m research.reference                 into build/reference, which is not committed
    python -m research.reference --out DIR

pdoc makes the pages, with mathematics by MathJax. Docstrings are Google's style with Sphinx' roles and tables, which
are turned into what pdoc reads. The command fails where a public name has no docstring, where a docstring has no
example or leaves out cost, shapes or errors, or where a docstring or a page refers to something that does not exist.
"""

import dataclasses
import importlib
import inspect
import re
import warnings
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Annotated, Any

import typer

PAGES = [
    "revlib",
    "revlib.couplings",
    "revlib.bijections",
    "revlib.schedulers",
    "revlib.models",
    "revlib.recurrences",
    "revlib.convert",
    "revlib.checkpoints",
    "revlib.diagnostics",
    "revlib.testing",
    "revlib.testing.strategies",
]

app = typer.Typer(add_completion=False)


@app.command()
def main(out: Annotated[Path, typer.Option(help="Folder for the pages.")] = Path("build/reference")) -> None:
    """Build the reference, and check it for missing docstrings and dead links."""
    try:
        build(out)
    except ModuleNotFoundError as error:
        raise typer.BadParameter(f"{error}: pip install -e '.[dev]'", param_hint="research.reference") from error
    if faults := [*undocumented(), *lacking(), *dead_roles(), *dead_links(out)]:
        typer.echo("\n".join(faults), err=True)
        raise typer.Exit(1)
    typer.echo(f"wrote {out / 'revlib.html'}")


def build(out: Path) -> None:
    import pdoc.docstrings
    import pdoc.render

    theirs = pdoc.docstrings.rst
    pdoc.docstrings.rst = lambda text, source: theirs(markdown_tables(text).replace(":`~", ":`"), source)
    pdoc.docstrings.convert.cache_clear()
    try:
        pdoc.render.configure(docformat="google", math=True, show_source=False, footer_text="revlib")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of annotations that only a type checker imports
            pdoc.pdoc(*PAGES, output_directory=out)
    finally:
        pdoc.docstrings.rst = theirs
    for path in out.rglob("*.html"):
        _unlink(path)


def _unlink(path: Path) -> None:
    """Remove links to what a class inherits from torch, which pdoc makes although no page has it."""
    ids = _Page(path).ids
    link = re.compile(r'<a href="#([^"]+)">(.*?)</a>')
    path.write_text(link.sub(lambda m: m[0] if m[1] in ids else m[2], path.read_text()))


def markdown_tables(text: str) -> str:
    """Turn simple tables of reStructuredText, which stand between rows of ``=``, into those of Markdown."""
    lines, found, rulers = text.splitlines(), [], 0
    starts: list[int] = []
    for line in lines:
        if re.fullmatch(r"\s*=+( +=+)+\s*", line):
            rulers = rulers % 3 + 1
            starts = [m.start() for m in re.finditer(r"=+", line)]
            if rulers == 2:
                found.append("|" + "---|" * len(starts))
        elif rulers in (1, 2):
            cells = [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
            found.append(f"| {' | '.join(cells)} |")
        else:
            found.append(line)
    return "\n".join(found)


# ---------------------------------------------------------------------------------------------- checks
def public() -> Iterator[tuple[str, str]]:
    """Every public name with its docstring: of the pages, and of their classes what revlib itself defines."""
    for page in PAGES:
        module = importlib.import_module(page)
        yield page, module.__doc__ or ""
        for name in module.__all__:
            thing = getattr(module, name)
            yield f"{page}.{name}", thing.__doc__ or ""
            if inspect.isclass(thing):
                for member, value in vars(thing).items():
                    if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                        yield f"{page}.{name}.{member}", _docstring(thing, member)


def _docstring(owner: type, member: str) -> str:
    """The docstring of a member, or of what it overrides in a class of revlib. One of torch's Module does not count."""
    for base in owner.__mro__:
        if base.__module__.startswith("revlib"):
            text = vars(base).get(member).__doc__ if member in vars(base) else None
            if text and text.strip():
                return text
            if base is not owner and member in vars(base).get("__annotations__", {}):
                return base.__doc__ or ""  # a field, which the docstring of its class explains
    return ""


def undocumented() -> list[str]:
    return [f"{name} has no docstring" for name, text in public() if not text.strip()]


def lacking() -> list[str]:
    """What the docstring of a public class or function leaves out of the sections that it should have."""
    found = []
    for page in PAGES:
        for name in importlib.import_module(page).__all__:
            thing = getattr(importlib.import_module(page), name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                found += [f"{page}.{name} has no {what}" for what in _lacks(thing)]
    return found


def _lacks(thing: Any) -> Iterator[str]:
    """Equations and sources are where there are some, which only a reader can tell; the rest follows from the code."""
    text, drawn = thing.__doc__ or "", thing.__module__ == "revlib.testing.strategies"
    source = "" if drawn else inspect.getsource(thing)  # hypothesis wraps what draws
    called = getattr(thing, "forward", None) if inspect.isclass(thing) else thing
    if ">>>" not in text:
        yield "example"
    if not re.search(r"Raises:|\berrors\b", text) and re.search(r"\braise (?!NotImplementedError)\w+\(", source):
        yield "errors (Raises:), though its code raises some"
    if not re.search(r"\b[Cc]ost\b", text) and not (drawn or _is_record(thing)):
        yield "cost (Cost: or Cost for ...)"
    if "Shapes" not in text and inspect.isfunction(called) and "Tensor" in str(inspect.signature(called)):
        yield "shapes (Shapes:), though it takes or gives tensors"


def _is_record(thing: Any) -> bool:
    """A named tuple, or a dataclass that is no scheduler and no coupling: what they hold costs nothing to hold."""
    bare = dataclasses.is_dataclass(thing) and thing.__bases__ == (object,)
    return bare or (inspect.isclass(thing) and issubclass(thing, tuple))


def dead_roles() -> list[str]:
    """References such as :class:`~revlib.Step` to what does not exist."""
    found = []
    for name, text in public():
        for target in re.findall(r":(?:class|func|meth|mod|attr):`~?([\w.]+)`", text):
            places = ("", f"{name}.", f"{name.rpartition('.')[0]}.", *(f"{page}." for page in PAGES))
            if not any(_exists(place + target) for place in places):
                found.append(f"{name} refers to {target}, which does not exist")
    return found


def _exists(target: str) -> bool:
    parts = target.split(".")
    for end in range(len(parts), 0, -1):
        try:
            thing: Any = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            thing = getattr(thing, part, None)
        return thing is not None
    return False


class _Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if key == "id" and value:
                self.ids.add(value)
            if tag == "a" and key == "href" and value:
                self.links.append(value)


def dead_links(out: Path) -> list[str]:
    """Links between the pages that lead nowhere."""
    pages = {path.resolve(): _Page(path) for path in out.rglob("*.html")}
    found = []
    for path, page in pages.items():
        for link in page.links:
            target, _, anchor = link.partition("#")
            if re.match(r"\w+:|//", link):
                continue
            where = (path.parent / target).resolve() if target else path
            if where not in pages or (anchor and anchor not in pages[where].ids):
                found.append(f"{path.relative_to(out.resolve())} links {link}, which does not exist")
    return found


if __name__ == "__main__":
    app()
