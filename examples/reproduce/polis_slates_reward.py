"""What a slate's answer earns, for polis_slates.py. The host loads this file by its path: `--reward.remote_url`."""

import json

NUMBERS = ("1", "2")


def named(answer: str) -> int | None:
    """The place of the statement that an answer names; None if it names none."""
    return NUMBERS.index(answer) if answer in NUMBERS else None


def answer(query: str, prompt: str) -> str:
    """What follows the prompt, which the host cuts if it is too long."""
    if not query.startswith(prompt):
        raise ValueError(f"a slate needs a query that begins with its prompt, got {query[:40]!r}: raise data.max_len")
    return query[len(prompt) :]


def reward_func(queries, prompts, labels):
    """The vote on the statement named, and the lower vote if none is."""
    places = [named(answer(query, prompt)) for query, prompt in zip(queries, prompts)]
    votes = [json.loads(label) for label in labels]
    rewards = [min(own) if place is None else own[place] for own, place in zip(votes, places)]
    return {"rewards": rewards, "scores": rewards, "extra_logs": {"names_none": places.count(None) / len(places)}}
