"""What a page says, read as text: no browser."""

import html
import os
import re
import subprocess
import sys

import pytest

from openrlhf_pgrpo.report import figures, write_report
from openrlhf_pgrpo.report.runs import read
from openrlhf_pgrpo.report.selection import DRAWN, LISTED, make_view
from openrlhf_pgrpo.report.tables import estimate, moment

pytestmark = pytest.mark.core
NAN = float("nan")
ANN, BOB, CLEO = (9, 0.0, 1.0), (9, 2.0, 1.0), (9, 4.0, 1.0)


@pytest.fixture
def text_of(tmp_path):
    """The text of a report, without tags and figures, and with single spaces."""

    def text_of(*runs):
        page = write_report(runs, tmp_path / "report.html").read_text()
        body = page[page.index("<body>") : page.index('<script type="application/json"')]
        return html.unescape(" ".join(re.sub(r"<[^>]*>", " ", body).split()))

    return text_of


def test_a_page_names_the_run_and_sums_it_up(make_row, write_run, text_of):
    text = text_of(write_run("my-run", [make_row(1, {"ann": ANN, "bob": BOB}), make_row(2, {"ann": BOB, "bob": BOB})]))
    assert "my-run" in text
    # ann: from 0 to 2, errors sqrt(9 / (9 * 8)) each; 18 rewards with std sqrt(1 + 1); bob stays
    assert "ann 18 50 % 0.00 ± 0.35 2.00 ± 0.35 +2.00 ± 0.50 +1.41 ± 0.35" in text
    assert "bob 18 50 % 2.00 ± 0.35 2.00 ± 0.35 +0.00 ± 0.50 +0.00 ± 0.50 gained least" in text
    assert "last step 2" in text and "written 2027-01-15 08:02 UTC" in text


def test_a_run_without_records_of_itself_says_so(make_row, write_run, text_of):
    assert "has no settings and versions" in text_of(write_run("a", [make_row(1, {"ann": ANN})]))


def test_a_killed_run_has_its_page_and_says_so(make_row, write_run, text_of):
    assert "incomplete and left out" in text_of(write_run("a", [make_row(1, {"ann": ANN})], '{"st'))


def test_a_resumed_run_shows_when_and_what_changed(make_row, write_run, text_of):
    records = [{"device": "cpu", "started": start, "settings": {"lr": lr}} for start, lr in ((NAN, 1e-5), (0, 2e-5))]
    rows = [make_row(1, {"ann": ANN}, run=records[0]), make_row(2, {"ann": ANN}, run=records[1])]
    text = text_of(write_run("a", rows))
    assert "resumed at step 2, 1970-01-01 00:00 UTC; a dotted line marks the step." in text
    assert text.count("resumed at") == 1
    assert "Changed when a was resumed from step 1 from step 2 lr 1e-05 2e-05" in text


def test_a_run_that_an_older_version_began_took_all_of_its_time(make_row, write_run, text_of):
    """Its first steps have no record of their process. The minutes from step 1 to 60, and those since the resume."""
    late = 1_900_000_000
    rows = [make_row(step, {"ann": ANN}) for step in range(1, 61)]
    rows += [
        {
            **make_row(step, {"ann": ANN}, run={"started": late} if step == 61 else None),
            "time": late + 60 * (step - 60),
        }
        for step in range(61, 71)
    ]
    text = text_of(write_run("a", rows))
    assert "took 69 min" in text
    assert "resumed at step 61, 2030-03-17 17:46 UTC; a dotted line marks the step." in text
    figure = figures.metric(make_view([read(write_run("b", rows), "b")]), "reward_mean")
    assert [shape.x0 for shape in figure.layout.shapes] == [61]


def test_settings_and_versions_are_shown_as_they_were_given(make_row, write_run, text_of):
    settings = {"actor.adam.lr": 5e-05, "flag": True, "none": None, "text": "", "nan": NAN}
    run = {"started": 0, "versions": {"torch": "2.13.0"}, "device": "cpu", "settings": settings}
    text = text_of(write_run("a", [make_row(1, {"ann": ANN}, run=run)]))
    for pair in ("actor.adam.lr 5e-05", "flag true", "none –", 'text ""', "nan NaN", "torch 2.13.0", "device cpu"):
        assert pair in text


