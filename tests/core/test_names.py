"""Names and their row numbers, and columns with one row per name."""

import numpy as np
import pytest

from openrlhf_pgrpo.core.names import NamedColumns, Names, alike, listed, name_of, need_keys

pytestmark = pytest.mark.core


# --- names ---------------------------------------------------------------------------------------------------------


def test_a_new_name_gets_the_next_row_and_a_known_one_keeps_its_own():
    names = Names()
    found = names.rows(["b", "a", "b"])
    assert found.tolist() == [0, 1, 0] and found.dtype == np.int64
    assert names.rows(["a", "c", "b"]).tolist() == [1, 2, 0]
    assert list(names) == ["b", "a", "c"] and len(names) == 3
    assert names.rows([]).tolist() == [] and len(names) == 3


def test_names_at_the_start_are_counted_once():
    assert list(Names(["x", "y", "x"])) == ["x", "y"]
    assert list(Names(name for name in "xyx")) == ["x", "y"]


def test_a_row_leads_back_to_its_name():
    names = Names("ab")
    assert names[0] == "a" and names[np.int64(1)] == "b"
    names.rows("c")
    assert [names[row] for row in range(3)] == ["a", "b", "c"]
    with pytest.raises(IndexError):
        names[3]


def test_a_look_up_adds_nothing():
    names = Names("ab")
    assert "a" in names and "z" not in names and len(names) == 2


def test_a_name_is_any_string():
    strange = ["", " ", "a", "A", "line\nbreak", "Grüße", "猫", "🙂", "x" * 10_000, "\0", "\ud83d", "\ude42"]
    back = Names.unpack(Names(strange).pack())
    assert list(back) == strange  # the two halves of 🙂 did not become one
    assert list(Names.unpack(Names().pack())) == []


def test_packed_names_are_one_text_and_lengths():
    state = Names(["ana", "ß"]).pack()
    assert state["names"] == "anaß".encode() and state["name_lengths"].tolist() == [3, 1]
    state["name_lengths"][0] = 2
    with pytest.raises(ValueError, match="the 3 characters that their lengths add up to, got 4"):
        Names.unpack(state)
    with pytest.raises(ValueError, match="saved names need to be distinct, got 1 distinct ones of 2"):
        Names.unpack({"names": b"aa", "name_lengths": [1, 1]})


def test_a_list_of_names_is_cut():
    assert listed(["a", "b"]) == "'a', 'b'"
    assert listed(Names(map(str, range(10)))) == "'0', '1', '2', '3', '4', '5', '6', '7' and 2 more"
    assert listed({"a": 1, "b": 2, "c": 3}, most=2) == "'a', 'b' and 1 more"
    assert repr(Names("ab")) == "Names(['a', 'b'])"


# --- columns -------------------------------------------------------------------------------------------------------


class Table(NamedColumns):
    columns = {"sum": 0.0, "last": np.nan}


def test_a_new_name_gets_a_row_with_the_first_values_and_nothing_else_moves():
    table = Table()
    assert table.rows(["b", "a"]).tolist() == [0, 1]
    table.sum[:] = 1, 2
    assert table.rows(["a", "c"]).tolist() == [1, 2] and len(table) == 3
    assert table.sum.tolist() == [1, 2, 0] and np.isnan(table.last).all()


def test_a_state_is_a_copy_and_comes_back_to_the_bit():
    table, back = Table(), Table()
    table.rows("ab")
    table.sum[:] = 0.1, 1 / 3
    state = table.state_dict()
    table.sum[:] = 0
    back.load_state_dict(state)
    state["sum"][:] = 7
    assert list(back.names) == ["a", "b"] and back.sum.tolist() == [0.1, 1 / 3]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(colour=1), r"Table state needs keys \['last', 'name_lengths', 'names', 'sum'\], got \['colour', 'last'"),
        (
            dict(sum=[1.0]),
            r"Table state needs one row for each of 2 names, got shapes {'sum': \(1,\), 'last': \(2,\)}",
        ),
        (dict(names=b"aa"), "distinct"),
    ],
)
def test_a_foreign_state_is_refused_and_changes_nothing(change, message):
    table = Table()
    table.rows("xyz")
    other = Table()
    other.rows("ab")
    with pytest.raises(ValueError, match=message):
        table.load_state_dict({**other.state_dict(), **change})
    assert list(table.names) == ["x", "y", "z"] and len(table.sum) == 3


def test_keys_are_those_and_no_others():
    need_keys(Table(), {"a": 1}, {"a"})
    with pytest.raises(ValueError, match=r"Table state needs keys \['a'\], got \[\]"):
        need_keys(Table(), {}, {"a"})


def test_finding_adds_nothing():
    names = Names(["a", "b"])
    assert names.find(["b", "x", None, "a"]).tolist() == [1, -1, -1, 0] and list(names) == ["a", "b"]


# --- names in rows of data -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, name",
    [("ann", "ann"), (" ann", " ann"), (7, "7"), (7.0, "7"), (np.float32(7), "7"), (0.5, "0.5"), (True, "True")],
)
def test_a7_a_name_is_a_text_or_a_number(value, name):
    assert name_of(value) == name


@pytest.mark.parametrize(
    "value, said",
    [
        (None, "null"),
        ("", "an empty text"),
        (" \t", r"a blank text, ' \\t'"),
        ("\u200b", r"a blank text, '\\u200b'"),
        (" \ufeff\u200d", r"a blank text, ' \\ufeff\\u200d'"),
        (float("nan"), "float nan"),
        (np.inf, "float inf"),
        ({"id": 7}, "a struct with the keys 'id'"),
        ({}, "an empty struct"),
        (["ann"], r"a list, \['ann'\]"),
        ([{"role": "user"}], "a list of messages"),
        (b"ann", "bytes b'ann'"),
    ],
)
def test_a7_anything_else_is_none_and_said_in_words(value, said):
    with pytest.raises(ValueError, match=f"^{said}$"):
        name_of(value)


def test_a7_names_that_look_alike_stand_together():
    assert alike(["a", "b", " A", "a", "Ann  Lee", "ann lee", "c"]) == [["a", " A"], ["Ann  Lee", "ann lee"]]
    assert alike(["Jos\u00e9", "Jose\u0301", "Jose"]) == [["Jos\u00e9", "Jose\u0301"]]  # two ways to write one letter
    assert alike(["7", "7.0", "7.5"]) == [["7", "7.0"]]  # as pandas writes a column with a gap
    assert alike([]) == []


def test_a7_names_that_differ_in_what_nobody_sees_stand_together():
    """A zero-width space comes along when a name is copied from a page. Joiners inside a word stay in the name."""
    assert alike(["a", "a\u200b", "\ufeffB", "b", "c\u00ad"]) == [["a", "a\u200b"], ["\ufeffB", "b"]]
    joined = "क्\u200dष"
    assert name_of(joined) == joined and name_of("a\u200b") == "a\u200b"
