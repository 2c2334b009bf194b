"""Rows of any shape into every reader: each gives texts, names and numbers of the right kind, or says where it cannot.

Properties, by hypothesis. A row has any JSON value in any column, or lacks the column. An input is one file or dataset
for one reader.
"""

import csv
import hashlib
import json
import re
import shutil
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openrlhf_pgrpo.core.names import name_of
from openrlhf_pgrpo.models import factorize
from openrlhf_pgrpo.models.tables import read_table
from openrlhf_pgrpo.people.groups import assign, name_users
from openrlhf_pgrpo.people.pool import read_pool
from openrlhf_pgrpo.people.rerank import read_candidates

pytestmark = pytest.mark.host

# What a text must never be: a value that was printed.
PRINTED = re.compile(r"\[\{|\{'|None|nan|\[\]")
# Where something is wrong: a row or line, or a column that is not there.
PLACE = re.compile(r"\b(row|line|lines|pair) \d|\d lines|needs (a|the) column|needs at least|columns? .*--data\.")

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="[]{}Nn<"), max_size=4)
PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-9, 9),
    st.floats(),
    TEXT,
    st.sampled_from(["", " ", "\n", "a", "b", 0.5, 1, 0]),
)
INNER = PLAIN | st.lists(PLAIN, max_size=2)
TURN = st.dictionaries(st.sampled_from(["role", "content", "text"]), INNER, max_size=3)
CONTENT = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": INNER})
ANY = st.one_of(PLAIN, PLAIN, st.lists(PLAIN, max_size=2), TURN, st.lists(TURN | CONTENT, max_size=3))


def turns(*texts):
    """A conversation; the user begins."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


WORDS = ["why?", "so", "it is", "猫", "🙂", "7"]
NAMES = ["ann", "bob", " ann", 7, 7.0, True]
CHATS = [turns("why?"), turns("a", "b", "c"), [{"role": "user", "content": [{"type": "text", "text": "why?"}]}]]
ANSWERS = [turns("why?", "so"), turns("why?", "it is"), turns("a", "b", "c", "so")]


@st.composite
def rows_of(draw, **good):
    """Up to three rows of values that are right, of which up to two become anything or get lost."""
    rows = draw(st.lists(st.fixed_dictionaries({key: st.sampled_from(of) for key, of in good.items()}), max_size=3))
    for number, key, value in draw(st.lists(st.tuples(st.integers(0, 2), st.sampled_from([*good]), ANY), max_size=2)):
        if number < len(rows):
            rows[number] = {**rows[number], key: value}
            if value == "b":
                del rows[number][key]
    return rows


class Table:
    """As much of a dataset as the checks read: it has every column that a row has, null where a row lacks it. Columns
    are arrow's; one of several kinds, which arrow cannot hold, is JSON, as `datasets` makes it of a JSONL file."""

    def __init__(self, rows):
        self.column_names = [*dict.fromkeys(key for row in rows for key in row)]
        self.length, self.values, self.arrow = len(rows), {}, {}
        for key in self.column_names:
            values = [row.get(key) for row in rows]
            try:
                self.arrow[key] = pa.array(values)
                self.values[key] = self.arrow[key].to_pylist()
            except (pa.ArrowInvalid, pa.ArrowTypeError):
                self.arrow[key], self.values[key] = pa.array(map(json.dumps, values)), values

    def __len__(self):
        return self.length

    def __repr__(self):
        return repr((self.length, self.values))

    def __getitem__(self, key):
        return self.values[key]

    @property
    def rows(self):
        return [{key: self.values[key][row] for key in self.column_names} for row in range(len(self))]

    def select_columns(self, keys):
        table = pa.table({key: self.arrow[key] for key in keys})
        return SimpleNamespace(with_format=lambda kind: {"arrow": table}[kind])


def template(conversation, tokenize=False, add_generation_prompt=False):
    text = "".join(f"<{turn['role']}>{turn['content']}" for turn in conversation)
    return text + "<assistant>" * add_generation_prompt


def is_text(text) -> bool:
    """A text that was written as one. Parts of a content and calls of a tool are the template's to print."""
    return isinstance(text, str) and bool(text.strip()) and not PRINTED.search(text)


def args_of(chat=False, **data):
    columns = dict(input_key="x", label_key="y", prompt_key="x", chosen_key="c", rejected_key="r", user_key="u")
    columns |= dict(pref_group_key="g", preference_key=None, image_key="images", max_images_per_prompt=0)
    data = SimpleNamespace(**{**columns, "apply_chat_template": chat, "input_template": None, **data})
    parts = dict(robust=SimpleNamespace(estimator=None), model=SimpleNamespace(margin_loss_enable=False))
    return SimpleNamespace(data=data, reward=SimpleNamespace(factors=2), **parts)


