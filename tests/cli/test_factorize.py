"""`openrlhf-pgrpo factorize`: the model it writes, the curve it draws, and what is refused."""

import sys

import datasets
import pytest
from common import rows_in

from openrlhf_pgrpo.core import optimum
from openrlhf_pgrpo.models import factorize as fast
from openrlhf_pgrpo.models.folder import Folder
from openrlhf_pgrpo.models.scoring import load

pytestmark = pytest.mark.core


def test_the_command_writes_a_model_that_predicts_its_users(annotations, tiny, tmp_path, run):
    argv = ["factorize", "--data", annotations, "--backbone", tiny / "model", "--output", tmp_path / "m"]
    argv += ["--pooling", "mean", "--l2", 1, "--curve", tmp_path / "curve.png"]
    code, printed = run(*argv)
    assert code == 0 and "recommended" in printed and printed.splitlines()[-1] == str(tmp_path / "m")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")

    model = load(tmp_path / "m")
    assert model.users == [f"u{user}" for user in range(8)]
    rows = fast.read(annotations).rows
    users, prompts, chosen, rejected, _ = zip(*rows)
    features = model.base_rewards(prompts, chosen) - model.base_rewards(prompts, rejected)
    own = model.coefficients[[model.users.index(user) for user in users]]
    assert ((features * own).sum(1) > 0).mean() > 0.95
    strangers = model.coefficients[[(model.users.index(user) + 4) % 8 for user in users]]
    assert ((features * strangers).sum(1) > 0).mean() < 0.05


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--factors", 9, "--l2", 1), "users"),
        (("--factors", 2, "--curve", "no/c.png"), "--curve needs a .png, .svg or .pdf in a folder that exists"),
        (("--factors", 2, "--l2", 1, "--curve", "c.png"), "--curve needs something to choose"),
        (("--factors", 2, "--curve", "folder.png"), "--curve needs the name of a file, got folder.png, a folder"),
        (
            ("--factors", 2, "--curve", "m/c.png"),
            "--curve needs a place outside of --output m, which holds a model alone",
        ),
        (
            ("--factors", 2, "--curve", "link/c.png"),
            "--curve needs a place outside of --output m, which holds a model a",
        ),
    ],
)
def test_wrong_flags_are_refused_and_nothing_is_written(run, annotations, tiny, tmp_path, flags, message):
    for name in ("folder.png", "m"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("m")
    code, _ = run("factorize", "--data", annotations, "--backbone", tiny / "model", "--output", "m", *flags)
    assert message in str(code) and not [*(tmp_path / "m").iterdir()]


def test_a_curve_without_matplotlib_is_refused_before_the_work(run, annotations, tiny, tmp_path, monkeypatch):
    """It was a traceback after the work."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = ("factorize", "--data", annotations, "--backbone", tiny / "model", "--output", "m", "--factors", 1)
    code, _ = run(*words, "--curve", "c.png")
    assert code.startswith("openrlhf-pgrpo factorize: --curve needs matplotlib, which is not installed: pip install")
    assert not (tmp_path / "m").exists()


def test_a_fit_without_an_end_is_a_sentence(run, annotations, tiny, monkeypatch):
    monkeypatch.setattr(optimum, "MOST_STEPS", 1)
    words = ("factorize", "--data", annotations, "--backbone", tiny / "model", "--output", "m")
    code, _ = run(*words, "--factors", 1, "--l2", 1)
    assert code == "openrlhf-pgrpo factorize: coefficients need to converge in 1 steps, got no end: raise l2, now 1"


@pytest.mark.parametrize("kind", ["csv", "parquet", "saved"])
def test_data_as_people_have_them(annotations, tiny, tmp_path, run, kind):
    """They had to be JSONL. The model is the same, whatever form its data came in."""
    rows = datasets.Dataset.from_list(rows_in(annotations))
    path = tmp_path / f"rows.{kind}"
    rows.save_to_disk(path) if kind == "saved" else getattr(rows, f"to_{kind}")(path)
    made = []
    for number, data in enumerate((annotations, path)):
        folder = tmp_path / f"rm{number}"
        words = ["--backbone", tiny / "model", "--output", folder, "--factors", 1, "--l2", 1]
        assert run("factorize", "--data", data, *words)[0] == 0
        made.append(Folder(folder).fingerprint)
    assert made[0] == made[1]
    assert "--split needs a" in run("factorize", "--data", path, *words, "--split", "test")[0]
