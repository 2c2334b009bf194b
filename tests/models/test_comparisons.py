"""Rows as people have them become comparisons: pairs, whole conversations, and ratings."""

import json
import re
from itertools import combinations
from random import Random
from statistics import mean

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from openrlhf_pgrpo.models import ratings as ratings_module
from openrlhf_pgrpo.models.comparisons import pair_up, read
from openrlhf_pgrpo.models.ratings import MOST_PAIRS, read_ratings
from openrlhf_pgrpo.models.tables import COLUMNS, Columns, Table
from openrlhf_pgrpo.people.pool import read_pool

pytestmark = pytest.mark.core


def turns(*texts, system=None):
    """A conversation; the user begins, perhaps after instructions."""
    before = [] if system is None else [{"role": "system", "content": system}]
    return before + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


# ---- conversations ----


def talk(chosen, rejected, **more):
    return {"user": "ana", "chosen": chosen, "rejected": rejected, **more}


def test_the_messages_that_conversations_share_are_the_prompt(jsonl):
    rows = [
        talk(turns("why?", "so"), turns("why?", "it is")),
        talk(turns("a", "b", "c", "d"), turns("a", "b", "c", "e")),
    ]
    assert read(jsonl("a.jsonl", rows)).rows == [
        ("ana", turns("why?"), turns("why?", "so")[1:], turns("why?", "it is")[1:], 1.0),
        ("ana", turns("a", "b", "c"), turns("a", "b", "c", "d")[3:], turns("a", "b", "c", "e")[3:], 1.0),
    ]


@pytest.mark.parametrize("prompt", [turns("why?"), "why?"])
def test_a_prompt_that_conversations_repeat_is_written_once(jsonl, prompt):
    whole = talk(turns("why?", "so"), turns("why?", "it is"), prompt=prompt)
    instructed = talk(turns("why?", "so", system="be brief"), turns("why?", "no", system="be brief"), prompt="why?")
    apart = talk(turns("", "so")[1:], turns("", "it is")[1:], prompt=prompt)
    found = read(jsonl("a.jsonl", [whole, instructed, apart])).rows
    assert found[0] == ("ana", turns("why?"), turns("", "so")[1:], turns("", "it is")[1:], 1.0)
    assert found[1][1] == turns("why?", system="be brief") and found[1][2] == turns("", "so")[1:]
    assert found[2] == ("ana", prompt, turns("", "so")[1:], turns("", "it is")[1:], 1.0)


def test_keys_that_arrow_adds_to_messages_change_nothing(tmp_path):
    named, other = ([{**turn, "name": None} for turn in turns("why?", said)] for said in ("so", "it is"))
    datasets.Dataset.from_list([talk(named, other)]).to_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet").rows == [
        ("ana", *(turns("why?", "so")[row:][:1] for row in (0, 1)), turns("", "it is")[1:], 1.0)
    ]


@pytest.mark.parametrize(
    "row, message",
    [
        (
            talk(turns("why?", "so"), turns("how?", "so")),
            "that begin with the same messages, .* first messages differ",
        ),
        (
            talk(turns("why?", "so"), turns("why?")),
            "needs an answer behind the messages .* the beginning of the other",
        ),
        (talk(turns("why?"), turns("why?", "so"), prompt="why?"), "the beginning of the other"),
        (
            talk(turns("a", "b", "c", "d"), turns("a", "b", "e", "d")),
            "that part at an answer, got messages of which the one that begins them is of 'user'",
        ),
        (talk(turns("why?", "so"), turns("how?", "so"), prompt="why?"), "got one that does not begin .* 'rejected'"),
        (talk("it is", turns("why?", "so"), prompt="why?"), "got one that does not begin with it in 'chosen'"),
        (
            talk("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: c"),
            "got no prompt and .*--prompt_key, or wr",
        ),
        (talk(turns("why?", "so"), turns("why?", "so")), "two answers that differ, got the same text twice"),
        (talk(turns("why?", "so"), turns("why?", " ")), "needs a text in 'rejected', got a blank text"),
    ],
)
def test_conversations_without_one_prompt_and_two_answers_are_refused_with_the_row(jsonl, row, message):
    good = talk(turns("a", "b"), turns("a", "c"), **({"prompt": "a"} if "prompt" in row else {}))
    with pytest.raises(ValueError, match="line 2 of .*") as refused:
        read(jsonl("a.jsonl", [good, row]))
    assert re.search(message, str(refused.value))


