"""Best of n for one user: candidates in the order of the user's reward, as arXiv 2503.06358 uses its rewards.

Axes: D base rewards, n candidates of a prompt.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from openrlhf_pgrpo.files import check_folder, held_in, read_rows, write_rows
from openrlhf_pgrpo.models.backbone import read_tokenizer
from openrlhf_pgrpo.models.folder import Folder
from openrlhf_pgrpo.models.form import PLAIN, Form, Writer
from openrlhf_pgrpo.models.messages import no_text
from openrlhf_pgrpo.models.remote_code import trusted
from openrlhf_pgrpo.models.scoring import RewardModel, load
from openrlhf_pgrpo.models.users import ASK, ERROR, MEAN, coefficients_for
from openrlhf_pgrpo.people.generation import prompt_ids, suit_vllm_to_this_machine, written

RANKING = ("rewards", "order", "best")  # the columns that are written


class Sampling(NamedTuple):
    """How a policy answers a prompt: n responses of at most max_tokens tokens."""

    n: int = 8
    temperature: float = 1.0
    max_tokens: int = 512


def rerank(
    model: str,
    candidates: Path,
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
    batch_size: int = 16,
) -> str:
    """Writes the candidates with `rewards`, `order` and `best`; returns what to print.

    Args:
        model: folder or hub name. user, profile: whose rewards. population: the average user's, for an unknown user.
        policy: samples responses to each prompt with vLLM; without it, candidates hold the responses.
        n, temperature, max_tokens: of the policy, as `Sampling` unless given. plain_prompts: the policy is prompted
            without a template. chat_template: as `Folder`.

    Raises:
        ValueError: arguments or files that do not fit.
        OSError: a file cannot be read or written.
        ModuleNotFoundError: vLLM is not installed.
    """
    read = {"--candidates": candidates, "--profile": profile, **held_in(model, "--model")}
    check_folder(output, "--output", read)
    if user is None and profile is None and not population:
        raise ValueError("rerank needs --user, --profile or --population, got none of them: name the user")
    sampling = {"n": n, "temperature": temperature, "max_tokens": max_tokens}
    given = {name: value for name, value in sampling.items() if value is not None}
    if policy is None and (unused := [*given, *["plain_prompts"] * plain_prompts]):
        raise ValueError(f"--{unused[0]} needs --generate, got responses in --candidates: leave it out")
    remedies = f"{ASK}, or take the average user with --population"
    folder = Folder(model, chat_template)
    coefficients = coefficients_for(folder, user, profile, MEAN if population else ERROR, remedies)
    if policy is None:
        numbered = read_candidates(candidates)
    else:
        numbered, how = read_prompts(candidates), Sampling(**given)
        check_length(how.max_tokens, folder)
        writer = prompt_writer(policy, folder.writer, plain_prompts)
        prompts = {f"line {number} of {candidates}": row["prompt"] for number, row in numbered}
        written(folder.writer, prompts)  # refuses those that the reward model could not be given
        ids = prompt_ids(writer, prompts)
        suit_vllm_to_this_machine()
        numbered = generate(numbered, ids, policy, how)
        write_rows(output, [row for _, row in numbered])  # what took hours is kept, whatever comes next
        numbered, said = leave_out(folder, numbered, output)
        write_rows(output, [row for _, row in numbered])  # if ranking fails, it can be read as candidates
        print(*said, f"the responses are in {output}, and are ranked now", sep="\n", flush=True)
    for line in check_texts(folder, numbered, candidates):
        print(line, flush=True)
    # vLLM takes most of the free memory, so the reward model is loaded after vLLM has given it back.
    loaded = load(model, chat_template=chat_template)
    write_rows(output, rank_responses(loaded, [row for _, row in numbered], coefficients, batch_size))
    return str(output)


def read_candidates(path: Path) -> list[tuple[int, dict]]:
    """Numbered rows with a prompt and `responses`, a list of at least one; each is a text or a list of messages. Other
    columns are kept.

    Raises:
        ValueError: a row that is not whole, holds a blank response, or has a column of the ranking; with its line.
        OSError: the file cannot be read.
    """
    rows = read_rows(path, {"prompt": object, "responses": object})
    refuse_taken(path, rows, RANKING)
    check_prompts(path, rows)
    for number, row in rows:
        if not isinstance(row["responses"], list) or not row["responses"]:
            got = "an empty list" if row["responses"] == [] else f"{str(row['responses'])[:80]!r}"
            raise ValueError(f"line {number} of {path} needs a list of at least one text as 'responses', got {got}")
        for response in row["responses"]:
            if wrong := no_text(response):
                raise ValueError(
                    f"line {number} of {path} needs texts or messages as 'responses', got {wrong}: drop it, because a "
                    "reward for saying nothing means nothing"
                )
    return rows


def read_prompts(path: Path) -> list[tuple[int, dict]]:
    """Numbered rows with a prompt, to which responses will be sampled.

    Raises:
        ValueError: a row without a prompt, or with a column that is to be written; with its line.
        OSError: the file cannot be read.
    """
    rows = read_rows(path, {"prompt": object})
    refuse_taken(path, rows, (*RANKING, "responses"))
    check_prompts(path, rows)
    return rows


def check_prompts(path: Path, rows: list[tuple[int, dict]]) -> None:
    """Raises ValueError if a prompt is neither a text nor messages; with its line."""
    for number, row in rows:
        if wrong := no_text(row["prompt"]):
            raise ValueError(
                f"line {number} of {path} needs a text or messages as 'prompt', got {wrong}: correct it or drop the "
                "row"
            )


def refuse_taken(path: Path, rows: list[tuple[int, dict]], columns: tuple[str, ...]) -> None:
    """Raises ValueError if a row has one of the columns that are to be written; with its line."""
    for number, row in rows:
        if taken := [column for column in columns if column in row]:
            raise ValueError(
                f"line {number} of {path} needs new columns for the ranking, got {taken[0]!r}, which it has: rename "
                "or drop it"
            )


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


def generate(
    rows: list[tuple[int, dict]], ids: list[list[int]], policy: str, sampling: Sampling
) -> list[tuple[int, dict]]:
    """The rows with `responses` of a policy to the prompts, given as tokens, sampled with vLLM.

    Raises:
        ModuleNotFoundError: vLLM is not installed.
    """
    from vllm import LLM, SamplingParams

    eager = not torch.cuda.is_available()  # compiling pays off on a GPU only
    llm = LLM(policy, enforce_eager=eager, trust_remote_code=trusted())
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in ids], SamplingParams(**sampling._asdict()))
    return [
        (number, {**row, "responses": [one.text for one in output.outputs]})
        for (number, row), output in zip(rows, outputs, strict=True)
    ]


def leave_out(model: Folder, rows: list[tuple[int, dict]], path: Path) -> tuple[list[tuple[int, dict]], list[str]]:
    """The rows without generated responses that are blank or that the model cannot read whole, and sentences with
    their number. A row may lose all. `path` is the file that they are kept in.

    Raises:
        ValueError: no response is left.
    """
    blank, long, sampled, none_left, left = 0, 0, 0, 0, []
    for number, row in rows:
        responses = row["responses"]
        tokens = model.tokens([row["prompt"]] * len(responses), responses)
        blank += int(tokens.empty.sum())
        long += int((tokens.too_long & ~tokens.empty).sum())
        good = [text for text, bad in zip(responses, tokens.empty | tokens.too_long) if not bad]
        sampled += len(responses)
        none_left += not good
        left.append((number, {**row, "responses": good}))
    longest = f"longer than the {model.max_length} tokens that the reward model reads"
    said = [f"{blank} of {sampled} responses are blank: they are left out"] * bool(blank)
    said += [f"{long} of {sampled} responses are {longest}: they are left out"] * bool(long)
    if none_left == len(rows):
        raise ValueError(
            f"--generate needs a policy that answers, got {blank} blank responses and {long} that are {longest}, of "
            f"{sampled}: look at them in {path}, at the prompts and at --max_tokens"
        )
    if none_left:
        said.append(f"{none_left} of {len(rows)} prompts have no response left: their best is null")
    return left, said


def check_texts(model: Folder, rows: list[tuple[int, dict]], path: Path) -> list[str]:
    """Sentences about texts that the model cannot read whole, or cannot tell apart.

    Args:
        rows: line numbers and contents, with responses, of the file `path`.

    Raises:
        ValueError: a row that cannot be written in the model's form; a response that is too long for the model, or is
            nothing but its end; or different responses that are equal once the prompt is cut. With the line.
    """
    cut, alike, equal, said = 0, 0, [], []
    for number, row in rows:
        responses = row["responses"]
        try:
            tokens = model.tokens([row["prompt"]] * len(responses), responses)
        except ValueError as error:
            raise ValueError(f"line {number} of {path}: {error}") from error
        if tokens.empty.any():
            i = int(tokens.empty.argmax())
            raise ValueError(
                f"line {number} of {path} needs responses with words, got {str(responses[i])[:80]!r}: drop it, "
                "because a reward for saying nothing means nothing"
            )
        if tokens.too_long.any():
            i = int(tokens.too_long.argmax())
            raise ValueError(
                f"line {number} of {path} needs responses of at most {model.max_length} tokens, got "
                f"{tokens.answers[i]} in response {i}: drop it, or take a reward model of longer texts"
            )
        cut += bool(tokens.cut.any())
        read = [*map(tuple, tokens.ids)]
        # Answers are never cut, so different ones that read alike are of different lengths: the longer one begins with
        # what the prompt ends with.
        if len({*read}) < len({*zip(read, tokens.answers.tolist())}):
            equal.append(number)
        alike += len({*read}) < len({*map(json.dumps, responses)})
    if equal:
        raise ValueError(
            f"line {equal[0]} of {path} needs responses that differ in the {model.max_length} tokens that the "
            f"model reads, got some that are equal once the prompt is cut, in {len(equal)} of {len(rows)} rows: "
            "shorten the prompt, or take a reward model of longer texts"
        )
    if cut:
        said.append(f"{cut} of {len(rows)} prompts are longer than the model reads: their beginnings were cut away")
    if alike:
        said.append(f"{alike} of {len(rows)} prompts have responses that are the same to the model: they rank alike")
    return said


def rank_responses(model: RewardModel, rows: list[dict], coefficients: np.ndarray, batch_size: int = 16) -> list[dict]:
    """The rows with `rewards` (n), `order` (the numbers of the responses, best first) and `best`, the first of them or
    None if there is none.

    Raises:
        ValueError: a reward that is not finite.
    """
    prompts, responses = zip(*((row["prompt"], response) for row in rows for response in row["responses"]))
    rewards = model.base_rewards(prompts, responses, batch_size) @ coefficients
    if not np.isfinite(rewards).all():
        text = responses[np.argmin(np.isfinite(rewards))]
        raise ValueError(f"ranking needs finite rewards, got nan or inf for {str(text)[:80]!r}: the model is broken")
    ranked = []
    ends = np.cumsum([len(row["responses"]) for row in rows])[:-1]
    for row, row_rewards in zip(rows, np.split(rewards, ends)):
        order = np.argsort(-row_rewards, kind="stable").tolist()
        best = row["responses"][order[0]] if order else None
        ranked.append({**row, "rewards": row_rewards.tolist(), "order": order, "best": best})
    return ranked
