"""`openrlhf-pgrpo elicit`, `rerank` and `groups` on a real reward model, from the command line on."""

import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
from common import CHAT, rows_in
from transformers import AutoTokenizer

from openrlhf_pgrpo.core.posterior import Prior, posterior
from openrlhf_pgrpo.models import scalar_reward
from openrlhf_pgrpo.models.folder import Folder, write
from openrlhf_pgrpo.models.form import Writer
from openrlhf_pgrpo.models.profiles import Answer, Profile
from openrlhf_pgrpo.models.scoring import RewardModel, load
from openrlhf_pgrpo.models.users import Users
from openrlhf_pgrpo.people.generation import Answer as Answered

pytestmark = pytest.mark.host

PROMPTS = ["Say something. ", "And you? ", "What now? "]
ANSWERS = ["Yes!", "Certainly not, no.", "It depends on the weather.", "1 + 1 = 2"]


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """Two kinds of people around (3, 0, 0) and (-3, 0, 0), 20 and 10 of them."""
    rng = np.random.default_rng(0)
    made = tmp_path_factory.mktemp("pref") / "model"
    kinds = np.repeat([[3.0, 0, 0], [-3.0, 0, 0]], (20, 10), 0)
    users = [f"user{number}" for number in range(30)]
    write(made, tiny / "model", rng.normal(0, 0.5, (3, 64)), kinds + rng.normal(0, 0.3, kinds.shape), users)
    return made


@pytest.fixture
def pool(jsonl):
    rows = [{"prompt": p, "a": a, "b": b} for p in PROMPTS for i, a in enumerate(ANSWERS) for b in ANSWERS[:i]]
    return jsonl("pool.jsonl", rows)


def test_elicit_asks_saves_and_goes_on(run, folder, pool, tmp_path):
    elicit = ("elicit", "--model", folder, "--pool", pool, "--user", "ana", "--questions", 4)
    code, shown = run(*elicit, typed="12")
    assert code == 0 and "Question 3 of 4" in shown and "2 answers saved" in shown
    code, shown = run(*elicit, typed="=1")
    assert code == 0 and "Question 1 of 4" not in shown and "4 answers. What the model believes" in shown
    assert "profile: ana.json" in shown

    model = load(folder)
    profile = Profile.load(tmp_path / "ana.json", model.fingerprint, Prior.of(model.coefficients))
    rows = {tuple(sorted((row["a"], row["b"]))) + (row["prompt"],): row for row in rows_in(pool)}
    texts = [(row["prompt"], row[side]) for row in rows.values() for side in "ab"]
    scores = dict(zip(texts, model.base_rewards(*zip(*texts))))
    features = np.array([said.features for said in profile.answers])
    possible = [scores[r["prompt"], r["a"]] - scores[r["prompt"], r["b"]] for r in rows.values()]
    for v in features:
        assert min(np.abs(v - other).max() for other in possible) < 1e-4
    fitted = posterior(features, [said.preference for said in profile.answers], Prior.of(model.coefficients))
    assert profile.coefficients == pytest.approx(fitted.mean)


def test_a_pool_is_scored_once_for_all_users(run, folder, pool, tmp_path):
    elicit = ("elicit", "--model", folder, "--pool", pool, "--scores", tmp_path / "pool.scores", "--user")
    code, shown = run(*elicit, "ana", typed="11")
    assert code == 0 and "scoring the answers of 18 pairs" in shown
    code, shown = run(*elicit, "ben", typed="11")
    assert code == 0 and "scoring" not in shown
    ana, ben = (json.loads((tmp_path / f"{name}.json").read_text())["answers"] for name in ("ana", "ben"))
    assert ana == ben and len(ana) == 2
    code, shown = run(*elicit, "zoe", "--entropy", 1)
    # before the first answer, the entropy is already below one bit per pair
    assert code == 0 and "\n0 answers. What the model believes" in shown and not (tmp_path / "zoe.json").exists()
    code, _ = run(*elicit[:-2], tmp_path / "nowhere" / "pool.scores", "--user", "eve")
    assert "--scores needs a folder that exists" in code