class Counted:
    """Which inputs there were, because hypothesis repeats many, how many readings, and how many of them gave rows."""

    def __init__(self):
        self.inputs, self.readings, self.accepted = set(), 0, 0

    def read(self, reader, *args, **kwargs):
        """What the reader gives; None if it refuses and says where."""
        self.readings += 1
        shown = (arg.read_bytes() if isinstance(arg, Path) and arg.is_file() else arg for arg in args)
        self.inputs.add(hash(repr((reader.__module__, reader.__qualname__, *shown))))
        try:
            found = reader(*args, **kwargs)
        except ValueError as error:
            assert PLACE.search(str(error)), error
            return None
        self.accepted += 1
        return found


@pytest.fixture
def counted(record_property):
    counted = Counted()
    yield counted
    record_property("inputs", len(counted.inputs))
    assert counted.readings > counted.accepted > counted.readings / 100  # else the rows are not of both kinds


def many(examples):
    return settings(max_examples=examples, deadline=None, suppress_health_check=[*HealthCheck])


@pytest.fixture
def host(hooks):
    """How the host makes its texts of rows that were accepted."""
    from openrlhf.datasets import prompts_dataset, reward_dataset

    from openrlhf_pgrpo.host.dpo import data as dpo
    from openrlhf_pgrpo.host.ppo import prompts
    from openrlhf_pgrpo.host.rm import data as rm

    def prompt(row, chat):
        return prompts_dataset.preprocess_data(row, None, "x", "y", template if chat else None)[0]

    def pair(row, prompt_key, chat, is_dpo):
        return reward_dataset.preprocess_data(row, None, prompt_key, "c", "r", template if chat else None, is_dpo)[:3]

    return SimpleNamespace(prompt=prompt, pair=pair, prompts=prompts.check, dpo=dpo.check, rm=rm.check)


def tool_or_parts(row, *keys) -> bool:
    """Whether a message has no text of its own."""
    turns = [turn for key in keys if isinstance(row.get(key), list) for turn in row[key]]
    return any(not isinstance(turn["content"], str) for turn in turns)


def test_a6_a7_prompts(host, counted):
    @many(800)
    @given(rows_of(x=WORDS, y=WORDS, g=NAMES, u=NAMES) | rows_of(x=WORDS + CHATS, y=WORDS, g=NAMES, u=NAMES))
    def check(rows):
        table = Table(rows)
        for chat, training in product((True, False), repeat=2):
            if counted.read(host.prompts, table, args_of(chat), "'p'", training) is not None:
                for row in table.rows:
                    assert is_text(host.prompt({"y": None, **row}, chat)) or tool_or_parts(row, "x")
                    assert not training or (name_of(row["g"]).strip() and name_of(row["u"]).strip())

    check()


PAIR = dict(g=NAMES, u=NAMES)
PAIRS = [
    dict(x=WORDS, c=WORDS, r=WORDS, **PAIR),
    dict(x=WORDS, c=WORDS, r=WORDS, **PAIR, preference=[1, 1.0, 0, 0.5]),
    dict(x=CHATS, c=ANSWERS, r=ANSWERS, **PAIR),
    dict(x=CHATS, c=[answer[-1:] for answer in ANSWERS], r=[answer[-1:] for answer in ANSWERS], **PAIR),
]


def test_b5_d19_pairs(host, counted):
    @many(600)
    @given(st.one_of(*(rows_of(**columns) for columns in PAIRS)))
    def check(rows):
        table = Table(rows)
        for chat, with_prompt, ours, is_dpo in product((True, False), repeat=4):
            args = args_of(chat, prompt_key="x" if with_prompt else None, pref_group_key="g" if ours else None)
            args.reward.factors = 2 if ours else None
            if counted.read(host.dpo if is_dpo else host.rm, table, args, "'p'") is None:
                continue
            for row in table.rows:
                prompt, *answers = host.pair(row, args.data.prompt_key, chat, is_dpo)
                own = not tool_or_parts(row, *("x",) * with_prompt, "c", "r")
                assert all(map(is_text, answers)) or not own
                assert is_text(prompt) or not (with_prompt or (chat and is_dpo)) or not own
                assert not ours or name_of(row["g" if is_dpo else "u"]).strip()
                assert (ours and not is_dpo) or row.get("preference") in (None, 1) or warned(table)

    check()


def warned(table) -> bool:
    """A column `preference` that holds something else is not read, which is said."""
    given = [value for value in table["preference"] if value is not None]
    return not all(isinstance(value, (int, float)) and 0 <= value <= 1 for value in given)


def is_text_or_messages(text) -> bool:
    return is_text(text) or (bool(text) and all(is_text(turn["role"]) and "content" in turn for turn in text))


def read_grouped(path):
    """As `openrlhf-pgrpo groups` reads its rows and writes them with the preference group of each user."""
    table = name_users(read_table(path, {}), "user").as_json()
    chances = {row["user"]: np.array([0.25, 0.75]) for row in table.rows}
    return table.rows, assign(table, chances, ["group-1", "group-2"], "user", "pref_group")


