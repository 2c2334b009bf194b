"""The opinions of five countries: cells, pairs and weights of made-up rows by hand, and the real file where there is
one."""

import gzip
import json
import sys

import numpy as np
import pytest

import group_robust_opinions as opinions

pytestmark = pytest.mark.core

COUNTRIES = ("Aland", "Borduria", "Carpania")


def row(country, question, shares, options=None):
    options = options or ["Good", "Bad", "Neither", "Both"][: len(shares)]
    return {"question": question, "options": options, "group": country, "dist": shares}


def saved(folder, rows):
    with gzip.open(folder / opinions.FILE, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder / opinions.FILE


@pytest.fixture(scope="module")
def cells():
    """60 questions of three countries; the third answers only every other one."""
    rng = np.random.default_rng(0)
    return [
        opinions.Cell(country, f"Question {q}?", ("Good", "Bad", "Neither", "Both")[: 2 + q % 3], tuple(shares))
        for q in range(60)
        for country in COUNTRIES[: 2 + q % 2]
        for shares in [rng.dirichlet(np.ones(2 + q % 3))]
    ]


@pytest.fixture(scope="module")
def phi(cells):
    return np.random.default_rng(1).normal(size=(sum(len(cell.options) for cell in cells), 40))


@pytest.fixture(scope="module")
def world(cells, phi):
    return opinions.World.draw(cells, phi, COUNTRIES, 4)


# --- data ------------------------------------------------------------------------------------------------------------


def test_options_that_are_no_answer_and_cells_without_answers_are_dropped(tmp_path):
    rows = [
        row("Aland", " How is it? ", [0.3, 0.2, 0.05, 0.5], ["Good", "Bad", "DK/Refused", "Total    N="]),
        row("Aland", "Nobody?", [0.0, 0.0]),
        row("Aland", "One?", [0.4, 0.6], ["Good", "Don't Know"]),
        row("Borduria", "Who?", [0.2, 0.7, 0.1], ["Those I know", "No, I do not know any", "Missing; Unknown"]),
    ]
    assert opinions.read(saved(tmp_path, rows)) == [
        ("Aland", "How is it?", ("Good", "Bad"), (0.3, 0.2)),
        ("Borduria", "Who?", ("Those I know", "No, I do not know any"), (0.2, 0.7)),
    ]


def test_countries_are_those_with_the_most_cells_that_share_questions():
    asked = {"a": "12349", "b": "12", "c": "13", "d": "45678", "e": "0"}
    cells = [opinions.Cell(c, q, ("x", "y"), (1, 0)) for c, questions in asked.items() for q in questions]
    assert opinions.most_shared(cells, 2) == ("a", "b")  # 2 questions, as a and c; d has most cells and shares one
    assert opinions.most_shared(cells, 3) == ("a", "b", "c")  # question 1 three times, 2 and 3 twice: 7 cells
    assert [cell[:2] for cell in opinions.sharing(cells, ("a", "c", "d"))] == [
        *(("a", q) for q in "134"), ("c", "1"), ("c", "3"), ("d", "4")
    ]  # fmt: skip


def test_no_question_is_in_two_parts_and_the_parts_are_80_10_10(world, cells):
    lengths = np.array([len(cell.options) for cell in cells])
    question = np.array([cell.question for cell in cells])
    losers = np.repeat(question, lengths - 1)
    for run in range(4):
        parts = [set(question[world.training[run].any(1)])]
        parts += [set(losers[part[run].any(1)]) for part in (world.validation, world.test)]
        assert [len(part) for part in parts] == [48, 6, 6] and len(set.union(*parts)) == 60
    assert (world.test[0] != world.test[1]).any()
    for part in (world.training, world.validation, world.test):
        np.testing.assert_allclose(part.sum(1), 1, rtol=1e-12)  # means over a country
    np.testing.assert_array_equal(world.counts, (world.training > 0).sum(1))


def test_a_cell_is_one_training_pair_and_all_its_options_count_alike_in_the_test(world, cells):
    row = 0
    for c, cell in enumerate(cells):
        own = range(row, row := row + len(cell.options) - 1)
        for run in range(4):
            assert any(np.array_equal(world.pairs[run, c], world.every[run, pair]) for pair in own)
            assert len({tuple(world.test[run, pair]) for pair in own}) == 1
    assert row == world.every.shape[1]


def test_the_chosen_option_is_that_of_most_people_and_the_rejected_one_any_other(monkeypatch):
    def which(shares):  # one-hot features, told apart after centring and whitening by the sign of the difference
        cells = [opinions.Cell(c, f"{q}", ("x", "y", "z"), shares) for q in range(30) for c in ("a", "b")]
        return opinions.World.draw(cells, np.tile(np.eye(3), (60, 1)), ("a", "b"), 20)

    monkeypatch.setattr(opinions, "FEATURES", 2)  # three centred options span a plane
    first, second = which((0.2, 0.5, 0.3)), which((0.2, 0.3, 0.5))
    for world in (first, second):
        kinds, times = np.unique(world.pairs[0].round(9), axis=0, return_counts=True)
        assert len(kinds) == 2 and times.min() > 15  # 60 draws of two
    # y - x and y - z, then z - x and z - y: in the same run y - z has the opposite sign
    np.testing.assert_allclose(first.every[0, 1], -second.every[0, 1], atol=1e-9)
    np.testing.assert_allclose(first.every[0, 0] - first.every[0, 1], second.every[0, 0], atol=1e-9)


def test_training_options_are_white_after_centring(cells, phi):
    world = opinions.World.draw(cells, phi, COUNTRIES, 1)
    lengths = [len(cell.options) for cell in cells]
    total, count, row = 0, 0, 0
    for c, length in enumerate(lengths):
        losers = world.every[0, row : row + length - 1]
        row += length - 1
        if world.training[0, c].any():  # chosen minus option, 0 for itself: centring takes the chosen one out
            centred = np.vstack([np.zeros(opinions.FEATURES), losers])
            centred = centred - centred.mean(0)
            total, count = total + centred.T @ centred, count + length
    np.testing.assert_allclose(total / count, np.eye(opinions.FEATURES), atol=1e-9)


def test_a_country_without_a_question_in_some_part_is_refused(cells, phi):
    few = [cell for cell in cells if cell.country != "Carpania" or cell.question == "Question 1?"]
    with pytest.raises(ValueError, match="every country needs questions for training, validation and test, got"):
        opinions.World.draw(few, phi[: sum(len(cell.options) for cell in few)], COUNTRIES, 1)


# --- features --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A Llama with random weights and a tokenizer whose tokens are characters."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    vocab = {chr(code): code for code in range(128)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="~"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="\0").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaModel(config).save_pretrained(folder)
    return folder


def test_features_are_the_mean_hidden_state_of_the_option_after_its_prompt(tiny):
    import torch
    from transformers import LlamaModel

    cells = [
        opinions.Cell("Aland", "How?", ("Good", "Not good"), (0.6, 0.4)),
        opinions.Cell("Aland", "Who is it?", ("I", "You", "They all"), (0.6, 0.4, 0)),
        opinions.Cell("Borduria", "How?", ("Good", "Not good"), (0.6, 0.4)),
    ]
    found = opinions.embed(cells, tiny)
    model, expected = LlamaModel.from_pretrained(tiny), []
    for cell in cells:
        for option in cell.options:
            text = f"{cell.question}\nMost people in {cell.country} answer: {option}"
            with torch.no_grad():
                hidden = model(torch.tensor([[ord(letter) for letter in text]])).last_hidden_state[0]
            expected.append(hidden[-len(option) - 1 :].mean(0).numpy())  # the space before it is its own, too
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_features_are_made_once_for_the_same_texts(cells, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "models", type("models", (), {"build_policy": staticmethod(lambda: "folder")}))
    monkeypatch.setattr(sys, "path", [*sys.path])
    asked = []
    monkeypatch.setattr(opinions, "embed", lambda own, folder: asked.append(own) or np.ones((3, 2), np.float32))
    for own in (cells, cells, cells[1:]):
        assert opinions.features(own, tmp_path / "new").dtype == np.float64
    assert asked == [cells, cells[1:]] and len([*(tmp_path / "new").iterdir()]) == 2


# --- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, losses, slopes", [("DPO", [np.log(2), 0.126928], [-0.5, -0.119203]),
                                                  ("IPO", [1, 1], [-2, 2])])  # fmt: skip
