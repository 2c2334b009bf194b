"""A reward model of two numbers that anybody can compute, a pool, and a session on both."""

from types import SimpleNamespace

import numpy as np
import pytest
from common import scored

from openrlhf_pgrpo.core.posterior import Prior
from openrlhf_pgrpo.models.folder import Folder
from openrlhf_pgrpo.models.form import PLAIN
from openrlhf_pgrpo.people.pool import Pair
from openrlhf_pgrpo.people.session import Session

TOPICS = ("tea", "rain", "trains", "bread", "sleep", "maps")
FINGERPRINT = "f00d" * 16


def base_rewards(prompts, responses, batch_size=16):
    """Exclamation marks, and tens of letters."""
    return np.array([[str(text).count("!"), len(text) / 10] for text in responses], np.float64)


@pytest.fixture
def model():
    """Ann likes it loud and short, Bob calm and long; the others are in between."""
    rng = np.random.default_rng(0)
    coefficients = np.concatenate([[[2.0, -1.0], [-2.0, 1.0]], rng.normal(0, 1, (18, 2))])
    return SimpleNamespace(
        base_rewards=base_rewards,
        users=["ann", "bob", *(f"user {number}" for number in range(18))],
        coefficients=coefficients,
        fingerprint=FINGERPRINT,
        name="the model",
    )


@pytest.fixture
def pairs():
    """Two pairs for each of six prompts: loud against calm, long against short."""
    made = []
    for topic in TOPICS:
        prompt = f"Tell me about {topic}."
        made.append(Pair(prompt, f"Oh, {topic}! Wonderful!!", f"A word on {topic}, then."))
        made.append(Pair(prompt, f"{topic.title()}, as people say who have seen a lot of it.", f"{topic.title()}."))
    return made


@pytest.fixture
def session_of(model, pairs, tmp_path):
    """A session of a user on the pool, as `elicit` makes it; called again, it goes on."""

    def session_of(user="ana", pool=pairs, **limits):
        path = tmp_path / f"{user}.json"
        return Session(
            pool, *scored(model, pool), Prior.of(model.coefficients), user, model.fingerprint, path, **limits
        )

    return session_of


@pytest.fixture
def reader_of(factorized):
    """The reader of a reward model with texts of that form, of at most `longest` tokens."""

    def reader_of(form=PLAIN, longest=64):
        model = Folder(factorized)
        vars(model).update(form=form, max_length=longest)
        return model

    return reader_of