def test_every_text_is_written_in_the_models_form_once(run, folder, pool, jsonl, monkeypatch):
    """It was written twice: to look at its tokens, and to score it."""
    count, pairs = [], Writer.pairs
    monkeypatch.setattr(
        Writer, "pairs", lambda self, texts, *more: count.append(len(texts)) or pairs(self, texts, *more)
    )
    row = {"user": "ana", "prompt": PROMPTS[0], "chosen": ANSWERS[0], "rejected": ANSWERS[1]}
    data = jsonl("choices.jsonl", [row])
    for words, texts in (
        (("elicit", "--pool", pool, "--user", "eve"), 36),
        (("elicit", "--answers", data, "--profiles", "old"), 2),
        (("refit", "--profile", "old", "--output", "new"), 2),
        (("evaluate", "--data", data), 2),
    ):
        count.clear()
        code, _ = run(words[0], "--model", folder, *words[1:])
        assert code == 0 and sum(count) == texts


def test_rerank_for_a_trained_a_new_and_an_unknown_user(run, folder, jsonl, tmp_path):
    candidates = jsonl("c.jsonl", [{"prompt": prompt, "responses": ANSWERS} for prompt in PROMPTS])
    model = load(folder)
    out, rerank = tmp_path / "out.jsonl", ("rerank", "--model", folder, "--candidates", candidates, "--output")
    ana = Profile.of("ana", model.fingerprint, [Answer("x", (2.0, 0.0, 0.0), 0.0)], Prior.of(model.coefficients))
    ana.save(tmp_path / "ana.json")
    for who, coefficients in (
        (("--user", "user3"), model.coefficients[3]),
        (("--profile", tmp_path / "ana.json"), ana.coefficients),
        (("--user", "user4", "--population"), model.coefficients[4]),
        (("--user", "ana", "--population"), model.coefficients.mean(0)),
        (("--population",), model.coefficients.mean(0)),
    ):
        code, shown = run(*rerank, out, *who)
        unknown = "the rewards are the average user's: 'ana' is none of the 30 users of" if "ana" in who else ""
        assert code == 0 and shown.endswith(f"{out}\n") and shown.startswith(unknown)
        assert shown.count("\n") == 1 + bool(unknown)
        for prompt, row in zip(PROMPTS, rows_in(out)):
            rewards = model.base_rewards([prompt] * 4, ANSWERS) @ coefficients
            assert row["rewards"] == pytest.approx(rewards, abs=1e-4)
            assert row["best"] == ANSWERS[rewards.argmax()] and row["order"] == np.argsort(-rewards).tolist()
        out.unlink()
    code, _ = run(*rerank, out, "--user", "ana")
    assert "--user needs one of the 30 users of " in code and "and its profiles, got 'ana': ask them with" in code
    assert code.endswith("or take the average user with --population") and not out.exists()
    code, _ = run(*rerank, out)
    assert code.endswith("needs --user, --profile or --population, got none of them: name the user")
    code, _ = run(*rerank, tmp_path / "nowhere" / "out.jsonl", "--user", "user3")
    assert "--output needs a folder that exists" in code


@pytest.mark.e2e
def test_rerank_what_vllm_samples(folder, tiny, jsonl, tmp_path):
    prompts, out = jsonl("p.jsonl", [{"prompt": "Hello "}, {"prompt": "And "}]), tmp_path / "out.jsonl"
    words = ("rerank", "--model", folder, "--user", "user3", "--candidates", prompts, "--output", out)
    sampling = ("--generate", tiny / "model", "--n", "3", "--max_tokens", "8")
    command = [sys.executable, "-m", "openrlhf_pgrpo.cli.main", *words, *sampling]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows, model = rows_in(out), load(folder)
    assert [row["prompt"] for row in rows] == ["Hello ", "And "]
    for row in rows:
        assert len(set(row["responses"])) == 3
        rewards = model.base_rewards([row["prompt"]] * 3, row["responses"]) @ model.coefficients[3]
        assert row["rewards"] == pytest.approx(rewards, abs=1e-4) and row["best"] == row["responses"][rewards.argmax()]


