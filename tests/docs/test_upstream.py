"""The pages of docs/upstream hold: each diff applies to the released host, where its test fails as the page says; with
the diffs these tests pass, and the host's own as well."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from openrlhf_pgrpo.host.cpu import launch

HOST = "0.11.2"  # of the diffs
pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(importlib.metadata.version("openrlhf") != HOST, reason=f"the diffs are against {HOST}"),
]

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "upstream"
TESTS_OF_THE_HOST = 221


class Page(NamedTuple):
    """What a page offers: a diff, a test with its file in the host, and the tests that fail without the diff."""

    diff: str
    test: str
    file: str
    fails: list[str]


def read(path: Path) -> Page:
    def block(language):
        (found,) = re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)
        return found

    test = block("python")
    return Page(block("diff"), test, re.match(r"# (tests/test_\w+\.py)\n", test)[1], block("text").splitlines())


PAGES = {path.stem: read(path) for path in sorted(FOLDER.glob("*.md")) if path.name != "README.md"}


@pytest.fixture
def host(host_copy):
    """A copy of the host laid out as its source is, with the tests that its wheel brings and with ours."""
    for file in importlib.metadata.files("openrlhf"):
        if file.match("tests/*.py"):
            path = host_copy.folder / file
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(file.read_binary())
    for page in PAGES.values():
        assert not (host_copy.folder / page.file).exists()
        (host_copy.folder / page.file).write_text(page.test)
    return host_copy


def apply(host, diff: str, *flags: str) -> None:
    command = ["git", "apply", *flags]
    done = subprocess.run(command, input=diff, cwd=host.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run(host, *tests: str) -> tuple[list[str], int, str]:
    """Runs tests where the copy is the host and nothing of ours is: what fails and why, how many pass, the output."""
    words = ["-q", "-rf", "-c", os.devnull, "--rootdir", os.curdir, "-p", "no:cacheprovider"]
    # A narrow terminal would shorten the reasons.
    environment = {**os.environ, **launch.environment(), **host.environment, "COLUMNS": "1000", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", *words, *tests]
    output = subprocess.run(command, cwd=host.folder, env=environment, capture_output=True, text=True).stdout
    failed = re.findall(r"^FAILED \S+?::(.*)$", output, re.MULTILINE)
    passed = re.search(r"^(?:\d+ failed, )?(\d+) passed(?:, \d+ warnings?)? in ", output, re.MULTILINE)
    assert passed, output  # no errors and nothing skipped either
    return failed, int(passed[1]), output


def test_each_test_fails_as_its_page_says_and_passes_with_the_diff(host):
    files = [page.file for page in PAGES.values()]
    failed, passed, output = run(host, *files)
    expected = [line for page in PAGES.values() for line in page.fails]
    assert sorted(failed) == sorted(expected), output
    assert all(page.fails for page in PAGES.values())

    for page in PAGES.values():
        apply(host, page.diff, "--check")  # each one alone
    for page in PAGES.values():
        apply(host, page.diff)
    still_failing, now_passing, output = run(host, "tests")
    assert still_failing == [] and now_passing == TESTS_OF_THE_HOST + passed + len(failed), output


def test_the_index_names_every_page():
    text = (FOLDER / "README.md").read_text()
    assert sorted(re.findall(r"^\| \[(\w+)\]\(\1\.md\) \|", text, re.MULTILINE)) == sorted(PAGES)
    assert f"{TESTS_OF_THE_HOST} tests" in text and HOST in text


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.md")), ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)]+)\)", re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.M)):
        assert (FOLDER / link).exists(), link


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_the_parts_of_a_pull_request(name):
    parts = re.findall(r"^\*\*(\w[\w ]*)\.\*\* ", (FOLDER / f"{name}.md").read_text(), re.MULTILINE)
    assert parts == ["What", "Why", "Test", "With us"]
