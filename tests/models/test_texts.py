"""How a text is made, how it ends, and where it is cut."""

import time
from itertools import product
from random import Random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from openrlhf_pgrpo.models.texts import Texts, end_of_text

pytestmark = pytest.mark.core

CORPUS = ["the dog ran to the house and the cat ran home", "once upon a time\n\nthe end", "1 + 12 = 13, or not?"] * 20


def byte_level() -> Tokenizer:
    """As GPT-2, SmolLM2 and Llama 3: a space belongs to the word behind it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def sentence_piece() -> Tokenizer:
    """As Llama 2: every text begins with a space of its own, and an unknown letter becomes its bytes."""
    made = Tokenizer(models.BPE(byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokens = ["<pad>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [text.replace("\n", " ") for text in CORPUS]
    made.train_from_iterator(words, trainers.BpeTrainer(vocab_size=500, special_tokens=tokens, show_progress=False))
    return made


def word_piece() -> Tokenizer:
    """As BERT: white space between words is forgotten."""
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokens = ["<pad>", "<eos>", "<unk>"]
    made.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=tokens))
    return made


KINDS = (byte_level, sentence_piece, word_piece)


@pytest.fixture(scope="module")
def tokenizers():
    made = {}
    for make in KINDS:
        made[make.__name__] = PreTrainedTokenizerFast(tokenizer_object=make(), pad_token="<pad>", eos_token="<eos>")
    return made


@pytest.fixture(params=[make.__name__ for make in KINDS])
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


def read(tokenizer, prompt, response, max_length=100):
    """The tokens of one text, written out."""
    (ids,) = Texts(tokenizer, max_length).tokens([prompt], [response]).ids
    return tokenizer.convert_ids_to_tokens(ids)


@pytest.mark.parametrize("response", ["ran", "ran<eos>", "ran<eos>\n", "ran<eos>\n\n<eos>\n"])
def test_a13_a_text_ends_once_and_directly_behind_the_answer(tokenizer, response):
    """A rollout has `answer</s>`, while training and ranking saw `answer </s>`."""
    tokens = read(tokenizer, "the dog ", response)
    assert tokens == [*read(tokenizer, "the dog ", "ran")[:-1], "<eos>"]
    assert tokens.count("<eos>") == 1 and "".join(tokens).endswith("ran<eos>")


def test_a13_newlines_of_an_answer_stay_as_a_rollout_has_them(tokenizers):
    assert read(tokenizers["byte_level"], "a ", "b\n\n") == ["a", "Ġ", "b", "Ċ", "Ċ", "<eos>"]
    assert read(tokenizers["byte_level"], "a ", "b\n<eos>\n") == ["a", "Ġ", "b", "Ċ", "<eos>"]
    assert read(tokenizers["byte_level"], "", "") == ["<eos>"]


def test_a13_no_token_spans_the_seam_of_prompt_and_answer(tokenizers):
    """A rollout reads the prompt alone: its last space is a token, and the answer's first word has none of its own."""
    byte_level, sentence_piece = tokenizers["byte_level"], tokenizers["sentence_piece"]
    assert byte_level.tokenize("the dog ran") == ["the", "Ġdog", "Ġran"]
    assert read(byte_level, "the dog ", "ran") == ["the", "Ġdog", "Ġ", "ran", "<eos>"]
    assert read(byte_level, "the dog", " ran") == ["the", "Ġdog", "Ġran", "<eos>"]
    assert sentence_piece.tokenize("ran") == ["▁ran"]  # a space that the answer lacks
    assert read(sentence_piece, "the dog ", "ran")[-2:] == ["ran", "<eos>"]
    assert read(sentence_piece, "the dog", " ran")[-2:] == ["▁ran", "<eos>"]


def test_a4_the_prompt_is_cut_from_the_left_and_the_answer_never(tokenizers):
    texts = Texts(tokenizers["byte_level"], 5)
    found = texts.tokens(["the dog ran "] * 3 + ["", ""], ["ran", " to the house", " the" * 5, "ran", " the" * 4])
    assert [tokenizers["byte_level"].convert_ids_to_tokens(ids) for ids in found.ids] == [
        ["Ġdog", "Ġran", "Ġ", "ran", "<eos>"],
        ["Ġ", "Ġto", "Ġthe", "Ġhouse", "<eos>"],
        ["Ġthe", "Ġthe", "Ġthe", "Ġthe", "<eos>"],
        ["ran", "<eos>"],
        ["Ġthe", "Ġthe", "Ġthe", "Ġthe", "<eos>"],
    ]
    assert found.cut.tolist() == [True, True, True, False, False]
    assert found.too_long.tolist() == [False, False, True, False, False]
    assert found.answers.tolist() == [2, 4, 6, 2, 5]


