"""Two policies compared: who wins, what is asked of a judge, and what is left of a command that was interrupted."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from common import rows_in

from openrlhf_pgrpo.files import locked
from openrlhf_pgrpo.models.scoring import load
from openrlhf_pgrpo.people import compare as module
from openrlhf_pgrpo.people import judge as judges
from openrlhf_pgrpo.people.compare import compare, read_data
from openrlhf_pgrpo.people.generation import Answer, generate, prompt_ids, writers_for
from openrlhf_pgrpo.people.judge import Pair, fill, read_prompt, verdict_in

pytestmark = pytest.mark.core

KEY = "sk-a-secret-of-mine"
# A is loud where the number of the prompt is even; B always is a little.
ANSWERS = {"A": ["Loud!!!", "calm", "Loud!!!", "calm"], "B": ["so!", "so!", "so!", "so!"]}
ROWS = [
    {"prompt": f"{number % 4} says ", "user": user, "pref_group": group}
    for number in range(4)
    for user, group in (("ana", "one"), ("bob", "other"))
]


@pytest.fixture
def policies(tiny, tmp_path, monkeypatch):
    """Folders of two policies, whose answers are those above. `asked` has the numbers of prompts by policy."""
    for side in "AB":
        (tmp_path / side).symlink_to(tiny / "model")
    asked = {"A": [], "B": []}

    def answer(policy, ids, sampling):
        for number in ids:
            asked[policy[-1]].append(number)
            yield Answer(number, ANSWERS[policy[-1]][number], False)

    monkeypatch.setattr(module, "generate", answer)
    return SimpleNamespace(names=[str(tmp_path / side) for side in "AB"], asked=asked)


class Server:
    """A judge: `say(text)` gives its answer to a prompt, a status, or bytes that are sent as they are."""

    def __init__(self, say):
        self.prompts, self.keys = [], set()
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send(200, {"object": "list", "data": [{"id": "the-judge", "object": "model"}]})

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert request["temperature"] == 0 and request["model"] == "the-judge"
                judge.keys.add(self.headers["Authorization"])
                judge.prompts.append(request["messages"][0]["content"])
                said = say(judge.prompts[-1])
                if isinstance(said, (int, bytes)):
                    self.send(said if isinstance(said, int) else 200, said)
                    return
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
                self.send(
                    200, {"id": "1", "object": "chat.completion", "created": 0, "model": "x", "choices": [choice]}
                )

            def send(self, status, content):
                body = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@contextmanager
def serving(say):
    judge = Server(say)
    threading.Thread(target=judge.server.serve_forever, daemon=True).start()
    try:
        yield judge
    finally:
        judge.server.shutdown()
        judge.server.server_close()


def louder(text):
    """Likes exclamation marks, and says so first."""
    a, b = (text.split(f"[Answer {side}]")[1].split("[End")[0].count("!") for side in "AB")
    return f"I count {a} and {b}.\n\n{'A' if a > b else 'B' if b > a else 'tie'}\n"


@pytest.fixture
def run(policies, jsonl, tmp_path):
    """Compares the two policies; `rows` are those of the data."""

    def run(rows=ROWS, output="out", **arguments):
        return compare(policies.names, jsonl("data.jsonl", rows), tmp_path / output, **arguments)

    return run


def test_a_language_model_judges_in_both_orders(run, policies, tmp_path):
    with serving(louder) as judge:
        said = run(judge=judge.url)
    assert len(judge.prompts) == 16  # 8 rows, two orders each
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    for counts, rows in ((result["all"], 8), (result["pref_groups"]["one"], 4), (result["pref_groups"]["other"], 4)):
        assert counts["rows"] == rows and counts["prompts"] == 4 and counts["win_rate"] == 0.5
        assert counts["wins"] == counts["losses"] == rows / 2
        assert counts["ties"] == counts["no_verdict"] == counts["order_dependent"] == 0
        assert 0 < counts["low"] < 0.2 and 0.8 < counts["high"] < 1
    verdicts = {verdict["line"]: verdict for verdict in rows_in(tmp_path / "out" / "verdicts.jsonl")}
    assert [verdicts[line]["verdict"] for line in range(1, 9)] == ["A", "A", "B", "B"] * 2
    assert verdicts[1]["user"] == "ana" and verdicts[1]["pref_group"] == "one" and len(verdicts[1]["said"]) == 2
    assert said[0].split()[:2] == ["preference", "group"] and [line.split()[0] for line in said[1:4]] == [
        *("one", "other", "all")
    ]
    kept = {"number": 1, "prompt": "1 says ", "answer": "calm", "cut": False}
    assert rows_in(tmp_path / "out" / "answers-A.jsonl")[1] == kept
    assert policies.asked == {"A": [0, 1, 2, 3], "B": [0, 1, 2, 3]}  # once for both users


def test_names_of_preference_groups_cannot_change_the_terminal(run, factorized):
    said = run([{**row, "pref_group": f"\x1b[31m{row['pref_group']}\n"} for row in ROWS], model=str(factorized))
    assert said[1].startswith("\ufffd[31mone ") and not any("\x1b" in line or "\n" in line for line in said)


def test_a_verdict_that_depends_on_the_order_is_a_tie_and_counted(run, tmp_path):
    with serving(lambda text: "A") as judge:
        run(judge=judge.url)
    counts = json.loads((tmp_path / "out" / "result.json").read_text())["all"]
    assert counts["ties"] == counts["order_dependent"] == 8 and counts["win_rate"] == 0.5


def test_equal_answers_are_a_tie_without_asking(run, monkeypatch, tmp_path):
    monkeypatch.setitem(ANSWERS, "A", ANSWERS["B"])
    with serving(louder) as judge:
        run(judge=judge.url)
    counts = json.loads((tmp_path / "out" / "result.json").read_text())["all"]
    assert judge.prompts == [] and counts["ties"] == 8 and counts["order_dependent"] == 0


def test_what_is_no_verdict_is_counted_and_kept(run, tmp_path):
    strange = {
        "0 says": "A is better, I would say",
        "1 says": 400,
        "2 says": b"<html>no</html>",
    }
    with serving(lambda text: next((it for begin, it in strange.items() if begin in text), louder(text))) as judge:
        said = run(judge=judge.url)
    counts = json.loads((tmp_path / "out" / "result.json").read_text())["all"]
    assert counts["no_verdict"] == 6 and counts["rows"] == 8 and counts["losses"] == 2 and counts["prompts"] == 1
    assert counts["win_rate"] == 0 and counts["low"] is None  # one prompt has no interval
    assert "6 of 8 rows have no verdict and are not in the win rate" in said[-2]
    kept = {verdict["line"]: verdict["said"][0] for verdict in rows_in(tmp_path / "out" / "verdicts.jsonl")}
    assert kept[1] == "A is better, I would say" and kept[3].startswith("no answer: BadRequestError")
    assert kept[5].startswith("no answer: no chat completion")


def test_a_judge_that_never_gives_a_verdict_is_an_error(run):
    with (
        serving(lambda text: "Both are fine.") as judge,
        pytest.raises(ValueError, match="needs to give verdicts, got none for 8 rows, for the first .*Both are fine"),
    ):
        run(judge=judge.url)


def test_a_judge_that_is_too_slow_ends_the_command(run, monkeypatch, tmp_path):
    monkeypatch.setattr(judges, "TRIES", 1)
    began = time.monotonic()
    with (
        serving(lambda text: time.sleep(3) or "A") as judge,
        pytest.raises(ValueError, match="within 0.3 seconds, got APITimeoutError.*goes on after the 0 verdicts in"),
    ):
        run(judge=judge.url, judge_timeout=0.3)
    assert time.monotonic() - began < 20
    assert len(rows_in(tmp_path / "out" / "answers-B.jsonl")) == 4


def test_a_judge_that_dies_half_way_and_comes_back(run, policies, monkeypatch, tmp_path):
    """It may come back at another address, and no row is judged twice."""
    monkeypatch.setattr(judges, "REQUESTS", 1)
    with serving(lambda text: louder(text) if len(judge.prompts) <= 6 else 500) as judge:
        with pytest.raises(ValueError, match="got InternalServerError.*after up to 4 tries.*goes on after the 3 verd"):
            run(judge=judge.url)
        assert len(judge.prompts) == 6 + judges.TRIES
    with pytest.raises(ValueError, match="needs to answer at .* got APIConnectionError"):
        run(judge=judge.url)
    assert len(rows_in(tmp_path / "out" / "verdicts.jsonl")) == 3
    with serving(louder) as judge:
        run(judge=judge.url)
    assert len(judge.prompts) == 10 and len(policies.asked["A"]) == 4
    assert sorted(verdict["line"] for verdict in rows_in(tmp_path / "out" / "verdicts.jsonl")) == [*range(1, 9)]
    with serving(louder) as judge:  # once more: all is there
        run(judge=judge.url)
    assert judge.prompts == []


def test_a_judge_that_is_not_there_is_said_before_policies_are_asked(run, policies):
    with serving(louder) as judge:
        pass
    with pytest.raises(ValueError, match=f"needs to answer at {judge.url}/v1 .* start it, or correct --judge"):
        run(judge=judge.url)
    assert policies.asked["A"] == []


@pytest.mark.parametrize("url", ["host:8000", "ftp://host", "http://me:secret@host/v1", "http://"])
def test_an_address_that_is_none_is_refused(run, url):
    with pytest.raises(ValueError, match="--judge needs an address like http://host:8000") as error:
        run(judge=url)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"temperature": 3.0}, "--temperature needs a number from 0 to 2, got 3.0"),
        ({"temperature": float("nan")}, "--temperature needs a number from 0 to 2, got nan"),
        ({"max_tokens": 0}, "--max_tokens needs at least 1, got 0"),
        ({"seed": -1}, "--seed needs at least 0, got -1"),
        ({"judge_tokens": -7}, "--judge_tokens needs at least 1, got -7"),
        ({"judge_timeout": float("nan")}, "--judge_timeout needs seconds above 0, got nan"),
        ({"judge_timeout": float("inf")}, "--judge_timeout needs seconds above 0, got inf"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_the_folder_is_made(run, tmp_path, setting, message):
    with pytest.raises(ValueError, match=message):
        run(judge="http://nobody.invalid", **setting)
    assert not (tmp_path / "out").exists()


def test_settings_are_not_held_against_anybody_before_there_is_an_answer(run, factorized, monkeypatch, tmp_path):
    """Whatever made vLLM refuse to start could not be corrected."""
    whole = module.generate

    def refuses(policy, ids, sampling):
        raise ValueError("too long for me")
        yield

    monkeypatch.setattr(module, "generate", refuses)
    with pytest.raises(ValueError, match="too long for me"):
        run(model=str(factorized), max_tokens=10**6)
    monkeypatch.setattr(module, "generate", whole)
    run(model=str(factorized), max_tokens=8)
    for path in (tmp_path / "out").glob("answers-*"):
        path.unlink()
    with pytest.raises(ValueError, match="got max_tokens '9' instead of '8'"):  # verdicts are of those answers
        run(model=str(factorized), max_tokens=9)


def test_the_key_is_sent_and_never_printed_or_written(run, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(judges.KEY, KEY)
    refusals = iter([f'{{"error": {{"message": "no {KEY}"}}}}'.encode()])
    with serving(lambda text: next(refusals, None) or louder(text)) as judge:
        run(judge=f"{judge.url}/v1/")
    assert judge.keys == {f"Bearer {KEY}"}
    with serving(lambda text: 401) as judge, pytest.raises(ValueError, match="AuthenticationError") as error:
        run(judge=judge.url, output="other")
    shown = capsys.readouterr()
    assert "answers of A" not in shown.err  # no progress where output is no terminal
    written = "".join(path.read_text() for path in tmp_path.glob("o*/*.json*"))
    assert KEY not in f"{error.value}{shown.out}{shown.err}{written}" and written


def test_the_judges_prompt_comes_from_a_file_and_knows_the_preference_group(run, tmp_path):
    prompt, texts = tmp_path / "prompt.txt", tmp_path / "texts.json"
    prompt.write_text("{pref_group}|{prompt}|{a}|{b}|{other}|{a}")
    texts.write_text(json.dumps({"one": "They like it loud {b}.", "other": "They do not."}))
    with serving(lambda text: "tie") as judge:
        run(judge=judge.url, judge_prompt=prompt, pref_group_texts=texts)
        assert "They like it loud {b}.|0 says |Loud!!!|so!|{other}|Loud!!!" in judge.prompts
        assert "They do not.|0 says |so!|Loud!!!|{other}|so!" in judge.prompts
        texts.write_text(json.dumps({"one": "x"}))
        with pytest.raises(ValueError, match="--pref_group_texts needs a text for 'other', got null"):
            run(judge=judge.url, judge_prompt=prompt, pref_group_texts=texts)
        texts.write_text('{"one": "x", "other": "y", "one": "z"}')
        with pytest.raises(ValueError, match="--pref_group_texts needs a JSON object, got the key 'one' twice in"):
            run(judge=judge.url, judge_prompt=prompt, pref_group_texts=texts)
        prompt.write_text("{prompt} {a}")
        with pytest.raises(ValueError, match="--judge_prompt needs .* without {b}"):
            run(judge=judge.url, judge_prompt=prompt)


def test_a_users_rewards_judge(run, factorized, tmp_path):
    rows = [{"prompt": f"{number} says ", "who": user} for number in range(4) for user in ("ana", "bob", 7)]
    with pytest.raises(ValueError, match=r"line 3 of .* needs one of the 3 users of .* got '7': .* --population"):
        run(rows, model=str(factorized), user_key="who")
    run(rows, model=str(factorized), user_key="who", population=True)
    model = load(factorized)
    verdicts = rows_in(tmp_path / "out" / "verdicts.jsonl")
    margins = []
    for row, verdict in zip(rows, sorted(verdicts, key=lambda verdict: verdict["line"])):
        number = int(row["prompt"][0])
        phi = model.base_rewards([row["prompt"]] * 2, [ANSWERS["A"][number], ANSWERS["B"][number]])
        of_user = {"ana": model.coefficients[0], "bob": model.coefficients[1], 7: model.coefficients.mean(0)}
        a, b = phi @ of_user[row["who"]]
        assert verdict["rewards"] == pytest.approx([a, b], abs=1e-4) and verdict["verdict"] == ("A" if a > b else "B")
        margins.append(a - b)
    counts = json.loads((tmp_path / "out" / "result.json").read_text())["all"]
    assert counts["mean_margin"] == pytest.approx(sum(margins) / 12, abs=1e-4)
    assert counts["win_rate"] == sum(margin > 0 for margin in margins) / 12 and counts["prompts"] == 4


def test_an_answer_that_the_reward_model_cannot_read_is_counted(run, factorized, monkeypatch, tmp_path):
    monkeypatch.setitem(ANSWERS, "A", ["x" * 300, "same", "x", "x"])
    monkeypatch.setitem(ANSWERS, "B", ["y", "same", " ", "y"])
    said = run(model=str(factorized))
    counts = json.loads((tmp_path / "out" / "result.json").read_text())["all"]
    assert counts["no_verdict"] == 4 and counts["ties"] == 2 and counts["wins"] + counts["losses"] == 2
    assert any("4 of 8 rows have no verdict" in line for line in said)
    lost = [verdict for verdict in rows_in(tmp_path / "out" / "verdicts.jsonl") if verdict["verdict"] is None]
    assert len(lost) == 4 and all("blank, or longer than the 256 tokens" in verdict["why"] for verdict in lost)


def test_answers_of_an_interrupted_command_are_kept_and_half_a_line_is_made_again(
    run, policies, factorized, monkeypatch, tmp_path
):
    whole = module.generate

    def dies(policy, ids, sampling):
        answers = whole(policy, ids, sampling)
        yield from (next(answers), next(answers))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "generate", dies)
    with pytest.raises(KeyboardInterrupt):
        run(model=str(factorized))
    path = tmp_path / "out" / "answers-A.jsonl"
    assert len(rows_in(path)) == 2
    path.write_text(path.read_text()[:-10])  # as a killed process leaves it
    monkeypatch.setattr(module, "generate", whole)
    run(model=str(factorized))
    assert policies.asked == {"A": [0, 1, 1, 2, 3], "B": [0, 1, 2, 3]}
    assert [line["number"] for line in rows_in(path)] == [0, 1, 2, 3]
    verdicts = tmp_path / "out" / "verdicts.jsonl"
    before = rows_in(verdicts)
    verdicts.write_text(verdicts.read_text()[:-10])
    run(model=str(factorized))
    assert rows_in(verdicts)[:-1] == before[:-1] and len(rows_in(verdicts)) == len(before) == 8
    assert rows_in(verdicts)[-1]["verdict"] == before[-1]["verdict"]


def test_other_settings_are_refused_with_both_values(run, policies, factorized, tmp_path):
    run(model=str(factorized))
    for change, message in (
        ({"seed": 3}, "got seed '3' instead of '0': name another folder$"),
        ({"temperature": 0.5}, "got temperature '0.5' instead of '1.0'"),
        ({"rows": ROWS[:4]}, "got data '.*' instead of '.*'"),
        ({"population": True}, f"got population 'True' instead of 'False': .* or delete {module.VERDICTS}"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**{"model": str(factorized), **change})
    policies.names.reverse()
    run(model=str(factorized))  # both are the same files
    with serving(louder) as judge:
        with pytest.raises(ValueError, match="got judge_model 'the-judge' instead of 'nothing'|got model 'nothing'"):
            run(judge=judge.url)
        (tmp_path / "out" / module.VERDICTS).unlink()  # the answers stay
        run(judge=judge.url)
    assert len(policies.asked["A"]) == 4


def test_a_folder_that_another_compare_writes_to_is_refused(run, factorized, tmp_path):
    """It waited for hours, without a word."""
    (tmp_path / "out").mkdir()
    refused = pytest.raises(ValueError, match="--output needs a folder that no other compare writes to, got .*out, wh")
    with locked(tmp_path / "out" / module.SETTINGS), refused:
        run(model=str(factorized))
    run(model=str(factorized))


def test_a_file_for_a_folder_is_refused(run, factorized, tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(ValueError, match="--output needs a folder, got .*out, a file: name another"):
        run(model=str(factorized))


def test_a_folder_of_others_is_refused(run, factorized, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="--output needs a new or empty folder, .* with 'mine.txt'"):
        run(model=str(factorized))


@pytest.mark.parametrize(
    "content, message",
    [
        (
            '{"editor.tabSize": 2}',
            "settings.json needs the settings of a comparison, got null as 'policies': name ano",
        ),
        ('{"policies": [], "answers": [1]}', "needs the settings of a comparison, got a list, .1. as 'answers'"),
        ("[1,2]", "settings.json needs a JSON object, got list"),
        ('// mine\n{"a": 1}', "settings.json needs a JSON object, got Expecting value"),
    ],
)
def test_the_settings_of_others_are_not_overwritten(run, factorized, tmp_path, content, message):
    """Any folder with a file of this name counted as this command's, such as one of an editor."""
    settings = tmp_path / "out" / module.SETTINGS
    settings.parent.mkdir()
    settings.write_text(content)
    with pytest.raises(ValueError, match=message):
        run(model=str(factorized))
    assert settings.read_text() == content and [*settings.parent.iterdir()] == [settings]
    (settings.parent / "launch.json").touch()
    with pytest.raises(ValueError, match="or one that compare has begun, got .* with 'launch.json': name another"):
        run(model=str(factorized))


