"""The benchmark of host time and the count of lines run, at a size that takes a second."""

import json

from typer.testing import CliRunner

from research import host_time, trace


def cli(module, *args):
    import typer

    app = typer.Typer()
    app.command()(module.main)
    return CliRunner().invoke(app, [*args])


def test_every_contender_and_guard_is_measured(tmp_path):
    result = cli(host_time, "--depths", "2", "--rounds", "1", "--out", str(tmp_path / "new"))
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "new" / "host_time.json").read_text())
    assert (tmp_path / "new" / "table.md").read_text().strip() == result.output[
        result.output.index("Processor") :
    ].strip()
    assert "--depths 2 --rounds 1" in (tmp_path / "new" / "command.txt").read_text()
    assert {"plain", "checkpoint", "Reversible()", "Checkpoint()", "Functional()"} <= set(found["ms"]["2"])
    assert all(ms > 0 for ms in found["ms"]["2"].values()) and len(found["guards"]) == 8


def test_a_step_runs_lines_of_many_files():
    lines, functions, crossings = trace.traced(trace.Reversible())
    assert lines["core/tape.py"] > 20 and lines["core/record.py"] > 20
    assert lines.total() > functions > len(lines) and crossings > len(lines)
