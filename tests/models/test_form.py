"""The form of texts: plain, by a chat template, by an input template; recorded, and the same for every station."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer

from openrlhf_pgrpo.models.folder import Folder, write
from openrlhf_pgrpo.models.form import KEY, PLAIN, Form, Writer, read
from openrlhf_pgrpo.models.scoring import load
from openrlhf_pgrpo.models.texts import Texts

CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
PICKY = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('begin with a user') }}{% endif %}" + CHATML
QUESTION = [{"role": "user", "content": "why?"}]
ANSWER = [{"role": "assistant", "content": "so"}]


@pytest.fixture
def tokenizer(backbone):
    return AutoTokenizer.from_pretrained(backbone)


@pytest.fixture
def chat(tokenizer):
    """A writer by CHATML, as a policy with this tokenizer is prompted."""
    tokenizer.chat_template = CHATML
    return Writer(Form.of_tokenizer(tokenizer, "here"), tokenizer)


def test_a_chat_template_writes_what_the_host_writes(chat, tokenizer):
    prompt = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(QUESTION + ANSWER, tokenize=False)
    assert chat.prompt(QUESTION) == chat.prompt("why?") == prompt == "<|user|>why?<eos>\n<|assistant|>"
    assert whole[len(prompt) :] == "so<eos>\n" and chat.response(QUESTION, ANSWER) == "so"  # as a policy makes it
    assert chat.response(QUESTION, [*ANSWER, *QUESTION, *ANSWER]) == "so<eos>\n<|user|>why?<eos>\n<|assistant|>so"
    assert chat.pairs([QUESTION, "why?"], [ANSWER, "so"]) == ([prompt] * 2, ["so", "so"])
    assert chat.opening == "<eos>\n<|assistant|>"


def test_a_template_prints_the_special_tokens_that_it_was_made_for(chat, tokenizer):
    other = SimpleNamespace(
        special_tokens_map={"eos_token": "</s>"}, apply_chat_template=tokenizer.apply_chat_template
    )
    assert Writer(chat.form, other).prompt(QUESTION) == chat.prompt(QUESTION)
    assert chat.ends == ["<eos>"]


CLOSED = (  # a turn ends with a mark of its own, as Gemma's, and the words are trimmed
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
THINKING = CHATML.replace(  # a thought before an answer, empty unless it is there, as Qwen3's
    "m['content'] +",
    "('' if m['role'] != 'assistant' or '<think>' in m['content'] else '<think>\n\n</think>\n\n') + m['content'] +",
)


SPACED = CHATML.replace(" + m['content']", " + (' ' if m['role'] == 'assistant' else '') + m['content']")  # Mistral's
SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('begin with a system') }}{% endif %}" + CLOSED
UNLIKE = CLOSED.replace("|>' }}{% endif", "|><none>' }}{% endif")  # a prompt does not begin what a conversation is
CHANNEL = CHATML.replace("m['role'] + '|>'", "m['role'] + '|>' + ('<final>' if m['role'] == 'assistant' else '')")


@pytest.mark.parametrize(
    "template, written, ends",
    [
        (CLOSED, "so", ["<eos>", "<end_of_turn>"]),
        (THINKING, "so", ["<eos>"]),
        (SPACED, " so", ["<eos>"]),
        (SYSTEM, "so", ["<eos>", "<end_of_turn>"]),
        (CLOSED.replace("turn>", "turn>\n<pad>"), "so", ["<eos>", "<end_of_turn>\n<pad>", "<end_of_turn>"]),
    ],
)
def test_an_answer_is_the_same_text_as_a_message_and_as_words(template, written, ends, tokenizer):
    """A model that was fitted on messages read the words of `rerank` as other texts, and lost its accuracy."""
    tokenizer.add_tokens(["<end_of_turn>", "<end"])
    writer = Writer(Form(template, {"eos_token": "<eos>"}), tokenizer)
    asked = [{"role": "system", "content": "be kind"}, *QUESTION] if template == SYSTEM else QUESTION
    assert writer.response(asked, ANSWER) == writer.response(asked, "so") == written and writer.ends == ends
    made = Texts(tokenizer, 99, writer.ends)
    closed = [f"{written}{end}\n" for end in ends]
    assert len({*map(tuple, made.tokens([writer.prompt(asked)] * (1 + len(ends)), [written, *closed]).ids)}) == 1
    thought = "<think>why</think>so"
    said = writer.response(asked, [{"role": "assistant", "content": thought}])
    assert said == written.replace("so", thought) and writer.response(asked, said) == said


def test_what_a_policy_itself_writes_before_its_words_stays(tokenizer):
    """Of a thought that the prompt begins, its end; and the name of a channel."""
    thinks = CHATML.replace("'<|assistant|>'", "'<|assistant|><think>'")
    thinks = thinks.replace(
        "m['role'] + '|>'", "m['role'] + '|>' + ('<think>x</think>' if m['role'] != 'user' else '')"
    )
    for template, written in ((CHANNEL, "<final>so"), (thinks, "x</think>so")):
        writer = Writer(Form(template, {"eos_token": "<eos>"}), tokenizer)
        assert writer.response(QUESTION, ANSWER) == written and writer.response(QUESTION, "so") == "so"


def test_the_end_of_a_turn_is_known_also_where_no_conversation_begins_with_its_prompt(tokenizer):
    writer = Writer(Form(UNLIKE, {"eos_token": "<eos>"}), tokenizer)
    assert writer.ends == ["<eos>", "<end_of_turn>"]
    with pytest.raises(ValueError, match="needs to begin a conversation with its prompt"):
        writer.response(QUESTION, ANSWER)


@pytest.mark.parametrize("form", [PLAIN, Form(input_template="Q: {}\nA: ")])
def test_without_a_chat_template_messages_are_refused_with_what_to_do(form, tokenizer):
    writer = Writer(form, tokenizer)
    assert writer.ends == [] and writer.words("so ") == "so "
    for wrong in (lambda: writer.prompt(QUESTION), lambda: writer.response("why?", ANSWER)):
        with pytest.raises(ValueError, match="needs to be a text.*got a list of messages: .*--chat_template"):
            wrong()
    with pytest.raises(ValueError, match=r"\(text 1\)"):
        writer.pairs(["a", QUESTION], ["b", "c"])
    assert writer.prompt("why?") == ("why?" if form == PLAIN else "Q: why?\nA: ")


def test_messages_that_a_template_refuses_are_named(tokenizer):
    writer = Writer(Form(PICKY, {"eos_token": "<eos>"}), tokenizer)
    with pytest.raises(ValueError, match="begin with a user, for the roles 'system', 'user'"):
        writer.prompt([{"role": "system", "content": "be kind"}, *QUESTION])
    with pytest.raises(ValueError, match="needs a list of messages.*got null as the content of message 0"):
        writer.prompt([{"role": "user", "content": None}])
    with pytest.raises(ValueError, match="needs a list of messages.*got a list, "):
        writer.prompt([])
    forgetful = Writer(Form("{{ messages[-1]['content'] }}"), tokenizer)
    with pytest.raises(ValueError, match="begin a conversation with its prompt"):
        forgetful.response(QUESTION, ANSWER)


def test_prompts_are_the_same_or_another_forms(chat, tokenizer):
    assert chat.same_prompts(Writer(Form(PICKY.replace("begin", "b"), {"eos_token": "<eos>"}), tokenizer)) is False
    assert chat.same_prompts(Writer(Form(CHATML + "{# a comment #}", {"eos_token": "<eos>"}), tokenizer))
    for other in (PLAIN, Form(CHATML, {"eos_token": "</s>"}), Form(CHATML.replace("<|", "["))):
        assert not chat.same_prompts(Writer(other, tokenizer))
    plain, framed = (Writer(form, tokenizer) for form in (PLAIN, Form(input_template="Q: {}")))
    assert plain.same_prompts(Writer(Form(input_template="{}"), tokenizer)) and not plain.same_prompts(framed)


def test_a_model_keeps_the_form_of_its_texts(chat, backbone, tmp_path):
    """A2: a model that was made of templated texts read plain ones between two commands, and lost its accuracy."""
    write(tmp_path, backbone, np.ones((1, 64)), np.ones((1, 1)), ["ana"], form=chat.form)
    model = load(tmp_path)
    assert model.form == chat.form
    chats = model.base_rewards([QUESTION, QUESTION, "why?"], [ANSWER, "so", "so"])
    assert np.abs(chats - chats[0]).max() < 1e-6
    assert np.abs(chats[0] - load(plain_copy(tmp_path)).base_rewards(["why?"], ["so"])).max() > 1e-3


def plain_copy(folder):
    return with_record(folder, {"chat_template": None, "special_tokens": {}, "input_template": None})


def with_record(folder, record):
    """The folder with another record of its form; none at all if it is None."""
    config = json.loads((folder / "config.json").read_text())
    config.pop(KEY)
    (folder / "config.json").write_text(json.dumps(config if record is None else {**config, KEY: record}))
    return folder


def test_a_model_without_a_record_needs_to_be_told(chat, made, backbone, tmp_path, tokenizer):
    folder = tmp_path / "old"
    write(folder, backbone, np.ones((1, 64)), np.ones((1, 1)), ["ana"])
    with pytest.raises(ValueError, match="has one: leave it out"):
        Folder(folder, "plain").form  # noqa: B018
    with_record(folder, None)
    with pytest.raises(ValueError, match="needs a record of how its texts are written.*--chat_template plain"):
        load(folder)
    assert load(folder, chat_template="plain").form == PLAIN
    with pytest.raises(ValueError, match="needs a model that has one, got none in the tokenizer of"):
        load(folder, chat_template=str(backbone))
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "policy")
    assert load(folder, chat_template=str(tmp_path / "policy")).form == chat.form == read(str(tmp_path / "policy"))


@pytest.mark.parametrize("record", ["plain", {}, {"chat_template": "a"}, {**PLAIN.record(), "special_tokens": None}])
def test_a_broken_record_is_refused(record, backbone, tmp_path):
    write(tmp_path, backbone, np.ones((1, 64)), np.ones((1, 1)), ["ana"])
    with pytest.raises(ValueError, match=f"needs a form of texts as {KEY}"):
        load(with_record(tmp_path, record))
