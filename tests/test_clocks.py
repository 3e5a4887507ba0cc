"""By how much another process's clock is ahead, told from questions and answers."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline_ext.processes.clocks import RoundTrip, ahead

delays = st.integers(0, 10**9)


def round_trips(skew, ways):
    """What one would see of a clock that is ``skew`` ahead, where messages take these nanoseconds."""
    now, found = 10**12, []
    for there, back in ways:
        found.append(RoundTrip(now, now + there + skew, now + there + back))
        now += there + back + 1000
    return found


@given(st.integers(-(10**15), 10**15), st.lists(st.tuples(delays, delays), min_size=1))
def test_it_is_wrong_by_at_most_half_of_the_shortest_round_trip(skew, ways):
    shortest = min(there + back for there, back in ways)
    assert abs(ahead(round_trips(skew, ways)) - skew) <= shortest / 2 + 1


def test_one_quick_answer_makes_up_for_slow_ones():
    ways = [(5_000_000, 10_000), (20_000, 30_000), (10_000, 900_000_000)]
    assert abs(ahead(round_trips(-(10**12), ways)) + 10**12) <= 25_000