def test_runs_differ_in_what_differs_and_in_their_preference_groups(make_row, write_run, text_of):
    runs = []
    for name, lr, rewards in (("one", 1e-5, {"ann": ANN, "bob": BOB}), ("two", 2e-5, {"ann": CLEO, "cleo": CLEO})):
        record = {"started": lr, "versions": {"torch": "2.13.0"}, "settings": {"lr": lr, "seed": 7}}
        runs.append(write_run(name, [make_row(1, rewards, run=record), make_row(2, rewards)]))
    text = text_of(*runs)
    differ = text[text.index("How the runs differ Settings") : text.index("Mean reward in the last quarter")]
    assert "lr 1e-05 2e-05" in differ
    assert not {"seed", "torch", "started"} & set(differ.split())
    # ann: 4 - 0, each with error sqrt(1/8)
    assert "ann 0.00 ± 0.35 gained +0.00 ± 0.50 gained least 4.00 ± 0.35 +4.00 ± 0.50" in text
    assert re.search(r"bob 2.00 ± 0.35 gained \S+ ± 0.50 not in this run", text)
    assert "cleo not in this run 4.00 ± 0.35 gained" in text
    assert "bob only in one" in text and "cleo only in two" in text and "ann gained least in one, two" in text


def test_numbers_that_are_not_finite_never_show(make_row, write_run, text_of):
    rows = [make_row(1, {"ann": (9, NAN, NAN), "bob": BOB}), make_row(2, {"ann": (9, float("inf"), 1.0), "bob": BOB})]
    text = text_of(write_run("a", rows))
    assert "ann 18 50 % – – – –" in text  # its samples were there; their rewards are not known
    assert "recorded numbers are not finite (NaN or infinity) and are left out" in text
    assert not re.search(r"\bnan\b|\binf\b", text)


def test_a_run_without_preference_groups_has_its_page(make_row, write_run, text_of):
    text = text_of(write_run("a", [make_row(1, {}), make_row(2, {})]))
    assert "no preference groups were recorded" in text
    assert "The whole batch" in text and "At a glance" not in text


def test_any_other_metric_has_a_figure_under_its_own_name(make_row, write_run, text_of):
    more = {"my/temperature": 0.5, "weight": 1.0}
    rows = [make_row(step, {"ann": ANN}, more=more, host_number=3.0) for step in (1, 2)]
    text = text_of(write_run("a", rows))
    for title in ("my/temperature", "Weight of the preference group", "host_number"):
        assert title in text


def test_many_preference_groups_are_cut_and_counted(make_row, write_run, tmp_path, text_of):
    rewards = {f"user {i}": (9, 0.1 * i, 1.0) for i in range(3000)}
    file = write_run("a", [make_row(step, rewards) for step in (1, 2, 3)])
    text = text_of(file)
    assert f"3,000 preference groups: {DRAWN} are drawn" in text
    assert f"{LISTED} of 3,000 preference groups" in text and f"the other {3000 - DRAWN:,}" in text
    assert len(text) < 20_000 and (tmp_path / "report.html").stat().st_size < 6e6


def test_seven_runs_have_one_page(make_row, write_run, text_of):
    text = text_of(*[write_run(f"run {i}", [make_row(step, {"ann": ANN}) for step in (1, 2)]) for i in range(7)])
    assert "7 runs compared" in text and all(f"run {i}" in text for i in range(7))


def test_before_and_after_are_side_by_side(make_row, write_run, text_of):
    def sample(response, reward):
        return [{"pref_group": "ann", "prompt": "Who?", "response": response, "reward": reward}]

    recorded = enumerate((sample("Nobody.", -1.5), sample("Me!", NAN)), start=1)
    rows = [make_row(step, {"ann": ANN}, samples) for step, samples in recorded]
    assert "Who? early · step 1 · reward −1.5 Nobody. late · step 2 Me!" in text_of(write_run("a", rows))


