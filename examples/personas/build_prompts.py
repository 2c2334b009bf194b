"""Writes `prompts.jsonl` from `personas.json` and `questions.txt`. The same two files always give the same rows.

    python examples/personas/build_prompts.py

A row is one question asked by one user of one persona:

    {"prompt": [system message, user message], "persona": "mara", "user": "mara-03", "question_id": 17}

`prompt` is for `--data.input_key` with `--data.apply_chat_template`, `persona` for `--data.label_key` and
`--data.pref_group_key`, and `user` for `--data.user_key`.
"""

import json
import random
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROWS = 800  # with the shares of personas.json, every persona gets a whole number of them
ROWS_PER_USER = 8
SEED = 0


def load_personas():
    return json.loads((HERE / "personas.json").read_text(encoding="utf-8"))


def load_questions():
    return (HERE / "questions.txt").read_text(encoding="utf-8").splitlines()


def build_rows(personas, questions):
    """Deals the questions out like cards, in shuffled order and round after round, to one persona after the other.
    Each question reaches three or four personas, and no persona gets a question twice."""
    dice = random.Random(SEED)
    deck = list(range(len(questions)))
    dice.shuffle(deck)
    rows, dealt = [], 0
    for persona in personas:
        for number in range(round(ROWS * persona["share"])):
            question_id = deck[dealt % len(deck)]
            rows.append(_row(persona, number // ROWS_PER_USER + 1, question_id, questions[question_id]))
            dealt += 1
    dice.shuffle(rows)
    return rows


def _row(persona, user, question_id, question):
    """The taste is in the user message, because the untrained model follows it more there than in the system message.
    The system message is tiny, because without one the chat template inserts its own, longer one."""
    return {
        "prompt": [
            {"role": "system", "content": "You talk about music."},
            {"role": "user", "content": f"I love {persona['taste']}. {question}"},
        ],
        "persona": persona["name"],
        "user": f"{persona['name']}-{user:02d}",
        "question_id": question_id,
    }


def as_jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    rows = build_rows(load_personas(), load_questions())
    (HERE / "prompts.jsonl").write_text(as_jsonl(rows), encoding="utf-8")
    print(f"prompts.jsonl: {len(rows)} rows, {len({row['user'] for row in rows})} users")
