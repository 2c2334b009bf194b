"""`openrlhf-pgrpo export-user`: whose reward is written, and what is refused."""

import pytest
from safetensors.torch import load_file

from openrlhf_pgrpo.core.posterior import Prior
from openrlhf_pgrpo.models.folder import Folder
from openrlhf_pgrpo.models.profiles import Answer, Profile

pytestmark = pytest.mark.core


def head(folder):
    return load_file(folder / "model.safetensors")["score.weight"].numpy()


@pytest.mark.parametrize("user", ["ana", "cleo"])
def test_a_trained_user_is_exported(run, factorized, tmp_path, user):
    code, shown = run("export-user", "--model", factorized, "--user", user, "--output", tmp_path / "out")
    assert code == 0 and shown == f"{tmp_path / 'out'}\n"
    model = Folder(factorized)
    expected = model.coefficients[model.users.index(user)] @ model.tensor("score.weight")
    assert head(tmp_path / "out") == pytest.approx(expected[None], abs=1e-6)


def test_a_new_user_is_exported_from_a_profile(run, factorized, tmp_path):
    model = Folder(factorized)
    answers = [Answer("x", (1.0, -2.0, 0.5), 1.0)]
    profile = Profile.of("eve", model.fingerprint, answers, Prior.of(model.coefficients))
    profile.save(tmp_path / "eve.json")
    code, _ = run("export-user", "--model", factorized, "--profile", "eve.json", "--output", "out")
    assert code == 0
    expected = profile.coefficients @ model.tensor("score.weight")
    assert head(tmp_path / "out") == pytest.approx(expected[None], abs=1e-6)


def test_an_unknown_user_is_refused(run, factorized, tmp_path):
    code, _ = run("export-user", "--model", factorized, "--user", "eve", "--output", "out")
    assert code.startswith(f"openrlhf-pgrpo export-user: --user needs one of the 3 users of {factorized} and its ")
    assert code.endswith("got 'eve': ask them with openrlhf-pgrpo elicit and give their profile with --profile")
    assert not (tmp_path / "out").exists()