def test_names_cannot_become_markup(make_row, write_run, tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\u2028"
    sample = {"pref_group": evil, "prompt": evil, "response": evil, "reward": 1.0}
    run = {"started": 0, "settings": {evil: evil}, "versions": {evil: evil}}
    rewards, more = {evil: ANN, "ann": BOB}, {evil: 1.0}
    rows = [make_row(step, rewards, [sample], run, more, **more) for step in (1, 2)]
    page = write_report([write_run("a", rows)], tmp_path / "report.html").read_text()
    assert "alert(1)" in page
    assert "<script>alert" not in page and "<img" not in page[: page.index("<footer>")]


def test_samples_are_counted_with_or_without_rewards(make_row, write_run, text_of):
    """Rewards that are not finite in half of the steps are no reason to count half of the samples."""
    rows = [make_row(step, {"ann": (8, NAN if step % 2 else 1.0, 0.5), "bob": (8, 1.0, 0.5)}) for step in range(1, 11)]
    text = text_of(write_run("a", rows))
    assert "samples 160 preference groups 2" in text and "ann 80 50 % " in text and "bob 80 50 % " in text


@pytest.fixture
def preference_training(make_row, write_run):
    """A run of DPO: pairs, losses and now and then an evaluation, but no rewards. Of thirty preference groups, each in
    every step, g00 has the fewest pairs."""
    rows = []
    for step in range(1, 21):
        row = make_row(step, {f"g{i:02d}": (i + 1, 0.0, 0.0) for i in range(30)})
        for i, group in enumerate(row["pref_groups"].values()):
            for key in [key for key in group if key not in ("samples", "share")]:
                del group[key]
            group |= {"loss": 0.5, **({"eval_pairs": 50.0, "eval_loss": 0.1 * i} if step % 10 == 0 else {})}
        rows.append(row)
    return write_run("dpo", rows)


def test_preference_training_counts_pairs_and_draws_the_largest(preference_training, text_of):
    text = text_of(preference_training)
    assert "samples 9,300 preference groups 30" in text  # 20 * 465
    assert f"30 preference groups: {DRAWN} are drawn, the largest. The others" in text
    view = make_view([read(preference_training, "dpo")])
    assert view.drawn == [f"g{i:02d}" for i in range(18, 30)]
    assert view.runs[0].summary.share[-1] == pytest.approx(30 / 465)


def test_letters_without_utf8_do_not_lose_the_page(make_row, write_run, tmp_path):
    page = write_report([write_run("a", [make_row(1, {"half \ud83d emoji": ANN})])], tmp_path / "report.html")
    assert "half ? emoji" in page.read_text()


def test_a_page_is_written_whole_or_not_at_all(make_row, write_run, tmp_path, monkeypatch):
    file, page = write_run("a", [make_row(1, {"ann": ANN})]), tmp_path / "new" / "folder" / "report.html"
    assert write_report([file], page) == page and page.read_text().startswith("<!doctype html>")
    page.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report([file], page)
    assert page.read_text() == "old"


def test_a_folder_is_no_place_for_a_page(make_row, write_run, tmp_path):
    with pytest.raises(ValueError, match="needs the name of a file to write, got the folder"):
        write_report([write_run("a", [make_row(1, {})])], tmp_path)


def test_a_missing_plotly_says_what_to_install(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.startswith("openrlhf_pgrpo.report.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ModuleNotFoundError, match=re.escape('pip install "openrlhf-pgrpo[report]"')):
        write_report([tmp_path], tmp_path / "report.html")


def test_importing_the_report_loads_neither_plotly_nor_the_host():
    heavy = "import sys, openrlhf_pgrpo.report as r; heavy = {'torch', 'ray', 'openrlhf', 'plotly', 'jinja2'}"
    more = "; from openrlhf_pgrpo.report import page; assert not {'torch', 'ray', 'openrlhf'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", f"{heavy}; assert not heavy & set(sys.modules){more}"], check=True)


@pytest.mark.parametrize(
    "pair, text",
    [
        ((1.23456, 0.0234), "1.235 ± 0.023"),
        ((-1234.5, 56.7), "−1234 ± 57"),
        ((0.00012345, 0.0000123), "0.000123 ± 0.000012"),
        ((1e-9, 1e-10), "1e−09 ± 1e−10"),
        ((2.5e8, 3e7), "2.5e+08 ± 3e+07"),
        ((2.0, 0.0), "2"),
        ((2.0, NAN), "2"),
        ((NAN, 1.0), "–"),
    ],
)
def test_an_estimate_has_two_digits_of_its_error(pair, text):
    assert estimate(pair) == text


@pytest.mark.parametrize("when", [None, NAN, "yesterday", 1e300])
def test_a_strange_time_is_unknown(when):
    assert moment(when) == "at an unknown time"


def test_a_run_without_rewards_shows_its_losses(make_row, write_run, text_of):
    rows = [make_row(step, {"ann": ANN}, more={"loss": 0.7}) for step in (1, 2)]
    for row in rows:
        for group in row["pref_groups"].values():
            del group["reward_mean"], group["reward_std"]
    text = text_of(write_run("a", rows))
    assert "More per preference group" in text and " loss " in text
    assert "At a glance" not in text and "each on its own scale" not in text