def test_losses_and_slopes_by_hand(kind, losses, slopes):
    h = np.array([0.0, 2.0])  # IPO: (h - 1)^2
    np.testing.assert_allclose(opinions.loss_of(kind, h), losses, rtol=1e-5)
    np.testing.assert_allclose(opinions.slope_of(kind, h), slopes, rtol=1e-5)


@pytest.mark.parametrize("kind", ["DPO", "IPO"])
def test_weights_are_those_of_group_weights_and_move_theta(world, kind, monkeypatch):
    monkeypatch.setattr(opinions, "ITERATIONS", 2)
    found = opinions.learn(world, kind)
    for m, (_, options, rate) in enumerate(opinions.settings(kind)):
        weights = opinions.GroupWeights(options, dict(zip(COUNTRIES, world.counts[0])))
        theta = np.zeros(opinions.FEATURES)
        for step in range(2):
            h = world.pairs[0] @ theta
            losses = opinions.loss_of(kind, h) @ world.training[0]
            weights.update(np.arange(3), losses, world.counts[0])
            np.testing.assert_allclose(found["alpha"][step, 0, m], weights.alpha, rtol=1e-9)
            of_country = [world.pairs[0].T @ (opinions.slope_of(kind, h) * own) for own in world.training[0].T]
            theta = theta - rate * weights.alpha @ np.array(of_country)
        h = world.every[0] @ theta
        np.testing.assert_allclose(found["validation"][1, 0, m], opinions.loss_of(kind, h) @ world.validation[0])
        np.testing.assert_allclose(found["loss"][1, 0, m], opinions.loss_of(kind, h) @ world.test[0])
        np.testing.assert_allclose(found["accuracy"][1, 0, m], (h > 0) @ world.test[0])
        trained = opinions.loss_of(kind, world.pairs[0] @ theta)
        np.testing.assert_allclose(found["training"][1, 0, m], trained @ world.training[0])
    share = world.counts[0] / world.counts[0].sum()
    plain, uniform, robust = (found["alpha"][1, 0, m] for m in (0, 2, -1))
    np.testing.assert_allclose(plain, share)
    np.testing.assert_allclose(uniform, 1 / 3)
    assert np.ptp(robust) > 1e-3


