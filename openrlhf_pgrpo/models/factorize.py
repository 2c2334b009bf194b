"""The fast way to a factorized reward model. A frozen backbone reads every text once, then core/factorization.py fits
head and coefficients in seconds (arXiv 2503.06358, with the features of section 3 kept fixed).

Axes: U users, P pairs, D base rewards, H embedding dimensions, N annotations.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from openrlhf_pgrpo.core.annotations import Annotations
from openrlhf_pgrpo.core.cross_validation import Choice, choose_factors, least_held_out
from openrlhf_pgrpo.core.differences import Differences
from openrlhf_pgrpo.core.factorization import Factorization, NotCarried, check_factors, fit
from openrlhf_pgrpo.core.names import Names, alike, alike_listed
from openrlhf_pgrpo.core.optimum import Problem, check_l2
from openrlhf_pgrpo.files import check_apart
from openrlhf_pgrpo.models import backbone as backbones
from openrlhf_pgrpo.models.comparisons import Comparisons, Row, read
from openrlhf_pgrpo.models.folder import write
from openrlhf_pgrpo.models.form import PLAIN, Form, Writer
from openrlhf_pgrpo.models.form import read as read_form
from openrlhf_pgrpo.models.network import check_pooling, hidden_size, skeleton
from openrlhf_pgrpo.models.output_folder import check_new
from openrlhf_pgrpo.models.scoring import AT_ONCE, embed, texts_of
from openrlhf_pgrpo.models.tables import COLUMNS, Columns
from openrlhf_pgrpo.models.texts import Texts
from openrlhf_pgrpo.progress import along, progress

MOST_FACTORS = 8  # the most that are tried; the paper's curve is flat from 6 on
L2S = (1.0, 3.0, 10.0, 30.0)  # penalties that are tried
FEWEST_PROMPTS = 20  # with fewer prompts, answers may be held out instead
COIN = float(np.log(2))  # the log loss of a coin
Say = Callable[[str], None]
SAY = partial(print, flush=True)


Written = tuple[str, str, str, str, float]  # a row of comparisons, as texts
Pair = tuple[str, str, str]  # prompt, first answer, second answer


def form_of(rows: Sequence[Row], chat_template: str | None, backbone: str | Path, tokenizer: Any, say: Say) -> Form:
    """The form in which the texts of rows are to be written: what `chat_template` names, as `form.read`. Without it,
    the backbone's own template if prompts are lists of messages, else plain.

    Raises:
        ValueError: there is no such template.
    """
    if chat_template is not None:
        return read_form(chat_template)
    if any(isinstance(text, list) for _, *texts, _ in rows for text in texts):
        return Form.of_tokenizer(tokenizer, backbone)
    if getattr(tokenizer, "chat_template", None):
        say(
            f"texts are written plain, though {backbone} has a chat template: pass --chat_template {backbone} if the "
            "policy will be prompted with it (--data.apply_chat_template)"
        )
    return PLAIN


def write_texts(data: Comparisons, writer: Writer) -> list[Written]:
    """The comparisons with prompts and answers as texts.

    Raises:
        ValueError: messages that the form cannot write, with the row.
    """
    users, prompts, firsts, seconds, preferences = zip(*data.rows)
    before, first = writer.pairs(prompts, firsts, lambda number: data.places([(number, 0)]))
    _, second = writer.pairs(prompts, seconds, lambda number: data.places([(number, 1)]))
    return [*zip(users, before, first, second, preferences)]


def annotate(rows: Sequence[Written]) -> tuple[list[Pair], Annotations, np.ndarray]:
    """The P distinct pairs in rows (N,) of `read`, and their annotations, as `in_order`.

    Answers are put in alphabetical order, so that a pair that some users saw the other way round is the same pair.
    """
    pairs: dict[Pair, int] = {}
    users, numbers, preferences = [], [], []
    for user, prompt, first, second, preference in rows:
        if first > second:
            first, second, preference = second, first, 1 - preference
        numbers.append(pairs.setdefault((prompt, first, second), len(pairs)))
        users.append(user)
        preferences.append(preference)
    return in_order([*pairs], Annotations.of(users, np.array(numbers), np.array(preferences)))


def in_order(pairs: Sequence[Pair], annotations: Annotations) -> tuple[list[Pair], Annotations, np.ndarray]:
    """Pairs (P,) and annotations (N,) sorted, so that no number depends on the order of the rows; and which row each
    annotation was (N,)."""
    order = sorted(range(len(pairs)), key=pairs.__getitem__)
    rank = np.empty(len(pairs), np.int64)
    rank[order] = np.arange(len(pairs))
    user, pair, preference = annotations.user, rank[annotations.pair], annotations.preference
    rows = np.lexsort((preference, pair, user))
    said = Annotations(user[rows], pair[rows], preference[rows], annotations.users)
    return [pairs[number] for number in order], said, rows


def differences(backbone: str | Path, pairs: Sequence[Pair], pooling: str, ends: Sequence[str] = ()) -> Differences:
    """X (P, H) float64: embedding of the first answer minus that of the second. Each text is read once, as `embed`."""
    texts, numbers = texts_of(pairs)
    prompts, answers = zip(*texts)
    return Differences.between(embed(backbone, prompts, answers, pooling, ends=ends), *numbers.T)


def check_texts(
    data: Comparisons,
    rows: Sequence[Written],
    pairs: Sequence[Pair],
    made: Texts,
) -> list[str]:
    """What to say about texts that are longer than the backbone reads, by its tokens `made`; `rows` are the data's.

    Raises:
        ValueError: an answer that does not fit even without its prompt, one that is nothing but its end, or a pair
            whose texts become the same tokens; with lines.
    """
    texts, cut, max_length = texts_of(pairs)[0], 0, made.max_length
    long: set[tuple[str, str]] = set()
    empty: set[tuple[str, str]] = set()
    seen: dict[tuple[str, str], int] = {}
    for start in along(range(0, len(texts), AT_ONCE), "looking at the texts", "batches"):
        some = texts[start : start + AT_ONCE]
        tokens = made.tokens(*zip(*some))
        cut += int(tokens.cut.sum())
        long.update(text for text, is_long in zip(some, tokens.too_long) if is_long)
        empty.update(text for text, is_empty in zip(some, tokens.empty) if is_empty)
        seen.update(zip(some, (hash(tuple(ids)) for ids in tokens.ids)))
    if long:
        raise ValueError(
            f"every answer needs to fit into the {max_length} tokens that the backbone reads, got a longer one in "
            f"{_places_of(data, rows, long)}: shorten or drop it, or name a backbone that reads more"
        )
    if empty:
        raise ValueError(
            f"every answer needs a token before its end, got none in {_places_of(data, rows, empty)}: fill it in or "
            "drop the row"
        )
    equal = {pair for pair in pairs if seen[pair[:2]] == seen[pair[0], pair[2]]}
    if equal:
        numbers = [number for number, (_, prompt, *both, _) in enumerate(rows) if (prompt, *sorted(both)) in equal]
        raise ValueError(
            "every pair needs two texts that differ, got texts that the backbone reads as the same tokens in "
            f"{data.places((number, side) for number in numbers for side in (0, 1))}: drop them, or name another "
            "backbone"
        )
    if not cut:
        return []
    return [f"{cut} of {len(texts)} texts are longer than {max_length} tokens: their prompts are cut from the left"]


def _places_of(data: Comparisons, rows: Sequence[Written], wrong: set[tuple[str, str]]) -> str:
    """Where the texts (prompt, answer) stand that are wrong."""
    return data.places(
        (number, side)
        for number, (_, prompt, *both, _) in enumerate(rows)
        for side, answer in enumerate(both)
        if (prompt, answer) in wrong
    )


def factorize(
    data: str | Path,
    backbone: str | Path,
    folder: Path,
    factors: int | None = None,
    l2: float | None = None,
    pooling: str = "last",
    columns: Columns = COLUMNS,
    chat_template: str | None = None,
    split: str | None = None,
    pairs_per_user: int | None = None,
    seed: int = 0,
    say: Say = SAY,
) -> Choice | None:
    """Fits a factorized reward model to annotations and writes it; returns the cross-validated curve.

    Every dimension of X is first divided by its root mean square. In language models a few dimensions of a hidden
    state are hundreds of times larger than the rest, and the penalty would leave only those.

    Args:
        folder: as `output_folder.check_new` wants it, with `refit`.
        factors, l2: D and the penalty on both factors. None is chosen by cross-validation, which holds out as
            `held_out_together`. If both are given, there is no curve: None.
        chat_template: in whose form texts are written, as `form_of`. split: of the data, as `read`.
        pairs_per_user, seed: of data that are ratings, as `read`.
        say: is told what the data lack.

    Raises:
        ValueError: as `read`, `check_texts`, `backbone.load`, `output_folder.check_new` and
            `core.factorization.fit`; or answers that no base reward explains, with the curve.
        ArithmeticError: the fit does not converge.
    """
    check_new(folder, "--output", [backbone], refit=True)
    check_apart(folder, "--output", {"--data": data})
    check_pooling(pooling)
    config = backbones.read_config(backbone)
    backbones.check(config, backbone)
    if l2 is not None:
        check_l2(l2)
    comparisons = read(data, columns, split, pairs_per_user, seed)
    for sentence in comparisons.said:
        say(sentence)
    tokenizer = backbones.read_tokenizer(backbone)
    form = form_of(comparisons.rows, chat_template, backbone, tokenizer, say)
    writer = Writer(form, tokenizer)
    rows = write_texts(comparisons, writer)
    pairs, annotations, _ = annotate(rows)
    sizes = {"users": len(annotations.users), "pairs": len(pairs), "embedding dimensions": hidden_size(config)}
    if factors is not None:
        check_factors(factors, sizes)
    if same := alike(annotations.users):
        say(f"warning: users have coefficients of their own whose names {alike_listed(same)}")
    max_length = backbones.max_length(skeleton(config), tokenizer)
    for sentence in check_texts(comparisons, rows, pairs, Texts(tokenizer, max_length, writer.ends)):
        say(sentence)
    X = differences(backbone, pairs, pooling, writer.ends)
    scale = np.sqrt(X.squares() / len(pairs))
    scale[scale == 0] = 1.0
    X = X.over(scale)
    with threadpool_limits(1, "blas"):  # on matrices of this size a second thread waits more than it works
        if factors is not None and l2 is not None:
            with progress("fitting"):
                choice, found = None, fit(X, annotations, factors, l2)
        else:
            # The differences of few texts have fewer independent dimensions than there are pairs.
            most = factors or min(MOST_FACTORS, *sizes.values(), len(Problem.of(X, annotations).squares))
            tried = range(1, most + 1) if factors is None else (factors,)
            together = held_out_together(pairs, annotations, say)
            l2s = L2S if l2 is None else (l2,)
            bar = partial(along, what="cross-validation", unit="fits")
            choice = choose_factors(X, annotations, tried, l2s, together=together, along=bar)
            found = _fit_chosen(X, annotations, choice, factors is None, say)
    write(folder, backbone, found.head / scale, found.coefficients, found.users, pooling, form)
    return choice


def held_out_together(pairs: Sequence[Pair], annotations: Annotations, say: Say) -> np.ndarray | None:
    """What cross-validation holds out, as `together` of `choose_factors`: prompts, because the reward will meet new
    ones. If these are few it is single pairs, where each has texts of its own; else prompts, or answers, whatever they
    answer: what leaves more in the smallest fold. None, which is said, where nothing is left to do: then a pair that
    one user answers is held out, and others who answer it train on it.
    """
    prompts, *answers = zip(*pairs)
    distinct, texts = Names(sorted(set(prompts))), Names(sorted({*answers[0], *answers[1]}))
    by_prompt = distinct.rows(prompts)
    if len(distinct) >= FEWEST_PROMPTS:
        return by_prompt
    if len(texts_of(pairs)[0]) == 2 * len(pairs):
        together = np.arange(len(pairs))
    else:
        by_answer = np.stack([texts.rows(column) for column in answers], 1)
        together = max(by_prompt, by_answer, key=partial(least_held_out, annotations))
    if least_held_out(annotations, together):
        return together
    say(
        "warning: cross-validation needs to hold out pairs that share no answer with those trained on, got too few of "
        f"{len(texts)} answers to {len(distinct)} prompts. Now they share answers, so that noise is predicted, too: "
        "add answers, or choose --factors and --l2 yourself"
    )
    return None


def _fit_chosen(X: Differences, annotations: Annotations, choice: Choice, free: bool, say: Say) -> Factorization:
    """The fit that the curve recommends; if the number of base rewards is free, with as many as all data carry.

    Raises:
        ValueError: they carry none, or fewer than asked for, at the chosen penalty.
    """
    pairs = f"{len(annotations)} answers of {len(annotations.users)} users to {X.shape[0]} pairs"
    coin = f"held-out answers are predicted no better than by a coin, whose log loss is {COIN:.4f}"
    if hopeless := choice.loss.min() > COIN - choice.error[choice.loss.argmin()]:
        coin = f"{coin}: {pairs} are too few or too noisy, or the backbone does not see what users go by"
    try:
        with progress("fitting"):
            found = fit(X, annotations, choice.recommended, choice.l2)
    except NotCarried as error:
        if not error.carried or not free:
            why = coin if hopeless else f"{pairs} carry {error.carried} at l2 {choice.l2:g}"
            raise ValueError(
                f"{choice.recommended} base rewards need data that carry as many, but {why}. "
                f"{'Ask more people' if hopeless else 'Ask for fewer with --factors'}, or name another "
                f"backbone or a lower penalty with --l2. The curve:\n{choice}"
            ) from error
        say(f"all data together carry {error.carried} base rewards at l2 {choice.l2:g}: that many are fitted")
        with progress("fitting"):
            found = fit(X, annotations, error.carried, choice.l2)
    if hopeless:
        say(f"warning: {coin}. A model is written, and it may be worth nothing")
    return found