def test_groups_writes_the_column_and_knows_a_new_user(run, folder, jsonl, tmp_path):
    model = load(folder)
    never = [Answer("x", (2.0, 0.0, 0.0), 0.0)] * 4  # no to the first base reward, which group-1 likes
    Profile.of("ana", model.fingerprint, never, Prior.of(model.coefficients)).save(tmp_path / "ana.json")
    rows = [{"input": "hi", "user": user} for user in (*model.users, "ana")]
    groups = ("groups", "--model", folder, "--data", jsonl("data.jsonl", rows), "--output", tmp_path / "out.jsonl")
    code, shown = run(*groups, "--profile", tmp_path / "ana.json")
    assert code == 0 and "2 preference groups have the lowest BIC (1: " in shown
    assert "group-1: 66.7% of 30 users\ngroup-2: 33.3% of 30 users\nana: group-2, with a probability of " in shown
    assert "--data.pref_group_key pref_group --data.user_key user" in shown
    written = rows_in(tmp_path / "out.jsonl")
    assert [row["pref_group"] for row in written] == ["group-1"] * 20 + ["group-2"] * 11
    assert [{"input": row["input"], "user": row["user"]} for row in written] == rows
    assert all(row["pref_group_probability"] > 0.9 for row in written)

    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "ana.json").write_bytes((tmp_path / "ana.json").read_bytes())
    code, _ = run(*groups, "--profile", tmp_path / "profiles")
    assert code == 0 and rows_in(tmp_path / "out.jsonl") == written

    (tmp_path / "out.jsonl").unlink()
    code, _ = run(*groups)
    assert (
        "line 31 of " in code and "needs one of the 30 users of " in code and "and its profiles, got 'ana': " in code
    )
    code, _ = run(*groups, "--profile", tmp_path / "ana.json", tmp_path / "ana.json")
    assert "needs to be of a new user, got 'ana', who is known" in code
    code, _ = run(*groups, "--groups", 31)
    assert "--groups needs a number from 1 to 30" in code and not (tmp_path / "out.jsonl").exists()
    code, shown = run(*groups, "--profile", tmp_path / "ana.json", "--groups", 3, "--pref_group_key", "g")
    assert code == 0 and "BIC" not in shown
    assert {row["g"] for row in rows_in(tmp_path / "out.jsonl")} == {"group-1", "group-2", "group-3"}


def names_of(file, folder):
    """A file by other names: as it is, as a relative path, a symbolic link and a hard link."""
    (folder / "symbolic").unlink(missing_ok=True), (folder / "symbolic").symlink_to(file)
    (folder / "hard").unlink(missing_ok=True), (folder / "hard").hardlink_to(file)
    return [file, os.path.relpath(file, folder), folder / "symbolic", folder / "hard"]


def test_an_output_that_is_an_input_is_refused_and_nothing_is_overwritten(run, folder, jsonl, tmp_path):
    model = Folder(folder)
    profiles = tmp_path / "profiles"
    profiles.mkdir()
    ana = profiles / "ana.json"
    Profile.of("ana", model.fingerprint, [], Prior.of(model.coefficients)).save(ana)
    rows = jsonl("c.jsonl", [{"prompt": "p", "responses": ["x"], "user": "ana"}])
    rerank = ("rerank", "--model", folder, "--candidates", rows, "--profile", ana)
    groups = ("groups", "--model", folder, "--data", rows, "--profile", profiles)
    inputs = {rows: ("--candidates", "--data"), ana: ("--profile",) * 2, folder / "users.json": ("--model",) * 2}
    for file, flags in inputs.items():
        before = file.read_bytes()
        for name in names_of(file, tmp_path):
            for command, flag in zip((rerank, groups), flags):
                code, _ = run(*command, "--output", name)
                assert f"--output needs a file of its own, got {name}, which {flag}" in code
                assert file.read_bytes() == before
    assert (tmp_path / "symbolic").is_symlink()
    policy = tmp_path / "policy"
    policy.mkdir()
    (policy / "config.json").write_text("{}")
    prompts = ("rerank", "--model", folder, "--candidates", rows, "--profile", ana, "--generate", policy)
    code, _ = run(*prompts, "--output", policy / "config.json")
    assert "config.json, which --generate " in code and (policy / "config.json").read_text() == "{}"


