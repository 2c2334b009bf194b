"""How a text is made and cut."""

import pytest
from transformers import AutoTokenizer

from openrlhf_pgrpo.models.texts import encode, end_of_text, text_of

pytestmark = pytest.mark.core


def test_a_text_ends_once():
    assert text_of("p ", "yes", "<eos>") == "p yes <eos>"
    assert text_of("p ", "yes\n\n", "<eos>") == "p yes <eos>"
    assert text_of("p ", "yes<eos>", "<eos>") == "p yes<eos>"
    assert text_of("p ", "yes<eos>\n", "<eos>") == "p yes<eos>"
    assert text_of("", "", "<eos>") == " <eos>"


def test_a_text_that_is_cut_still_ends(backbone):
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    batch = encode(["abcdef <eos>", "a <eos>"], tokenizer, max_length=4)
    letters = dict(zip("abc", tokenizer.convert_tokens_to_ids(["a", "b", "c"])))
    space = tokenizer.convert_tokens_to_ids("Ġ")
    assert batch["input_ids"].tolist() == [
        [letters["a"], letters["b"], letters["c"], 1],  # <eos> is 1
        [0, letters["a"], space, 1],  # <pad> is 0, on the left
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]


def test_a_tokenizer_without_an_end_is_refused(backbone):
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="need a token that ends them, got neither eos nor sep"):
        end_of_text(tokenizer)
    tokenizer.sep_token = "<eos>"
    assert end_of_text(tokenizer) == "<eos>"
