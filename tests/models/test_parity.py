"""Every family against its oracle: the cases of tests/models/cases, each through every check of `parity`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models import parity
from tests.models.parity import EXECUTORS, Case, Prepared
from tests.parallel.checks import check_two_ranks
from tests.parallel.pair import Pair

MODULES = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent / "cases")]))
CASES: list[Case] = [case for name in MODULES for case in importlib.import_module(f"tests.models.cases.{name}").CASES]


@pytest.fixture(scope="module", params=CASES, ids=[case.id for case in CASES])
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The case's checkpoint, written once for all its checks (pytest runs them one after the other)."""
    return Prepared(request.param, tmp_path_factory.mktemp("case"))


def test_cases_have_names_of_their_own() -> None:
    ids = [case.id for case in CASES]
    assert len(set(ids)) == len(ids)


CHECKS: list[Callable[[Prepared, str], None]] = [
    parity.check_logits,
    parity.check_alone,
    parity.check_together,
    parity.check_preempted,
]


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_one_rank(prepared: Prepared, check: Callable[[Prepared, str], None], kind: str) -> None:
    if kind == "native" and prepared.case.not_native:
        if check is parity.check_logits:
            parity.check_not_recordable(prepared)
        return
    check(prepared, kind)


def test_two_ranks(prepared: Prepared, pair: Pair) -> None:
    if prepared.case.no_ranks:
        pytest.skip(prepared.case.no_ranks)
    check_two_ranks(prepared, pair)
