"""Votes of a Polis conversation as ratings: user, prompt, response, rating.

Who agreed with a statement rates it 1, who passed 0, who disagreed -1. Nobody was asked to write the statements in
answer to a prompt, so each person gets one of eight that ask for such a statement. People with few votes are left
out, and so are statements with few.
"""

import csv
import gzip
import io
from itertools import product
from pathlib import Path

VOTES, STATEMENTS = "participants-votes.csv.gz", "comments.csv.gz"
COLUMNS = ("user", "prompt", "response", "rating")
FEWEST_OF_PERSON, FEWEST_OF_STATEMENT = 25, 20
ASKED = ("Say in one sentence what you think about {}.", "What should be done about {}?")
SUBJECTS = ("land on the islands", "farmland and nature here", "how our community uses its land", "our open land")


def is_polis(data: Path) -> bool:
    return (data / VOTES).is_file() and (data / STATEMENTS).is_file()


def ratings(folder: Path) -> list[dict]:
    """The ratings of a folder with the two files of a Polis conversation."""
    texts = {row["comment-id"]: row["comment-body"] for row in _rows(folder / STATEMENTS)}
    people = [{one: vote for one, vote in row.items() if one in texts and vote} for row in _rows(folder / VOTES)]
    votes_of = {one: sum(one in votes for votes in people) for one in texts}
    prompts = [asked.format(subject) for asked, subject in product(ASKED, SUBJECTS)]
    return [
        {"user": f"p{person}", "prompt": prompts[person % len(prompts)], "response": texts[one], "rating": int(vote)}
        for person, votes in enumerate(people)
        if len(votes) >= FEWEST_OF_PERSON
        for one, vote in votes.items()
        if votes_of[one] >= FEWEST_OF_STATEMENT
    ]


def as_csv(rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _rows(path: Path) -> list[dict]:
    return [*csv.DictReader(io.StringIO(gzip.decompress(path.read_bytes()).decode()))]
