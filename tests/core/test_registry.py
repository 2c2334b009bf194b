"""The names of estimators, plug-ins that add names, and what importing costs."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import openrlhf_pgrpo
from openrlhf_pgrpo.core import registry
from openrlhf_pgrpo.core.registry import (
    AdvantageEstimator,
    RewardBatch,
    advantage_estimators,
    load_plugin,
    make_advantage_estimator,
    register_advantage_estimator,
)

pytestmark = pytest.mark.core


@pytest.fixture(autouse=True)
def own_names(monkeypatch):
    """What a test registers or imports is gone after it."""
    monkeypatch.setattr(registry, "_estimators", {})
    monkeypatch.setattr(sys, "modules", sys.modules.copy())


# --- names ---------------------------------------------------------------------------------------------------------


def test_a_registered_class_is_made_by_name_with_its_options():
    @register_advantage_estimator("mine")
    class Mine(AdvantageEstimator):
        pass

    assert advantage_estimators() == {"mine": Mine}
    mine = make_advantage_estimator("mine", "options")
    assert type(mine) is Mine and mine.options == "options"


def test_what_advantage_estimators_returns_is_a_copy():
    advantage_estimators()["mine"] = AdvantageEstimator
    assert advantage_estimators() == {}


def estimator_class(module, qualname):
    return type("Mine", (AdvantageEstimator,), {"__module__": module, "__qualname__": qualname})


def test_the_same_class_again_is_fine_and_the_newer_one_counts():
    register_advantage_estimator("mine")(estimator_class("plug", "Mine"))
    again = register_advantage_estimator("mine")(estimator_class("plug", "Mine"))  # the module was imported anew
    assert advantage_estimators() == {"mine": again}


@pytest.mark.parametrize("module, qualname", [("plug", "Other"), ("other", "Mine")])
def test_two_classes_of_one_name_are_refused_and_the_first_stays(module, qualname):
    first = register_advantage_estimator("mine")(estimator_class("plug", "Mine"))
    with pytest.raises(ValueError, match=f"'mine' needs one owner, got plug.Mine and {module}.{qualname}: rename"):
        register_advantage_estimator("mine")(estimator_class(module, qualname))
    assert advantage_estimators() == {"mine": first}


def test_an_unknown_name_lists_what_exists():
    for name in ("b", "a"):
        register_advantage_estimator(name)(AdvantageEstimator)
    with pytest.raises(ValueError, match=r"needs one of \['a', 'b'\], got 'c'"):
        make_advantage_estimator("c", None)


def test_an_estimator_without_memory_saves_nothing_and_refuses_a_state():
    plain = AdvantageEstimator(options=None)
    plain.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match=r"AdvantageEstimator keeps no state, got keys \['history'\]"):
        plain.load_state_dict({"history": {}})


# --- plug-ins ------------------------------------------------------------------------------------------------------

PLUGIN = """
import numpy as np
from openrlhf_pgrpo.core.registry import AdvantageEstimator, register_advantage_estimator

@register_advantage_estimator("median_baseline")
class MedianBaseline(AdvantageEstimator):
    def __call__(self, batch):
        return batch.rewards - np.median(batch.rewards)
