"""`openrlhf-pgrpo compare` as it is typed, and once with nothing but real parts: vLLM answers, and vLLM's own server
judges."""

import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import datasets
import pytest
from common import rows_in

from openrlhf_pgrpo.cli.main import main
from openrlhf_pgrpo.host.cpu.launch import environment
from openrlhf_pgrpo.people import compare as module
from openrlhf_pgrpo.people.generation import Answer


@pytest.fixture
def words(tiny, factorized, jsonl, monkeypatch):
    """A command, whose policies answer with their number in it."""

    def answer(policy, ids, sampling):
        return (Answer(number, f"{'!' * number}{len(ids)}", number == 0) for number in ids)

    monkeypatch.setattr(module, "generate", answer)
    rows = [{"text": f"{number}: ", "who": "ana", "kind": "ab"[number % 2]} for number in range(4)]
    data = jsonl("data.jsonl", rows)
    columns = ("--prompt_key", "text", "--user_key", "who", "--pref_group_key", "kind")
    policies = ("--policies", tiny / "model", tiny / "model")
    return ("compare", *policies, "--data", data, "--output", "out", "--model", factorized, *columns)


@pytest.mark.core
def test_a_table_is_shown_and_no_progress_where_output_is_no_terminal(run, words, tmp_path):
    code, shown = run(*words)
    assert code == 0 and "answers of A:" not in shown
    title, *rows, a_cut, _, path = shown.splitlines()
    assert title.split("  ")[0] == "preference group" and title.endswith("mean margin  win rate of A  95 % interval")
    assert [row.split()[0] for row in rows] == ["a", "b", "all"] and "50.0%" in rows[2] and "to" in rows[2]
    assert a_cut == "1 answers of A were ended by --max_tokens" and path == "out/result.json"
    result = json.loads((tmp_path / path).read_text())
    assert result["all"]["ties"] == 4 and result["all"]["mean_margin"] == 0 and {*result["pref_groups"]} == {"a", "b"}


@pytest.mark.core
def test_rows_come_from_parquet(run, words, tmp_path):
    where = words.index("--data") + 1
    datasets.Dataset.from_list(rows_in(words[where])).to_parquet(tmp_path / "data.parquet")
    code, _ = run(*words[:where], tmp_path / "data.parquet", *words[where + 1 :])
    assert code == 0 and [verdict["line"] for verdict in rows_in(tmp_path / "out" / "verdicts.jsonl")] == [0, 1, 2, 3]
    code, _ = run(*words[:where], tmp_path / "data.parquet", *words[where + 1 :], "--pref_group_key", "who2")
    assert f"row 0 of {tmp_path / 'data.parquet'} needs the column 'who2', got 'text', 'who', 'kind'" in code


@pytest.mark.core
def test_ctrl_c_leaves_a_sentence(words, monkeypatch, capsys, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "generate", interrupted)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="130"):
        main([str(word) for word in words])
    said = "openrlhf-pgrpo compare: stopped; the same command goes on with what is in out"
    assert said in capsys.readouterr().err.splitlines()


@pytest.mark.core
def test_errors_are_a_sentence(run, words):
    code, _ = run(*words[:-6])
    assert code.startswith("openrlhf-pgrpo compare: line 1 of ") and "needs the column 'prompt', got 'text'" in code
    code, _ = run(*words, "--judge", "http://x")
    assert code == 2  # argparse: one of the two


# ---- real -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def yes_man(tiny, tmp_path_factory):
    """A model that answers "A" to everything that ends with ">", as all does by the chat template beside it."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("judge")
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    tokenizer.save_pretrained(folder)
    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, max_position_embeddings=2048)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=32, tie_word_embeddings=False)
    tokens = dict(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, bos_token_id=None)
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads, **tokens)).to(torch.bfloat16)
    ask, says = (tokenizer.convert_tokens_to_ids(token) for token in ">A")
    with torch.no_grad():
        layer = model.model.layers[0]
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight, model.lm_head.weight):
            weight.zero_()  # so that the state of a token is its embedding
        for token, state in ((ask, 0), (says, 1)):
            model.model.embed_tokens.weight[token] = 0
            model.model.embed_tokens.weight[token, state] = 1
        model.lm_head.weight[says, 0] = model.lm_head.weight[1, 1] = 10
    model.save_pretrained(folder)
    (folder / "template.jinja").write_text("{{ messages[0].content }}>")
    return folder


@pytest.fixture
def server(yes_man, started, tmp_path):
    """vLLM's own server with that model, and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = {"--model": yes_man, "--served-model-name": "yes-man", "--host": "127.0.0.1", "--port": port}
    flags |= {"--chat-template": yes_man / "template.jinja"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += [str(word) for pair in flags.items() for word in pair]
    server = started(command, tmp_path / "server.txt", {**os.environ, **environment()})

    def ready():
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
        except (urllib.error.URLError, OSError):
            return False

    try:
        server.until(ready, timeout=400)
        yield server, f"http://127.0.0.1:{port}"
    finally:
        server.kill()


@pytest.mark.e2e
def test_vllm_answers_and_vllms_server_judges(run, server, yes_man, tiny, factorized, jsonl, tmp_path):
    process, url = server
    rows = [{"prompt": f"{number}>", "user": "ana", "pref_group": "ab"[number % 2]} for number in range(4)]
    data, out = jsonl("prompts.jsonl", rows), tmp_path / "out"

    words = ("compare", "--policies", tiny / "model", yes_man, "--data", data, "--output", out, "--max_tokens", 8)
    command = [sys.executable, "-m", "openrlhf_pgrpo.cli.main", *words, "--judge", url]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = (sorted(rows_in(out / f"answers-{side}.jsonl"), key=lambda row: row["number"]) for side in "AB")
    assert [row["answer"] for row in b] == ["A"] * 4 and not any(row["cut"] for row in b)
    assert len({row["answer"] for row in a}) == 4 and all(row["cut"] for row in a)
    verdicts = rows_in(out / "verdicts.jsonl")
    assert all(verdict["said"] == ["A", "A"] and verdict["order_dependent"] for verdict in verdicts)
    result = json.loads((out / "result.json").read_text())
    assert result["all"]["ties"] == result["all"]["order_dependent"] == 4 and {*result["pref_groups"]} == {"a", "b"}
    assert result["settings"]["verdicts"]["judge_model"] == "yes-man" and "Traceback" not in done.stderr

    # The answers stay, whoever judges them next.
    made = [(out / f"answers-{side}.jsonl").stat().st_mtime_ns for side in "AB"]
    (out / "verdicts.jsonl").unlink()
    (tmp_path / "long.txt").write_text("{prompt}{a}{b}" + "long " * 1000)
    said, _ = run(*words, "--judge", url, "--judge_prompt", tmp_path / "long.txt")
    assert "got none for 4 rows" in said and "no answer: BadRequest" in said
    (out / "verdicts.jsonl").unlink()
    process.kill()
    said, _ = run(*words, "--judge", url)
    assert "the judge needs to answer at" in said
    code, shown = run(*words, "--model", factorized)
    assert code == 0 and "mean margin" in shown
    assert all(verdict["verdict"] in ("A", "B") for verdict in rows_in(out / "verdicts.jsonl"))
    assert made == [(out / f"answers-{side}.jsonl").stat().st_mtime_ns for side in "AB"]
