"""The demo, as `make demo` runs it, for one step, on a policy built from its pip package."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "personas"


@pytest.fixture(scope="module")
def models():
    spec = importlib.util.spec_from_file_location("demo_models", FOLDER / "models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def policy(models, tmp_path_factory):
    return models.build_policy(tmp_path_factory.mktemp("models") / "policy")


def test_the_converted_policy_is_the_known_model(models, policy):
    models.check_policy(policy)
    assert [path.name for path in policy.parent.iterdir()] == ["policy"]  # nothing half-built is left beside it
    saved = json.loads((policy / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert saved["padding_side"] == "left" and saved["clean_up_tokenization_spaces"] is False


def test_every_prompt_is_short_for_the_policy(policy):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy)
    rows = [json.loads(line) for line in (FOLDER / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True) for row in rows]
    assert max(map(len, tokenizer(texts)["input_ids"])) < 70


@pytest.fixture(scope="module")
def demo(policy, tmp_path_factory):
    """Two steps of the demo, since a warm-up begins at the learning rate 0: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    done = subprocess.run(
        [sys.executable, FOLDER / "demo.py", folder, "--steps", "2"],
        env={**os.environ, "PERSONAS_POLICY": str(policy)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_the_demo_trains_reports_and_shows_answers(demo):
    folder, output = demo
    assert "\n[pgrpo] step 2  100%  ETA 0:00  reward: " in output
    assert "reward, first 1 steps -> last 1 steps" in output
    for name in ("vera", "zoe", "mara"):
        assert f"\n{name}: I love" in output
    assert output.count("before: ") == output.count("after:  ") == 3
    for product in ("checkpoint/model.safetensors", "metrics.jsonl", "report.html", "train.log"):
        assert (folder / product).stat().st_size > 0
    assert list((folder / "tensorboard").rglob("events*"))


def test_the_report_of_the_demo_opens_in_a_browser(demo, visit):
    report = demo[0] / "report.html"
    with visit(report) as seen:
        seen.page.wait_for_selector(".plotly .scatterlayer .trace", state="attached")
        assert "I love" in seen.page.inner_text("body")
        assert seen.requests == [report.resolve().as_uri()] and seen.complaints == []
