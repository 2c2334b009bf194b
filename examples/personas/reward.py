"""The reward of the demo: how much a persona likes an answer. Host: `--reward.remote_url examples/personas/reward.py`.

    reward = offset + scale * (style + genre)        offset, scale: the persona's; style, genre: in [0, 1]

Scales and offsets differ on purpose, from 0.3 to 6 and from -8 to +5, because people also rate on different scales.
They carry no information about the answer, and mislead an estimator that mixes personas.

The host calls `reward_func` with lists of length 1, from many threads of each vLLM engine, and hides its
exceptions. So everything that can be missing is looked up on import, where a failure still stops the run.
"""

import importlib.util
import json
import re
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent


def _sibling(name):
    """Loads a file of this folder by its path, as the host loads this file: it is in no package."""
    spec = importlib.util.spec_from_file_location(f"personas_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PERSONAS = {persona["name"]: persona for persona in json.loads((HERE / "personas.json").read_text(encoding="utf-8"))}
STYLES = _sibling("styles").STYLES
GENRES = _sibling("genres").GenreScorer(_sibling("models").minilm_folder())

ASSISTANT = "<|im_start|>assistant\n"
SPECIAL_TOKEN = re.compile(r"<\|[^|]*\|>")


def reward_func(queries, prompts, labels):
    """One reward per query. `extra_logs` has the mean of both parts, which the host averages into its logs."""
    answers = [answer_of(query, prompt) for query, prompt in zip(queries, prompts, strict=True)]
    parts = [score(answer, label) for answer, label in zip(answers, labels, strict=True)]
    rewards = torch.tensor(
        [_persona(label)["offset"] + _persona(label)["scale"] * sum(part) for label, part in zip(labels, parts)]
    )
    style, genre = (sum(column) / len(parts) for column in zip(*parts))
    return {"rewards": rewards, "scores": rewards, "extra_logs": {"style": style, "genre": genre}}


def score(answer, label):
    """The style and the genre of an answer, each in [0, 1]."""
    persona = _persona(label)
    return STYLES[persona["style"]](answer), GENRES.score(answer, persona["genre"])


def answer_of(query, prompt):
    """The answer alone. The host cuts the start of a long prompt, which is then no longer a prefix of the query."""
    answer = query[len(prompt) :] if query.startswith(prompt) else query.rpartition(ASSISTANT)[2]
    return SPECIAL_TOKEN.split(answer)[0].strip()


def _persona(label):
    try:
        return PERSONAS[str(label)]
    except KeyError:
        raise ValueError(
            f"needs: a persona as label, one of {', '.join(PERSONAS)}\n  got: {label!r}\n"
            "   do: pass --data.label_key persona"
        ) from None