def test_data_of_no_known_shape_are_refused(jsonl):
    with pytest.raises(
        ValueError, match="'chosen', of pairs, or 'rating', of ratings, got 'user', 'stars': name it wi"
    ):
        read(jsonl("a.jsonl", [{"user": "ana", "stars": 3}]))


# ---- ratings ----


def rated(user, prompt, response, rating, **more):
    return {"user": user, "prompt": prompt, "response": response, "rating": rating, **more}


SOME = [
    rated("ana", "p", "x", 4.5),
    rated("ben", "p", "x", 1),
    rated("ana", "p", "z", 4.5),
    rated("ana", "p", "y", -2),
    rated(7, "q", "x", 3),
    rated("ben", "p", "y", 2),
]
PAIRS = [
    ("ana", "p", "x", "y", 1.0),
    ("ana", "p", "x", "z", 0.5),
    ("ana", "p", "z", "y", 1.0),
    ("ben", "p", "y", "x", 1.0),
]


def test_each_two_ratings_of_one_user_to_one_prompt_are_a_pair(jsonl):
    found = read(jsonl("a.jsonl", SOME))
    assert found.rows == PAIRS
    assert found.of.tolist() == [[0, 3], [0, 2], [2, 3], [5, 1]]
    assert found.places([(0, 0), (0, 1), (1, 0)]) == f"2 lines (1, 4) of {found.table.name}"
    assert found.said == [
        "1 users rated no two responses to one prompt and are left out: '7'",
        "6 ratings make 4 pairs",
    ]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_ratings_are_the_same_in_every_form(tmp_path, kind):
    rows = [row | {"user": str(row["user"]), "rating": float(row["rating"])} for row in SOME]
    getattr(datasets.Dataset.from_list(rows), f"to_{kind}")(tmp_path / f"a.{kind}")
    assert read(tmp_path / f"a.{kind}").rows == PAIRS


def test_answers_of_csv_stay_as_they_are_written(tmp_path):
    (tmp_path / "a.csv").write_text("who,ask,text,stars\n007,1,1.0,3\n007,1,None,4\n007,2,a,5\n007,2,b,1\n")
    names = Columns(user="who", prompt="ask", response="text", rating="stars")
    assert read(tmp_path / "a.csv", names).rows == [("007", "1", "None", "1.0", 1.0), ("007", "2", "a", "b", 1.0)]


def test_a_text_is_a_rating_if_it_is_a_number(tmp_path):
    (tmp_path / "a.csv").write_text("user,prompt,response,rating\nana,p,x,4.5\nana,p,y,4.25\nana,p,z,good\n")
    with pytest.raises(
        ValueError, match="row 2 of .* needs a finite number in 'rating', got 'good': correct it or dr"
    ):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize(
    "rating", ["null", "NaN", "true", "1e400", '""', '"good"', '"1_0"', "[1]", "{}", "1" + 400 * "0"]
)
def test_a_rating_that_is_none_is_refused_with_its_line(jsonl, rating):
    broken = '{"user": "ana", "prompt": "p", "response": "y", "rating": ' + rating + "}"
    with pytest.raises(ValueError, match="line 2 of .* needs a finite number in 'rating', got .*: correct it or drop"):
        read(jsonl("a.jsonl", [rated("ana", "p", "x", 1), broken]))


def test_ratings_that_differ_by_less_than_a_number_can_hold_are_refused(jsonl):
    """10**17 and 10**17 + 1 were a tie."""
    with pytest.raises(ValueError, match=r"line 2 of .* needs a rating below 2\*\*53 in 'rating', got int 100"):
        read(jsonl("a.jsonl", [rated("ana", "p", "x", 2**53 - 1), rated("ana", "p", "y", 10**17)]))


def test_a_preference_of_csv_has_no_underscores(tmp_path):
    (tmp_path / "a.csv").write_text("user,prompt,chosen,rejected,preference\nana,p,x,y,0_1\n")
    with pytest.raises(ValueError, match="row 0 of .* in 'preference', got '0_1': correct it or drop the row"):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize(
    "row, message",
    [
        ({"user": "ana", "response": "y", "rating": 1}, "needs the column 'prompt', got 'user', 'response', 'rating'"),
        ({"user": "ana", "prompt": "p", "rating": 1}, "needs the column 'response'"),
        (rated(None, "p", "y", 1), "needs a user in 'user', a text or a number, got null"),
        (rated("ana", "p", " ", 1), "needs a text in 'response', got a blank text"),
        (rated("ana", "", "y", 1), "needs a text in 'prompt', got an empty text"),
    ],
)
def test_a_rating_without_its_user_or_texts_is_refused_with_its_line(jsonl, row, message):
    with pytest.raises(ValueError, match=f"line 2 of .* {message}"):
        read(jsonl("a.jsonl", [rated("ana", "p", "x", 1), row]))


