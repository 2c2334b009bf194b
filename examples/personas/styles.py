"""Seven ways to speak, each measured from the text alone as a number in [0, 1].

Every measure is *graded*: four answers of an untrained model to one question almost never score the same. A yes-or-no
rule would leave many prompt groups without spread, and a reward without spread teaches nothing. The measures are
densities and not counts, so a longer answer is not better, and an empty answer scores nothing.

The constants were set on 224 answers of the untrained SmolLM2-135M-Instruct to prompts of this folder (8 questions x
7 personas x 4 samples, 28 tokens, temperature 1). `within`: standard deviation among the 4 answers to one prompt.

              short  excited  listing  naming  ornate  personal  asking
    mean       0.33     0.19     0.15    0.20    0.19      0.19    0.15
    within     0.23     0.21     0.16    0.27    0.13      0.18    0.15
    best of 4  0.59     0.44     0.37    0.54    0.34      0.42    0.35
"""

import math
import re

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
SENTENCE_END = re.compile(r"[.!?…]+|\n+")
ITEM_END = re.compile(r"[,;•*\n]")
NAME = re.compile(r"(?<=[\w,;:'’&–—-] )[\"“'(]?(?!I\b)[A-Z][\w'’-]+")  # a capital inside a sentence, but not "I"

FIRST_PERSON = frozenset("i i'm i've i'd i'll me my mine myself".split())
QUESTION_WORDS = frozenset(
    "what which who whose where when why how do does did are is have would could can you your".split()
)
DELIGHT = frozenset(
    "absolutely amazing awesome beautiful best brilliant crazy dance dazzling exciting fabulous fantastic fun "
    "glorious great happy hooray incredible joy love magic magical oh party perfect so sparkle super thrilling "
    "wonderful wow yeah yes".split()
)

FEW_WORDS = 8  # a shorter text counts as this long in every density, because one lucky word is no style


def short(text):
    """Short sentences: 1 for 3 words in a sentence, 0 from 18 words on, falling with the logarithm."""
    lengths = [length for length in map(_count_words, SENTENCE_END.split(text)) if length]
    if not lengths:
        return 0.0
    return _grade(math.log(sum(lengths) / len(lengths)), nothing=math.log(18), everything=math.log(3))


def excited(text):
    """Exclamation marks, at most three in a row, and words of delight."""
    marks = re.sub(r"!{4,}", "!!!", text).count("!")
    return _density(text, 1.5 * marks + _count_members(text, DELIGHT), everything=0.30)


def listing(text):
    """Enumerations: commas and line breaks, and the words of items of at most three words between them."""
    between = ITEM_END.split(text)[1:-1]
    words_in_items = sum(length for length in map(_count_words, between) if length <= 3)
    return _density(text, len(ITEM_END.findall(text)) + words_in_items, everything=0.70)


def naming(text):
    """Names: capitalised words inside a sentence. The first word of a sentence does not count."""
    return _density(text, len(NAME.findall(text)), everything=0.35)


def ornate(text):
    """Long words: 0 for 4 letters on average, 1 for 7."""
    words = WORD.findall(text)
    return _grade(sum(map(len, words)) / max(len(words), FEW_WORDS), nothing=4.0, everything=7.0)


def personal(text):
    """The speaker's own story: I, me, my."""
    return _density(text, _count_members(text, FIRST_PERSON), everything=0.25)


def asking(text):
    """Questions to the listener: question marks, and the words that questions are made of."""
    return _density(text, 2.5 * text.count("?") + _count_members(text, QUESTION_WORDS), everything=0.50)


def _count_words(text):
    return len(WORD.findall(text))


def _count_members(text, vocabulary):
    return sum(word.lower().replace("’", "'") in vocabulary for word in WORD.findall(text))


def _density(text, amount, everything):
    """`amount` per word: 0 for none, 1 from `everything` on."""
    return _grade(amount / max(_count_words(text), FEW_WORDS), nothing=0.0, everything=everything)


def _grade(value, nothing, everything):
    """The place of `value` on the straight line from `nothing` (0) to `everything` (1), limited at both ends."""
    return min(1.0, max(0.0, (value - nothing) / (everything - nothing)))


STYLES = {measure.__name__: measure for measure in (short, excited, listing, naming, ornate, personal, asking)}