def test_rerank_samples_no_responses_beside_those_that_are_there(run, folder, jsonl, tmp_path):
    rows = jsonl("c.jsonl", [{"prompt": "p"}, {"prompt": "p", "responses": ["x"]}])
    out = tmp_path / "out.jsonl"
    words = ("rerank", "--model", folder, "--user", "user3", "--candidates", rows, "--output", out)
    code, _ = run(*words, "--generate", "a-policy-that-is-not-looked-at")
    assert "line 2 of " in code and "needs new columns for the ranking, got 'responses', which it has" in code
    assert not out.exists()


def test_elicit_says_that_a_trained_user_has_nearly_this_name(run, folder, pool):
    """It may be a typing error, and it may be another person."""
    elicit = ("elicit", "--model", folder, "--pool", pool, "--questions", 1, "--user")
    code, shown = run(*elicit, " User3", typed="1")
    assert code == 0 and shown.count("is a new user") == 1
    assert "--user ' User3' is a new user, though the model has 'user3'\n" in shown
    code, shown = run(*elicit, "ana", typed="1")
    assert code == 0 and "is a new user" not in shown


def test_elicit_needs_a_file_each_for_pool_scores_and_profile(run, folder, pool, tmp_path):
    """One that is read is never written, and two that are written are not one, even if neither is there yet."""
    elicit = ("elicit", "--model", folder, "--pool", pool, "--user", "ana")
    before = pool.read_bytes()
    for name in names_of(pool, tmp_path):
        for flag in ("--profile", "--scores"):
            code, _ = run(*elicit, flag, name)
            assert f"--pool and {flag} need a file each, got {name} for both: name another" in code
            assert pool.read_bytes() == before
    code, shown = run(*elicit, "--profile", "new.json", "--scores", tmp_path / "new.json")
    assert "--scores and --profile need a file each, got new.json for both" in code and "scoring" not in shown
    code, _ = run(*elicit, "--scores", "ana.json")  # the profile's own name
    assert "--scores and --profile need a file each, got ana.json for both" in code
    assert not list(tmp_path.glob("*.json"))


def test_elicit_keeps_scores_and_a_profile_with_names_of_their_own(run, folder, pool, tmp_path):
    elicit = ("elicit", "--model", folder, "--pool", pool, "--scores", "pool.scores", "--profile", "p.json", "--user")
    assert run(*elicit, "ana", typed="12")[0] == 0
    code, shown = run(*elicit, "ana", "--questions", 3, typed="1")
    assert code == 0 and "scoring" not in shown and "3 answers. What the model believes" in shown
    code, _ = run(*elicit, "ben")
    assert "p.json needs a profile of 'ben', got one of 'ana': name another file" in code
    other = tmp_path / "other.jsonl"
    other.write_text("".join(pool.read_text().splitlines(True)[1:]))
    code, _ = run(*elicit, "ana", "--pool", other)
    assert "pool.scores needs to be for the pool " in code and code.endswith("name another file")


