"""Two ways to run the tests: the default, which is quick and repeats itself, and ``--thorough``, which is everything.

By default, tests marked ``slow`` are left out, of those marked ``some(n)`` only n parameters are tried, and hypothesis
draws a third of the examples, the same every time, so that what has passed once passes again. With ``--thorough``
every test runs, and hypothesis draws from a seed that is new each time. The seed is printed at the start, and again at
the end if a test has failed. ``--rest`` is for CI, which has just run the default: it leaves out of a thorough run what
would only be repeated.
"""

from __future__ import annotations

import gc
import random

import pytest
import torch
from hypothesis import HealthCheck, settings

COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("default", **COMMON, max_examples=20, derandomize=True)
settings.register_profile("thorough", **COMMON, max_examples=60, derandomize=False)
settings.load_profile("default")
torch.set_num_threads(1)  # The tensors here are small.


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="run every test, hypothesis with a new seed")
    parser.addoption("--rest", action="store_true", help="of a thorough run, what the default run does not do already")


@pytest.hookimpl(tryfirst=True)  # Before hypothesis reads the seed, and before pytest-xdist hands it to its workers.
def pytest_configure(config: pytest.Config) -> None:
    config.option.thorough |= config.option.rest
    if config.option.thorough:
        settings.load_profile("thorough")
        if config.option.hypothesis_seed is None:
            config.option.hypothesis_seed = str(random.SystemRandom().randrange(2**32))


def _of_the_default_run(items: list[pytest.Item]) -> set[pytest.Item]:
    kept = [item for item in items if not item.get_closest_marker("slow")]
    by_test: dict[str, list[pytest.Item]] = {}
    for item in kept:
        if item.get_closest_marker("some"):
            by_test.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left_out: set[pytest.Item] = set()
    for group in by_test.values():
        few = group[0].get_closest_marker("some").args[0]
        last = len(group) - 1
        spread = {group[min(i * len(group) // few + i, last)] for i in range(few)}  # So that every axis moves.
        left_out.update(item for item in group if item not in spread)
    return set(kept) - left_out


@pytest.hookimpl(trylast=True)  # Of what -k and -m have selected.
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = set(items)
    if config.option.rest:  # Properties are tried again, on other examples.
        chosen -= {item for item in _of_the_default_run(items) if not item.get_closest_marker("hypothesis")}
    elif not config.option.thorough:
        chosen = _of_the_default_run(items)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


@pytest.fixture(autouse=True, scope="module")
def _quick_garbage_collection() -> None:
    """Take what has been imported out of the sight of the garbage collector, which many tests call.

    It would look at each of a million objects every time. What the tests of a file make comes after this.
    """
    gc.collect()
    gc.freeze()


def _how_to_repeat(config: pytest.Config) -> str:
    return f"The same examples again: pytest --thorough --hypothesis-seed={config.option.hypothesis_seed}"


def pytest_report_header(config: pytest.Config) -> str | None:
    return _how_to_repeat(config) if config.option.thorough else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.option.thorough:
        terminalreporter.write_line("Slow tests and parts of sweeps were left out; pytest --thorough runs everything.")
    elif terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.write_line(_how_to_repeat(config))
