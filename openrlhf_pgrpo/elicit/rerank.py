"""Best of n for one user: candidates in the order of the user's reward (arXiv 2503.06358 uses its rewards this way).

Axes: D base rewards, n candidates of a prompt.
"""

from pathlib import Path
from typing import Optional

import numpy as np
import torch

from openrlhf_pgrpo.core.elicitation import Profile
from openrlhf_pgrpo.core.rows import read_rows


def coefficients_for(model, user: Optional[str], profile: Optional[Path], population: bool) -> np.ndarray:
    """The coefficients (D,) of a trained user, of a profile, or the mean of all trained users.

    Args:
        model: a `models.factorized_reward.Folder`; its weights are not needed.
        population: whether a user whom the model does not know, or none, means the mean.

    Raises:
        ValueError: nobody is named, or an unknown user without `population`; a profile as `Profile.load`.
    """
    if profile is not None:
        return Profile.load(profile, model.fingerprint).coefficients
    if user in model.users:
        return model.coefficients[model.users.index(user)]
    if population:
        return model.coefficients.mean(0)
    if user is None:
        raise ValueError("rerank needs --user, --profile or --population, got none of them: say for whom")
    raise ValueError(
        f"the model needs to know the user, got {user!r}, none of its {len(model.users)}: ask them with "
        "openrlhf-pgrpo elicit and give --profile, or take the mean of all users with --population"
    )


def read_candidates(path: Path) -> list[dict]:
    """Rows with a prompt and its responses, a list of at least one text, and whatever else they have.

    Raises:
        ValueError: a row that is not whole; with its line.
        OSError: the file cannot be read.
    """
    rows = read_rows(path, {"prompt": str, "responses": list})
    for number, row in rows:
        if not row["responses"]:
            raise ValueError(f"line {number} of {path} needs at least one text as 'responses', got an empty list")
    return [row for _, row in rows]


def generate(path: Path, policy: str, n: int, temperature: float, max_tokens: int) -> list[dict]:
    """Rows with a prompt, and n responses of a policy to it, sampled with vLLM.

    Raises:
        ValueError: a row without a prompt; with its line.
        ModuleNotFoundError: vLLM is not installed.
        OSError: the file cannot be read.
    """
    rows = [row for _, row in read_rows(path, {"prompt": str})]
    from vllm import LLM, SamplingParams

    sampling = SamplingParams(n=n, temperature=temperature, max_tokens=max_tokens)
    llm = LLM(policy, enforce_eager=not torch.cuda.is_available())  # without a GPU there is nothing to compile for
    outputs = llm.generate([row["prompt"] for row in rows], sampling)
    return [{**row, "responses": [one.text for one in output.outputs]} for row, output in zip(rows, outputs)]


def rerank(model, rows: list[dict], coefficients: np.ndarray, batch_size: int = 16) -> list[dict]:
    """The rows with `rewards` (n), `order`, numbers of responses from the best on, and `best`, the first of them.

    Raises:
        ValueError: a reward that is not finite.
    """
    prompts, responses = zip(*((row["prompt"], response) for row in rows for response in row["responses"]))
    rewards = model.base_rewards(prompts, responses, batch_size) @ coefficients
    if not np.isfinite(rewards).all():
        text = responses[np.argmin(np.isfinite(rewards))]
        raise ValueError(f"ranking needs finite rewards, got another for {text[:80]!r}: the model is broken")
    ranked = []
    for row, of_row in zip(rows, np.split(rewards, np.cumsum([len(row["responses"]) for row in rows])[:-1])):
        order = np.argsort(-of_row, kind="stable").tolist()
        best = row["responses"][order[0]]
        ranked.append({**row, "rewards": of_row.tolist(), "order": order, "best": best})
    return ranked