def test_texts_are_padded_on_the_left(tokenizers):
    tokenizer = tokenizers["byte_level"]
    batch = Texts(tokenizer, 9).pad([[5, 6, 7], [8]])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]  # <pad> is 0
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_no_texts_have_no_tokens(tokenizer):
    found = Texts(tokenizer, 9).tokens([], [])
    assert (found.ids, found.cut.tolist(), found.too_long.tolist()) == ([], [], [])


def test_half_a_character_is_refused_with_its_number(tokenizer):
    with pytest.raises(ValueError, match=r"a text needs whole characters, got half of one, '\\ud83d', in text 1"):
        Texts(tokenizer, 9).tokens(["a", "b"], ["a", "\ud83d"])


def test_a_length_without_room_is_refused(tokenizer):
    with pytest.raises(ValueError, match="a text needs room for two tokens or more, got a longest text of 1"):
        Texts(tokenizer, 1)


def test_a_tokenizer_without_an_end_is_refused(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="need a token that ends them, got neither eos nor sep"):
        end_of_text(tokenizer)
    tokenizer.sep_token = "<eos>"
    assert end_of_text(tokenizer) == "<eos>"


@pytest.mark.parametrize("end", ["<eos>", "<eos>\n", "\n"])
def test_a_text_of_ends_alone_takes_no_quadratic_time(tokenizers, end):
    start = time.monotonic()
    read(tokenizers["byte_level"], "", end * 100_000 + "x")
    read(tokenizers["byte_level"], "", "x" + end * 100_000, 200_000)
    assert time.monotonic() - start < 10


PIECES = (
    "the dog",
    "ran",
    " ",
    "  ",
    "\n",
    "\t",
    "1",
    "12",
    "é",
    "漢",
    "👩‍🚀",
    "<eos>",
    "<pad>",
    "<unk>",
    "▁",
    "Ġ",
    "'s",
    "\x00",
)


def any_texts(rng):
    """One to eight texts of pieces and of letters from all of Unicode.

    They come from `random`, not hypothesis, which repeats most of what it draws.
    """
    return ["".join(any_piece(rng) for _ in range(rng.randint(0, 8))) for _ in range(rng.randint(1, 8))]


def any_piece(rng):
    if rng.random() < 0.6:
        return rng.choice(PIECES)
    letters = (
        chr(rng.choice([rng.randrange(128), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) for _ in "12345"
    )
    return "".join(letters)[: rng.randint(0, 5)]


def test_any_texts_have_one_account(tokenizers, record_property):
    """At most `max_length` tokens, one end, the answer whole or `too_long`, and the same tokens in any company."""
    rng, inputs = Random(0), set()
    for _ in range(400):
        kind, max_length = rng.choice(sorted(tokenizers)), rng.randint(2, 40)
        pairs = [*product(any_texts(rng), any_texts(rng))]
        inputs.update((kind, max_length, *pair) for pair in pairs)
        check_account(tokenizers[kind], kind, max_length, pairs)
    record_property("inputs", len(inputs))


def check_account(tokenizer, kind, max_length, pairs):
    prompts, responses = map(list, zip(*pairs))
    alone = dict(zip(prompts, tokenizer(prompts, add_special_tokens=False)["input_ids"]))
    short, long = Texts(tokenizer, max_length), Texts(tokenizer, 10_000)
    found, whole = short.tokens(prompts, responses), long.tokens(prompts, responses)
    assert not whole.cut.any() and not whole.too_long.any()
    for number, (prompt, response) in enumerate(pairs):
        before = alone[prompt]
        ids, all_ids, answer = found.ids[number], whole.ids[number], int(found.answers[number])
        assert all_ids[: len(before)] == before and len(all_ids) == len(before) + answer
        assert ids == all_ids[-max_length:] and ids[-1] == tokenizer.eos_token_id
        assert found.cut[number] == (len(before) > max(max_length - answer, 0))
        assert found.too_long[number] == (answer > max_length)
        own = all_ids[len(before) : -1]
        assert not own or own[-1] != tokenizer.eos_token_id
        if kind == "byte_level":
            while response.rstrip("\n").endswith("<eos>"):
                response = response.rstrip("\n").removesuffix("<eos>")
            assert tokenizer.decode(all_ids) == prompt + response + "<eos>"
    assert long.tokens([prompt], [responses[-1]]).ids == [all_ids]
    padded = short.pad(found.ids)
    assert padded["input_ids"][padded["attention_mask"].bool()].tolist() == sum(found.ids, [])
    assert padded["attention_mask"].diff(dim=1).ge(0).all()  # all padding is on the left
