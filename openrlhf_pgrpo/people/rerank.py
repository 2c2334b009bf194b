"""Best of n for one user: candidates in the order of the user's reward, as arXiv 2503.06358 uses its rewards.

Axes: D base rewards, n candidates of a prompt.
"""

import os
from pathlib import Path

import numpy as np
import torch

from openrlhf_pgrpo.files import check_folder, read_rows, write_rows
from openrlhf_pgrpo.host.cpu.launch import environment
from openrlhf_pgrpo.models.folder import Folder
from openrlhf_pgrpo.models.remote_code import trusted
from openrlhf_pgrpo.models.scoring import RewardModel, load
from openrlhf_pgrpo.models.users import ASK, ERROR, MEAN, coefficients_for

RANKING = ("rewards", "order", "best")  # the columns that are written


def rerank(
    model: str,
    candidates: Path,
    output: Path,
    user: str | None = None,
    profile: Path | None = None,
    population: bool = False,
    policy: str | None = None,
    n: int = 8,
    temperature: float = 1.0,
    max_tokens: int = 512,
    batch_size: int = 16,
) -> str:
    """Writes the candidates with `rewards`, `order` and `best`; returns what to print.

    Args:
        model: folder or hub name. user, profile: whose rewards. population: the average user's, for an unknown user.
        policy: samples n responses to each prompt with vLLM; without it, candidates hold the responses.

    Raises:
        ValueError: arguments or files that do not fit.
        OSError: a file cannot be read or written.
        ModuleNotFoundError: vLLM is not installed.
    """
    check_folder(output, "--output", {"--candidates": candidates, "--profile": profile})
    if user is None and profile is None and not population:
        raise ValueError("rerank needs --user, --profile or --population, got none of them: name the user")
    remedies = f"{ASK}, or take the average user with --population"
    coefficients = coefficients_for(Folder(model), user, profile, MEAN if population else ERROR, remedies)
    if policy is None:
        rows = read_candidates(candidates)
    else:
        suit_vllm_to_this_machine()
        rows = generate(candidates, policy, n, temperature, max_tokens)
    # vLLM takes most of the free memory, so the reward model is loaded after vLLM has given it back.
    loaded = load(model)
    for line in check_texts(loaded, rows):
        print(line, flush=True)
    write_rows(output, rank_responses(loaded, rows, coefficients, batch_size))
    return str(output)


def read_candidates(path: Path) -> list[dict]:
    """Rows with a prompt and `responses`, a list of at least one text. Other columns are kept.

    Raises:
        ValueError: a row that is not whole, holds a blank response, or has a column of the ranking; with its line.
        OSError: the file cannot be read.
    """
    rows = read_rows(path, {"prompt": str, "responses": list})
    refuse_taken(path, rows, RANKING)
    for number, row in rows:
        if not row["responses"]:
            raise ValueError(f"line {number} of {path} needs at least one text as 'responses', got an empty list")
        if blank := [response for response in row["responses"] if not response.strip()]:
            raise ValueError(
                f"line {number} of {path} needs texts as 'responses', got {blank[0]!r}: drop it, because a reward for "
                "saying nothing means nothing"
            )
    return [row for _, row in rows]


def refuse_taken(path: Path, rows: list[tuple[int, dict]], columns: tuple[str, ...]) -> None:
    """Raises ValueError if a row has one of the columns that are to be written; with its line."""
    for number, row in rows:
        if taken := [column for column in columns if column in row]:
            raise ValueError(
                f"line {number} of {path} needs new columns for the ranking, got {taken[0]!r}, which it has: rename "
                "or drop it"
            )


def suit_vllm_to_this_machine() -> None:
    """Without a GPU, sets the environment variables that limit what vLLM takes."""
    if not torch.cuda.is_available():
        os.environ.update(environment())


def generate(path: Path, policy: str, n: int, temperature: float, max_tokens: int) -> list[dict]:
    """Rows with a prompt, and n responses of a policy to it, sampled with vLLM.

    Raises:
        ValueError: a row without a prompt, or with a column that is to be written; with its line.
        ModuleNotFoundError: vLLM is not installed.
        OSError: the file cannot be read.
    """
    numbered = read_rows(path, {"prompt": str})
    refuse_taken(path, numbered, (*RANKING, "responses"))
    rows = [row for _, row in numbered]
    from vllm import LLM, SamplingParams

    sampling = SamplingParams(n=n, temperature=temperature, max_tokens=max_tokens)
    eager = not torch.cuda.is_available()  # compiling pays off on a GPU only
    llm = LLM(policy, enforce_eager=eager, trust_remote_code=trusted())
    outputs = llm.generate([row["prompt"] for row in rows], sampling)
    return [{**row, "responses": [one.text for one in output.outputs]} for row, output in zip(rows, outputs)]


def check_texts(model: RewardModel, rows: list[dict]) -> list[str]:
    """Sentences about texts that the model cannot read whole, or cannot tell apart.

    Raises:
        ValueError: a response that is too long for the model; with its prompt.
    """
    cut, alike, said = 0, 0, []
    for row in rows:
        responses = row["responses"]
        tokens = model.texts.tokens([row["prompt"]] * len(responses), responses)
        if tokens.too_long.any():
            i = int(tokens.too_long.argmax())
            raise ValueError(
                f"a response needs at most {model.texts.max_length} tokens, got {tokens.answers[i]} in response {i} "
                f"to {row['prompt'][:80]!r}: drop it, or take a reward model of longer texts"
            )
        cut += bool(tokens.cut.any())
        alike += len({*map(tuple, tokens.ids)}) < len(set(responses))
    if cut:
        said.append(f"{cut} of {len(rows)} prompts are longer than the model reads: their beginnings were cut away")
    if alike:
        said.append(f"{alike} of {len(rows)} prompts have responses that are the same to the model: they rank alike")
    return said


def rank_responses(model: RewardModel, rows: list[dict], coefficients: np.ndarray, batch_size: int = 16) -> list[dict]:
    """The rows with `rewards` (n), `order` (the numbers of the responses, best first) and `best`, the first of them.

    Raises:
        ValueError: a reward that is not finite.
    """
    prompts, responses = zip(*((row["prompt"], response) for row in rows for response in row["responses"]))
    rewards = model.base_rewards(prompts, responses, batch_size) @ coefficients
    if not np.isfinite(rewards).all():
        text = responses[np.argmin(np.isfinite(rewards))]
        raise ValueError(f"ranking needs finite rewards, got nan or inf for {text[:80]!r}: the model is broken")
    ranked = []
    ends = np.cumsum([len(row["responses"]) for row in rows])[:-1]
    for row, row_rewards in zip(rows, np.split(rewards, ends)):
        order = np.argsort(-row_rewards, kind="stable").tolist()
        best = row["responses"][order[0]]
        ranked.append({**row, "rewards": row_rewards.tolist(), "order": order, "best": best})
    return ranked
