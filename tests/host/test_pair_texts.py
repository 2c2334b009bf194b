"""Whether two texts may be one to a tokenizer, asked without making the tokens of all."""

import string

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from openrlhf_pgrpo.host import pair_texts

LETTERS = string.ascii_lowercase + ".'"


def word_piece() -> PreTrainedTokenizerFast:
    """As MiniLM: one token for any word with a letter that it does not know, or of more than 100 letters."""
    pieces = ["<eos>", "<unk>", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    made = Tokenizer(models.WordPiece({piece: row for row, piece in enumerate(pieces)}, unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", unk_token="<unk>")


def whole_words() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", unk_token="<unk>")


TOKENIZERS = {"pieces": word_piece(), "words": whole_words()}
TEXTS = st.text(alphabet="abAB é.กขค猫狗\n ", max_size=12) | st.text(alphabet="ab ", min_size=99, max_size=103)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a5_texts_of_equal_tokens_are_never_missed(kind, record_property):
    """Answers in Thai, or in words beyond 100 letters, were trained on though MiniLM cannot tell them apart."""
    tokenizer, inputs = TOKENIZERS[kind], set()
    alike = pair_texts.may_be_equal(tokenizer)

    @settings(max_examples=1500, deadline=None, suppress_health_check=[*HealthCheck])
    @given(TEXTS, TEXTS, TEXTS)
    @example("", "ดี", "เลว")
    @example("yes ", "a" * 101, "b" * 101)
    @example("", "กข ค", "กขค ค")
    @example("", "ข", " ก")
    @example("", ".Aก", " . ก")
    @example("a ", "b ก", " b ข")
    def check(start, one, other):
        one, other = start + one, start + other
        inputs.add((one, other))
        same = tokenizer(one)["input_ids"] == tokenizer(other)["input_ids"]
        assert not same or one == other or alike(one, other, pair_texts.common_start(one, other))

    check()
    record_property("inputs", len(inputs))


def test_few_tokens_are_made_in_vain():
    alike = pair_texts.may_be_equal(TOKENIZERS["pieces"])
    for one, other in (("yes", "no"), ("ja, gern", "ja, nie"), ("a" * 90, "b" * 90), ("schön ist es", "schön war es")):
        assert not alike(one, other, pair_texts.common_start(one, other))
