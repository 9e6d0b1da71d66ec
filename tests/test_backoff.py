"""Pauses between attempts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitneck.backoff import Backoff
from bitneck.errors import InvalidConfig

STEPS = st.lists(st.floats(0.0, 1.0, exclude_max=True) | st.just("success"), max_size=60)


@given(st.floats(0.01, 10.0), st.floats(1.0, 100.0), st.integers(-1, 6), STEPS)
def test_pauses_double_up_to_a_limit_and_retries_end(
    first_s: float, factor: float, retries: int, steps: list[float | str]
) -> None:
    most_s = first_s * factor
    backoff = Backoff(first_s=first_s, most_s=most_s, retries=retries)
    failures = 0
    for step in steps:
        if isinstance(step, str):
            backoff.succeeded()
            failures = 0
        else:
            pause_s = backoff.failed(step)
            failures += 1
            if 0 <= retries < failures:
                assert pause_s is None
            else:
                assert pause_s == pytest.approx(min(most_s, first_s * 2.0 ** (failures - 1)) * (0.5 + step))
        assert backoff.failures == failures


@pytest.mark.parametrize(("first_s", "most_s"), [(0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0)])
def test_pauses_that_make_no_sense_are_refused(first_s: float, most_s: float) -> None:
    with pytest.raises(InvalidConfig, match="expected 0 < first"):
        Backoff(first_s=first_s, most_s=most_s)
