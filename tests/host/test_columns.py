"""The columns that name preference groups and users, and files without a row."""

from datetime import datetime
from types import SimpleNamespace

import pytest
from datasets import Dataset

from openrlhf_pgrpo.host import columns
from openrlhf_pgrpo.host.dpo.seams import SEAMS as DPO
from openrlhf_pgrpo.host.rm.seams import SEAMS as RM

pytestmark = pytest.mark.host


def test_names_in_csv_are_read_as_they_are_written(tmp_path, host_args, monkeypatch):
    """As our commands read them: the host's reader made one user of 7 and 007, and let columns slip."""
    from openrlhf.datasets import utils

    path = tmp_path / "rows.csv"
    path.write_text("input,who,persona,answer\nq,007,1.10,1\nq,7,NA,2\n")
    words = ("--data.user_key", "who", "--data.pref_group_key", "persona", "--data.prompt_dataset", str(path))
    args = host_args("--advantage_estimator", "pgrpo", "--data.label_key", "answer", *words)
    strategy = SimpleNamespace(args=args, is_rank_0=lambda: False, print=lambda *_: None)
    rows = utils.blending_datasets(str(path), None, strategy, 42)
    assert rows["who"][:] == ["007", "7"] and rows["persona"][:] == ["1.10", "NA"] and rows["answer"][:] == [1, 2]
    with pytest.raises(ValueError, match="got CSV in the folder .*makes one user of 7 and 007: name the file in it"):
        utils.blending_datasets(str(tmp_path), None, strategy, 42)
    (tmp_path / "csv").mkdir()
    monkeypatch.chdir(tmp_path)
    assert utils.blending_datasets("rows.csv", None, strategy, 42)["who"][:] == ["007", "7"]
    nameless = SimpleNamespace(args=SimpleNamespace(data=SimpleNamespace()), is_rank_0=lambda: False, print=print)
    assert len(utils.blending_datasets(str(tmp_path), None, nameless, 42)) == 2  # the host's own training
    path.write_text("input,who,persona,answer\nq,a, then b,7,x\n")
    with pytest.raises(ValueError, match="every row needs 4 fields, as the header has, got 5 in line 2 of"):
        utils.blending_datasets(str(path), None, strategy, 42)


def test_an_empty_file_is_named():
    def blending_datasets(datasets, probabilities, strategy=None):
        raise StopIteration

    module = SimpleNamespace(blending_datasets=blending_datasets, load_dataset=None)
    columns.install(module)
    with pytest.raises(ValueError, match="a dataset needs at least one row, got an empty file 'pairs.jsonl'"):
        module.blending_datasets("pairs.jsonl", None)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("cut.jsonl", b'{"a": 1}\n{"a":', "JSON parse error.* in row 1 in '.*cut.jsonl': correct it"),
        ("nothing.jsonl", b"{}\n", "no data! in '.*nothing.jsonl'"),
        ("bytes.csv", b"a,b\n1,\xff\n", "cannot be read from line"),
        ("cut.parquet", b"PAR1", "file size is 4 bytes.* in '.*cut.parquet'"),
    ],
)
def test_b5_a_broken_file_is_named(hooks, tmp_path, name, content, message):
    """The host hides the reason behind 'An error occurred while generating the dataset'."""
    from openrlhf.datasets.utils import blending_datasets

    path = tmp_path / name
    path.write_bytes(content)
    strategy = SimpleNamespace(print=lambda *_: None, is_rank_0=lambda: False)
    with pytest.raises(ValueError, match=f"a dataset needs rows that can be read, got .*{message}|{path} {message}"):
        blending_datasets(str(path), None, strategy)


def table(**columns):
    return Dataset.from_dict(columns)


@pytest.mark.parametrize(
    "value, said",
    [
        (None, "null"),
        ("", "an empty text"),
        (" \n", r"a blank text, ' \\n'"),
        (float("nan"), "float nan"),
        (float("inf"), "float inf"),
        (datetime(2020, 1, 2), "datetime 2020-01-02 00:00:00"),
        ({"name": "ann"}, "a struct with the keys 'name'"),
        (["ann"], "a list, .'ann'."),
    ],
)
def test_a7_a_missing_name_is_refused_with_its_row(value, said):
    """Null, NaN, a blank text, a struct and a list are no names, in whatever kind of file."""
    with pytest.raises(
        ValueError, match=f"a name in 'g' .--flag., got {said} in row 0 of 'x.jsonl': (fill it|put the)"
    ):
        columns.names(table(g=[value]), "--flag", "g", "'x.jsonl'")


def test_a7_a_whole_number_has_one_name():
    """A column of whole numbers with a gap becomes one of floats in CSV, and 7 would be another user than 7.0."""
    assert columns.names(table(g=[7, 8]), "--flag", "g", "x") == columns.names(table(g=[7.0, 8.0]), "--flag", "g", "x")
    assert columns.names(table(g=[0.5]), "--flag", "g", "x") == ["0.5"]


def test_a7_names_that_look_alike_are_a_warning():
    (said,) = columns.spellings(["a", " a", "b", "B", "c"], "--flag", "'x'")
    assert said.startswith("warning: names in 'x' (--flag) count as different that differ only in case, white space")
    assert "'a', ' a'; 'b', 'B'" in said and columns.spellings(["a", "b"], "--flag", "'x'") == []


@pytest.mark.parametrize("seams", [DPO, RM])
def test_the_trainers_on_pairs_name_it_too(seams):
    assert seams["openrlhf.datasets.utils"].installs == ("openrlhf_pgrpo.host.columns:install",)