@pytest.mark.parametrize(
    "rows, named, message",
    [
        ([{"prompt": " "}], {}, "line 1 of .* needs a prompt in 'prompt', got a blank text"),
        ([{"prompt": []}], {}, "line 1 of .* needs a prompt in 'prompt', got"),
        ([{"prompt": "p", "user": "a"}, {"prompt": "q"}], {}, "line 2 of .* needs the column 'user', got 'prompt'"),
        (
            [{"prompt": "p", "pref_group": None}],
            {},
            "line 1 .* needs a preference group in 'pref_group', a text or a number, got null",
        ),
        ([{"prompt": "p"}], {"user_key": "who"}, "line 1 of .* needs the column 'who'"),
        ([{"prompt": "p"}], {"pref_group_key": "g"}, "line 1 of .* needs the column 'g'"),
        ([{"prompt": "p"}], {"prompt_key": "input"}, "line 1 of .* needs the column 'input'"),
    ],
)
def test_rows_that_are_not_whole_are_refused_with_their_line(jsonl, rows, named, message):
    with pytest.raises(ValueError, match=message):
        read_data(jsonl("d.jsonl", rows), **named)


def test_names_in_a_csv_are_as_they_are_written(tmp_path):
    (tmp_path / "d.csv").write_text("prompt,user,pref_group\n12,007,1.0\n12,8,1.0\n")
    data = read_data(tmp_path / "d.csv")
    assert data.prompts == ["12"] and [tuple(row) for row in data.rows] == [(0, 0, "007", "1.0"), (1, 0, "8", "1.0")]