def test_ratings_without_a_pair_or_only_ties_are_refused(jsonl):
    alone = [
        rated("ana", "p", "x", 1),
        rated("ana", "q", "y", 2),
        rated("ben", "p", "y", 2),
        rated("ben", "p", "y", 3),
    ]
    with pytest.raises(ValueError, match="two different responses to one prompt, got none among 3 ratings of 2 users"):
        read(jsonl("a.jsonl", alone))
    with pytest.raises(ValueError, match="two that differ of one user to one prompt, got only ties in 2 pairs"):
        read(jsonl("b.jsonl", [rated(user, "p", text, 3) for user in ("ana", "ben") for text in "xy"]))


def test_the_mean_of_repeated_ratings_counts(jsonl):
    """Also as a tie: ten ratings of 0.1 are one of 0.1."""
    rows = [rated("ana", "p", "x", 0.1)] + [rated("ana", "p", "y", 0.1)] * 10
    rows += [rated("ana", "p", "z", rating) for rating in (0, 1)]
    found = read(jsonl("a.jsonl", rows))
    assert [(*row[2:],) for row in found.rows] == [("x", "y", 0.5), ("z", "x", 1.0), ("z", "y", 1.0)]
    assert found.said[0] == "2 responses were rated more than once by one user: the mean counts"


def test_prompts_and_responses_may_be_messages(jsonl):
    rows = [rated("ana", turns("why?"), turns("", text)[1:], len(text)) for text in ("so", "it is", "so")]
    assert read(jsonl("a.jsonl", rows)).rows == [
        ("ana", turns("why?"), turns("", "it is")[1:], turns("", "so")[1:], 1.0)
    ]


def test_the_name_in_a_column_is_that_of_both_ratings(jsonl):
    rows = [rated("ana", "p", text, rating, group=7) for text, rating in (("x", 1), ("y", 2))]
    assert read(jsonl("a.jsonl", rows)).names("group", "preference group") == ["7"]
    with pytest.raises(ValueError, match="one preference group in 'group', got '7' and '8' in 2 lines .1, 3. of"):
        read(jsonl("b.jsonl", [rows[0], rows[0], rows[1] | {"group": 8}])).names("group", "preference group")


RATING = st.tuples(*map(st.sampled_from, (["ana", "ben", 7], "pq", "xyz", [-1, 0, 0.5, 2])))


def table_of(rows):
    return Table("rows", [rated(*row) for row in rows], list(range(len(rows))), "row")


def naive(rows):
    """Each two responses, one by one."""
    given = {}
    for user, prompt, response, rating in rows:
        given.setdefault((str(user), prompt), {}).setdefault(response, []).append(rating)
    for (user, prompt), responses in given.items():
        for first, second in combinations(sorted(responses), 2):
            one, other = mean(responses[first]), mean(responses[second])
            first, second = (second, first) if other > one else (first, second)
            yield user, prompt, first, second, 0.5 if one == other else 1.0


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(RATING, min_size=1, max_size=20), st.none() | st.integers(1, 4), st.randoms())
@example(
    [(7, "p", "y", rating) for rating in (-1, 0, 2)] + [(7, "p", "z", rating) for rating in (0, 0.5, 0.5)],
    None,
    Random(0),
)
def test_pairs_are_those_of_a_double_loop(rows, count, random):
    expected = sorted(naive(rows))
    shuffled = random.sample(rows, len(rows))
    try:
        found, again = (pair_up(read_ratings(table_of(some), COLUMNS), count, 0) for some in (rows, shuffled))
    except ValueError as error:
        assert ("only ties" in str(error)) or not expected
        assert count is not None or {row[-1] for row in expected} <= {0.5}
        return
    assert found.rows == again.rows  # whatever the order of rows
    for pair, (one, other) in zip(found.rows, found.of.tolist()):
        for place, response in ((one, pair[2]), (other, pair[3])):
            assert [str(value) for value in rows[place][:3]] == [*pair[:2], response]
    if count is None:
        assert sorted(found.rows) == expected
        return
    for user in {row[0] for row in expected}:
        own = [row for row in found.rows if row[0] == user]
        all_own = [row for row in expected if row[0] == user]
        assert len(own) == len(set(own)) == min(count, len(all_own)) and set(own) <= set(all_own)


