"""Durations are read and printed as Go does."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kproxy.config.duration import Duration


@pytest.mark.parametrize(
    ("text", "seconds", "printed"),
    [
        ("0", 0, "0s"),
        ("0s", 0, "0s"),
        ("30s", 30, "30s"),
        ("1h2m", 3720, "1h2m0s"),
        ("1.5h", 5400, "1h30m0s"),
        (".5s", 0.5, "500ms"),
        ("1.s", 1, "1s"),
        ("100ms", 0.1, "100ms"),
        ("1ms500us", 0.0015, "1.5ms"),
        ("1µs", 1e-6, "1µs"),
        ("1μs", 1e-6, "1µs"),
        ("7ns", 7e-9, "7ns"),
        ("24h", 86400, "24h0m0s"),
        ("15m", 900, "15m0s"),
        ("1h0.25s", 3600.25, "1h0m0.25s"),
        ("+1m", 60, "1m0s"),
        ("-1.5s", -1.5, "-1.5s"),
    ],
)
def test_a_duration_is_read_and_printed_back(text, seconds, printed):
    duration = Duration.parse(text)

    assert duration.seconds == pytest.approx(seconds)
    assert str(duration) == printed
    assert Duration.parse(printed) == duration


@pytest.mark.parametrize("text", ["", "-", "30", "s", ".s", "1d", "1h 2m", "h1", "1h2", "0x1s", "٣s", "9999999h"])
def test_anything_else_is_refused_with_what_was_given(text):
    with pytest.raises(ValueError, match=r"is not a duration|is longer than") as error:
        Duration.parse(text)
    assert f'"{text}"' in str(error.value)


@given(st.integers(-(2**63) + 1, 2**63 - 1))
def test_every_duration_that_go_can_hold_survives_being_printed(nanoseconds):
    assert Duration.parse(str(Duration(nanoseconds))) == nanoseconds
