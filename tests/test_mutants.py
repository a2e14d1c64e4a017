"""The list of mutants fits the library as it is now."""

import ast
from pathlib import Path

import mutants
import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=str)
def test_each_changes_one_place_of_its_file_into_other_python(mutant):
    text = (ROOT / mutant.file).read_text()
    assert text.count(mutant.before) == 1
    ast.parse(text.replace(mutant.before, mutant.after))
    assert mutant.after != mutant.before and all((ROOT / test).exists() for test in mutant.tests)


@pytest.mark.slow
def test_what_breaks_nothing_survives_and_what_breaks_the_import_does_not():
    version, tests = "__version__ = ", ("tests/test_encoder.py",)
    assert mutants.survives(mutants.Mutant("revlib/__init__.py", version, "__version__  = ", "nothing"), tests)
    broken = mutants.Mutant("revlib/__init__.py", version, "raise SystemError\n" + version, "the import")
    assert not mutants.survives(broken, tests)
    with pytest.raises(RuntimeError, match=r"tests/test_nothing.py was not run"):
        mutants.survives(None, ("tests/test_nothing.py",))