def test_a_profile_that_was_edited_is_refused_by_all_who_read_it(run, folder, pool, jsonl, tmp_path):
    assert run("elicit", "--model", folder, "--pool", pool, "--user", "ana", typed="12")[0] == 0
    path, rows = tmp_path / "ana.json", jsonl("c.jsonl", [{"prompt": "p", "responses": ["x"], "user": "ana"}])
    profile = json.loads(path.read_text())
    profile["coefficients"][0] += 1
    path.write_text(json.dumps(profile))
    for words in (
        ("elicit", "--pool", pool, "--user", "ana"),
        ("rerank", "--profile", path, "--candidates", rows, "--output", "out.jsonl"),
        ("groups", "--profile", path, "--data", rows, "--output", "out.jsonl"),
        ("export-user", "--profile", path, "--output", "out"),
    ):
        code, _ = run(words[0], "--model", folder, *words[1:])
        assert "ana.json needs the coefficients that follow from its 2 answers, got " in code
    assert json.loads(path.read_text()) == profile and not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    "change, message",
    [
        (("--user", " "), "a user needs a name that is not blank, in UTF-8, got ' '"),
        (("--user", "user7"), "--user needs a new name, got 'user7'"),
        (("--questions", 0), "--questions needs at least 1, got 0"),
        (("--entropy", 1.5), "--entropy needs a number of bits above 0 and up to 1, got 1.5"),
        (("--entropy", "nan"), "--entropy needs a number of bits above 0 and up to 1, got nan"),
        (("--pool", "no/where.jsonl"), "the data need to be a file, a folder or a data set on the hub, got no/where"),
        (("--profile", "nowhere/ana.json"), "--profile needs a folder that exists, got nowhere: make it"),
        (("--host", "0.0.0.0", "--web"), "--host needs one address of this machine"),
        (("--host", "127.0.0.1"), "--host needs --web, got questions in the terminal: leave it out"),  # case D18
        (("--port", 0), "--port needs --web, got questions in the terminal: leave it out"),
    ],
)
def test_elicit_refuses_before_it_asks(run, folder, pool, change, message):
    code, _ = run("elicit", "--model", folder, "--pool", pool, "--user", "ana", *change)
    assert code.startswith("openrlhf-pgrpo elicit: ") and message in code


@pytest.mark.parametrize(
    "words, message",
    [
        (("--pool", "p"), "asking one user needs --pool and --user, got no --user: add it"),
        (("--user", "ana"), "asking one user needs --pool and --user, got no --pool: add it"),
        (
            ("--pool", "p", "--user", "ana", "--profiles", "f"),
            "--profiles is of no use to asking one user: leave it out",
        ),
        (
            ("--answers", "a"),
            "learning from --answers needs --answers and --profiles, got no --profiles: add it",
        ),
        *(
            (("--answers", "a", "--profiles", "f", *more), f"{more[0]} is of no use to learning from --answers")
            for more in (
                ("--pool", "p"),
                ("--user", "ana"),
                ("--profile", "p"),
                ("--questions", 10),
                ("--entropy", 0.5),
                ("--web",),
                ("--host", "127.0.0.1"),
                ("--port", 0),
            )
        ),
    ],
)
def test_elicit_asks_one_or_learns_many(run, folder, tmp_path, words, message):
    code, _ = run("elicit", "--model", folder, *words)
    assert code.startswith("openrlhf-pgrpo elicit: ") and message in code and not (tmp_path / "f").exists()


