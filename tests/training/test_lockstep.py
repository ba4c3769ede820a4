"""Loops that run one at a time and are served together."""

import pytest

from raydpo.training.lockstep import Lockstep, Request


def run(scripts, behind=lambda number: 0):
    """Loops that ask for what their script says; returns what was served together, and the results."""
    served, turns = [], []

    def serve(members, requests):
        served.append((members, [request.key for request in requests]))
        if requests[0].content == "raise":
            raise ValueError("no")
        return [request.content for request in requests]

    def loop(number):
        return [lockstep.ask(number, Request(*request)) for request in scripts[number]]

    lockstep = Lockstep(len(scripts), serve, behind, turns.append)
    results = lockstep.run([lambda number=number: loop(number) for number in range(len(scripts))])
    return served, results, turns


def test_equal_requests_are_served_together_and_each_gets_its_answer():
    served, results, turns = run([[(1, "a", 10), (1, "b", 11)], [(1, "a", 20), (1, "b", 21)], [(1, "a", 30), (1, "b", 31)]])
    assert served == [([0, 1, 2], ["a"] * 3), ([0, 1, 2], ["b"] * 3)]
    assert results == [[10, 11], [20, 21], [30, 31]]
    assert turns == [0, 1, 2] * 3, "one at a time, in order"


def test_what_only_one_asks_for_comes_first_so_that_all_meet():
    served, results, _ = run([[(1, "a", 0)], [(0, "look", 1), (0, "look", 2), (1, "a", 3)]])
    assert served == [([1], ["look"]), ([1], ["look"]), ([0, 1], ["a", "a"])]
    assert results == [[0], [1, 2, 3]]


def test_a_loop_that_is_behind_catches_up_before_others_go_on():
    done = [2, 0]
    served = []

    def serve(members, requests):
        served.append(members)
        return [None] * len(members)

    def loop(number):
        while done[number] < 4:
            lockstep.ask(number, Request(0, done[number], None))
            done[number] += 1

    lockstep = Lockstep(2, serve, lambda number: done[number], lambda number: None)
    assert lockstep.run([lambda: loop(0), lambda: loop(1)]) == [None, None]
    assert served == [[1], [1], [0, 1], [0, 1]]


def test_an_error_reaches_those_who_asked_and_a_loop_that_ends_stops_no_other():
    served, results, _ = run([[(0, "bad", "raise"), (1, "a", 1)], [(1, "a", 2), (1, "b", 3)]])
    assert isinstance(results[0], ValueError) and results[1] == [2, 3]
    assert served == [([0], ["bad"]), ([1], ["a"]), ([1], ["b"])]


def test_an_interrupt_unwinds_all_loops():
    unwound = []

    def serve(members, requests):
        raise KeyboardInterrupt

    def loop(number):
        try:
            lockstep.ask(number, Request(0, 0, None))
        finally:
            unwound.append(number)

    lockstep = Lockstep(2, serve, lambda number: 0, lambda number: None)
    with pytest.raises(KeyboardInterrupt):
        lockstep.run([lambda: loop(0), lambda: loop(1)])
    assert sorted(unwound) == [0, 1]


def test_an_error_may_end_all():
    ended = []

    def loop(number):
        try:
            for step in range(3):
                if (number, step) == (1, 1):
                    raise ValueError("mine alone")
                lockstep.ask(number, Request(0, step, None))
        finally:
            ended.append(number)

    served = []
    lockstep = Lockstep(3, lambda members, requests: served.append(members) or [None] * len(members), lambda number: 0,
                        lambda number: None, lambda error: isinstance(error, ValueError))
    with pytest.raises(ValueError, match="mine alone"):
        lockstep.run([lambda number=number: loop(number) for number in range(3)])
    assert served == [[0, 1, 2]] and sorted(ended) == [0, 1, 2]
