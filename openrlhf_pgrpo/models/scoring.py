"""Base rewards of texts, from a factorized reward model or from a frozen backbone whose head is yet to be fitted.

Axes: B texts of a batch, S tokens, D base rewards, H embedding dimensions, N pairs of prompt and response.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel

from openrlhf_pgrpo.files import reading
from openrlhf_pgrpo.models import backbone as backbones
from openrlhf_pgrpo.models.folder import WEIGHTS, Folder
from openrlhf_pgrpo.models.messages import Text
from openrlhf_pgrpo.models.network import check_pooling, factorized_reward_model, states
from openrlhf_pgrpo.models.remote_code import trusted
from openrlhf_pgrpo.models.texts import Texts, Tokens, TooLong
from openrlhf_pgrpo.progress import along, progress

AT_ONCE = 1024  # texts that are made tokens at once: as lists, those of all would take a hundred bytes a token
MOST_TEXTS = 16  # in a batch; on a CPU more is slower: 64 short texts at once took half as long again
MOST_TOKENS = 16384  # in a batch, padding counted; a text that is longer has a batch of its own
# What a forward pass costs besides its tokens, in tokens. On a CPU, SmolLM2-135M takes 75 ms and 2 ms a token. A GPU
# reads the padding of a batch in less time than it takes to begin another one.
FORWARD = {"cpu": 40, "cuda": MOST_TOKENS}


class RewardModel(Folder):
    """A factorized reward model with its weights loaded, on the GPU if there is one.

    Args:
        chat_template: as `Folder`.

    Raises:
        ValueError, OSError: as `Folder` and its form, or the backbone's weights are not whole.
    """

    def __init__(self, name: str | Path, dtype: torch.dtype = torch.float32, chat_template: str | None = None):
        super().__init__(name, chat_template)
        self.writer  # noqa: B018  an unknown form or a broken tokenizer is refused before the weights are read
        self.check_shapes()
        llm: Any = AutoModel._model_mapping[type(self.config)]
        model = factorized_reward_model(llm.__base__, llm, self.head_name)
        with progress(f"loading {self.name}"), reading(f"the weights of {self.name}"):
            self.model = model.from_pretrained(self.name, config=self.config, dtype=dtype, trust_remote_code=trusted())
        backbones.check_finite(self.model.named_parameters(), self.path(WEIGHTS))
        self.check_unchanged()
        self.model = self.model.eval().to(_device())

    def base_rewards(
        self, prompts: Sequence[Text], responses: Sequence[Text], batch_size: int = MOST_TEXTS
    ) -> np.ndarray:
        """phi (N, D) float64 of each response to its prompt; at most `batch_size` texts at once.

        Raises:
            ValueError: as `tokens`, or a response is too long for the model; with its number.
        """
        return self.of_written(*self.writer.pairs(prompts, responses), batch_size)

    def of_written(self, prompts: Sequence[str], responses: Sequence[str], batch_size: int = MOST_TEXTS) -> np.ndarray:
        """As `base_rewards`, of texts that `writer` has written."""
        ids = token_ids(self.model, self.texts, prompts, responses)
        return read(self.model, self.model, self.texts, ids, batch_size)


def load(folder: str | Path, dtype: torch.dtype = torch.float32, chat_template: str | None = None) -> RewardModel:
    """A factorized reward model from its folder or hub name; the backbone in `dtype`, head and sums in float32.

    Raises:
        ValueError: the folder holds another kind of model, or a broken one.
    """
    return RewardModel(folder, dtype, chat_template)


def texts_of(pairs: Sequence[tuple[str, str, str]]) -> tuple[list[tuple[str, str]], np.ndarray]:
    """The distinct texts of pairs (P,) of answers to a prompt, and the numbers (P, 2) of each pair's two; a text is a
    prompt with an answer, as the model reads it."""
    rows: dict[tuple[str, str], int] = {}
    numbers = [rows.setdefault((prompt, answer), len(rows)) for prompt, *answers in pairs for answer in answers]
    return [*rows], np.array(numbers).reshape(-1, 2)


def embed(
    backbone: str | Path,
    prompts: Sequence[str],
    responses: Sequence[str],
    pooling: str = "last",
    batch_size: int = MOST_TEXTS,
    ends: Sequence[str] = (),
) -> np.ndarray:
    """h (N, H) float64 of each response, from a frozen backbone: what a head sees once `write` has put it there.

    Prompts and responses are texts that are written in the form of the model to be; `ends` are those of its `Writer`.

    Raises:
        ValueError: as `backbone.load` and `RewardModel.base_rewards`.
    """
    check_pooling(pooling)
    model = backbones.load(backbone).to(_device())
    tokenizer = backbones.read_tokenizer(backbone)
    texts = Texts(tokenizer, backbones.max_length(model, tokenizer), ends)

    def pooled(input_ids, attention_mask):
        return states(model, input_ids, attention_mask, pooling)[0]

    return read(pooled, model, texts, token_ids(model, texts, prompts, responses), batch_size)


def token_ids(model: Any, texts: Texts, prompts: Sequence[str], responses: Sequence[str]) -> Iterator[list[int]]:
    """The token ids of each response to its prompt, both (N,), one after the other.

    Raises:
        ValueError: as `Texts.tokens` and `check`.
    """
    for start in along(range(0, len(prompts), AT_ONCE), "making tokens", "batches"):
        some = slice(start, start + AT_ONCE)
        tokens = texts.tokens(prompts[some], responses[some], first=start)
        check(model, texts, tokens, start)
        yield from tokens.ids


def check(model: Any, texts: Texts, tokens: Tokens, first: int = 0) -> None:
    """Looks at texts that are to be read.

    Args:
        first: number of the first text, for a message.

    Raises:
        TooLong: a response does not fit; with its number.
        ValueError: a text has a token that the model does not know; with its number.
    """
    if tokens.too_long.any():
        number = int(tokens.too_long.argmax())
        raise TooLong(
            f"a response needs to fit into the {texts.max_length} tokens that the model reads, got "
            f"{tokens.answers[number]} with its end in text {first + number}: shorten it, or leave it out"
        )
    known = model.get_input_embeddings().num_embeddings
    for number, ids in enumerate(tokens.ids, first):
        if max(ids) >= known:
            raise ValueError(
                f"every token needs to be one of the {known} that the model knows, got {max(ids)} in text {number}: "
                "tokenizer and weights are of different models"
            )


@torch.no_grad()
def read(
    forward: Callable[..., torch.Tensor], model: Any, texts: Texts, ids: Iterable[Sequence[int]], batch_size: int
) -> np.ndarray:
    """What `forward` makes of each text (N,), given by its token ids, float64; equal texts are read once. They have
    been looked at by `check`."""
    rows: dict[bytes, int] = {}  # four bytes a token: there may be a billion
    row_of = [rows.setdefault(np.array(one, np.int32).tobytes(), len(rows)) for one in ids]
    distinct = [np.frombuffer(row, np.int32) for row in rows]
    found: dict[int, np.ndarray] = {}
    device = next(model.parameters()).device
    with progress("reading texts", len(distinct), "texts") as count:
        for batch in batches(distinct, batch_size, FORWARD[device.type]):
            padded = texts.pad([distinct[row].tolist() for row in batch])
            scores = forward(**{name: tensor.to(device) for name, tensor in padded.items()})
            found.update(zip(batch, scores.double().cpu().numpy()))
            count(len(batch))
    return np.array([found[row] for row in row_of])


def batches(ids: Sequence[Sequence[int] | np.ndarray], most_texts: int, forward: int) -> list[list[int]]:
    """The numbers of texts, the longest first, in batches that cost least: a batch costs its tokens with padding, and
    as much as `forward` tokens besides. It has at most `most_texts` texts and MOST_TOKENS tokens.
    """
    order = sorted(range(len(ids)), key=lambda number: -len(ids[number]))
    lengths = [len(ids[number]) for number in order]
    cost, first = [0], [0]  # of the first texts in their best batches, and where the last of these batches begins
    for end in range(1, len(order) + 1):
        starts = [
            start
            for start in range(max(0, end - most_texts), end)
            if start == end - 1 or lengths[start] * (end - start) <= MOST_TOKENS
        ]
        least, start = min((cost[start] + forward + lengths[start] * (end - start), start) for start in starts)
        cost.append(least)
        first.append(start)
    found, end = [], len(order)
    while end:
        found.append(order[first[end] : end])
        end = first[end]
    return found[::-1]


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