def test_people_are_learned_from_choices_and_groups_and_rewards_follow(run, folder, jsonl, tmp_path):
    """Then the model is trained again, and nobody is asked."""
    names = ["Ana Mar\u00eda", ".dot", "../up", "7", "\U0001f600" * 90]
    pairs = [(a, b) for i, a in enumerate(ANSWERS) for b in ANSWERS[:i]]
    rows = [
        {"who": int(name) if name == "7" else name, "prompt": prompt, "good": b, "bad": a}
        for name in [*names, "user3"]
        for prompt in PROMPTS
        for a, b in pairs
    ]
    data = jsonl("choices.jsonl", rows)
    named = ("--user_key", "who", "--chosen_key", "good", "--rejected_key", "bad")
    code, shown = run("elicit", "--model", folder, "--answers", data, "--profiles", "people", *named)
    assert code == 0 and "people: 5 profiles of 90 answers\n" in shown and "no profile: 1 ('user3')" in shown
    code, shown = run("elicit", "--model", folder, "--pool", data, "--user", "eve", *named, typed="1sbuu")
    assert code == 0 and "18 of 108 pairs of " in shown and "noted: skip" in shown and "1 answer saved" in shown

    prompts = jsonl("prompts.jsonl", [{"prompt": "hi", "user": name} for name in names])
    groups = ("groups", "--model", folder, "--data", prompts, "--output", "grouped.jsonl", "--profile", "people")
    assert run(*groups)[0] == 0 and all(row["pref_group"] for row in rows_in(tmp_path / "grouped.jsonl"))
    candidates = jsonl("c.jsonl", [{"prompt": prompt, "responses": ANSWERS} for prompt in PROMPTS])
    rerank = ("rerank", "--candidates", candidates, "--model")
    ana = ("--profile", "people/Ana%20Mar\u00eda.json")
    assert run(*rerank, folder, "--output", "ranked.jsonl", *ana)[0] == 0

    rng = np.random.default_rng(3)
    again = tmp_path / "again"
    write(again, folder, rng.normal(0, 0.5, (2, 64)), rng.normal(0, 1, (6, 2)), [f"user{n}" for n in range(6)])
    code, _ = run(*rerank, again, "--output", "other.jsonl", *ana)
    assert "got one for" in code and code.endswith("or fit the profile again with openrlhf-pgrpo refit")
    code, shown = run("refit", "--model", again, "--profile", "people", "eve.json", "--output", "refitted")
    assert code == 0 and "refitted: 6 profiles of 91 answers\n" in shown
    for name in ("Ana%20Mar\u00eda.json", "eve.json"):
        out = f"{name}.jsonl"
        assert run(*rerank, again, "--output", out, "--profile", f"refitted/{name}")[0] == 0
    code, _ = run("refit", "--model", again, "--profile", "people", "--output", "people")
    assert code.startswith(
        "openrlhf-pgrpo refit: --output needs a folder without other files of these names, got people/"
    )


@pytest.mark.parametrize("flags", [("--n", 8), ("--temperature", 1), ("--max_tokens", 512), ("--plain_prompts",)])
def test_d18_flags_of_generate_without_it_are_refused(run, folder, jsonl, tmp_path, flags):
    data = jsonl("c.jsonl", [{"prompt": "p", "responses": ["x", "y"]}])
    words = ("rerank", "--model", folder, "--user", "user3", "--candidates", data, "--output", "out.jsonl")
    code, _ = run(*words, *flags)
    assert code.endswith(f"{flags[0]} needs --generate, got responses in --candidates: leave it out")
    assert not (tmp_path / "out.jsonl").exists()


def test_b4_max_tokens_are_refused_before_anything_is_generated(run, folder, tiny, jsonl, tmp_path):
    """The tiny model reads 256 tokens, and the default of --max_tokens is 512."""
    data = jsonl("p.jsonl", [{"prompt": "p"}])
    words = ("rerank", "--model", folder, "--user", "user3", "--candidates", data, "--output", "out.jsonl")
    code, _ = run(*words, "--generate", tiny / "model")
    assert "--max_tokens needs fewer than the 256 tokens that " in code and " reads, got 512: lower it" in code


