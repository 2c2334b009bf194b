"""The verbs and flags of the door to the host's reward server."""

import pytest

from openrlhf_pgrpo.host import doors

pytestmark = pytest.mark.host


@pytest.fixture
def served(monkeypatch):
    """What has been served, instead of serving it."""
    from openrlhf_pgrpo.host.serve import server

    served = []
    monkeypatch.setattr(server, "serve", lambda *given: served.append(given))
    return served


@pytest.fixture
def parse(host_parser):
    def parse(folder, *words):
        words = ["--reward.model_name_or_path", str(folder), *map(str, words)]
        return doors.SERVE.parse_args(host_parser(doors.SERVE.script), words)

    return parse


def test_parsing_serves_nothing(parse, served, factorized):
    assert vars(parse(factorized))["data.user_key"] == "user" and served == []


def test_a_factorized_model_is_served_and_the_process_ends(parse, served, factorized):
    with pytest.raises(SystemExit) as done:
        doors.SERVE.prepare(parse(factorized, "--data.user_key", "who"))
    ((args, folder),) = served
    assert not done.value.code and args.data.user_key == "who" and folder.users == ["ana", "bob", "cleo"]


def test_a_plain_model_is_left_to_the_host(parse, served, tiny):
    args = parse(tiny / "model")
    doors.SERVE.prepare(args)
    assert served == [] and vars(args)["ds.attn_implementation"] == "sdpa"


REFUSED = {
    "--reward.unknown_user needs a factorized reward model in --reward.model_name_or_path, got a plain one": (
        ("--reward.unknown_user", "mean")
    ),
    "--reward.profiles needs a factorized reward model": ("--reward.profiles", "p"),
    "--reward.user_key is now called --data.user_key": ("--reward.user_key", "who"),
    "--reward.unknown needs its whole name": ("--reward.unknown", "mean"),
    "--data.user needs its whole name": ("--data.user", "who"),
    "--pgrpo.dev needs its whole name": ("--pgrpo.dev", "cpu"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_work_is_a_usage_message(parse, served, tiny, capsys, message):
    with pytest.raises(SystemExit) as refused:
        doors.SERVE.prepare(parse(tiny / "model", *REFUSED[message]))
    assert refused.value.code == 2 and f"error: {message}" in capsys.readouterr().err


def test_help_lists_everything(host_parser):
    parser = host_parser(doors.SERVE.script)
    doors.SERVE.extend(parser)
    for flag in ("--reward.unknown_user", "--reward.profiles", "--data.user_key", "--pgrpo.device"):
        assert flag in parser.format_help()
