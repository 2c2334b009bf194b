"""Best of n for one user: candidates in the order of the user's reward, as arXiv 2503.06358 uses its rewards.

Axes: D base rewards, n candidates of a prompt.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from openrlhf_pgrpo.core.names import in_words, listed
from openrlhf_pgrpo.files import check_folder, data_in, held_in, write_rows
from openrlhf_pgrpo.models.backbone import read_tokenizer
from openrlhf_pgrpo.models.folder import Folder
from openrlhf_pgrpo.models.form import PLAIN, Form, Writer
from openrlhf_pgrpo.models.messages import Text, check_begun, no_answer, no_text
from openrlhf_pgrpo.models.scoring import MOST_TEXTS, RewardModel, load
from openrlhf_pgrpo.models.tables import Table, read_table
from openrlhf_pgrpo.models.users import ASK, ERROR, MEAN, coefficients_for
from openrlhf_pgrpo.people import generation
from openrlhf_pgrpo.people.generation import Sampling, prompt_ids, written
from openrlhf_pgrpo.progress import along, progress

RANKING = ("rewards", "order", "best")  # the columns that are written
PROMPT, RESPONSES = "prompt", "responses"  # columns of the data, unless others are named
SAMPLES = 8  # to each prompt, unless another number is given


def rerank(
    model: str,
    candidates: str | Path,
    output: Path,
    user: str | None = None,
    profile: Path | None = None,
    population: bool = False,
    policy: str | None = None,
    n: int | None = None,
    temperature: float | None = None,
    max_tokens: int | None = None,
    plain_prompts: bool = False,
    chat_template: str | None = None,
    batch_size: int = MOST_TEXTS,
    prompt_key: str = PROMPT,
    responses_key: str = RESPONSES,
    split: str | None = None,
) -> str:
    """Writes the candidates with `rewards`, `order` and `best`; returns what to print.

    Args:
        model: folder or hub name. candidates, split: as `tables.read_table`. user, profile: whose rewards.
        population: the average user's, for an unknown user.
        policy: samples responses to each prompt with vLLM; without it, candidates hold the responses.
        n: responses to a prompt, SAMPLES unless given. temperature, max_tokens: as `Sampling` unless given.
            plain_prompts: the policy is prompted without a template. chat_template: as `Folder`.

    Raises:
        ValueError: arguments or files that do not fit.
        OSError: a file cannot be read or written.
        ModuleNotFoundError: vLLM is not installed.
    """
    read = {**data_in(candidates, "--candidates"), "--profile": profile}
    read |= held_in(model, "--model") | (held_in(policy, "--generate") if policy is not None else {})
    check_folder(output, "--output", read)
    if responses_key in RANKING:
        raise ValueError(f"--responses_key needs another column than {listed(RANKING)}, got {responses_key!r}")
    if user is None and profile is None and not population:
        raise ValueError("rerank needs --user, --profile or --population, got none of them: name the user")
    sampling = {"n": n, "temperature": temperature, "max_tokens": max_tokens}
    given = {name: value for name, value in sampling.items() if value is not None}
    if policy is None and (unused := [*given, *["plain_prompts"] * plain_prompts]):
        raise ValueError(f"--{unused[0]} needs --generate, got responses in --candidates: leave it out")
    n, how = given.pop("n", SAMPLES), Sampling(**given)
    if n < 1:
        raise ValueError(f"--n needs at least 1, got {n}: correct it")
    remedies = f"{ASK}, or take the average user with --population"
    folder = Folder(model, chat_template)
    coefficients = coefficients_for(folder, user, profile, MEAN if population else ERROR, remedies)
    if policy is None:
        table = read_candidates(candidates, prompt_key, responses_key, split)
        prompts, responses = [row[prompt_key] for row in table.rows], [row[responses_key] for row in table.rows]
    else:
        table = read_prompts(candidates, prompt_key, responses_key, split)
        prompts = [row[prompt_key] for row in table.rows]
        check_length(how.max_tokens, folder)
        writer = prompt_writer(policy, folder.writer, plain_prompts)
        placed = {table.place(number): prompt for number, prompt in enumerate(prompts)}
        written(folder.writer, placed)  # refuses those that the reward model could not be given
        ids = prompt_ids(writer, placed)
        responses = generate(ids, policy, n, how)

    def write(ranking: Sequence[dict]) -> None:
        rows = zip(table.rows, responses, ranking, strict=True)
        write_rows(output, [{**row, responses_key: of_row, **ranked} for row, of_row, ranked in rows])

    unranked: list[dict] = [{} for _ in prompts]
    try:
        if policy is not None:
            write(unranked)  # what took hours is kept, whatever comes next
            responses, said = leave_out(folder, prompts, responses, output)
            write(unranked)  # if ranking fails, it can be read as candidates
            print(*said, f"the responses are in {output}, and are ranked now", sep="\n", flush=True)
        for line in check_texts(folder, prompts, responses, table.place):
            print(line, flush=True)
        # vLLM takes most of the free memory, so the reward model is loaded after vLLM has ended.
        loaded = load(model, chat_template=chat_template)
        ranking = rank_responses(loaded, prompts, responses, coefficients, batch_size)
        folder.check_unchanged()
        write(ranking)
    except KeyboardInterrupt:
        if policy is None:
            raise
        again = f"without --generate, --candidates {output} and another --output rank them"
        raise KeyboardInterrupt(f"the responses are in {output}; {again}") from None
    return str(output)


def read_candidates(
    source: str | Path, prompt_key: str = PROMPT, responses_key: str = RESPONSES, split: str | None = None
) -> Table:
    """Rows with a prompt and responses, a list of at least one; each is a text or a list of messages. Other columns
    are kept.

    Raises:
        ValueError: as `read_table`; a row that is not whole, holds a blank response, or has a column of the ranking,
            with its place; or all responses repeat their prompt.
        OSError: the file cannot be read.
    """
    table = _read(source, [prompt_key, responses_key], RANKING, split)
    for number, row in enumerate(table.rows):
        place, responses = table.place(number), row[responses_key]
        if not isinstance(responses, list) or not responses:
            got = "an empty list" if responses == [] else in_words(responses)
            lists = "; CSV has no lists, JSONL and Parquet do" if isinstance(responses, str) else ""
            raise ValueError(f"{place} needs a list of at least one text as {responses_key!r}, got {got}{lists}")
        for response in responses:
            if wrong := no_answer(response):
                raise ValueError(
                    f"{place} needs texts or messages as {responses_key!r}, got {wrong}: drop it, because a reward "
                    "for saying nothing means nothing"
                )
    owner = [number for number, row in enumerate(table.rows) for _ in row[responses_key]]
    prompts = [table.rows[number][prompt_key] for number in owner]
    responses = [response for row in table.rows for response in row[responses_key]]

    def places(found: Sequence[int]) -> str:
        return table.places(sorted({owner[number] for number in found}))

    for sentence in check_begun(prompts, responses, places=places):
        print(sentence, flush=True)
    return table


def read_prompts(
    source: str | Path, prompt_key: str = PROMPT, responses_key: str = RESPONSES, split: str | None = None
) -> Table:
    """Rows with a prompt, to which responses will be sampled.

    Raises:
        ValueError: as `read_table`; a row without a prompt, or with a column that is to be written; with its place.
        OSError: the file cannot be read.
    """
    return _read(source, [prompt_key], (*RANKING, responses_key), split)


def _read(source: str | Path, columns: Sequence[str], new: Sequence[str], split: str | None) -> Table:
    """Rows with these columns, the first of which has prompts, and without those that are to be written."""
    table = read_table(source, dict.fromkeys(columns, object), split)
    for number, row in enumerate(table.rows):
        if taken := [column for column in new if column in row]:
            raise ValueError(
                f"{table.place(number)} needs new columns for the ranking, got {taken[0]!r}, which it has: rename or "
                "drop it"
            )
        if wrong := no_text(row[columns[0]]):
            raise ValueError(
                f"{table.place(number)} needs a text or messages as {columns[0]!r}, got {wrong}: correct it or drop "
                "the row"
            )
    return table.as_json()


def check_length(max_tokens: int, model: Folder) -> None:
    """Raises ValueError if the policy may give responses that the reward model cannot read."""
    longest = model.max_length
    if max_tokens >= longest:  # a response and its end
        raise ValueError(
            f"--max_tokens needs fewer than the {longest} tokens that {model.name} reads, got {max_tokens}: lower it, "
            "or take a reward model of longer texts"
        )


def prompt_writer(policy: str, rewards: Writer, plain_prompts: bool) -> Writer:
    """What writes the prompts of a policy: as the reward model's texts are written, if the policy is prompted so.

    A policy that knows prompts by its chat template gives a plain one empty answers, and a reward of other texts than
    the model was made from means nothing.

    Args:
        rewards: writes the texts of the reward model. plain_prompts: the prompts are to be as they are in the file.

    Raises:
        ValueError: the policy is prompted in another form.
    """
    tokenizer = read_tokenizer(policy)
    if plain_prompts:
        return Writer(PLAIN, tokenizer)
    if not tokenizer.chat_template:
        if rewards.form.chat_template is None:
            return Writer(rewards.form, tokenizer)
        raise ValueError(
            f"--generate needs a policy that is prompted as the reward model's texts are written, {rewards.form}, got "
            f"{policy}, which has no chat template: name a policy with that template, or pass --plain_prompts"
        )
    own = Writer(Form.of_tokenizer(tokenizer, policy), tokenizer)
    if not own.same_prompts(rewards):
        of_model = rewards.form if rewards.form.chat_template is None else "by another chat template"
        raise ValueError(
            f"--generate needs a reward model whose texts are written by the chat template of {policy}, got one with "
            f"texts written {of_model}: make it with openrlhf-pgrpo factorize --chat_template {policy}, or pass "
            "--plain_prompts to prompt the policy without its template"
        )
    return own


def generate(ids: list[list[int]], policy: str, n: int, sampling: Sampling) -> list[list[str]]:
    """n responses of a policy to each prompt, given as tokens, sampled with vLLM.

    Raises:
        ValueError, ModuleNotFoundError: as `generation.generate`.
    """
    asked = {i * len(ids) + number: prompt for number, prompt in enumerate(ids) for i in range(n)}
    responses = [[""] * n for _ in ids]
    answers = generation.generate(policy, asked, sampling)
    with closing(answers), progress("responses", len(asked), "responses") as count:  # closing ends its process
        for number, text, _ in answers:
            responses[number % len(ids)][number // len(ids)] = text
            count(1)
    return responses


def leave_out(
    model: Folder, prompts: Sequence[Text], responses: Sequence[list[str]], path: Path
) -> tuple[list[list[str]], list[str]]:
    """The responses to each prompt without generated ones that are blank or that the model cannot read whole, and
    sentences with their number. A prompt may lose all. `path` is the file that they are kept in.

    Raises:
        ValueError: no response is left.
    """
    blank, long, sampled, left = 0, 0, 0, []
    for prompt, texts in zip(along(prompts, "looking at the responses", "prompts"), responses):
        tokens = model.tokens([prompt] * len(texts), texts)
        blank += int(tokens.empty.sum())
        long += int((tokens.too_long & ~tokens.empty).sum())
        sampled += len(texts)
        left.append([text for text, bad in zip(texts, tokens.empty | tokens.too_long) if not bad])
    none_left = left.count([])
    longest = f"longer than the {model.max_length} tokens that the reward model reads"
    said = [f"{blank} of {sampled} responses are blank: they are left out"] * bool(blank)
    said += [f"{long} of {sampled} responses are {longest}: they are left out"] * bool(long)
    if none_left == len(left):
        raise ValueError(
            f"--generate needs a policy that answers, got {blank} blank responses and {long} that are {longest}, of "
            f"{sampled}: look at them in {path}, at the prompts and at --max_tokens"
        )
    if none_left:
        said.append(f"{none_left} of {len(left)} prompts have no response left: their best is null")
    return left, said


def check_texts(
    model: Folder, prompts: Sequence[Text], responses: Sequence[Sequence[Text]], place: Callable[[int], str]
) -> list[str]:
    """Sentences about texts that the model cannot read whole, or cannot tell apart.

    Args:
        responses: those to each prompt. place: says where the row of a number stands, for a message.

    Raises:
        ValueError: a row that cannot be written in the model's form; a response that is too long for the model, or is
            nothing but its end; or different responses that are equal once the prompt is cut. With the place.
    """
    count, cut, alike, equal, said = len(prompts), 0, 0, [], []
    for number, prompt in enumerate(along(prompts, "looking at the texts", "prompts")):
        texts = responses[number]
        try:
            tokens = model.tokens([prompt] * len(texts), texts)
        except ValueError as error:
            raise ValueError(f"{place(number)}: {error}") from error
        if tokens.empty.any():
            i = int(tokens.empty.argmax())
            raise ValueError(
                f"{place(number)} needs responses with words, got {str(texts[i])[:80]!r}: drop it, because a reward "
                "for saying nothing means nothing"
            )
        if tokens.too_long.any():
            i = int(tokens.too_long.argmax())
            raise ValueError(
                f"{place(number)} needs responses of at most {model.max_length} tokens, got {tokens.answers[i]} in "
                f"response {i}: drop it, or take a reward model of longer texts"
            )
        cut += bool(tokens.cut.any())
        read = [*map(tuple, tokens.ids)]
        # Answers are never cut, so different ones that read alike are of different lengths: the longer one begins with
        # what the prompt ends with.
        if len({*read}) < len({*zip(read, tokens.answers.tolist())}):
            equal.append(number)
        alike += len({*read}) < len({*map(json.dumps, texts)})
    if equal:
        raise ValueError(
            f"{place(equal[0])} needs responses that differ in the {model.max_length} tokens that the model reads, "
            f"got some that are equal once the prompt is cut, in {len(equal)} of {count} rows: shorten the prompt, or "
            "take a reward model of longer texts"
        )
    if cut:
        said.append(f"{cut} of {count} prompts are longer than the model reads: their beginnings were cut away")
    if alike:
        said.append(f"{alike} of {count} prompts have responses that are the same to the model: they rank alike")
    return said


def rank_responses(
    model: RewardModel,
    prompts: Sequence[Text],
    responses: Sequence[Sequence[Text]],
    coefficients: np.ndarray,
    batch_size: int = MOST_TEXTS,
) -> list[dict]:
    """Of the responses to each prompt the `rewards` (n), their `order` (the numbers of the responses, best first) and
    the `best`, the first of them or None if there is none.

    Raises:
        ValueError: a reward that is not finite.
    """
    asked, answers = zip(*((prompt, text) for prompt, texts in zip(prompts, responses) for text in texts))
    rewards = model.base_rewards(asked, answers, batch_size) @ coefficients
    if not np.isfinite(rewards).all():
        text = answers[np.argmin(np.isfinite(rewards))]
        raise ValueError(f"ranking needs finite rewards, got nan or inf for {str(text)[:80]!r}: the model is broken")
    ranked = []
    ends = np.cumsum([len(texts) for texts in responses])[:-1]
    for texts, of_row in zip(responses, np.split(rewards, ends)):
        order = np.argsort(-of_row, kind="stable").tolist()
        ranked.append({"rewards": of_row.tolist(), "order": order, "best": texts[order[0]] if order else None})
    return ranked