def policy(policy, ids, sampling):
    """Stands in for `generation.generate`: it answers by nothing, by a word, and by more than the model reads."""
    for number in ids:
        yield Answered(number, ["", "word", "long " * 99][number * 3 // len(ids)], False)


def test_b4_what_was_generated_is_kept_and_ranked_whatever_it_is(run, folder, tiny, jsonl, tmp_path, monkeypatch):
    """One response that was too long lost them all; an empty one could be the best."""
    monkeypatch.setattr("openrlhf_pgrpo.people.generation.generate", policy)
    data, out = jsonl("p.jsonl", [{"prompt": "p"}, {"prompt": "q"}]), tmp_path / "out.jsonl"
    words = ("rerank", "--model", folder, "--user", "user3", "--candidates", data, "--output", out)
    words += ("--generate", tiny / "model", "--n", 3, "--max_tokens", 64)
    code, shown = run(*words)
    assert code == 0 and "2 of 6 responses are blank: they are left out\n2 of 6 responses are longer than " in shown
    assert f"the responses are in {out}, and are ranked now" in shown
    assert [(row["responses"], row["best"]) for row in rows_in(out)] == [(["word"], "word")] * 2

    def broken(*_, **__):
        raise ValueError("the reward model cannot be loaded")

    monkeypatch.setattr("openrlhf_pgrpo.people.rerank.load", broken)
    code, _ = run(*words)
    assert "cannot be loaded" in code
    assert rows_in(out) == [{"prompt": prompt, "responses": ["word"]} for prompt in "pq"]


def test_a14_a_profile_without_an_answer_is_refused_by_all_who_need_one(run, folder, jsonl, tmp_path):
    model = Folder(folder)
    Profile.of("ana", model.fingerprint, [], Prior.of(model.coefficients)).save(tmp_path / "ana.json")
    rows = jsonl("c.jsonl", [{"prompt": "p", "responses": ["x"], "user": "ana"}])
    for words in (
        ("rerank", "--candidates", rows, "--output", "out.jsonl"),
        ("groups", "--data", rows, "--output", "out.jsonl"),
        ("export-user", "--output", "out"),
    ):
        code, _ = run(words[0], "--model", folder, "--profile", "ana.json", *words[1:])
        assert "ana.json needs an answer of 'ana', got none" in code
    assert not list(tmp_path.glob("out*"))


@pytest.fixture
def chat_folder(tiny, tmp_path):
    """A reward model from before forms were recorded, and the folder of the policy whose chat template it was."""
    rng = np.random.default_rng(0)
    made, policy = tmp_path / "chat-model", tmp_path / "chat-policy"
    write(made, tiny / "model", rng.normal(0, 0.5, (2, 64)), rng.normal(size=(4, 2)), ["ann", "bob", "cy", "di"])
    config = json.loads((made / "config.json").read_text())
    del config["base_reward_form"]
    (made / "config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(policy)
    return made, policy


def test_an_older_model_is_told_how_its_texts_are_written(run, chat_folder, jsonl, tmp_path):
    model, policy = chat_folder
    chats = [[{"role": "user", "content": f"why {i}?"}] for i in range(3)]
    answers = [[{"role": "assistant", "content": text}] for text in ("Yes!", "Certainly not, no.")]
    pool = jsonl("chats.jsonl", [{"prompt": chat, "a": answers[0], "b": answers[1]} for chat in chats])
    data = jsonl("c.jsonl", [{"prompt": chats[0], "responses": answers}])
    elicit = ("elicit", "--model", model, "--pool", pool, "--user", "ana")
    rerank = ("rerank", "--model", model, "--user", "ann", "--candidates", data, "--output", tmp_path / "out.jsonl")
    export = ("export-user", "--model", model, "--user", "ann", "--output", tmp_path / "out")
    for words in (elicit, rerank, export):
        code, _ = run(*words)
        assert "needs a record of how its texts are written" in code and "--chat_template plain" in code
    told = ("--chat_template", policy)
    code, shown = run(*elicit, "--scores", "s", *told, typed="12")
    assert code == 0 and "  user: why" in shown and "  assistant: Yes!" in shown and "2 answers saved" in shown
    code, _ = run(*elicit, "--scores", "s", "--chat_template", "plain")
    assert "line 1 of " in code and "a prompt needs to be a text" in code
    profile = json.loads((tmp_path / "ana.json").read_text())
    assert len(Users(Folder(model, str(policy)), ["ana.json"])) == 5
    with pytest.raises(ValueError, match="ana.json needs to be a profile for the model .*, got one for "):
        Users(Folder(model, "plain"), ["ana.json"])
    assert len(Users(Folder(model), ["ana.json"])) == 5  # as groups reads it, which needs no form
    (tmp_path / "ana.json").write_text(json.dumps({**profile, "fingerprint": Folder(model).fingerprint}))
    assert len(Users(Folder(model, "plain"), ["ana.json"])) == 5  # from before the form was noted
    assert run(*rerank, *told)[0] == 0
    rewards = load(model, chat_template=str(policy)).base_rewards(["why 0?"] * 2, ["Yes!", "Certainly not, no."])
    assert rows_in(tmp_path / "out.jsonl")[0]["rewards"] == pytest.approx(
        (rewards @ Folder(model).coefficients[0]).tolist(), abs=1e-4
    )
    assert run(*export, *told)[0] == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["base_reward_form"]["chat_template"] == CHAT


def test_a_truncated_profile_or_one_for_another_model_stays_as_it_is(run, folder, pool, tmp_path):
    elicit = ("elicit", "--model", folder, "--pool", pool, "--user", "ana")
    model = load(folder)
    profile = Profile.of("ana", "beef", [], Prior.of(model.coefficients))
    profile.save(tmp_path / "ana.json")
    code, _ = run(*elicit)
    assert f"for the model {model.fingerprint}, got one for beef" in code
    whole = (tmp_path / "ana.json").read_bytes()
    (tmp_path / "ana.json").write_bytes(whole[:100])
    code, _ = run(*elicit)
    assert "ana.json needs to be a whole profile" in code and (tmp_path / "ana.json").read_bytes() == whole[:100]


def test_a_model_of_another_kind_is_refused(run, tiny, pool):
    code, _ = run("elicit", "--model", tiny / "model", "--pool", pool, "--user", "ana")
    assert "needs to be a factorized reward model" in code


def test_a_folder_that_is_no_model_is_refused(run, tmp_path, pool):
    code, _ = run("elicit", "--model", tmp_path, "--pool", pool, "--user", "ana")
    assert code.startswith("openrlhf-pgrpo elicit: ")


def test_the_page_is_served_until_ctrl_c(folder, pool, tmp_path):
    words = ("elicit", "--model", folder, "--pool", pool, "--user", "ana", "--web")
    command = [sys.executable, "-m", "openrlhf_pgrpo.cli.main", *words]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        address = next(line for line in process.stdout if line.startswith("open ")).split()[1]
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address) as page:
            assert page.status == 200 and b"Question" in page.read()
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(address.partition("?")[0])
        process.send_signal(2)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "ana.json").exists()


@pytest.mark.parametrize("command", ["elicit", "learn", "refit", "evaluate", "rerank", "export-user"])
def test_a_model_that_is_replaced_meanwhile_is_refused(run, folder, tiny, pool, jsonl, tmp_path, monkeypatch, command):
    """Coefficients or a fingerprint of one model came together with scores of another, and were believed."""
    mine, other, rng = shutil.copytree(folder, tmp_path / "rm"), tmp_path / "other", np.random.default_rng(7)
    users = [f"user{number}" for number in range(30)]
    write(other, tiny / "model", rng.normal(0, 0.5, (3, 64)), rng.normal(0, 1, (30, 3)), users)
    rows = [
        {"user": f"new{n}", "prompt": PROMPTS[0], "chosen": ANSWERS[n], "rejected": ANSWERS[n - 1]} for n in (1, 2)
    ]
    data, candidates = jsonl("d.jsonl", rows), jsonl("c.jsonl", [{"prompt": "p", "responses": ["x", "y"]}])
    run("elicit", "--model", folder, "--answers", data, "--profiles", "old")
    words = {
        "elicit": ("elicit", "--pool", pool, "--user", "ana", "--scores", "out.scores", "--profile", "out.json"),
        "learn": ("elicit", "--answers", data, "--profiles", "out", "--scores", "out.scores"),
        "refit": ("refit", "--profile", "old", "--output", "out"),
        "evaluate": ("evaluate", "--data", data, "--output", "out.json", "--scores", "out.scores"),
        "rerank": ("rerank", "--user", "user3", "--candidates", candidates, "--output", "out.jsonl"),
        "export-user": ("export-user", "--user", "user3", "--output", "out"),
    }[command]

    def replaced(work):
        def work_and_replace(*given, **more):
            found = work(*given, **more)
            for path in other.iterdir():
                shutil.copyfile(path, mine / path.name)
            return found

        return work_and_replace

    monkeypatch.setattr(RewardModel, "of_written", replaced(RewardModel.of_written))
    monkeypatch.setattr(scalar_reward, "load_file", replaced(scalar_reward.load_file))
    code, _ = run(words[0], "--model", mine, *words[1:], typed="1")
    assert "rm needs to stay as it is while it is read, got other files: begin again" in str(code)
    assert not list(tmp_path.glob("out*"))
