"""Data that several examples read."""

import gzip

import pytest


@pytest.fixture
def polis(tmp_path):
    """Thirty people who saw thirty statements, one more who saw a single one, and a statement that three saw."""
    people = ["participant,group-id," + ",".join(map(str, range(31)))]
    for person in range(30):
        votes = [(-1, 0, 1)[(person + one) % 3] for one in range(30)] + [1 if person < 3 else ""]
        people.append(f"{person},0," + ",".join(map(str, votes)))
    people.append("30,0,1" + "," * 30)
    statements = ["comment-id,comment-body", *(f'{one},"view, {one}"' for one in range(31))]
    for name, lines in (("participants-votes.csv.gz", people), ("comments.csv.gz", statements)):
        (tmp_path / name).write_bytes(gzip.compress("\n".join(lines).encode()))
    return tmp_path
