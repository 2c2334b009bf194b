"""Columns of conversations looked at as a whole: as fast as texts, and never another answer than row by row."""

import time
from types import SimpleNamespace

import pytest
from datasets import Dataset

from openrlhf_pgrpo.host import conversations, rows

pytestmark = pytest.mark.host

DATA = SimpleNamespace(chosen_key="chosen", rejected_key="rejected", apply_chat_template=True, input_template=None)


def turns(*texts, end="assistant", **more):
    before = [{"role": "user", "content": text} for text in texts[:-1]]
    return [*before, {"role": end, "content": texts[-1], **more}]


def pair(chosen, rejected, prompt=None):
    return {"prompt": prompt or turns("why?", end="user"), "chosen": chosen, "rejected": rejected}


GOOD = pair(turns("why?", "so"), turns("why?", "it is"))
KINDS = {
    "good": GOOD,
    "equal": pair(turns("why?", "so"), turns("why?", "so")),
    "other prompts": pair(turns("why?", "so"), turns("how?", "it is")),
    "other lengths": pair(turns("why?", "so"), turns("a", "b", "it is")),
    "answers alone": pair(turns("so"), turns("it is")),
    "no answer": pair(turns("why?", "so", end="user"), turns("why?", "it is")),
    "a blank answer": pair(turns("why?", "so"), turns("why?", " \n")),
    "a blank role": pair(turns("why?", "so"), [{"role": " ", "content": "a"}, *turns("so")]),
    "null": pair(turns("why?", "so"), None),
    "no messages": pair([], turns("why?", "so")),
    "a null content": pair(turns("why?", None), turns("why?", "so")),
    "another key": pair(turns("why?", "so", name="bob"), turns("why?", "so")),
    "an answered prompt": pair(turns("so"), turns("it is"), turns("why?")),
}


@pytest.mark.parametrize("dpo", [True, False])
@pytest.mark.parametrize("prompt_key", [None, "prompt"])
@pytest.mark.parametrize("kind", KINDS)
def test_d19_the_whole_column_says_what_each_row_says(kind, prompt_key, dpo, monkeypatch):
    """Refusals, sentences and equal rows, also where Arrow holds the rows in several parts and in another order."""
    data = SimpleNamespace(**vars(DATA), prompt_key=prompt_key)
    dataset = Dataset.from_list([GOOD, KINDS["other prompts"], KINDS[kind], GOOD]).select([0, 3, 2])

    def said():
        try:
            return rows.check_pairs(dataset, data, "'x.jsonl'", dpo)
        except ValueError as refusal:
            return str(refusal)

    at_once = said()
    monkeypatch.setattr(conversations, "compared", lambda *columns: None)
    monkeypatch.setattr(conversations, "await_answers", lambda *column: None)
    assert at_once == said()


def test_many_conversations_take_little_beside_reading_them():
    """1e5 pairs took two seconds; now a tenth of one on a quiet core."""
    many = [pair(turns(f"{i} says", "hello", "so"), turns(f"{i} says", "hello", "it is")) for i in range(100_000)]
    dataset = Dataset.from_list(many)
    began = time.process_time()
    said, equal = rows.check_pairs(dataset, SimpleNamespace(**vars(DATA), prompt_key=None), "'x.jsonl'", dpo=True)
    assert said == equal == [] and time.process_time() - began < 0.7
