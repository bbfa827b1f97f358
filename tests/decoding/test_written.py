"""Rounds of several tokens, written a token of every row at a time."""

import numpy as np

from dyncomp.decoding.written import Writer, Written

END = 9


def writer(rows=2, room=4):
    return Writer([Written() for _ in range(rows)], room, [END])


def test_rounds_become_steps():
    made = writer()
    ticks = list(made.ticks([[[1], [2]], [[3, 4], [5]], [[], [6]]]))
    assert [tick.tokens.tolist() for tick in ticks] == [[1, 2], [3, 5], [4, 0], [0, 6]]
    assert [tick.emitted.tolist() for tick in ticks[1:]] == [[1, 1], [1, 0], [0, 1]]
    assert [row.tokens for row in made.rows] == [[1, 3, 4], [2, 5, 6]]
    assert made.room.tolist() == [1, 1] and not made.done.any()


def test_a_row_ends_in_the_middle_of_a_round():
    """At its ending token, or where nothing is left of what was asked for."""
    made = writer(room=2)
    ticks = list(made.ticks([[[1, END, 2], [3, 4, 5]]]))
    assert [row.tokens for row in made.rows] == [[1], [3, 4]]
    assert [row.reason for row in made.rows] == ["eos", "length"] and made.done.all()
    assert len(ticks) == 2 and ticks[1].ended.tolist() == [True, False]
    assert ticks[1].tokens[0] == END and not ticks[1].emitted[0]


def test_a_listener_ends_a_row_in_the_middle_of_a_round():
    made = writer()
    rounds, asked = [[[1, 2, 3], [4, 5, 6]], [[7], [8]]], []

    def brought():
        for fresh in rounds:
            asked.append(made.done.copy())
            yield fresh

    rows = made.finish(made.ticks(brought()), lambda tick: tick.tokens == 2)
    assert [row.tokens for row in rows] == [[1, 2], [4, 5, 6, 8]]
    assert [row.reason for row in rows] == ["stop", "length"]
    assert np.array_equal(asked, [[False, False], [True, False]])
