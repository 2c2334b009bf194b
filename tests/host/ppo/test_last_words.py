"""What a run says at its end when something of it died; the errors are Ray's own."""

import sys
import zipfile

import pytest
import ray
from ray.core.generated.common_pb2 import ActorDiedErrorContext

from openrlhf_pgrpo.host.ppo import last_words

pytestmark = pytest.mark.host

DETAIL = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: "
    "Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the"
)


def death_of(name, message=DETAIL):
    context = ActorDiedErrorContext(class_name=name, actor_id=bytes(16), pid=7, error_message=message)
    return ray.exceptions.ActorDiedError(context)


@pytest.fixture
def ended(monkeypatch, capsys, tmp_path):
    """The last two lines of a run that ends by an error, while nodes of the names `lost` died."""

    def end(error, lost=()):
        nodes = [{"NodeID": name, "NodeName": name, "Alive": name != "old"} for name in ("n1", "n2", "old")]
        monkeypatch.setattr(ray, "nodes", lambda: nodes)
        monkeypatch.setattr(ray, "shutdown", lambda: print("workers' output", file=sys.stderr))
        monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: print("traceback", file=sys.stderr))
        last_words.install(tmp_path)
        for node in nodes:
            node["Alive"] = node["Alive"] and node["NodeName"] not in lost
        sys.excepthook(type(error), error, None)
        return capsys.readouterr().err.splitlines()

    return end


def test_the_dead_are_named_after_all_other_output(ended):
    traceback, others, who, _ = ended(death_of("RolloutRayActor"))
    assert (traceback, others) == ("traceback", "workers' output")
    assert who == (
        "[pgrpo] the run has failed: a rollout engine (vLLM) died. Worker unexpectedly exits with a connection error "
        "code 2."
    )
    assert "training rank of the policy died. " in ended(death_of("PolicyModelActor"))[2]
    assert "Mine died. Ray says why above." in ended(death_of("Mine", "Nobody knows."))[2]


def test_an_error_inside_an_actor_names_the_one_that_died_for_it(ended):
    """The trainer's task failed because an engine died: Ray hands on both, the inner one in the text."""
    inner = death_of("RolloutRayActor")
    error = ray.exceptions.RayTaskError("PPOTrainer.fit", f"Traceback ...\n{inner}", inner).as_instanceof_cause()
    assert "a rollout engine (vLLM) died." in ended(error)[2]
    assert "a rollout engine (vLLM) died." in ended(death_of("PPOTrainer", f"It failed, because\n{inner}"))[2]


def test_a_lost_node_comes_before_what_was_lost_with_it(ended):
    assert ended(death_of("PolicyModelActor"), lost=["n2"])[2] == "[pgrpo] the run has failed: node n2 died"


def test_it_waits_until_ray_reports_the_death_of_a_node(ended, monkeypatch):
    """The third check sees it."""
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 2:
            ray.nodes()[1]["Alive"] = False

    monkeypatch.setattr(last_words.time, "sleep", sleep)
    unavailable = ray.exceptions.ActorUnavailableError("RpcError: Socket closed", bytes(16))
    assert ended(unavailable)[2] == "[pgrpo] the run has failed: node n2 died" and len(looks) == 2
    assert "died" in ended(death_of("PolicyModelActor"))[2] and len(looks) == 2  # that one is explained


def test_an_error_of_the_training_itself_is_its_last_line(ended):
    trace = "Traceback ...\n  line 3\nValueError: every sample needs a reward, got none"
    error = ray.exceptions.RayTaskError("PPOTrainer.fit", trace, ValueError("…")).as_instanceof_cause()
    assert ended(error)[2] == "[pgrpo] the run has failed: ValueError: every sample needs a reward, got none"


def save_checkpoint(folder, tag):
    (folder / tag).mkdir(parents=True)
    with zipfile.ZipFile(folder / tag / "mp_rank_00_model_states.pt", "w"):
        pass
    (folder / "latest").write_text(tag)


def test_how_to_go_on_depends_on_what_was_saved(ended, tmp_path):
    assert ended(death_of("X"))[3] == f"[pgrpo] start again: there is no complete checkpoint in {tmp_path}"
    save_checkpoint(tmp_path / "_actor", "global_step4")
    assert ended(death_of("X"))[3] == (
        f"[pgrpo] resume from global_step4 in {tmp_path}: the same command, with --ckpt.load_enable"
    )


def test_d1_half_a_checkpoint_is_not_advised(ended, tmp_path):
    (tmp_path / "_actor" / "global_step4").mkdir(parents=True)
    (tmp_path / "_actor" / "latest").write_text("global_step4")
    assert "start again: there is no complete checkpoint" in ended(death_of("X"))[3]


def test_d3_d7_an_error_of_code_is_not_to_be_resumed_into(ended, tmp_path):
    save_checkpoint(tmp_path / "_actor", "global_step4")
    error = ray.exceptions.RayTaskError("PPOTrainer.fit", "Traceback\nStopIteration", ValueError("…"))
    assert ended(error.as_instanceof_cause())[3].startswith(
        "[pgrpo] mend its cause first, or it comes again; then resume from global_step4"
    )


def test_errors_that_are_not_of_ray_are_left_alone(ended):
    assert ended(ValueError("mine")) == ["traceback"]
