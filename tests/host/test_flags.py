"""How options become flags, and which spellings of flags are refused."""

import argparse
from dataclasses import dataclass, field
from typing import Literal

import pytest

from openrlhf_pgrpo.host import doors, flags

pytestmark = pytest.mark.host

DOORS = {"PPO": doors.PPO, "DPO": doors.DPO, "RM": doors.RM, "SERVE": doors.SERVE}


@dataclass(frozen=True)
class Options:
    count: int = 3
    rate: float | None = None
    name: str = field(default="a", metadata={"help": "One of two, 100 % of them.", "choices": ("a", "b")})
    fast: bool = True

    def __post_init__(self):
        if self.count < 0:
            raise ValueError(f"count needs a number >= 0, got {self.count}")


def parsed(*words, options=Options, only=None):
    parser = argparse.ArgumentParser()
    flags.add_options(parser, "mine", options, only)
    return vars(parser.parse_args(words))


def test_options_become_flags_and_flags_options():
    assert flags.read_options(Options, "mine", parsed()) == Options()
    words = ("--mine.count", "5", "--mine.rate", "0.5", "--mine.name", "b", "--no-mine.fast")
    assert flags.read_options(Options, "mine", parsed(*words)) == Options(5, 0.5, "b", False)


def test_a_refusal_begins_with_the_flag():
    with pytest.raises(ValueError, match="^--mine.count needs a number >= 0, got -1"):
        flags.read_options(Options, "mine", parsed("--mine.count", "-1"))


def test_a_refusal_that_names_no_option_names_the_namespace():
    @dataclass
    class Pair:
        low: int = 0
        made: int = field(init=False, default=0)

        def __post_init__(self):
            raise ValueError("low and high are the wrong way round" if self.low > 1 else "too little of both")

    assert parsed(options=Pair) == {"mine.low": 0}
    with pytest.raises(ValueError, match="^options of mine: too little of both"):
        flags.read_options(Pair, "mine", {"mine.low": 1})
    with pytest.raises(ValueError, match="^--mine.low and high"):
        flags.read_options(Pair, "mine", {"mine.low": 2})


def test_what_is_left_out_keeps_its_default():
    assert parsed(only=("count",)) == {"mine.count": 3}
    assert flags.read_options(Options, "mine", {"mine.count": 4}, ("count",)) == Options(4)


def test_a_field_that_cannot_be_a_flag_is_refused():
    @dataclass
    class NoDefault:
        count: int

    @dataclass
    class Listed:
        many: list = None

    @dataclass
    class Mixed:
        one: Literal[1, "a"] = 1

    @dataclass
    class Unknown:
        what: "Nobody" = None  # noqa: F821

    refusals = ((NoDefault, "a plain default, got .*: NoDefault.count"), (Listed, "got .*list.*: Listed.many"))
    refusals += ((Mixed, "one type, got .*: Mixed.one"), (Unknown, "'Nobody' is not defined in Unknown"))
    for options, message in refusals:
        with pytest.raises(ValueError, match=message):
            parsed(options=options)


def test_flags_that_are_set():
    def add(parser):
        flags.add_options(parser, "mine", Options)

    assert flags.set_flags(add, parsed()) == []
    assert flags.set_flags(add, parsed("--mine.count", "5", "--no-mine.fast")) == ["mine.count", "mine.fast"]


@pytest.fixture
def refusal(host_parser, capsys):
    """What a door says to words that it refuses."""

    def refusal(door, *words):
        with pytest.raises(SystemExit) as ended:
            DOORS[door].parse_args(host_parser(DOORS[door].script), [*words])
        assert ended.value.code == 2
        return capsys.readouterr().err

    return refusal


@pytest.mark.parametrize(
    ("door", "old"),
    [
        *(("PPO", old) for old in flags.OLD_SPELLINGS),
        *(("DPO", old) for old in ("--robust.group_key", "--robust.metrics_path")),
        *(("RM", old) for old in ("--reward.metrics_path", "--reward.user_key")),
        ("SERVE", "--reward.user_key"),
    ],
)
def test_an_old_spelling_is_refused_with_the_new_one(door, old, refusal):
    for words in ((old, "x"), (f"{old}=x",)):
        assert f"{old} is now called --{flags.OLD_SPELLINGS[old]}" in refusal(door, *words)


def test_an_old_spelling_of_a_flag_that_a_door_does_not_have_says_so(refusal):
    said = refusal("DPO", "--pgrpo.user_key", "x")
    assert (
        "--pgrpo.user_key is an old name of --data.user_key, which does nothing in this script: leave it out" in said
    )


@pytest.mark.parametrize(
    "door, flag", [("RM", "data.pref_group_key"), ("DPO", "data.user_key"), ("PPO", "data.preference_key")]
)
def test_d18_a_flag_of_other_trainers_is_refused_by_name(door, flag, refusal):
    """A column that this trainer does not read is no flag of it."""
    assert f"--{flag} is for other trainers and does nothing in this script" in refusal(door, f"--{flag}", "x")


def test_arguments_are_nested_as_the_host_nests_them(host_parser):
    from openrlhf.utils.config import hierarchize

    for door in DOORS.values():
        args = host_parser(door.script).parse_args([])
        assert flags.nest(args) == hierarchize(args)


@pytest.mark.parametrize("flag", flags.GONE)
def test_a_flag_that_is_gone_is_named(flag, refusal):
    assert f"{flag} is gone" in refusal("PPO", flag, "x")


@pytest.mark.parametrize("words", [("--advantage_estimator", "pgrpo_centered"), ("--robust.base=pgrpo_centered",)])
def test_the_old_name_of_an_estimator_is_refused_with_the_new_one(words, refusal):
    assert "is now --advantage_estimator pgrpo --pgrpo.center prompt" in refusal("PPO", *words)


@pytest.mark.parametrize(
    "door, short, whole",
    [
        ("PPO", "--pgrpo.dev", "--pgrpo.device"),
        ("PPO", "--data.pref", "--data.pref_group_key"),
        ("PPO", "--pgrpo.min=3", "--pgrpo.min_count"),
        ("PPO", "--adv", "--advantage_estimator"),
        ("DPO", "--robust.weight", "--robust.weights"),
        ("RM", "--reward.fact", "--reward.factors"),
        ("SERVE", "--reward.prof", "--reward.profiles"),
    ],
)
def test_an_abbreviation_of_our_flags_is_refused(door, short, whole, refusal):
    assert f"{short.split('=')[0]} needs its whole name, got an abbreviation of {whole}" in refusal(door, short, "cpu")


def test_abbreviations_of_the_hosts_flags_stay_what_they_are(host_parser):
    args = doors.DPO.parse_args(host_parser(doors.DPO.script), ["--model.model_name", "m"])
    assert vars(args)["model.model_name_or_path"] == "m"