def test_a7_b5_lines_of_jsonl(counted, tmp_path):
    path = tmp_path / "rows.jsonl"
    columns = dict(user=NAMES, prompt=WORDS, chosen=WORDS, rejected=["no", "not so"], preference=[0, 1, 0.5])

    @many(400)
    @given(
        rows_of(**columns, a=WORDS, b=["no", "not so"], responses=[["a"], ["a", "b"]]),
        st.sampled_from(
            ["", "", "", "[1]\n", "{\n", '{"user": "\\ud83d"}\n', '{"user": 1, "pref_group": 1}\n', "\n\n"]
        ),
    )
    def check(rows, more):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + more)
        for user, *texts, preference in (counted.read(factorize.read, path) or ((), ()))[1]:
            assert user.strip() and all(map(is_text_or_messages, texts))
            assert type(preference) is float and 0 <= preference <= 1
        for _, pair in counted.read(read_pool, path) or ():
            assert all(map(is_text_or_messages, pair))
        for row in getattr(counted.read(read_candidates, path), "rows", ()):
            assert all(map(is_text_or_messages, [row["prompt"], *row["responses"]]))
        for row, grouped in zip(*counted.read(read_grouped, path) or ((), ()), strict=True):
            assert row["user"].strip() and not PRINTED.search(row["user"])
            assert grouped == {**row, "pref_group": "group-2", "pref_group_probability": 0.75}

    check()


def test_a7_names(counted):
    def read(value):
        try:
            return name_of(value)
        except ValueError as error:
            raise ValueError(f"row 0 {error}") from error

    @many(300)
    @given(st.lists(ANY, min_size=8, max_size=8))
    def check(values):
        for value in values:
            name = counted.read(read, value)
            assert name is None or (name.strip() and not PRINTED.search(name))

    check()


def save_jsonl(rows, folder):
    (path := folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_csv(rows, folder):
    columns = Table(rows).column_names
    if not rows or not all(csv_holds([row.get(column) for row in rows]) for column in columns):
        return None
    path = folder / "rows.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def csv_holds(column) -> bool:
    """Whether CSV tells the values of a column from others: it has no lists, nor texts that look like a number or a
    truth value, and beside a text or a truth value 8.0 is the text 8.0. The text 7 becomes a number, which is the same
    name but no prompt."""
    texts = [value for value in column if isinstance(value, str)]
    floats = [value for value in column if isinstance(value, float)]
    if floats and (texts or any(isinstance(value, bool) for value in column)):
        return False
    if any(text != "7" and re.search(r"\d|true", text.lower()) for text in texts):
        return False
    plain = all(value is None or isinstance(value, (str, int, float)) for value in column)
    return plain and all(abs(value) < 2**53 and value == int(value) for value in floats)


def save_arrow(rows, folder):
    from datasets import Dataset

    if (table := arrow_of(rows)) is None:
        return None
    Dataset(table).save_to_disk(folder / "rows")
    return folder / "rows"


def save_parquet(rows, folder):
    if (table := arrow_of(rows)) is None:
        return None
    try:
        pq.write_table(table, folder / "rows.parquet")
    except pa.ArrowNotImplementedError as error:
        assert re.search("Cannot write struct type .* with no child field", str(error)), error
        return None
    return folder / "rows.parquet"


def arrow_of(rows):
    """A table of rows; None if there is none, because a column has values of several kinds, or nothing is left."""
    kinds = [{type(row.get(column)) for row in rows} for column in "xygu"]
    if any(bool in kind and kind & {int, float} for kind in kinds):
        return None  # among numbers, arrow writes False as 0
    try:
        table = pa.Table.from_pylist(rows)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None
    return table if len(table) else None


def test_a6_a7_files_of_every_kind(host, counted, tmp_path):
    """The same rows in every format that can hold them, through the host's own reading: the same texts and names, or
    refused."""
    from datasets import disable_progress_bars, enable_progress_bars
    from openrlhf.datasets.utils import blending_datasets

    strategy = SimpleNamespace(print=lambda *_: None, is_rank_0=lambda: False)

    def read(path):
        dataset = blending_datasets(str(path), None, strategy)
        host.prompts(dataset, args_of(), repr(str(path)))
        return [*zip(dataset["x"], map(name_of, dataset["g"]), map(name_of, dataset["u"]))]

    @many(40)
    @given(rows_of(x=WORDS, y=WORDS, g=["ann", "7"], u=[7, 8.0]))
    def check(rows):
        folder = tmp_path / hashlib.sha256(repr(rows).encode()).hexdigest()
        shutil.rmtree(folder, ignore_errors=True)  # it may have been these rows before
        folder.mkdir()
        found = counted.read(read, save_jsonl(rows, folder))
        for save in (save_parquet, save_arrow, save_csv):
            if (path := save(rows, folder)) is not None:
                again = counted.read(read, path)
                assert found == again or (save is save_csv and None in (found, again)), save

    disable_progress_bars()
    try:
        check()
    finally:
        enable_progress_bars()
