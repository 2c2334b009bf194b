"""What tests of several folders do alike. Pytest has this folder on its path."""

import json

# Names the speaker before each message, and whom the model answers as.
CHAT = (
    "{% for m in messages %}<{{ 'a' if m['role'] == 'assistant' else m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def rows_in(path):
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def places(value, at=()):
    """The path of everything in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield (*at, key)
        yield from places(part, (*at, key))


def scored(model, pairs):
    """Base rewards (P, D) of the answers a and b of pairs (P,), all read at once."""
    prompts = [pair.prompt for pair in pairs for _ in "ab"]
    rewards = model.base_rewards(prompts, [answer for pair in pairs for answer in (pair.a, pair.b)])
    return rewards[::2], rewards[1::2]
