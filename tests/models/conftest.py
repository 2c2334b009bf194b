"""A tiny backbone, and a factorized reward model on it."""

import numpy as np
import pytest

from openrlhf_pgrpo.models.folder import write


@pytest.fixture(scope="module")
def backbone(tiny):
    return tiny / "model"


@pytest.fixture(scope="module", params=["last", "mean"])
def made(request, backbone, tmp_path_factory):
    """A folder with two base rewards of random numbers and three users, and what it was made of."""
    rng = np.random.default_rng(0)
    head, coefficients = rng.normal(size=(2, 64)), rng.normal(size=(3, 2))
    folder = tmp_path_factory.mktemp(request.param)
    write(folder, backbone, head, coefficients, ["ana", "Łukasz", "3"], request.param)
    return folder, head, coefficients, request.param
