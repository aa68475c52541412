"""Phases are ranges of torch's profiler where there is one, and nothing where there is none."""

from torch.profiler import ProfilerActivity, profile

from varscale.engine.phases import in_phase, name_methods, phase


class Thing:
    def work(self, number):
        return number + 1


@in_phase("optimizer")
def update(number):
    """Doubles."""
    return 2 * number


def test_contexts_functions_and_methods_are_seen_by_a_profiler():
    thing, other = Thing(), Thing()
    name_methods(thing, work="forward")
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        with phase("loss"):
            assert thing.work(1) == 2
        assert update(3) == 6
        other.work(1)
    events = {event.name: event for event in seen.events()}
    assert {"loss", "forward", "optimizer"} <= events.keys()
    assert events["forward"].time_range.start >= events["loss"].time_range.start
    assert events["forward"].time_range.end <= events["loss"].time_range.end
    assert [event.name for event in seen.events()].count("forward") == 1, "of another thing nothing is named"


def test_without_a_profiler_they_are_one_and_the_same_nothing():
    assert phase("loss") is phase("forward")
    assert update(2) == 4
    assert update.__doc__ == "Doubles."
