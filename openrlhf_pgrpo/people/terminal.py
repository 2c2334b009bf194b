"""The questions in a terminal, one line of input each."""

import shutil
import textwrap
from collections.abc import Callable
from unicodedata import bidirectional, category

from openrlhf_pgrpo.models.profiles import BOTH_BAD, SKIP
from openrlhf_pgrpo.people.session import LEFT, PREFERENCES, RIGHT, TIE, Forecast, NotNow, Session

KEYS = {"1": LEFT, "2": RIGHT, "=": TIE, "b": BOTH_BAD, "s": SKIP}
HELP = "1 or 2: the better answer   =: equally good   b: both bad   s: skip   u: undo   q: save and leave"
BAR = 31  # characters
EMBEDDINGS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}  # they turn the text that follows


def ask(session: Session, read: Callable[[str], str] = input, write: Callable[[str], None] = print) -> None:
    """Asks until the session ends or the person leaves. Every answer is on the disk before the next question."""
    write(HELP)
    shown = None
    while session.question is not None:
        if session.question is not shown:
            shown = session.question
            write(question_text(session))
        try:
            key = read("1, 2, =, b, s, u, q: ").strip().lower()
        except (EOFError, KeyboardInterrupt):
            key = "q"
        if key == "q":
            write(f"{answered(session)} saved; the same command goes on from here")
            return
        try:
            if key in KEYS:
                session.answer(shown.name, KEYS[key])
            elif key == "u":
                session.undo()
            else:
                write(HELP)
                continue
        except NotNow as error:
            write(str(error))
        except OSError as error:
            write(plain(f"not saved, so the question stays open: {error}"))
        else:
            write(done_text(session, KEYS.get(key)))
    write(summary(session))


def plain(text: str) -> str:
    """The text without what could change the terminal, or cannot be shown: control characters, those that turn the
    direction of writing, and halves of surrogate pairs are replaced."""
    text = text.replace("\r\n", "\n")
    controls = {letter for letter in text if category(letter) in ("Cc", "Cs") or bidirectional(letter) in EMBEDDINGS}
    controls -= {"\n", "\t"}
    return text.translate(dict.fromkeys(map(ord, controls), "\ufffd"))


def on_one_line(text: str) -> str:
    """The text as `plain`, with spaces for its line breaks and tabs."""
    return plain(text).translate({ord("\n"): " ", ord("\t"): " "})


def block(text: str, indent: str) -> str:
    width = max(shutil.get_terminal_size().columns - 2, 40)
    lines = (line for line in plain(text).splitlines() or [""])
    return "\n".join(
        textwrap.fill(line, width, initial_indent=indent, subsequent_indent=indent) or indent for line in lines
    )


def question_text(session: Session) -> str:
    number = len(session.profile.answers) + 1
    of = "" if session.questions is None else f" of {session.questions}"
    asked, (_, prompt, left, right) = f"Question {number}{of}", session.question
    return "\n".join(("", asked, block(prompt, "  "), "", "1", block(left, "  "), "", "2", block(right, "  "), ""))


def done_text(session: Session, choice: str | None) -> str:
    """What to say after a choice was saved; None is undo."""
    if choice is None:
        return "taken back"
    return forecast_text(session.forecast()) if choice in PREFERENCES else f"noted: {choice}"


def forecast_text(forecast: Forecast) -> str:
    """The chance that the model had given to the answer."""
    if forecast.choice == TIE:
        return f"the model gave 1 a chance of {forecast.left:.0%}"
    return f"the model gave that a chance of {forecast.left if forecast.choice == LEFT else 1 - forecast.left:.0%}"


def answered(session: Session) -> str:
    count, skipped = len(session.profile.answers), len(session.profile.skipped)
    return f"{count} answer{'s' * (count != 1)}" + f", {skipped} skipped" * bool(skipped)


def summary(session: Session) -> str:
    """Coefficients, a ranking of answers, and the path of the profile."""
    lines = ["", f"{answered(session)}. What the model believes, with 90 % intervals (~ most users):"]
    coefficients = session.coefficients()
    low = min(min(one.low, one.usual_low) for one in coefficients)
    high = max(max(one.high, one.usual_high) for one in coefficients)

    def column(value: float) -> int:
        return round((value - low) / (high - low) * (BAR - 1))

    for number, one in enumerate(coefficients, 1):
        bar = [" "] * BAR
        for mark, start, end in (("~", one.usual_low, one.usual_high), ("=", one.low, one.high)):
            bar[column(start) : column(end) + 1] = mark * (column(end) + 1 - column(start))
        bar[column(one.mean)] = "o"
        lines.append(f"  {number:2}  {''.join(bar)}  {one.mean:+.2f}  [{one.low:+.2f}, {one.high:+.2f}]")
    lines.append("")
    for prompt, ranked in session.ranking():
        lines.append(block(prompt, "  "))
        for number, one in enumerate(ranked, 1):
            lines += [f"    {number}. {one.reward:+.2f} ± {one.deviation:.2f}", block(one.answer, "       ")]
        lines.append("")
    kept = plain(str(session.path)) if session.is_kept else "none before the first choice"
    if session.is_kept and not session.profile.answers:
        kept += ", without an answer yet, so it is refused"
    return "\n".join((*lines, f"profile: {kept}"))
