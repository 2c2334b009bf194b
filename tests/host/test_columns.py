"""The columns that name preference groups and users, and files without a row."""

from types import SimpleNamespace

import pytest

from openrlhf_pgrpo.host import columns
from openrlhf_pgrpo.host.dpo.seams import SEAMS as DPO
from openrlhf_pgrpo.host.rm.seams import SEAMS as RM

pytestmark = pytest.mark.host


def test_an_empty_file_is_named():
    def blending_datasets(datasets, probabilities, strategy=None):
        raise StopIteration

    module = SimpleNamespace(blending_datasets=blending_datasets)
    columns.install(module)
    with pytest.raises(ValueError, match="a dataset needs at least one row, got an empty file 'pairs.jsonl'"):
        module.blending_datasets("pairs.jsonl", None)


@pytest.mark.parametrize("seams", [DPO, RM])
def test_the_trainers_on_pairs_name_it_too(seams):
    assert seams["openrlhf.datasets.utils"].install == "openrlhf_pgrpo.host.columns:install"
