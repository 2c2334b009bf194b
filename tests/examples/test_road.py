"""The parts of the road that are no commands: votes as ratings, a stranger's answers, the page, and what is kept."""

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "road"


@pytest.fixture
def modules(monkeypatch):
    """The example's modules, under names that no other test uses."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = ("demo", "models", "page", "votes", "road")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import votes

    import road

    yield road, votes
    for name in names:
        sys.modules.pop(name, None)


def test_votes_are_ratings_of_people_and_statements_with_enough(modules, polis):
    _, votes = modules
    assert votes.is_polis(polis) and not votes.is_polis(polis / "other")
    rows = votes.ratings(polis)
    assert len(rows) == 30 * 30 and {row["user"] for row in rows} == {f"p{person}" for person in range(30)}
    assert rows[0] == {"user": "p0", "prompt": rows[0]["prompt"], "response": "view, 0", "rating": -1}
    assert len({row["prompt"] for row in rows}) == 8
    assert len({(row["user"], row["prompt"]) for row in rows}) == 30  # one prompt for each person


def new_road(road, folder, **given):
    (folder / "done").mkdir()
    return road.Road(folder, **{"data": folder, "policy": folder, "steps": 1, "pairs": 5, **given})


def test_the_stranger_answers_as_they_rated(modules, tmp_path):
    walked = new_road(modules[0], tmp_path)
    walked.rated = {"more land": 1.0, "1": -1.0}
    question = "\nQuestion 1 of 10\n  what?\n\n1\n  {}\n\n2\n  {}\n\n1, 2, =, q: "
    assert walked.choice(question.format("more land", "1")) == "1"
    assert walked.choice("before\n" + question.format("1", "more land")) == "2"


def test_a_station_is_done_once_and_what_follows_again(modules, tmp_path, monkeypatch):
    """A station with another command is done again, and so are those that follow from it."""
    road, _ = modules
    ran = []
    monkeypatch.setattr(road.Road, "run", lambda self, command, log: ran.append(command) or "said")
    (tmp_path / "old").mkdir()

    def walk(first):
        walked = road.Road(tmp_path, tmp_path, tmp_path, 1, 5)
        walked.station("one", ".", first)
        walked.station("two", ".", "b", clear=("old", "none"))
        return [station["output"] for station in walked.told]

    (tmp_path / "done").mkdir()
    assert walk("a") == ["said", "said"] and not (tmp_path / "old").exists()
    assert walk("a") == ["said", "said"] and ran == ["a", "b"]
    walk("c")
    assert ran == ["a", "b", "c", "b"]


def test_a_command_that_fails_ends_the_road_and_is_not_done(modules, tmp_path):
    walked = new_road(modules[0], tmp_path)
    with pytest.raises(SystemExit, match="ended with 3; once mended, the same call goes on from here"):
        walked.station("one", ".", "python -c 'raise SystemExit(3)'")
    assert not [*(tmp_path / "done").iterdir()]


def test_the_page_tells_every_station(modules, tmp_path):
    road, _ = modules
    after = [{"answers": 0, "by information": {"all": {"accuracy": {"value": 0.6, "error": 0.01}}}}, {"answers": 20}]
    (tmp_path / "evaluation.json").write_text(json.dumps({"new": {"after": after}}))
    (tmp_path / "comparison").mkdir()
    rates = dict(win_rate=0.75, low=None, high=None)
    (tmp_path / "comparison" / "result.json").write_text(json.dumps({"all": rates, "pref_groups": {"<a>": rates}}))
    told = [dict(title="one", sentence="why", command="openrlhf-pgrpo <b>", output="said & done")]
    text = road.write_page(tmp_path, told, {"at random": -0.25}).read_text()
    for shown in ("0.600 ± 0.010", "75.0%", "&lt;a&gt;", "openrlhf-pgrpo &lt;b&gt;", "said &amp; done", "-0.25"):
        assert shown in text
