"""Annotations: what they refuse, and rows by name."""

import re

import numpy as np
import pytest

from openrlhf_pgrpo.core.annotations import Annotations

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    "user, pair, preference, users, message",
    [
        ([0, 1], [0], [1, 0], "ab", "user, pair and preference of one length above 0, got shapes [(2,), (1,), (2,)]"),
        ([], [], [], "", "user, pair and preference of one length above 0, got shapes [(0,), (0,), (0,)]"),
        ([0.0, 1.0], [0, 1], [1, 0], "ab", "annotations need row numbers as user, got float64"),
        ([0, 1], [0, 1], [1, 1.5], "ab", "annotation 1 needs a preference from 0 to 1, got 1.5"),
        ([0, 1], [0, 1], [-0.1, 0], "ab", "annotation 0 needs a preference from 0 to 1, got -0.1"),
        ([0, 1], [0, 1], [1, np.nan], "ab", "annotation 1 needs a preference from 0 to 1, got nan"),
        ([0, 1], [0, -1], [1, 0], "ab", "annotation 1 needs a row of the pairs, got -1"),
        ([0, 1], [0, 1], [1, 0], "aa", "users need different names, got 2 with 1 names"),
        ([0, 2], [0, 1], [1, 0], "ab", "annotations need one of 2 users, got row 2"),
        ([0, -1], [0, 1], [1, 0], "ab", "annotations need one of 2 users, got row -1"),
        ([0, 2], [0, 1], [1, 0], "abcd", "every user needs pairs, got none of 'b', 'd': leave them out, and learn"),
    ],
)
def test_annotations_that_cannot_be_are_refused(user, pair, preference, users, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Annotations(np.array(user), np.array(pair), np.array(preference), list(users))


def test_annotations_by_name_are_in_the_order_of_names():
    known = Annotations.of(["zoe", "ana", "zoe", "ben"], [0, 1, 2, 1], [1, 0, 0.5, 0.2])
    assert known.users == ["ana", "ben", "zoe"] and known.user.tolist() == [2, 0, 2, 1] and len(known) == 4
    part = known.select(np.array([True, True, False, True]))
    assert part.pair.tolist() == [0, 1, 1] and part.preference.tolist() == [1, 0, 0.2] and part.users == known.users
