"""The two texts of a pair: whether a model sees them as one, and whether the host cuts them out of a chat rightly.

A pair whose texts are the same tokens teaches nothing. To make the tokens of all pairs would take minutes for 1e5 of
them, so they are made only where two different texts may become the same.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable

from openrlhf_pgrpo.core.names import is_blank
from openrlhf_pgrpo.host import columns
from openrlhf_pgrpo.host.rows import TEMPLATE

AT_ONCE = 1000  # texts whose tokens are counted together
LONGEST_WORD = 100  # characters; BERT's tokenizer does not know a longer word, whatever it is
COMPARED = 32  # characters after a place where two texts differ
SPARE_TOKENS = 8  # a text may have so many more tokens than bytes, for spaces and marks that a tokenizer adds


def equal_tokens(dataset, before: Iterable[int]) -> list[int]:
    """The pairs, by row, of a host's `RewardDataset` whose two texts are the same tokens, as the host makes them: cut
    from the right.

    Args:
        before: (pairs,) at most so many tokens stand before the answers of a pair.
    """
    equal, alike = [], may_be_equal(dataset.tokenizer)
    for row, (chosen, rejected, tokens) in enumerate(zip(list(dataset.chosens), list(dataset.rejects), before)):
        start = common_start(chosen, rejected)
        if may_fill(chosen[:start], tokens, dataset.max_length) or alike(chosen, rejected, start):
            chosen_ids, _, rejected_ids, *_ = dataset[row]
            if chosen_ids.shape == rejected_ids.shape and bool((chosen_ids == rejected_ids).all()):
                equal.append(row)
    return equal


def check_said(dataset, ends: Iterable[str] = ()) -> None:
    """Checks that every answer of a host's `RewardDataset` says something before its end token, or one of `ends`.

    Raises:
        ValueError: one does not.
    """
    from openrlhf_pgrpo.models.texts import Texts  # torch, which the early look does without

    texts = Texts(dataset.tokenizer, dataset.max_length, ends)
    pairs = zip(list(dataset.chosens), list(dataset.rejects))
    if silent := [row for row, pair in enumerate(pairs) if any(is_blank(texts.open(answer)) for answer in pair)]:
        raise ValueError(
            "every answer needs words before its end token, got one that is nothing but its end in "
            f"{columns.at(silent, 'the pairs')}: fill it in or drop the row, because saying nothing would be trained"
        )


def most_tokens(dataset) -> list[int]:
    """(pairs,) At most so many tokens the prompt of each pair of a host's `RewardDataset` has: as many as bytes, or
    counted if so many would leave too little room for an answer.
    """
    prompts, answers = list(dataset.prompts), zip(list(dataset.chosens), list(dataset.rejects))
    most = [len(prompt.encode("utf-8", "replace")) for prompt in prompts]
    long = [
        row
        for row, (tokens, pair) in enumerate(zip(most, answers))
        if any(may_fill(answer, tokens, dataset.max_length) for answer in pair)
    ]
    counts = counted(dataset.tokenizer, (prompts[row] for row in long))
    for row in long:
        most[row] = counts[prompts[row]]
    return most


def counted(tokenizer, texts: Iterable[str]) -> dict[str, int]:
    """How many tokens each text has, by text."""
    texts, counts = [*dict.fromkeys(texts)], {}
    for start in range(0, len(texts), AT_ONCE):
        part = texts[start : start + AT_ONCE]
        ids = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        counts.update(zip(part, map(len, ids)))
    return counts


def may_fill(text: str, tokens: int, max_length: int) -> bool:
    """Whether `text`, after so many other tokens, may reach the end of `max_length` tokens."""
    return tokens + len(text.encode("utf-8", "replace")) + SPARE_TOKENS >= max_length


def may_be_equal(tokenizer) -> Callable[[str, str, int], bool]:
    """Whether two texts that are alike up to a place may become the same tokens: from there on they differ in case,
    accents or signs alone, any of which a tokenizer may lose; or in words that this one may not know, which are the
    first ones if letters differ at that place.
    """
    unknown = _unknown_words(tokenizer)

    def has_unknown(text: str, start: int, characters: int) -> bool:
        words = [_word_at(text, start), *text[start : start + characters].split()]
        return unknown is not None and any(map(unknown, words))

    def alike(one: str, other: str, start: int) -> bool:
        first, second = one[start : start + 1], other[start : start + 1]
        if first.isascii() and first.isalnum() and second.isascii() and second.isalnum():
            lost, reach = first.lower() == second.lower(), 0
        else:
            ours, theirs = _letters(one[start : start + COMPARED]), _letters(other[start : start + COMPARED])
            lost, reach = ours.startswith(theirs) or theirs.startswith(ours), COMPARED + LONGEST_WORD
        return lost or (has_unknown(one, start, reach) and has_unknown(other, start, reach))

    return alike


def _unknown_words(tokenizer) -> Callable[[str], bool] | None:
    """Says of a word whether it may become the token for what is unknown; None if none does, as with bytes."""
    unknown = tokenizer.unk_token_id

    def among(text: str) -> bool:
        return unknown in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    if unknown is None or not among("\U00013000"):  # a hieroglyph, which hardly any vocabulary has
        return None
    if among("qzxjvkwq"):  # its vocabulary is of whole words
        return lambda word: True
    return lambda word: len(word) > LONGEST_WORD or not word.isascii()


def _word_at(text: str, place: int) -> str:
    """What stands around a place up to white space, without that at the place itself, which tokenizers may forget; of
    a longer word, as much as shows that it is one."""
    start = re.compile(r"\s*").match(text, place).end()
    before, after = text[max(place - LONGEST_WORD - 1, 0) : place], text[start : start + LONGEST_WORD + 1]
    return re.split(r"\s", before)[-1] + re.split(r"\s", after)[0]


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKD", text).casefold()))


def common_start(one: str, other: str) -> int:
    """How many characters two texts begin with alike. Slices compare faster than single characters."""
    low, high, size = 0, min(len(one), len(other)), 8
    while low < high:
        middle = min(low + size, high)
        if one[low:middle] == other[low:middle]:
            low, size = middle, 2 * size
        elif middle == low + 1:
            return low
        else:
            high, size = middle, (middle - low) // 2
    return low


def check_template(prompt: str, row: dict, keys, template: Callable) -> None:
    """Checks that a chat template begins both conversations of a pair with `prompt`, the text of what precedes the
    answers. The host takes for the answer what follows after as many characters.

    Args:
        row: of the dataset. keys: nested arguments with the names of its columns.

    Raises:
        ValueError: it does not.
    """
    for key in (keys.chosen_key, keys.rejected_key):
        text = template((row[keys.prompt_key] if keys.prompt_key else []) + row[key], tokenize=False)
        if not text.startswith(prompt):
            at = common_start(text, prompt)
            raise ValueError(
                f"{TEMPLATE} needs a template that begins a conversation with its prompt, got {text[at:][:40]!r}"
                f" where the prompt goes on with {prompt[at:][:40]!r}, in {key!r} after {prompt[:at][-40:]!r}: give "
                "another one by --data.tokenizer_chat_template, or write the answer as that template expects it"
            )