"""


def write(path, text=PLUGIN):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def test_a_plugin_file_registers_its_estimator_also_twice(tmp_path):
    plugin = write(tmp_path / "my plugin.py")
    for _ in range(2):
        load_plugin(plugin)
    batch = RewardBatch([1, 2, 9], [0, 0, 0], "aaa", [None] * 3, [None] * 3)
    assert list(make_advantage_estimator("median_baseline", None)(batch)) == [-1, 0, 7]


def test_a_plugin_may_be_a_dotted_module(tmp_path, monkeypatch):
    write(tmp_path / "my_package" / "__init__.py", "")
    write(tmp_path / "my_package" / "plugin.py")
    monkeypatch.syspath_prepend(tmp_path)
    load_plugin("my_package.plugin")
    assert list(advantage_estimators()) == ["median_baseline"]


def test_two_files_of_one_name_do_not_replace_each_other(tmp_path):
    load_plugin(write(tmp_path / "mine" / "plugin.py"))
    with pytest.raises(ValueError, match="'median_baseline' needs one owner"):
        load_plugin(write(tmp_path / "yours" / "plugin.py"))


def test_a_missing_plugin_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="needs an existing file, got .*nowhere.py"):
        load_plugin(str(tmp_path / "nowhere.py"))


@pytest.mark.parametrize("plugin", ["no_such_module", "no_such_package.module", "./mine", "openrlhf_pgrpo.no_such"])
def test_a_missing_plugin_module_is_named(plugin):
    with pytest.raises(ValueError) as error:
        load_plugin(plugin)
    assert f"a plugin needs a .py file or an importable module, got {plugin!r}" in str(error.value)


@pytest.mark.parametrize("text, error", [("1 / 0", ZeroDivisionError), ("import no_such_thing", ModuleNotFoundError)])
@pytest.mark.parametrize("how", ["file", "module", "package"])
def test_an_error_inside_a_plugin_passes_through(tmp_path, monkeypatch, how, text, error):
    monkeypatch.syspath_prepend(tmp_path)
    file = write(tmp_path / "broken_plugin.py", text)
    write(tmp_path / "broken_package" / "__init__.py", text)
    write(tmp_path / "broken_package" / "plugin.py")
    with pytest.raises(error):
        load_plugin({"file": file, "module": "broken_plugin", "package": "broken_package.plugin"}[how])


# --- reward batches ------------------------------------------------------------------------------------------------


def test_a_reward_batch_is_float64_and_int64():
    batch = RewardBatch([1, 2], np.array([0, 1], np.int32), ["a", "b"], [None] * 2, [None] * 2)
    assert (batch.rewards.dtype, batch.prompt_groups.dtype) == (np.float64, np.int64)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_reward_that_is_no_number_names_sample_and_preference_group(bad):
    with pytest.raises(ValueError, match=rf"got {bad} for sample 1 of preference group 'b' \(2 of 3 samples\)"):
        RewardBatch([1, bad, bad], [0, 1, 2], ["a", "b", "c"], [None] * 3, [None] * 3)


@pytest.mark.parametrize("field", ["rewards", "prompt_groups", "pref_groups", "users", "labels"])
def test_fields_of_unequal_length_are_refused_with_their_lengths(field):
    fields = dict(rewards=[1, 2], prompt_groups=[0, 0], pref_groups=["a"] * 2, users=[None] * 2, labels=["x"] * 2)
    with pytest.raises(ValueError, match=rf"one entry per sample in every field, got .*'{field}': 1"):
        RewardBatch(**{**fields, field: fields[field][:1]})


def test_a_prompt_group_of_two_preference_groups_is_refused_with_both_named():
    with pytest.raises(ValueError, match=r"got 'a' and 'b' in prompt group 7 \(sample 2\)"):
        RewardBatch([1, 2, 3, 4], [7, 0, 7, 0], ["a", "b", "b", "b"], [None] * 4, [None] * 4)


def test_a_matrix_of_rewards_is_refused():
    with pytest.raises(ValueError, match="one entry per sample"):
        RewardBatch([[1, 2], [3, 4]], [0, 1], ["a", "b"], [None] * 2, [None] * 2)


# --- imports -------------------------------------------------------------------------------------------------------

HEAVY = {"ray", "openrlhf", "vllm", "deepspeed", "transformers", "torch"}


def fresh_import(statement, stubs):
    """(top-level modules, CPU seconds) after `statement` in a fresh interpreter.

    Empty stand-ins for the heavy modules come first on its path: so an import that hides behind `try` is seen also
    where they are not installed.
    """
    for name in HEAVY:
        write(stubs / f"{name}.py", "")
    root = Path(openrlhf_pgrpo.__file__).parents[1]
    code = f"import sys, time; t = time.process_time(); {statement}; print(time.process_time() - t, *sys.modules)"
    environment = {**os.environ, "PYTHONPATH": f"{stubs}{os.pathsep}{root}", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    seconds, *modules = done.stdout.split()
    return {name.split(".")[0] for name in modules}, float(seconds)


@pytest.mark.parametrize("module", ["openrlhf_pgrpo", "openrlhf_pgrpo.core.advantages"])
def test_importing_is_light(module, tmp_path):
    modules, seconds = fresh_import(f"import {module}", tmp_path)
    assert "openrlhf_pgrpo" in modules
    assert not modules & HEAVY
    assert seconds < 1


def test_the_test_above_would_see_a_heavy_import(tmp_path):
    write(tmp_path / "guarded.py", "try:\n    import ray.util\nexcept ImportError:\n    pass")
    assert fresh_import("import guarded", tmp_path)[0] & HEAVY == {"ray"}
    assert fresh_import("sum(range(10_000_000))", tmp_path)[1] > 0.05