def test_every_pair_of_a_user_is_drawn_equally_often():
    """Two of four: 1 of the prompt p, 3 of q. Each in half of 1,000 draws, give or take four standard errors."""
    rows = [("ana", "p", text, number) for number, text in enumerate("xy")]
    rows += [("ana", "q", text, number) for number, text in enumerate("xyz")]
    found = read_ratings(table_of(rows), COLUMNS)
    drawn = np.zeros((5, 5), int)
    for seed in range(1000):
        np.add.at(drawn, found.draw(2, seed), 1)
    counts = drawn[drawn > 0]
    assert len(counts) == 4 and counts.sum() == 2000 and np.abs(counts - 500).max() < 64


def test_pairs_without_number_are_refused_unless_few_are_drawn():
    """A single user, who rated 5,000 responses: 12,497,500 pairs."""
    found = read_ratings(table_of([("ana", "p", f"{number}", number) for number in range(5000)]), COLUMNS)
    with pytest.raises(
        ValueError, match=f"at most {MOST_PAIRS:,} pairs, got 12,497,500 of 1 users .*: draw .* --pairs"
    ):
        found.draw(None, 0)
    first, second = found.draw(40, 0)
    assert len({*zip(first.tolist(), second.tolist())}) == 40 and (found.rating[first] > found.rating[second]).all()


def test_numbers_of_pairs_are_exact_where_roots_are_not():
    high = np.array([1, 2, 3, 94906267, 10**8, 2**31])
    first = high * (high - 1) // 2
    for low in (0 * high, high - 1):
        assert [*map(list, ratings_module._of_triangle(first + low))] == [list(low), list(high)]


@pytest.mark.parametrize(
    "draw, message",
    [
        ((0, 0), "--pairs needs at least 1, got 0"),
        ((1, -1), "--seed needs a number of at least 0, got -1"),
        ((1, 0), "--pairs draws pairs of ratings, got .*, whose rows are pairs already, so it does nothing: leave it"),
    ],
)
def test_a_draw_that_cannot_be_is_refused(annotations, draw, message):
    with pytest.raises(ValueError, match=message):
        read(annotations, COLUMNS, None, *draw)


USER, SYSTEM = {"role": "user", "content": "hi"}, {"role": "system", "content": "be kind"}
SAID = [{"role": "assistant", "content": text} for text in ("yes", "no")]


@pytest.mark.parametrize(
    "row, got",
    [
        # The prompt is in both: the reward model was trained on it twice.
        ({"prompt": [USER], "chosen": [SYSTEM, USER, SAID[0]], "rejected": [SYSTEM, USER, SAID[1]]}, "begins them"),
        ({"prompt": "other", "chosen": [USER, SAID[0]], "rejected": [USER, SAID[1]]}, "begins them is of 'user'"),
        # The last words are the user's, which no policy is rewarded for.
        ({"chosen": [USER, SAID[0], USER], "rejected": [USER, SAID[1], USER]}, "ends them is of 'user'"),
    ],
)
def test_conversations_that_are_no_answers_are_refused(tmp_path, row, got):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"user": "u", **row}) + "\n")
    with pytest.raises(ValueError, match=f"line 1 of .*, got messages of which the one that {got}.*: correct it or"):
        read(path)


def test_a_prompt_is_its_text_without_white_space_around_it(tmp_path):
    path = tmp_path / "pairs.jsonl"
    turn = {**USER, "content": "hi\n"}
    row = {"user": "u", "prompt": "hi", "chosen": [turn, SAID[0]], "rejected": [turn, SAID[1]]}
    path.write_text(json.dumps(row) + "\n")
    assert read(path).rows == [("u", [turn], SAID[:1], SAID[1:], 1.0)]


def test_a_response_that_is_a_whole_conversation_is_refused(tmp_path):
    path = tmp_path / "ratings.jsonl"
    rows = [{"user": "u", "prompt": "hi", "response": [USER, said], "rating": rank} for rank, said in enumerate(SAID)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="line 1 of .* in 'response', got messages of which the one that begins them"):
        read(path)


