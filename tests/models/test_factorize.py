"""The fast path from a file of annotations to a reward model's folder, on a tiny causal model that stays as it is."""

import shutil
import tracemalloc

import numpy as np
import pytest
from transformers import AutoTokenizer

from openrlhf_pgrpo.core.cross_validation import choose_factors as choose
from openrlhf_pgrpo.models import factorize as fast
from openrlhf_pgrpo.models.scoring import load

pytestmark = pytest.mark.host


def row(user, prompt, chosen, rejected, **more):
    return {"user": user, "prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def test_a_pair_is_the_same_either_way_round():
    rows = [("ana", "p", "b", "a", 1.0), ("ben", "p", "a", "b", 0.75), ("ana", "q", "a", "b", 0.5)]
    pairs, annotations, order = fast.annotate(rows)
    assert pairs == [("p", "a", "b"), ("q", "a", "b")] and order.tolist() == [0, 2, 1]
    assert annotations.users == ["ana", "ben"]
    assert annotations.user.tolist() == [0, 0, 1] and annotations.pair.tolist() == [0, 1, 0]
    assert annotations.preference.tolist() == [0.0, 0.5, 0.75]


def test_pairs_and_annotations_do_not_depend_on_the_order_of_rows():
    rng = np.random.default_rng(0)
    answers = rng.integers(0, 4, (60, 2))
    rows = [(f"u{n % 7}", f"p{n % 5}", *map(str, answers[n]), float(n % 3 / 2)) for n in range(60)]
    rows = [row for row in rows if row[2] != row[3]]
    pairs, said, _ = fast.annotate(rows)
    for _ in range(3):
        moved = rng.permutation(len(rows))
        its_pairs, its_said, its_order = fast.annotate([rows[row] for row in moved])
        assert its_pairs == pairs
        for column in ("user", "pair", "preference"):
            assert np.array_equal(getattr(its_said, column), getattr(said, column))
        assert sorted(its_order.tolist()) == list(range(len(rows)))


def test_the_order_of_rows_chooses_and_fits_nothing(jsonl, tiny, tmp_path, monkeypatch):
    """Where single pairs are dealt to folds, their numbers count."""
    monkeypatch.setattr(fast, "MOST_FACTORS", 2)
    rng, words = np.random.default_rng(1), "sun moon tree river stone cloud".split()
    taste, rows = rng.normal(size=(8, 6)), []
    for user, number in np.ndindex(8, 10):
        one, other = rng.choice(6, 2, replace=False)
        if taste[user, one] + rng.normal() < taste[user, other]:
            one, other = other, one
        texts = (f"{words[word]} {user}{number}" for word in (one, other))
        rows.append(row(f"u{user}", f"p{number} ", *texts))
    found = []
    for name, moved in (("one", rows), ("two", [rows[n] for n in rng.permutation(len(rows))])):
        choice = fast.factorize(jsonl(f"{name}.jsonl", moved), tiny / "model", tmp_path / name, l2=0.1)
        found.append((choice.loss.tolist(), (tmp_path / name / "model.safetensors").read_bytes()))
    assert found[0] == found[1]


def test_what_is_written_predicts_what_was_fitted(annotations, tiny, tmp_path):
    assert fast.factorize(annotations, tiny / "model", tmp_path / "m", factors=1, l2=2.0) is None
    pairs, found, _ = fast.annotate(fast.read(annotations).rows)
    X = fast.differences(tiny / "model", pairs, "last")
    X = X.over(np.sqrt(X.squares() / len(pairs)))
    fitted = fast.fit(X, found, 1, 2.0)
    expected = X @ fitted.head.T @ fitted.coefficients.T
    model = load(tmp_path / "m")
    prompts, first, second = zip(*pairs)
    written = (model.base_rewards(prompts, first) - model.base_rewards(prompts, second)) @ model.coefficients.T
    assert np.abs(written - expected).max() < 1e-4 * np.abs(expected).max()  # weights are saved in float32


def test_an_answer_counts_alike_as_messages_as_words_and_as_the_policy_closes_it(jsonl, tiny, tmp_path):
    """The policy whose template writes the texts has an end token of its own, which the backbone does not know."""
    policy = AutoTokenizer.from_pretrained(tiny / "model")
    policy.eos_token = "<|im_end|>"
    policy.chat_template = "".join(
        ["{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] + eos_token }}\n{% endfor %}"]
        + ["{% if add_generation_prompt %}<|assistant|>{% endif %}"]
    )
    policy.save_pretrained(tmp_path / "policy")
    ways = {
        "messages": lambda words: [{"role": "assistant", "content": words}],
        "words": str,
        "closed": lambda words: f"{words}<|im_end|>\n",
    }
    for name, way in ways.items():
        rows = [row(f"u{n % 2}", f"{n}?", way(f"yes {n}"), way(f"no {n}")) for n in range(8)]
        data = jsonl(f"{name}.jsonl", rows)
        fast.factorize(data, tiny / "model", tmp_path / name, 1, 0.1, chat_template=str(tmp_path / "policy"))
    heads = [(tmp_path / name / "model.safetensors").read_bytes() for name in ways]
    assert heads[0] == heads[1] == heads[2]
    model = load(tmp_path / "words")
    closed = model.base_rewards(["0?"], [ways["closed"]("yes 0")])
    assert np.array_equal(closed, model.base_rewards(["0?"], ["yes 0"]))


@pytest.mark.parametrize(
    "rows, message",
    [
        ([row("a", "p", "x", "y"), {"user": "a"}], "line 2 of .* needs the column 'prompt', got 'user'"),
        ([row("", "p", "x", "y")], "line 1 of .* needs a user in 'user', a text or a number, got"),
        ([row("a", "p", ["x"], "y")], "line 1 of .* needs a text in 'chosen'"),
        ([row("a", "p", "x", "y", preference=2)], "line 1 of .* from 0 .* to 1 .* in 'preference', got 2"),
        ([row("a", "p", "x", "y", preference=True)], "got True"),
        ([], "needs at least one row"),
    ],
)
def test_a_bad_row_is_refused_with_its_number(rows, message, jsonl):
    with pytest.raises(ValueError, match=message):
        fast.read(jsonl("pairs.jsonl", rows))


def test_a_line_that_was_cut_is_refused_with_its_number(annotations, tmp_path):
    (tmp_path / "cut.jsonl").write_text(annotations.read_text()[:-30])
    with pytest.raises(ValueError, match="line 320 of"):
        fast.read(tmp_path / "cut.jsonl")


# ---- rows ----


def test_a1_rows_are_read_as_train_rm_reads_them(jsonl):
    """Users may be numbers, and a preference weighs; without one, the chosen answer was preferred."""
    rows = [row(7, "p", "x", "y", preference=0), row("ana", "p", "x", "z", preference=0.5)]
    assert [(user, preference) for user, *_, preference in fast.read(jsonl("a.jsonl", rows)).rows] == [
        ("7", 0),
        ("ana", 0.5),
    ]
    assert fast.read(jsonl("b.jsonl", [row(7, "p", "x", "y")])).rows == [("7", "p", "x", "y", 1.0)]


@pytest.mark.parametrize("preference", ["null", "NaN", '"1"', "true", "-0.1", "1.5", "[1]", "{}", "1e400"])
def test_a1_a_preference_that_is_none_is_refused_with_its_line(jsonl, preference):
    lines = [row("ana", "p", "x", "y", preference=1)]
    broken = '{"user": "ana", "prompt": "p", "chosen": "x", "rejected": "z", "preference": ' + preference + "}"
    with pytest.raises(ValueError, match="line 2 of .* a number from 0 .rejected. to 1 .chosen. in 'preference', got"):
        fast.read(jsonl("a.jsonl", [*lines, broken]))


def test_a1_a_preference_that_one_row_lacks_is_missing(jsonl):
    with pytest.raises(ValueError, match="line 2 of .* in 'preference', got null: correct it or drop the row"):
        fast.read(jsonl("a.jsonl", [row("ana", "p", "x", "y", preference=1), row("ana", "p", "x", "z")]))


@pytest.mark.parametrize("user", ["null", '""', '"  "', "NaN", "{}", '["ana"]'])
def test_a7_a_user_who_has_no_name_is_refused_with_the_line(jsonl, user):
    line = '{"user": ' + user + ', "prompt": "p", "chosen": "x", "rejected": "z"}'
    with pytest.raises(ValueError, match="line 1 of .* needs a user in 'user', a text or a number, got "):
        fast.read(jsonl("a.jsonl", [line]))


def test_a4_equal_answers_are_refused_with_lines_and_count(jsonl):
    rows = [row("ana", "p", "x", "y"), row("ana", "p", "x", "x"), row("ben", "p", "z", "z"), row("ben", "p", "z", "x")]
    with pytest.raises(
        ValueError, match=r"answers that differ, got the same text twice in 2 lines \(2, 3\) of .*: dr"
    ):
        fast.read(jsonl("a.jsonl", rows))


@pytest.mark.parametrize("texts", [("", "x", "y"), ("p", " ", "y"), ("p", "x", "\n")])
def test_b5_a_blank_text_is_missing_as_it_is_in_train_rm(jsonl, texts):
    with pytest.raises(
        ValueError, match="line 1 of .* needs a text in '(prompt|chosen|rejected)', got .*: correct it"
    ):
        fast.read(jsonl("a.jsonl", [row("ana", *texts)]))


# ---- texts that are longer than the backbone reads: 256 tokens of a byte each ----


def test_a4_prompts_are_cut_from_the_left_and_counted(jsonl, tiny, tmp_path):
    """The answers decide, whatever stands before them. They used to be cut away."""
    rng, rows, said = np.random.default_rng(0), [], []
    for pair in range(30):
        loud, calm = f"{rng.integers(1000)}!!!!!!!!", f"{rng.integers(1000)}"
        rows += [row("ana", "once upon a time " * 40 + f"{pair} ", loud, calm)]
        rows += [row("ben", "once upon a time " * 40 + f"{pair} ", calm, loud)]
    rows += [row("ana", "short ", "!!!!!", "."), row("ben", "short ", ".", "!!!!!")]
    fast.factorize(jsonl("a.jsonl", rows), tiny / "model", tmp_path / "m", 1, 1.0, say=said.append)
    assert said == ["60 of 62 texts are longer than 256 tokens: their prompts are cut from the left"]
    model = load(tmp_path / "m")
    users, prompts, chosen, rejected = zip(*(tuple(one.values()) for one in rows))
    own = model.coefficients[[model.users.index(user) for user in users]]
    features = model.base_rewards(prompts, chosen) - model.base_rewards(prompts, rejected)
    assert ((features * own).sum(1) > 0).mean() > 0.9


def test_a4_an_answer_that_does_not_fit_is_refused_with_lines(jsonl, tiny, tmp_path):
    rows = [row("ana", "p", "x", "y"), row("ana", "p", "x" * 400, "y"), row("ben", "q", "x", "y")]
    with pytest.raises(ValueError, match="answer needs to fit into the 256 tokens .*, got a longer one in line 2 of"):
        fast.factorize(jsonl("a.jsonl", rows), tiny / "model", tmp_path / "m", 1, 1.0)
    assert not (tmp_path / "m").exists()


def test_b5_an_answer_that_is_nothing_but_its_end_is_missing(jsonl, tiny, tmp_path):
    """Some chat models write no more than that. A reward for it means nothing."""
    rows = [row("ana", "p", "x", "y"), row("ana", "q", "x", "<eos>\n"), row("ben", "p", "x", "y")]
    with pytest.raises(ValueError, match="every answer needs a token before its end, got none in line 2 of .*: fill"):
        fast.factorize(jsonl("a.jsonl", rows), tiny / "model", tmp_path / "m", 1, 1.0)
    assert not (tmp_path / "m").exists()


def test_a4_texts_that_the_backbone_reads_alike_are_refused_with_lines(jsonl, tiny, tmp_path):
    """Two texts that differ, of one and the same tokens: the second brings its end token along."""
    rows = ["", row("ana", "p", "x", "y"), row("ana", "p", "x<eos>", "x"), row("ben", "p", "x", "x<eos>")]
    with pytest.raises(
        ValueError, match=r"reads as the same tokens in 2 lines \(3, 4\) of .*: drop them, or name anot"
    ):
        fast.factorize(jsonl("a.jsonl", rows), tiny / "model", tmp_path / "m", 1, 1.0)
    assert not (tmp_path / "m").exists()


def test_d12_a_very_long_prompt_takes_no_memory_of_its_length_for_each_pair(
    annotations, jsonl, tiny, tmp_path, monkeypatch
):
    """A table of texts of equal length would take 4 MB for each of 41 pairs."""
    monkeypatch.setattr(fast, "MOST_FACTORS", 1)
    rows = [*annotations.read_text().splitlines(), row("u0", "a" * 10**6, "x", "y")]
    path, said = jsonl("a.jsonl", rows), []
    tracemalloc.start()
    try:
        fast.factorize(path, tiny / "model", tmp_path / "m", l2=1.0, pooling="mean", say=said.append)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 120e6 and "2 of 82 texts are longer than 256 tokens" in said[0]


# ---- data that say little ----


def noise(users=6, pairs=24):
    rng = np.random.default_rng(0)
    for pair in range(pairs):
        for user in range(users):
            answers = [f"yes {pair}", f"no {pair}"]
            chosen = rng.integers(2)
            yield row(f"u{user}", f"{pair} says: ", answers[chosen], answers[1 - chosen])


def test_no_more_base_rewards_are_tried_than_few_texts_carry(jsonl, tiny, tmp_path):
    """Five statements of twenty users have four independent differences: after all texts were embedded, eight base
    rewards were refused that nobody had asked for."""
    rng = np.random.default_rng(0)
    rows = [
        {"user": f"u{user}", "prompt": "p", "response": f"statement {number}", "rating": float(rng.integers(1, 6))}
        for user in range(20)
        for number in range(5)
    ]
    data, said = jsonl("a.jsonl", rows), []
    choice = fast.factorize(data, tiny / "model", tmp_path / "m", l2=0.3, say=said.append)
    assert choice.factors.tolist() == [1, 2, 3, 4] and load(tmp_path / "m").coefficients.shape[1] <= 4
    with pytest.raises(ValueError, match="5 base rewards need as many independent embedding dimensions, got 4: lower"):
        fast.factorize(data, tiny / "model", tmp_path / "other", factors=5, say=said.append)


def test_d13_answers_that_nothing_explains_are_said_to_be_like_a_coins(jsonl, tiny, tmp_path, monkeypatch):
    """Either nothing is written, or a model with a warning; no word of a penalty that nobody gave."""
    monkeypatch.setattr(fast, "MOST_FACTORS", 2)
    said = []
    try:
        fast.factorize(jsonl("a.jsonl", list(noise())), tiny / "model", tmp_path / "m", say=said.append)
    except ValueError as error:
        said.append(str(error))
        assert "held-out log loss" in said[-1] and not (tmp_path / "m").exists()
    told = " ".join(said)
    assert "predicted no better than by a coin, whose log loss is 0.6931" in told and "at this l2" not in told


def rated(responses, users=16, prompts=1):
    """Ratings of noise."""
    rng = np.random.default_rng(0)
    for user, prompt, response in np.ndindex(users, prompts, responses):
        answer = f"{response} times {response * (response + prompt + 3)}"
        yield {"user": f"u{user}", "prompt": f"{prompt}?", "response": answer, "rating": int(rng.integers(1, 6))}


def test_noise_in_ratings_of_one_prompt_is_no_better_than_a_coin(jsonl, tiny, tmp_path, monkeypatch):
    """A held-out pair followed from others of the same ratings: .40 and no warning."""
    monkeypatch.setattr(fast, "MOST_FACTORS", 2)
    said, choices = [], []
    monkeypatch.setattr(
        fast, "choose_factors", lambda *given, **more: choices.append(choose(*given, **more)) or choices[0]
    )
    try:
        fast.factorize(jsonl("a.jsonl", list(rated(16))), tiny / "model", tmp_path / "m", say=said.append)
    except ValueError as error:
        said.append(str(error))
    best = choices[0].loss.argmin()
    assert choices[0].loss[best] + 2 * choices[0].error[best] > fast.COIN
    assert "predicted no better than by a coin" in " ".join(said) and "share" not in " ".join(said)


def held_out(rows):
    """What is held out together of rows (user, prompt, one answer, other answer), and what is said."""
    pairs, annotations, _ = fast.annotate([(*row, 1.0) for row in rows])
    said = []
    return fast.held_out_together(pairs, annotations, said.append), pairs, said


def all_pairs(prompts, answers, users=16):
    return [
        (f"u{user}", f"{prompt}?", f"{one}", f"{other}")
        for user, prompt in np.ndindex(users, prompts)
        for one in range(answers)
        for other in range(one)
    ]


def test_prompts_are_held_out_and_of_few_prompts_answers():
    together, pairs, said = held_out(all_pairs(20, 3))
    assert together.shape == (60,) and len({*zip(together, (prompt for prompt, *_ in pairs))}) == 20 and not said
    together, pairs, said = held_out(all_pairs(2, 12))  # the same answers to both prompts
    assert together.shape == (132, 2) and together.max() == 11 and not said
    for (_, *answers), numbers in zip(pairs, together.tolist()):
        assert [sorted(map(str, range(12)))[number] for number in numbers] == answers
    for answers in (4, 8):  # four cannot be dealt to five folds; of eight, pairs of two in one fold would be few
        together, _, said = held_out(all_pairs(10, answers))
        assert together.ndim == 1 and len({*together.tolist()}) == 10 and not said


def test_a_pair_that_shares_no_text_is_held_out_from_everybody():
    """Else what others say about it tells what is held out, though the reward can only learn it by heart."""
    together, _, said = held_out([(f"u{user}", "?", f"a{pair}", f"b{pair}") for user in range(3) for pair in range(9)])
    assert together.tolist() == [*range(9)] and not said


@pytest.mark.parametrize(
    "rows, got",
    [
        (all_pairs(1, 6), "6 answers to 1 prompts"),
        ([(f"u{user}", f"{pair}?", "a", "b") for user in range(9) for pair in range(3)], "2 answers to 3 prompts"),
    ],
)
def test_where_too_few_pairs_are_apart_a_warning_says_that_noise_is_predicted(rows, got):
    together, _, said = held_out(rows)
    assert together is None and len(said) == 1
    assert said[0].startswith(
        "warning: cross-validation needs to hold out pairs that share no answer with those traine"
    )
    assert f"got too few of {got}" in said[0] and "add answers, or choose --factors and --l2" in said[0]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_d13_a_handful_of_answers_says_what_is_too_little(jsonl, tiny, tmp_path, count):
    rows = [row(f"u{number}", f"{number} says: ", "yes", "no") for number in range(count)]
    with pytest.raises(
        ValueError, match="hold out in each, got too few pairs or users .*: ask more, or choose the num"
    ):
        fast.factorize(jsonl("a.jsonl", rows), tiny / "model", tmp_path / "m")


@pytest.mark.parametrize(
    "factors, l2, message",
    [
        (0, None, "at least one base reward"),
        (9, None, "as many users, got 8"),
        (None, 0.0, "l2 needs a finite"),
        (None, float("nan"), "l2 needs a finite"),
        (-1, 1.0, "at least one"),
    ],
)
def test_wrong_numbers_are_refused_before_a_text_is_read(
    annotations, tiny, tmp_path, monkeypatch, factors, l2, message
):
    monkeypatch.setattr(fast, "embed", None)
    with pytest.raises(ValueError, match=message):
        fast.factorize(annotations, tiny / "model", tmp_path / "m", factors, l2)


# ---- where it is written ----


def test_b1_a_policy_is_not_replaced_by_a_reward_model_on_it(annotations, tiny, tmp_path, monkeypatch):
    """By its own name, through a link, or when it is another model's; before a text is read."""
    monkeypatch.setattr(fast, "embed", None)
    policy, other = (shutil.copytree(tiny / "model", tmp_path / name) for name in ("policy", "other"))
    (tmp_path / "link").symlink_to(policy)
    before = {path.name: path.read_bytes() for path in policy.iterdir()}
    for folder in (policy, tmp_path / "link", tmp_path / "other" / ".." / "policy", other):
        with pytest.raises(ValueError, match="--output needs a (folder of its own|new or empty folder)"):
            fast.factorize(annotations, policy, folder, 1, 1.0)
    assert {path.name: path.read_bytes() for path in policy.iterdir()} == before


def test_a15_the_same_command_twice_gives_the_same_model(annotations, tiny, tmp_path):
    for name in ("one", "one", "two"):
        fast.factorize(annotations, tiny / "model", tmp_path / name, 1, 1.0)
    assert load(tmp_path / "one").fingerprint == load(tmp_path / "two").fingerprint
