"""`openrlhf-pgrpo elicit`, `rerank` and `groups` on a real reward model, from the command line on."""

import json
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest

from openrlhf_pgrpo.core.posterior import Prior, posterior
from openrlhf_pgrpo.models.folder import write
from openrlhf_pgrpo.models.profiles import Answer, Profile
from openrlhf_pgrpo.models.scoring import load

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


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_elicit_asks_saves_and_goes_on(run, folder, pool, tmp_path):
    elicit = ("elicit", "--model", folder, "--pool", pool, "--user", "ana", "--questions", 4)
    code, shown = run(*elicit, typed="12")
    assert code == 0 and "Question 3 of 4" in shown and "2 answers saved" in shown
    code, shown = run(*elicit, typed="=1")
    assert code == 0 and "Question 1 of 4" not in shown and "4 answers. What the model believes" in shown
    assert "profile: ana.json" in shown

    model = load(folder)
    profile = Profile.load(tmp_path / "ana.json", model.fingerprint)
    rows = {tuple(sorted((row["a"], row["b"]))) + (row["prompt"],): row for row in read_lines(pool)}
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
    ana, ben = (Profile.load(tmp_path / f"{name}.json", load(folder).fingerprint) for name in ("ana", "ben"))
    assert ana.answers == ben.answers and len(ana.answers) == 2
    code, shown = run(*elicit, "zoe", "--entropy", 1)
    # before the first answer, the entropy is already below one bit per pair
    assert code == 0 and "\n0 answers. What the model believes" in shown
    code, _ = run(*elicit[:-2], tmp_path / "nowhere" / "pool.scores", "--user", "eve")
    assert "--scores needs a folder that exists" in code


def test_rerank_for_a_trained_a_new_and_an_unknown_user(run, folder, jsonl, tmp_path):
    candidates = jsonl("c.jsonl", [{"prompt": prompt, "responses": ANSWERS} for prompt in PROMPTS])
    model = load(folder)
    out, rerank = tmp_path / "out.jsonl", ("rerank", "--model", folder, "--candidates", candidates, "--output")
    Profile.of("ana", model.fingerprint, [], Prior.of(model.coefficients)).save(tmp_path / "ana.json")
    for who, coefficients in (
        (("--user", "user3"), model.coefficients[3]),
        (("--profile", tmp_path / "ana.json"), model.coefficients.mean(0)),
        (("--user", "ana", "--population"), model.coefficients.mean(0)),
    ):
        code, shown = run(*rerank, out, *who)
        assert code == 0 and shown == f"{out}\n"
        for prompt, row in zip(PROMPTS, read_lines(out)):
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
    rows, model = read_lines(out), load(folder)
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
    written = read_lines(tmp_path / "out.jsonl")
    assert [row["pref_group"] for row in written] == ["group-1"] * 20 + ["group-2"] * 11
    assert [{"input": row["input"], "user": row["user"]} for row in written] == rows
    assert all(row["pref_group_probability"] > 0.9 for row in written)

    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "ana.json").write_bytes((tmp_path / "ana.json").read_bytes())
    code, _ = run(*groups, "--profile", tmp_path / "profiles")
    assert code == 0 and read_lines(tmp_path / "out.jsonl") == written

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
    assert {row["g"] for row in read_lines(tmp_path / "out.jsonl")} == {"group-1", "group-2", "group-3"}


@pytest.mark.parametrize(
    "change, message",
    [
        (("--user", " "), "a user needs a name that is not blank, in UTF-8, got ' '"),
        (("--user", "user7"), "--user needs a new name, got 'user7'"),
        (("--questions", 0), "--questions needs at least 1, got 0"),
        (("--entropy", 1.5), "--entropy needs a number of bits above 0 and up to 1, got 1.5"),
        (("--entropy", "nan"), "--entropy needs a number of bits above 0 and up to 1, got nan"),
        (("--pool", "nowhere.jsonl"), "No such file"),
        (("--profile", "nowhere/ana.json"), "--profile needs a folder that exists, got nowhere: make it"),
        (("--host", "0.0.0.0", "--web"), "--host needs one address of this machine"),
    ],
)
def test_elicit_refuses_before_it_asks(run, folder, pool, change, message):
    code, _ = run("elicit", "--model", folder, "--pool", pool, "--user", "ana", *change)
    assert code.startswith("openrlhf-pgrpo elicit: ") and message in code


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
    assert json.loads((tmp_path / "ana.json").read_text())["answers"] == []