@pytest.mark.parametrize(
    "form, named, message",
    [
        ("pairs", {"rating": "stars"}, "--rating_key names a column of ratings, got .*, whose rows are pairs, so it"),
        ("pairs", {"preference": "prefrence"}, "--preference_key needs a column of .*, got 'prefrence': correct it"),
        ("chats", {"prompt": "promt"}, "--prompt_key needs a column of .*, 'chosen', .*, got 'promt': correct it"),
        ("ratings", {"chosen": "god", "rejected": "bad"}, "--chosen_key needs a column of .*, got 'god': correct it"),
        ("ratings", {"rejected": "bad"}, "--rejected_key names a column of pairs, got .*, whose rows are ratings, so"),
        ("ratings", {"preference": "weight"}, "--preference_key names a column of pairs, got .*, so it does nothing:"),
        ("ratings", {"user": "who"}, "--user_key needs a column of .*, got 'who': correct it"),
    ],
)
@pytest.mark.parametrize("reading", [read, read_pool])
def test_a_key_that_names_nothing_or_does_nothing_is_refused(jsonl, reading, form, named, message):
    """A mistyped --chosen_key made ratings of pairs, and the others were passed over."""
    rows = {
        "pairs": [{"user": "u", "prompt": "hi", "chosen": "yes", "rejected": "no", "stars": 3}],
        "chats": [{"user": "u", "chosen": [USER, SAID[0]], "rejected": [USER, SAID[1]]}],
        "ratings": [
            {"user": "u", "prompt": "hi", "response": text, "rating": len(text), "good": "g", "bad": "b", "weight": 1}
            for text in ("yes", "no")
        ],
    }
    path = jsonl("rows.jsonl", rows[form])
    reading(path)
    with pytest.raises(ValueError, match=message):
        reading(path, COLUMNS._replace(**named))


def test_half_of_a_character_in_a_name_is_refused_with_its_line(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"user": "a\\ud800", "prompt": "hi", "chosen": "yes", "rejected": "no"}\n')
    with pytest.raises(ValueError, match="line 1 of .* needs a user in 'user' of whole characters, got half of one"):
        read(path)


def test_texts_that_may_stand_for_a_missing_value_are_said(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [
        dict(user="nan", prompt="hi", chosen="yes", rejected="None"),
        dict(user="u", prompt="a", chosen="b", rejected="c"),
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    user, answer = read(path).said
    assert user.startswith("warning: 'nan' is a user like any other in 1 places")
    assert answer.startswith("warning: 'None' is an answer")


def rows_of(kind, texts):
    """Rows of pairs, or of ratings, of (prompt, chosen, rejected)."""
    if kind == "pairs":
        return [dict(user="u", prompt=prompt, chosen=one, rejected=other) for prompt, one, other in texts]
    ranked = [(prompt, text, rank) for prompt, *both in texts for rank, text in enumerate(both[::-1])]
    return [dict(user="u", prompt=prompt, response=text, rating=rank) for prompt, text, rank in ranked]


@pytest.mark.parametrize("kind", ["pairs", "ratings"])
def test_a_form_that_tells_which_answer_was_chosen_is_refused(kind, tmp_path):
    """Public data have such rows; of coin tosses a model of them predicts everything."""
    path = tmp_path / "rows.jsonl"
    texts = [(f"{n}?", f"yes {n}", f"['no {n}']") for n in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(kind, texts)))
    with pytest.raises(ValueError, match="one form, got a printed list as the rejected answer of every pair of "):
        read(path)
    texts[1] = ("1?", "['yes']", "['no']")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(kind, texts)))
    assert len(read(path).rows) == 10


def test_a_form_that_tells_nothing_is_none(jsonl):
    """An A/B test shows lists on one side, which wins or not."""
    shown = [dict(user="u", prompt=f"{n}?", chosen=f"['{n}']", rejected="no", preference=n % 2) for n in range(12)]
    assert len(read(jsonl("p.jsonl", shown)).rows) == 12
    won = [dict(row, chosen=row["rejected"], rejected=row["chosen"]) if row["preference"] else row for row in shown]
    ties = [dict(row, prompt=f"{row['prompt']}?", preference=0.5) for row in shown]
    with pytest.raises(ValueError, match="got a printed list as the rejected answer of every pair of"):
        read(jsonl("p.jsonl", won + ties))


@pytest.mark.parametrize("kind, places", [("pairs", "10 lines .1, 2, .* of "), ("ratings", "20 lines .1, 2, .* of ")])
def test_answers_that_repeat_their_prompt_are_refused_or_said(kind, places, tmp_path):
    """A model would be made of texts with the prompt twice, and no policy writes such."""
    path = tmp_path / "rows.jsonl"
    texts = [(f"{n}?", f"{n}? yes", f"{n}? no") for n in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(kind, texts)))
    with pytest.raises(ValueError, match=f"begin after their prompt, got ones that repeat it in {places}"):
        read(path)
    for some in ([*texts, ("one?", "one? yes", "no")], [("Hello", "Hello! How are you?", "Hello.")]):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(kind, some)))
        assert read(path).said[-1].startswith("warning: answers begin with the text of their prompt in ")
