"""Type checkers see what typed_use.py says that they see."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
WRONG = """
from revlib import ReversibleSequence
from typing_extensions import assert_type

assert_type(ReversibleSequence(), ReversibleSequence)
assert_type(ReversibleSequence()[0], int)
"""


def errors_of_mypy(*files):
    found = subprocess.run(
        [sys.executable, "-m", "mypy", *map(str, files)], capture_output=True, text=True, cwd=TESTS.parent
    )
    assert found.returncode in (0, 1), found.stdout + found.stderr
    return [
        (Path(match[1]).name, int(match[2]), match[3])
        for match in re.finditer(r"(.+):(\d+): error: (.+)", found.stdout)
    ]


def errors_of_pyright(*files):
    beside = Path(sys.executable).parent
    command = shutil.which("pyright", path=os.pathsep.join([str(beside), os.environ.get("PATH", "")]))
    if command is None:
        pytest.skip("pyright is not installed")
    arguments = ["--outputjson", "--pythonpath", sys.executable, *map(str, files)]
    found = subprocess.run([command, *arguments], capture_output=True, text=True, cwd=TESTS.parent)
    assert found.returncode in (0, 1), found.stdout + found.stderr
    return [
        (Path(error["file"]).name, error["range"]["start"]["line"] + 1, error["message"])
        for error in json.loads(found.stdout)["generalDiagnostics"]
    ]


@pytest.mark.parametrize(
    "errors_of", [errors_of_pyright, pytest.param(errors_of_mypy, marks=pytest.mark.slow)], ids=["pyright", "mypy"]
)
def test_type_checkers_see_the_types_of_the_public_interface(errors_of, tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text(WRONG)
    errors = errors_of(TESTS / "typed_use.py", wrong)
    assert [error for error in errors if error[0] != "wrong.py"] == []
    assert [(file, line) for file, line, _ in errors] == [("wrong.py", 6)], errors  # which has but one error
