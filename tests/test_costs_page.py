"""The page of costs has what its script makes of the measurements."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "update_costs.py"))


def test_the_table_is_that_of_the_measurements(script: dict[str, Any]) -> None:
    costs = json.loads((ROOT / "docs" / "costs" / "costs.json").read_text())
    assert script["table"](costs) in (ROOT / "docs" / "costs.md").read_text()


def test_a_start_has_two_rows_only_where_they_differ(script: dict[str, Any]) -> None:
    early, best = ({"point": name, "down": 1000 * k, "s": float(k)} for k, name in enumerate(("s4", "s1"), start=1))
    assert script["starts"](early, best) == [
        "| empty cache, first answer (`s4`) | 1,000 | 1.0 |",
        "| empty cache, the most accurate point answers (`s1`) | 2,000 | 2.0 |",
    ]
    assert script["starts"](best, best) == [
        "| empty cache, first answer, of the most accurate point already (`s1`) | 2,000 | 2.0 |"
    ]