def test_the_setting_and_the_moment_are_chosen_on_validation_by_the_worst_country_of_each_seed():
    names = [name for name, *_ in opinions.settings("DPO")]
    validation = np.ones((3, 2, len(names), 2))
    validation[1, 0, 1] = 0.5, 0.8  # seed 0, plain: the second step size, second moment
    validation[2, 0, 0] = 0.1, 0.9  # better on average, worse for the worst
    validation[2, 1, names.index("GR-DPO") + 4] = 0.7
    test = np.random.default_rng(0).random(validation.shape)
    found = {"validation": validation, "loss": test, "accuracy": 1 - test, "alpha": test**2, "training": 2 * test}
    chosen = opinions.choose("DPO", found)
    np.testing.assert_array_equal(chosen["DPO"]["loss"], [test[1, 0, 1], test[0, 1, 0]])
    np.testing.assert_array_equal(chosen["DPO"]["accuracy"], 1 - chosen["DPO"]["loss"])
    np.testing.assert_array_equal(chosen["GR-DPO"]["alpha"][1], test[2, 1, names.index("GR-DPO") + 4] ** 2)
    np.testing.assert_array_equal(chosen["DPO"]["training"], 2 * test[-1, :, 1])  # the larger step size, the end


def test_measures_by_hand():
    result = {"loss": np.array([[0.5, 0.7, 0.9]]), "accuracy": np.array([[0.8, 0.6, 0.7]])}
    result["training"] = np.array([[0.1, 0.3, 0.2]])
    np.testing.assert_allclose(opinions.measures(result)[:, 0], [0.9, 0.7, 0.4, 0.6, 0.7, 0.3])


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_the_tables_and_writes_the_figure(cells, phi, tmp_path, monkeypatch, capsys):
    saved(tmp_path, [row(cell.country, cell.question, list(cell.shares)) for cell in cells])
    monkeypatch.setattr(opinions, "features", lambda own, cache: phi)
    monkeypatch.setattr(opinions, "ITERATIONS", 20)
    figure = tmp_path / "opinions.png"
    figure.write_text("an old figure")
    argv = ["--data", tmp_path, "--countries", *COUNTRIES, "--seeds", "2", "--out", figure]
    opinions.main([str(word) for word in argv])
    out = capsys.readouterr().out
    assert out.startswith("Aland 60, Borduria 60, Carpania 30\n150 cells on 60 questions; all choose alike on ")
    assert "GR-IPO - IS-IPO" in out and out.count("\nGR-DPO   ") == 4 and "nan" not in out
    assert max(map(len, out.splitlines()[:-1])) <= 119
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"opinions.png", opinions.FILE}


def test_a_country_without_cells_is_refused(cells, tmp_path, capsys):
    saved(tmp_path, [row(cell.country, cell.question, list(cell.shares)) for cell in cells])
    with pytest.raises(SystemExit):
        opinions.main(["--data", str(tmp_path), "--countries", "Aland", "Utopia", "Erewhon"])
    assert f"--countries needs countries of {opinions.FILE}, got Erewhon, Utopia" in capsys.readouterr().err


def test_without_the_data_it_says_so_and_ends_well(tmp_path, capsys):
    opinions.main(["--data", str(tmp_path)])
    assert capsys.readouterr().out == (
        f"skipped: needs {opinions.FILE}, got none in {tmp_path}; name its folder by --data or $OPINIONS_DATA\n"
    )


def test_the_real_file_has_the_five_countries_of_the_table():
    path = opinions.DATA / opinions.FILE
    if not path.is_file():
        pytest.skip(f"needs {opinions.FILE}, got none in {opinions.DATA}; name its folder by $OPINIONS_DATA")
    cells = opinions.read(path)
    countries = opinions.most_shared(cells)
    assert countries == ("Britain", "France", "Germany", "Spain", "United States")
    assert len(cells) == 9804 and len(opinions.sharing(cells, countries)) == 748
    options = {option.lower() for cell in cells for option in cell.options}
    assert not any(option.startswith(("total", "dk", "no answer")) for option in options)
