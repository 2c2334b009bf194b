"""The one account of a text: how it is cut, how it ends, and how long it may be.

Training, scoring, ranking and serving all make their tokens here, in the form that a rollout has:

    tokens of the prompt alone, tokens of the answer that goes on from there, one end token

A rollout reads the prompt alone and then adds token after token, so no token spans the seam between the two. A
tokenizer that reads `prompt + answer` in one go may join them, such as the space that ends a prompt and the first word
of the answer.

Axes: N texts, B texts of a batch, S tokens.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from openrlhf_pgrpo.core.names import is_blank

# What an answer may stand behind if it cannot stand behind its prompt without being joined to it. Nothing at all comes
# last, because a SentencePiece tokenizer begins every text with a space that the answer lacks.
BEFORE = ("\n", "a", "")


class Tokens(NamedTuple):
    """N texts as a model reads them.

    Attributes:
        ids: N lists of at most `max_length` token ids. cut: (N,) whether the prompt was cut, from the left.
        too_long: (N,) whether the answer and its end do not fit, even without a prompt; then `ids` hold their tail.
        answers: (N,) int, how many tokens the answer and its end have. empty: (N,) whether there is nothing but white
            space before that end: a reward for saying nothing means nothing.
    """

    ids: list[list[int]]
    cut: np.ndarray
    too_long: np.ndarray
    answers: np.ndarray
    empty: np.ndarray


class TooLong(ValueError):
    """A text has more than its reader takes."""


class Texts:
    """Makes the tokens of prompts and answers for a model that reads at most `max_length` of them.

    Args:
        ends: other texts that may close an answer, such as the end token of a policy with another tokenizer.

    Attributes:
        end: id of the token that closes every text.

    Raises:
        ValueError: the tokenizer has no end token, or there is no room for an answer and its end.
    """

    def __init__(self, tokenizer: Any, max_length: int, ends: Iterable[str] = ()):
        if max_length < 2:
            raise ValueError(
                f"a text needs room for two tokens or more, got a longest text of {max_length}: name a model or a "
                "length that has it"
            )
        self.tokenizer, self.max_length = tokenizer, max_length
        end = end_of_text(tokenizer)
        self.end: int = tokenizer.convert_tokens_to_ids(end)
        # Ends that a text brings along, read backwards: forwards, many of them would take quadratic time.
        self._ends = (end, *ends)
        known = "|".join(re.escape(known[::-1]) for known in self._ends)
        self._own_end = re.compile(rf"(?:\n*(?:{known}))*")

    def tokens(self, prompts: Sequence[str], responses: Sequence[str], *, first: int = 0) -> Tokens:
        """The tokens of each response to its prompt, both (N,).

        A response may bring its end along, as the host's chat templates and rollouts write it; newlines behind that
        end are no part of the answer. All other newlines stay.

        Args:
            first: number of the first text, for a message.

        Raises:
            ValueError: a text has half of a surrogate pair, which no tokenizer reads; with its number.
        """
        pairs = [(prompt, self.open(response)) for prompt, response in zip(prompts, responses, strict=True)]
        for number, (prompt, response) in enumerate(pairs, first):
            _check_unicode(number, prompt + response)
        prompt_ids = self._encode(dict.fromkeys([*prompts, *BEFORE]))
        answer_ids = self._answers(dict.fromkeys(pairs), prompt_ids)
        ids, cut, sizes, empty = [], [], [], []
        for prompt, response in pairs:
            before, answer = prompt_ids[prompt], [*answer_ids[prompt, response], self.end]
            room = max(self.max_length - len(answer), 0)
            ids.append([*before, *answer][-self.max_length :])
            cut.append(len(before) > room)
            sizes.append(len(answer))
            empty.append(len(answer) == 1 or is_blank(response))
        answers = np.array(sizes, np.int64)
        return Tokens(ids, np.array(cut, bool), answers > self.max_length, answers, np.array(empty, bool))

    def pad(self, ids: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` (B, S) of the texts of one batch, padded on the left."""
        length = max(map(len, ids))
        pad = self.end if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        input_ids = torch.full((len(ids), length), pad, dtype=torch.long)
        mask = torch.zeros_like(input_ids)
        for row, row_ids, row_mask in zip(ids, input_ids, mask):
            row_ids[length - len(row) :] = torch.tensor(row)
            row_mask[length - len(row) :] = 1
        return {"input_ids": input_ids, "attention_mask": mask}

    def open(self, response: str) -> str:
        """The response without the end that it may bring along."""
        if not response.rstrip("\n").endswith(self._ends):  # as most: there may be a million
            return response
        own = self._own_end.match(response[::-1])
        return response[: len(response) - own.end()] if own else response

    def _answers(
        self, pairs: Iterable[tuple[str, str]], prompt_ids: dict[str, list[int]]
    ) -> dict[tuple[str, str], list[int]]:
        """The tokens of each response behind its prompt, or behind the first of BEFORE that it is not joined to."""
        found: dict[tuple[str, str], list[int]] = {}
        for before in (None, *BEFORE):
            starts = {pair: pair[0] if before is None else before for pair in pairs if pair not in found}
            whole_ids = self._encode(dict.fromkeys(start + response for (_, response), start in starts.items()))
            for (prompt, response), start in starts.items():
                whole, known = whole_ids[start + response], prompt_ids[start]
                if whole[: len(known)] == known:
                    answer = found[prompt, response] = whole[len(known) :]
                    while answer and answer[-1] == self.end:  # what stood behind it was dropped by the tokenizer
                        answer.pop()
        return found

    def _encode(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Token ids by text, without the tokens that a tokenizer puts around a text of its own accord."""
        texts = list(texts)
        if not texts:
            return {}
        return dict(zip(texts, self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]))


def end_of_text(tokenizer: Any) -> str:
    """The token that closes every text: the tokenizer's end of a sequence, or an encoder's separator."""
    end = tokenizer.eos_token or tokenizer.sep_token
    if end is None:
        raise ValueError(f"texts need a token that ends them, got neither eos nor sep in {type(tokenizer).__name__}")
    return end


def _check_unicode(number: int, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = text[error.start : error.end]
        raise ValueError(
            f"a text needs whole characters, got half of one, {half!r}, in text {number}: correct or drop it"
        ) from None
