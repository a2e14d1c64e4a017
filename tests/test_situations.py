"""The situation matrix: what is supported, what is refused and with which error; nothing is silently wrong."""

import pytest
from situations import SITUATIONS, THEMES
from situations.base import (
    COUPLINGS,
    NOT_RUN,
    PENDING,
    REFUSED,
    SCHEDULERS,
    SUPPORTED,
    by_hand,
    expected,
    fits,
    verdict,
)
from situations.render import PAGE, rendered

pytestmark = pytest.mark.filterwarnings("ignore")
TABLE = expected()
SLOW = [pytest.mark.slow, pytest.mark.timeout(1800)]


def cells():
    """Every situation with every coupling under which it is run. All but the first coupling are for thorough runs."""
    for s in SITUATIONS.values():
        for i, coupling in enumerate(c for c in COUPLINGS if c in s.couplings):
            yield pytest.param(s.name, coupling, marks=SLOW if s.slow or i > 0 else ())


@pytest.mark.parametrize(("name", "coupling"), list(cells()))
def test_situation(name, coupling):
    s, wrong = SITUATIONS[name], []
    row, want = TABLE[name, coupling], by_hand(s, COUPLINGS[coupling])
    for scheduler in SCHEDULERS:
        found, told = verdict(s, scheduler, coupling, want)
        if found != row.verdicts[scheduler] or (found == REFUSED and not fits(told, row.pattern(scheduler))):
            wrong.append(f"{scheduler}: {row.verdicts[scheduler]} expected, was {found} {told}")
    assert not wrong, "\n".join([f"{name}, {coupling}:", *wrong])


def _pending(s):
    return pytest.param(s.name, marks=[pytest.mark.xfail(strict=True, raises=AssertionError, reason=s.pending)])


@pytest.mark.parametrize("name", [_pending(s) for s in PENDING.values()])
def test_pending_situation(name, pytestconfig):
    """Right under every scheduler, or refused where that may be; then it belongs into the table."""
    s, wrong = PENDING[name], []
    fine = {SUPPORTED, NOT_RUN, *([REFUSED] if s.refusable else [])}
    for coupling in [c for c in COUPLINGS if c in s.couplings][: None if pytestconfig.option.thorough else 1]:
        want = by_hand(s, COUPLINGS[coupling])
        assert want.raised is None or "Affine" in coupling, want.raised
        for scheduler in SCHEDULERS:
            found, told = verdict(s, scheduler, coupling, want)
            if found not in fine:
                wrong.append(f"{scheduler}, {coupling}: {found} {told}")
    assert not wrong, "\n".join([f"{name}:", *wrong])


def test_the_table_has_every_cell_and_no_other():
    assert list(TABLE) == [(s, c) for s in SITUATIONS for c in COUPLINGS]
    for (name, coupling), row in TABLE.items():
        s = SITUATIONS[name]
        assert list(row.verdicts) == list(SCHEDULERS)
        assert all(
            v in ("supported", "refused", "not applicable")
            if coupling in s.couplings and scheduler != s.without
            else v == NOT_RUN
            for scheduler, v in row.verdicts.items()
        )
        refused = {k for k, v in row.verdicts.items() if v == REFUSED}
        assert bool(row.error) == bool(refused - {"Functional()"}), f"{name}, {coupling}: an error for what is refused"
        assert bool(row.functional) == ("Functional()" in refused), f"{name}, {coupling}: and under Functional()"


def test_every_theme_is_rendered():
    assert {s.theme for s in SITUATIONS.values()} == {m.__name__.rpartition(".")[2] for m in THEMES}


def test_the_page_shows_the_table():
    page = PAGE.read_text()
    assert rendered(page) == page, "write the page with: PYTHONPATH=.:tests python -m situations"
