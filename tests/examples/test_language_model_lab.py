"""The language-model lab: what it rewards, that a run is made once, and that wider heads leave a model as it is."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import language_model_lab as lab
import wider_heads

pytestmark = pytest.mark.host

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
STORIES = Path(os.environ.get("STORIES260K") or EXAMPLES.parents[1] / "shared" / "models" / "stories260k")


def test_a_model_that_never_earns_a_liking_is_refused(tiny):
    with pytest.raises(ValueError, match=r"needs to earn each liking sometimes, got none of \['"):
        lab.Writer(tiny / "model")


@pytest.mark.parametrize(
    "liking, text, expected",
    [
        (lab.short, "He ran far away. She sat down too! And", (14 - (4 + 4 + 1) / 3) / 10),
        (lab.short, "one two three four five six seven eight nine ten eleven twelve thirteen fourteen", 0),
        (lab.short, "...", 0),
        (lab.animals, "Two Cats saw a dog and the catalogue.", 2 / 3),
        (lab.animals, "cat cat cat cat", 1),
        (lab.dialogue, '"Hi," she said. "', 3 / 4),
        (lab.happy, "She loved it and smiled.", 2 / 3),
    ],
)
def test_a_liking_is_seen_in_the_text(liking, text, expected):
    assert liking(text) == pytest.approx(np.clip(expected, 0, 1))


def test_everybody_has_a_name_of_their_own_and_beginnings_are_held_out():
    for count in (4, 40, 400):
        assert len({*lab.people(count)}) == count
    assert len(lab.HELD_OUT) == 8 and len(lab.TRAINED) == 24 and not {*lab.HELD_OUT} & {*lab.TRAINED}


def test_a_world_of_many_users_is_drawn_by_the_seed():
    one, other = (lab.CELLS["users-40"].population(np.random.default_rng(seed)) for seed in (0, 1))
    share, scale, offset, liking = one
    assert lab.CELLS["users-40"].changed({"noise": 1.5, "samples": 4}) == lab.Cell(
        "users-40-noise-1.5-samples-4", 4, 1.5, users=40
    )
    assert share.sum() == pytest.approx(1) and (np.bincount(liking) == 10).all()
    assert (scale > 0).all() and not np.array_equal(scale, other[1]) and not np.array_equal(offset, other[2])


stories = pytest.mark.skipif(not STORIES.is_dir(), reason=f"needs stories260K, got no {STORIES}: set STORIES260K")


@pytest.mark.parametrize(
    "words, said",
    [
        (("--noise", "nan"), "--noise needs a finite number of at least 0, got nan"),
        (("--difficulty", "-1"), "--difficulty needs a finite number of at least 0, got -1"),
        (("--tune", "--samples", "4"), "--tune needs the cell groups-2-noise-0.3 as it is"),
        (("--rate", "nan"), "--rate needs a positive number, got nan"),
        (("--first_seed", "-1"), "--first_seed needs a number of at least 0, got -1"),
        (("--out", "lab.txt"), "--out needs a .png, .svg or .pdf in a folder that exists, got lab.txt"),
        (("--qui",), "unrecognized arguments: --qui"),
    ],
)
def test_a_cell_that_means_nothing_is_refused(tmp_path, capsys, words, said):
    with pytest.raises(SystemExit):
        lab.main([str(tmp_path), *words])
    assert said in capsys.readouterr().err


@stories
def test_a_run_is_made_once(tmp_path):
    names = ["ebpo_per_group", "ebpo_per_group+bounds"]
    command = [sys.executable, EXAMPLES / "language_model_lab.py", tmp_path, "--model", STORIES, "--seeds", 2]
    command += ["--steps", 4, "--cells", "users-400", "--estimators", *names]
    first = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "4 of 4 runs are to be made" in first.stdout and "nan" not in first.stdout
    rows = [line for line in first.stdout.splitlines() if line.startswith(names[0])]
    assert [row.split()[0] for row in rows] == [*names, *names]  # means, then likings
    assert rows[0].split()[1:3] != rows[1].split()[1:3]  # the weights do something
    assert len(rows[3].split()) == 9 and float(rows[3].split()[-1][:4]) > 1 / 400  # the largest alpha
    assert len([*tmp_path.rglob("rate-*.json")]) == 4

    (tmp_path / "users-400" / names[1] / f"rate-{lab.RATE:g}-steps-4-seed-1.json").unlink()
    figure = tmp_path / "figure.svg"
    again = subprocess.run([*map(str, [*command, "--out", figure])], capture_output=True, text=True)
    assert "1 of 4 runs are to be made" in again.stdout and figure.read_text().count("<svg") == 1, again.stderr
    assert {*rows} < {*again.stdout.splitlines()}  # the run that was made again is the same

    kept = tmp_path / "users-400" / names[0] / "settings.json"  # as if a default had changed since
    kept.write_text(kept.read_text().replace('"noise": 0.3', '"noise": 3.0'))
    with pytest.raises(SystemExit, match=r"needs a folder with results of .*0\.3.*, got .* with those of .*3\.0"):
        lab.main([*map(str, command[2:])])


def test_samples_needed_are_a_ratio_with_the_jackknifes_error():
    """Two seeds, two likings: means .3 .5 .7 .9, and half as fast; one seed alone is earlier or later."""
    one = np.linspace(0.3, 0.9, 4)[None, :, None] + np.array([-0.05, 0.05])[:, None, None] + np.zeros(2)
    slow = np.linspace(0.3, 0.6, 4)[None, :, None] + np.array([-0.05, 0.15])[:, None, None] + np.zeros(2)
    assert lab.evaluations_needed(one) == pytest.approx(1.5) and lab.evaluations_needed(slow) == pytest.approx(2.5)
    assert lab.ratio(one, one) == "1.00±.00" and lab.ratio(slow, one) == "never"  # not without the second seed
    assert lab.ratio(one, slow) == "alone"
    fast = one + 0.1  # needs 1, and 1.25 and .75 with one seed; `one` 1.75 and 1.25
    assert lab.ratio(fast, one) == f".67±{abs(0.75 / 1.25 - 1.25 / 1.75) / 2:.2f}".replace("0.", ".")


def test_weights_stand_after_a_plus():
    bounds = {"ana": (0.0, 1.0), "ben": (-1.0, 3.0)}
    contender, weights = lab.contender_and_weights("pgrpo:half_life=64+improvement:eta=0.5,improvement_lambda=0.2")
    assert contender.options.half_life == 64 and lab.contender_and_weights("rloo") == (lab.Contender.parse("rloo"), "")
    moving, fixed, bounded = (lab.weigher(text, bounds) for text in (weights, "importance", "bounds"))
    assert moving.weights.options.eta == 0.5 and moving.signal.options.improvement_lambda == 0.2
    assert fixed.weights.options.chi == 0
    owners, nobody = ["ana", "ana", "ana", "ben"], [None] * 4
    batch = lab.RewardBatch([0.5, 0.5, 0.5, 3.0], np.arange(4), owners, nobody, nobody)
    assert fixed(batch) == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2])  # 1/2 of the weight for each preference group
    bounded(batch)
    assert bounded.latest.tolist() == [0.5, 0]
    wrong = ("rloo+", "rloo+fairness", "rloo+quantiles:rate=1", "rloo+quantiles:eta=-1", "nobody+quantiles")
    for text in (*wrong, "rloo+importance:chi=0.5", "rloo+quantiles:eta=1,eta=2"):
        with pytest.raises(ValueError, match="needs? "):
            lab.contender_and_weights(text)


def test_wider_heads_leave_a_model_as_it_is(tiny, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=3, vocab_size=258)
    heads = dict(num_attention_heads=6, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)
    LlamaForCausalLM(LlamaConfig(**shape, **heads)).save_pretrained(tmp_path / "narrow")
    AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(tmp_path / "narrow")
    wider_heads.widen(tmp_path / "narrow", tmp_path / "wide")
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("narrow", "wide")]
    assert models[1].config.head_dim == 32
    tokens = torch.randint(258, (4, 60))
    narrow, wide = (model(tokens).logits for model in models)
    assert torch.allclose(narrow, wide, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="--head_dim needs a multiple of 8, got 20"):
        wider_heads.widen(tmp_path / "narrow", tmp_path / "other", 20)
    assert not (tmp_path / "other").exists()
    with pytest.raises(FileExistsError):
        wider_heads.widen(tmp_path / "narrow", tmp_path / "wide")


@stories
def test_the_wider_stories_are_the_stories_to_the_character(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wider_heads.widen(STORIES, tmp_path / "wide")
    tokenizer, said = AutoTokenizer.from_pretrained(STORIES), []
    for folder in (STORIES, tmp_path / "wide"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        options = dict(do_sample=False, max_new_tokens=200, eos_token_id=lab.START, pad_token_id=lab.PADDING)
        said.append(tokenizer.decode(model.generate(**tokenizer("", return_tensors="pt"), **options)[0]))
    assert said[0] == said[1]
    assert "Once upon a time, there was a little girl named Lily. She loved to play outside in the park." in said[0]


@pytest.mark.parametrize(
    "words, said",
    [
        (("--steps", "0"), "--steps needs a multiple of 4, the number of evaluations, got 0"),
        (("--seeds", "1"), "--seeds and --lab_seeds need at least 2, got 1 and 10"),
        (("--estimators", "pgrpo_robust"), "--estimators needs names that the lab has, too, from"),
    ],
)
def test_the_stack_refuses_what_the_lab_cannot_compare(tmp_path, capsys, words, said):
    import language_model_stack as stack

    with pytest.raises(SystemExit):
        stack.main([str(tmp_path / "run"), *words])
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_stack_gets_the_labs_prompts_and_rewards(monkeypatch):
    """A batch as the host hands it over: the text with its tokens' marks, the prompt, and what the label says."""
    import language_model_stack as stack  # it puts the folders of the demo on the path

    spread = np.array([0.1, 0.2, 0.25, 0.5])
    rows = stack.rows(spread, seed=3, steps=2)
    assert len(rows) == 2 * lab.BATCH // stack.CELL.samples and rows == stack.rows(spread, seed=3, steps=2)
    assert {row["person"] for row in rows} <= {*lab.people(4)}
    monkeypatch.setattr(stack.np.random, "default_rng", lambda: np.random.RandomState(0))
    noise = np.random.RandomState(0).standard_normal()
    _, scale, offset, liking = stack.CELL.population(None)
    for row in rows:
        g = lab.people(4).index(row["person"])
        query = f'<s> {row["prompt"].removeprefix("<s>")} cat. "Yes, we love it!"<s> a dog'
        (found,) = stack.reward_func([query], [row["prompt"]], [row["wish"]])["rewards"].tolist()
        value = lab.LIKINGS[liking[g]](' cat. "Yes, we love it!"') / spread[liking[g]] + stack.CELL.noise * noise
        assert found == pytest.approx(offset[g] + scale[g] * value, rel=1e-6)
    with pytest.raises(ValueError, match="needs texts that begin with their prompt '.*', got 'a cat'"):
        stack.reward_func(["a cat"], [row["prompt"]], [row["wish"]])