def test_rows_without_users_need_the_average_one(run, factorized):
    with pytest.raises(ValueError, match="line 1 of .* needs a user for --model, got no column of users"):
        run([{"prompt": "p"}], model=str(factorized))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "needs --model or --judge, got neither"),
        ({"judge": "http://x", "model": "rm"}, "needs --model or --judge, got both"),
        ({"judge": "http://x", "population": True}, "--population needs --model"),
        ({"model": "rm", "judge_model": "x"}, "--judge_model needs --judge"),
    ],
)
def test_flags_of_the_other_judge_are_refused(run, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(**arguments)


# ---- prompts --------------------------------------------------------------------------------------------------------


def test_policies_are_prompted_alike(tiny, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    tokenizer.save_pretrained(tmp_path / "chat")
    plain, chat = str(tiny / "model"), str(tmp_path / "chat")
    with pytest.raises(ValueError, match="prompted alike, got .*chat with a chat template and .*model without one"):
        writers_for([plain, chat])
    messages = [{"role": "user", "content": "hi"}]
    for policies, plain_prompts, written in (
        ([chat, chat], False, "<user>hi<assistant>"),
        ([plain, chat], True, "hi"),
        ([plain, plain], False, "hi"),
    ):
        for writer in writers_for(policies, plain_prompts):
            assert tokenizer.decode(prompt_ids(writer, {"line 1": "hi"})[0]) == written
            if written != "hi":
                assert prompt_ids(writer, {"line 1": messages}) == prompt_ids(writer, {"line 1": "hi"})
    with pytest.raises(ValueError, match="line 1: a prompt needs to be a text"):
        prompt_ids(writers_for([plain])[0], {"line 1": messages})


def test_generation_says_that_vllm_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="answers need vLLM, which is not installed"):
        next(generate("nobody", {0: [1]}, None))


@pytest.mark.parametrize(
    "said, verdict",
    [
        ("A", "A"),
        ("I think.\n\n b \n", "B"),
        ("Tie", "tie"),
        ("A\nor B", None),
        ("A.", None),
        ("The answer is A", None),
        ("AB", None),
        ("", None),
        (None, None),
    ],
)
def test_a_verdict_is_the_last_line_alone(said, verdict):
    assert verdict_in(said) == verdict


def test_a_judges_prompt_holds_messages_and_keeps_what_looks_like_a_place():
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "{a}?"}]
    text = fill(read_prompt(None), Pair(turns, "{b}", "two", "cooks"))
    assert "system: Be brief.\n\nuser: {a}?" in text and "[Answer A]\n{b}\n" in text and "[Answer B]\ntwo\n" in text
    assert "on behalf of these readers: cooks\n" in text
