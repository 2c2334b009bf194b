"""One look at flags, files and rows before anything heavy starts: no Ray, no vLLM, no model.

Each door has a function here. It reads the rows as the run will (the host's own reader, whose cache the run uses
again), checks them against the flags, and asks `plan` how many updates the run makes. All arguments are nested host
arguments, as the host's parser has them. What they return are sentences to print; what is wrong is a ValueError.

A driver without the files of its cluster cannot look at them. That is said, and not refused.

With `tokens` they also say what a run says once it has a tokenizer. That takes seconds more, for `doctor --like`.
"""

import ast
import importlib.util
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from openrlhf_pgrpo.core.estimator import advantage_estimators, namespace_of, options_of
from openrlhf_pgrpo.core.pgrpo import PGRPO
from openrlhf_pgrpo.host import columns, device, flags, numbers, pair_texts, plan, resume, script
from openrlhf_pgrpo.models import output_folder

FORMATS = (".json", ".jsonl", ".csv", ".parquet", ".arrow")  # files that the host reads as rows
REWARD_ARGUMENTS = ("queries", "prompts", "labels")
# Models (their `model_type`) with a table of positions, where a longer text ends in an IndexError: tried with
# transformers 5.15. Those that compute positions only become worse.
TABLE_OF_POSITIONS = {
    *("gpt2", "gpt_neo", "gpt_bigcode", "opt", "openai-gpt", "gptj", "codegen", "ctrl", "biogpt", "xlm"),
    *("bert", "bert-generation", "megatron-bert", "mobilebert", "distilbert", "rembert", "albert", "electra", "ernie"),
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "mpnet"),
    *("deberta", "deberta-v2", "longformer", "big_bird", "nystromformer", "mra", "yoso", "fnet", "canine", "ibert"),
    *("roformer", "convbert", "nomic_bert", "flaubert", "luke", "esm", "roc_bert", "splinter", "layoutlm"),
    *("bart", "mbart", "plbart", "mvp", "pegasus", "bigbird_pegasus", "marian", "blenderbot", "blenderbot-small"),
    *("prophetnet", "trocr"),
}


def ppo(args, tokens: bool = False) -> list[str]:
    """What there is to say of a run of PPO.

    Raises:
        ValueError: it cannot run, or would train nothing or something else than was meant.
        OSError: a file cannot be read.
    """
    from openrlhf_pgrpo.host.ppo import assertions, prompts, reward_model

    numbers.check(args)
    assertions.check(args)
    remote = device.cluster() is not None
    if not args.vllm.num_engines or args.vllm.num_engines < 0:
        raise ValueError(
            f"PPO needs engines that generate, got --vllm.num_engines {args.vllm.num_engines}: pass 1 or more"
        )
    said = [*_rewards(args, remote), *model("actor.model_name_or_path", args.actor.model_name_or_path, remote)]
    if not said:  # both models are here
        reward_model.check_texts(args)
    if args.critic.model_name_or_path:
        said += model("critic.model_name_or_path", args.critic.model_name_or_path, remote)
    said += _lengths(args, "actor", "critic", "reward")

    def check(dataset, args, source: str, training: bool = True) -> list[str]:
        of_histories = _histories(dataset, args, source) if training else []
        return [*prompts.check(dataset, args, source, training), *of_histories]

    looked = check
    if tokens and not args.train.agent_func_path:  # an agent writes its prompts itself
        looked = _with_tokens(check, args.actor.model_name_or_path, _prompts_cut)
    rows, of_rows = _rows(
        args, "data.prompt_dataset", "data.prompt_split", looked, args.data.prompt_probs, remote=remote
    )
    evaluated = _evaluation(args, looked, remote)
    read = (args.actor, args.critic, args.reward)
    said += _unused_users(args) + _output(args, *read, part="_actor")
    if args.algo.advantage.estimator == "gae" and args.critic.save_value_network:
        said += _output(args, *read, part="_critic", beside="_critic")
    return [*said, *of_rows, *evaluated, *plan.ppo(args, rows).sentences]


def dpo(args, tokens: bool = False) -> list[str]:
    """What there is to say of preference training. Raises as `ppo`."""
    from openrlhf_pgrpo.host.dpo import data

    return _pairs(args, data.check, tokens)


def rm(args, tokens: bool = False) -> list[str]:
    """What there is to say of the training of a reward model. Raises as `ppo`."""
    from openrlhf_pgrpo.host.rm import data

    return _pairs(args, data.check, tokens)


def serve(args, tokens: bool = False) -> list[str]:
    """What there is to say of a reward server, which has no rows. Raises as `ppo`."""
    from openrlhf_pgrpo.host.user_flags import check_profiles
    from openrlhf_pgrpo.host.user_rewards import factorized_folder  # transformers, which takes ten seconds

    name = args.reward.model_name_or_path
    said = model("reward.model_name_or_path", name, remote=False)
    if (folder := factorized_folder(name, args.reward.chat_template)) is not None:
        folder.form  # noqa: B018  refused unless it is known
        check_profiles(folder, args.reward.profiles)
    return said


def _pairs(args, check: Callable, tokens: bool) -> list[str]:
    numbers.check(args)
    if tokens:
        check = _with_tokens(check, args.model.model_name_or_path, _pairs_made)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    said = model("model.model_name_or_path", args.model.model_name_or_path, remote=False)
    read = [args.model]
    if hasattr(args, "ref") and args.ref.model_name_or_path is not None:
        said += model("ref.model_name_or_path", args.ref.model_name_or_path, remote=False)
        read.append(args.ref)
    said += _lengths(args, "model", "ref") + _output(args, *read)
    rows, of_rows = _rows(args, "data.dataset", "data.dataset_split", check, args.data.dataset_probs)
    return [*said, *of_rows, *_evaluation(args, check), *plan.pairs(args, rows, ranks).sentences]


# ---- what only tokens show ------------------------------------------------------------------------------------------


def _with_tokens(check: Callable, model_name: str, look_at: Callable) -> Callable:
    """A check of rows that goes on to their tokens, which `look_at(dataset, tokenizer, strategy)` makes. It is called
    with a stand-in for the host's strategy, one for all data of a run, and says something by `strategy.print`.
    """
    strategy = SimpleNamespace(is_rank_0=lambda: False)

    def both(dataset, args, source, training=True):
        said, printed = check(dataset, args, source, training=training), []
        if not Path(model_name).is_dir():
            return [*said, f"tokens of {source} are not counted here: the folder of {model_name} is needed for that"]
        from openrlhf_pgrpo.models import backbone  # transformers, which takes ten seconds

        strategy.args, strategy.print = args, printed.append
        look_at(dataset, backbone.read_tokenizer(model_name), strategy)
        return [*said, *(sentence.removeprefix("[pgrpo] ") for sentence in printed)]

    return both


def _pairs_made(dataset, tokenizer, strategy) -> None:
    """Makes the host's dataset of pairs. Our hooks on it count pairs that are cut, left out or equal."""
    from openrlhf.datasets.reward_dataset import RewardDataset

    data, dpo = strategy.args.data, hasattr(strategy.args, "ref")  # only the preference trainer has a reference model
    processes = min(os.cpu_count() or 1, 8)
    RewardDataset(dataset, tokenizer, data.max_len, strategy, data.input_template, dpo, processes)


def _prompts_cut(dataset, tokenizer, strategy) -> None:
    """Says how many prompts the host's rollouts cut, after it has written them."""
    from openrlhf.datasets.prompts_dataset import PromptDataset

    args = strategy.args
    prompts = [*map(str, PromptDataset(dataset, tokenizer, strategy, args.data.input_template).prompts)]
    room = args.data.max_len - (args.rollout.max_new_tokens or 1)
    counts = pair_texts.counted(tokenizer, (text for text in prompts if pair_texts.may_fill(text, 0, room)))
    if cut := sum(counts.get(text, 0) > room for text in prompts):
        strategy.print(
            f"{cut} of {len(prompts)} prompts are cut from the left to {room} tokens, to leave room for an answer in "
            f"--data.max_len {args.data.max_len}"
        )


# ---- rewards --------------------------------------------------------------------------------------------------------


def _rewards(args, remote: bool) -> list[str]:
    """Looks at the one source of rewards: an agent, a function, servers, or a model."""
    agent, url, name = args.train.agent_func_path, args.reward.remote_url, args.reward.model_name_or_path
    sources = {"train.agent_func_path": agent, "reward.remote_url": url, "reward.model_name_or_path": name}
    if len(given := [f"--{flag} {source}" for flag, source in sources.items() if source]) > 1:
        raise ValueError(
            f"PPO needs one source of rewards, got {' and '.join(given)}: leave out all but one, because the host "
            "would use the first alone"
        )
    if agent:
        if not agent.endswith(".py"):
            raise ValueError(f"--train.agent_func_path needs a .py file, got {agent!r}: correct it")
        return _python_file("train.agent_func_path", agent, _agent, remote)
    if url:
        sources = url.split(",")
        files = [source for source in sources if source.endswith(".py")]
        if files and len(sources) > 1:
            raise ValueError(
                f"--reward.remote_url needs one file or any number of URLs, got {url!r}: call the one function from "
                "the other, because the host would read the first file alone"
            )
        if files:
            return _python_file("reward.remote_url", files[0], _reward_function, remote)
        for source in sources:
            if not re.match(r"https?://[^/\s]", source):
                raise ValueError(
                    f"--reward.remote_url needs a .py file or URLs (http://HOST:PORT/PATH), got {source!r}: correct it"
                )
        return []
    if not name:
        raise ValueError(
            "PPO needs rewards, got none of --reward.remote_url (a .py file or a server), --reward.model_name_or_path "
            "and --train.agent_func_path: name one"
        )
    if "," in name:
        raise ValueError(f"--reward.model_name_or_path needs one model, got {name!r}: name one of them")
    return model("reward.model_name_or_path", name, remote)


def _python_file(flag: str, name: str, check: Callable[[ast.Module], str | None], remote: bool) -> list[str]:
    """Reads a Python file without running it."""
    path = Path(name)
    if not path.is_file():
        if remote and not path.exists():
            return [_only_there(flag, name)]
        found = "which is a folder" if path.exists() else "which does not exist"
        raise ValueError(f"--{flag} needs a .py file, got {name!r}, {found}: correct it")
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        where = f" in line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise ValueError(f"--{flag} needs Python, got {error.args[0]}{where} of {name}: correct it") from error
    if (wrong := check(tree)) is not None:
        raise ValueError(f"--{flag} needs {wrong}, of {name}: correct it")
    return []


def _reward_function(tree: ast.Module) -> str | None:
    need = f"a function reward_func({', '.join(REWARD_ARGUMENTS)}) at the top level"
    found = _names(tree)
    if "reward_func" not in found:
        return None if "*" in found else f"{need}, got none"
    made = found["reward_func"]
    if isinstance(made, ast.AsyncFunctionDef):
        return f"{need}, got an async one in line {made.lineno}"
    if isinstance(made, ast.FunctionDef) and not made.decorator_list and not _takes(made.args, len(REWARD_ARGUMENTS)):
        return f"{need}, got one with other arguments in line {made.lineno}"
    return None


def _takes(arguments: ast.arguments, number: int) -> bool:
    """Whether a function can be called with so many arguments, by position."""
    places = len(arguments.posonlyargs) + len(arguments.args)
    asked = sum(default is None for default in arguments.kw_defaults)
    return places - len(arguments.defaults) <= number and (places >= number or bool(arguments.vararg)) and not asked


def _agent(tree: ast.Module) -> str | None:
    found = _names(tree)
    if "AgentExecutor" in found or "*" in found:
        return None
    return "a class AgentExecutor at the top level, got none"


def _names(tree: ast.Module) -> dict[str, ast.AST]:
    """What the top level of a module makes, by name; the last of each. "*": more than can be seen here."""
    found: dict[str, ast.AST] = {}
    for node in _top_level(tree.body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name: node for alias in node.names}
        else:
            written = (part for part in ast.walk(node) if isinstance(part, ast.Name | ast.Call))
            for part in written:
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                    found[part.id] = node
                elif isinstance(part, ast.Call) and getattr(part.func, "id", "") in ("exec", "globals", "setattr"):
                    found["*"] = node
    return found | ({"*": tree} if "__getattr__" in found else {})


def _top_level(lines: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, and those inside its `if`, `try` and `with`."""
    for line in lines:
        inside = [getattr(line, field, []) for field in ("body", "orelse", "finalbody")]
        inside += [handler.body for handler in getattr(line, "handlers", [])]
        if isinstance(line, ast.If | ast.Try | ast.With | ast.For | ast.While):
            for block in inside:
                yield from _top_level(block)
        else:
            yield line


# ---- models and profiles --------------------------------------------------------------------------------------------


def model(flag: str, name: str | None, remote: bool) -> list[str]:
    """Looks whether a model is there: a folder, or else a name that the hub may know.

    Returns:
        A sentence if only the cluster can tell.

    Raises:
        ValueError: there is none.
    """
    if not name:
        raise ValueError(f"--{flag} needs a folder or the name of a model on the hub, got none: name one")
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"--{flag} needs a folder of a model, got {name!r}, which has no config.json: correct it")
        return []
    if folder.exists():
        raise ValueError(f"--{flag} needs a folder, got the file {name!r}: name the folder of the model")
    if not _is_path(name):
        return []
    if remote:
        return [_only_there(flag, name)]
    raise ValueError(f"--{flag} needs a folder of a model, got {name!r}, which does not exist: correct it")


def _lengths(args, *sections: str) -> list[str]:
    """Compares the longest texts, of prompt and answer together, with the positions of models that are here.

    Args:
        sections: of the arguments, each with a model that the run may read.

    Raises:
        ValueError: a model has no positions for them.
    """
    said, length = [], args.data.max_len
    for section in sections:
        name = getattr(getattr(args, section, None), "model_name_or_path", None)
        kind, positions = _positions(name)
        if positions is None or length <= positions:
            continue
        flag = f"--{section}.model_name_or_path {name}"
        if kind in TABLE_OF_POSITIONS:
            raise ValueError(
                f"--data.max_len needs at most {positions} tokens, the positions of {flag}, got {length}: lower it or "
                "name another model, because a longer text, prompt and answer together, would end the run"
            )
        said.append(f"warning: --data.max_len {length} is more than the {positions} tokens that {flag} was made for")
    return said


def _positions(name: str | None) -> tuple[str | None, int | None]:
    """Type of a model, or of its part for text, and for how many tokens it was made; None is unknown."""
    try:
        config = json.loads((Path(name or "") / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config") or config
        positions = config.get("max_position_embeddings", config.get("n_positions"))
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        stretched = rope.get("rope_type", rope.get("type", "default")) != "default"
    except (OSError, ValueError, AttributeError):  # what is wrong with it is said when the model is loaded
        return None, None
    known = isinstance(positions, int) and positions > 0 and not stretched
    return config.get("model_type"), positions if known else None


def _output(args, *read, part: str = "", beside: str = "") -> list[str]:
    """Looks whether a model may be written to `--ckpt.output_dir`: only over one that a run of ours left there.

    Args:
        read: sections of the arguments, each with a model that the run reads.
        part: folder in `--ckpt.path` with the checkpoints of the model.
        beside: what the host adds to the name of the folder for a second model, a critic.
    """
    for name, path in (("output_dir", args.ckpt.output_dir), ("path", args.ckpt.path)):
        if not path.strip() or Path(path).is_file():
            got = f"the file {path!r}" if path.strip() else "none"
            raise ValueError(f"--ckpt.{name} needs a folder, got {got}: name another")
    folder, earlier = args.ckpt.output_dir + beside, _earlier_settings(args)
    resumed = args.ckpt.load_enable and resume.latest(Path(args.ckpt.path) / part) is not None
    ours = earlier is not None and (not beside or earlier.get("critic.save_value_network") is True)
    flag = "--ckpt.output_dir" + f" (with {beside}, for --critic.save_value_network)" * bool(beside)
    inputs = [section.model_name_or_path for section in read]
    output_folder.check_output(folder, flag, inputs, again=resumed or ours)
    if not resumed and (Path(folder) / output_folder.CONFIG).is_file():
        return [f"the model in {folder}, which an earlier run left there, will be replaced at the end of this run"]
    return []


def _earlier_settings(args) -> dict | None:
    """The settings of the run that wrote metrics into `--ckpt.output_dir`; None if there are no metrics of ours."""
    path = Path(flags.metrics_path(args))
    if not path.is_file() or path.resolve().parent != Path(args.ckpt.output_dir).resolve():
        return None
    with open(path, "rb") as file:
        try:
            row = json.loads(file.readline())
            return dict(row.get("run", {}).get("settings", {})) if type(row["step"]) is int else None
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            return None


def _is_path(name: str) -> bool:
    """Whether a name can only be that of a file or folder: on the hub, names are `NAME` or `OWNER/NAME`."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith("/") or "\\" in name


def _unused_users(args) -> list[str]:
    """A warning if users are named and nobody reads them: no factorized reward model, no estimator of the user's."""
    if args.data.user_key is None or args.pgrpo.plugin is not None:
        return []
    if args.reward.model_name_or_path and not (args.reward.remote_url or args.train.agent_func_path):
        from openrlhf_pgrpo.host.user_rewards import factorized_folder  # transformers, which takes ten seconds

        name = args.reward.model_name_or_path
        if not Path(name).is_dir() or factorized_folder(name) is not None:
            return []
    return [
        f"warning: --data.user_key {args.data.user_key} does nothing here: users are for a factorized reward model in "
        "--reward.model_name_or_path, or for an estimator of your own"
    ]


def _histories(dataset, args, source: str) -> list[str]:
    """Sentences on histories of rewards that tell an estimator nothing: too short for it, or one for all."""
    estimator, data = args.algo.advantage.estimator, args.data
    if not len(dataset) or not issubclass(advantage_estimators().get(estimator, object), PGRPO):
        return []
    names = columns.names(dataset, f"--{flags.PREF_GROUP_KEY}", data.pref_group_key, source, data.label_key)
    (largest, rows), said = Counter(names).most_common(1)[0], []
    if rows == len(names):
        said.append(
            f"all prompts are of one preference group, {largest!r}: {estimator} has one history for all rewards"
        )
    space = namespace_of(options_of(estimator))
    least, most = getattr(args, space).min_count, rows * args.rollout.n_samples_per_prompt * args.train.num_episodes
    if most < least:
        said.append(
            f"warning: --{space}.min_count {least:g} is never reached, because the largest preference group, "
            f"{largest!r}, gets {most} rewards in the whole run: every advantage will come of its prompt group alone; "
            "lower it or train on more"
        )
    return said


def _only_there(flag: str, name: str) -> str:
    return f"--{flag} {name} is not on this machine, so only the cluster can tell whether it is right"


# ---- rows -----------------------------------------------------------------------------------------------------------


def _evaluation(args, check: Callable, remote: bool = False) -> list[str]:
    if not args.eval.dataset:
        return []
    return _rows(args, "eval.dataset", "eval.split", check, training=False, remote=remote)[1]


def _rows(
    args, flag: str, split_flag: str, check: Callable, probabilities=None, training: bool = True, remote: bool = False
) -> tuple[int | None, list[str]]:
    """How many rows the data have that `flag` names, and what there is to say of them; None if they are not here."""
    files, split = _value(args, flag), _value(args, split_flag)
    if not files:
        raise ValueError(f"--{flag} needs data, got none: name a file, a folder or a data set on the hub")
    parts = [name.strip() for name in files.split(",")]
    absent = [said for name in parts if (said := _file(flag, name, remote))]
    if absent:
        return None, absent
    _refuse_metrics(args, parts, flag)
    _check_probabilities(probabilities, parts, flag)
    # The host's trainers on pairs evaluate on all rows.
    most = args.data.max_samples if training or hasattr(args, "rollout") else sys.maxsize
    dataset = _read(args, files, split, f"--{flag}", f"--{split_flag}", probabilities, most)
    if probabilities is None:
        _refuse_unreached(parts, split, most, flag)
    return len(dataset), check(dataset, args, repr(files), training=training)


def _value(args, flag: str):
    for name in flag.split("."):
        args = getattr(args, name)
    return args


def _file(flag: str, name: str, remote: bool) -> str | None:
    """Looks whether one file or folder of data is there. Returns a sentence if this machine cannot tell."""
    path = Path(name.split("@")[0].strip())
    if not path.name:
        raise ValueError(f"--{flag} needs names with commas between them, got an empty one: correct it")
    if path.suffix == ".py" or (path / f"{path.name}.py").is_file():
        raise ValueError(f"--{flag} needs files with rows, got the Python script {name!r}: save its rows to a file")
    if path.is_dir():
        if not any(path.iterdir()):
            raise ValueError(f"--{flag} needs rows, got the empty folder {name!r}: correct it")
        return None
    if path.is_file():
        if path.suffix not in FORMATS:
            raise ValueError(f"--{flag} needs a file of {', '.join(FORMATS)}, got {name!r}: rename or convert it")
        if not path.stat().st_size:
            raise ValueError(f"--{flag} needs rows, got the empty file {name!r}: correct it")
        return None
    if path.suffix not in FORMATS and not _is_path(str(path)):
        return f"--{flag} {name} is not on this machine: if it is on the hub, its rows are checked when it is loaded"
    if remote:
        return _only_there(flag, name)
    raise ValueError(f"--{flag} needs a file or folder that exists, got {name!r}: correct it")


def _refuse_metrics(args, parts: list[str], flag: str) -> None:
    """Refuses to write metrics over data."""
    metrics = Path(flags.metrics_path(args))
    for data in (Path(name.split("@")[0].strip()) for name in parts):
        if metrics.exists() and data.exists() and (metrics.samefile(data) or metrics.parent.samefile(data)):
            raise ValueError(
                f"--{flags.METRICS_PATH} needs a file of its own, got {metrics}, which holds data of --{flag}: name "
                "another"
            )


def _check_probabilities(given: str | None, parts: list[str], flag: str) -> None:
    if given is None:
        return
    try:
        numbers = [float(number) for number in given.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != len(parts) or not all(number >= 0 for number in numbers) or abs(sum(numbers) - 1) > 1e-6:
        raise ValueError(
            f"--{flag} with {len(parts)} parts needs as many probabilities, which add up to 1, got {given!r}: "
            "correct them"
        )


def _refuse_unreached(parts: list[str], split: str, most: int, flag: str) -> None:
    """Refuses a part of the data that was read just now, of which the host would take no row: it puts parts behind one
    another, and keeps the first rows."""
    before = 0
    for name, data in zip(parts, _reader().loaded, strict=True):
        rows = len(data[split] if isinstance(data, dict) else data)
        if rows and before >= most:
            raise ValueError(
                f"--{flag} needs a row of every part, got none of {name!r}, because --data.max_samples is {most} and "
                f"the parts before it have {before}: raise it, leave the part out, or mix parts by probabilities"
            )
        before += rows


def _read(args, files: str, split: str, flag: str, split_flag: str, probabilities: str | None, most: int):
    """At most so many rows, through the host's own reader; both flags are for messages.

    Raises:
        ValueError: the data cannot be read, or do not have that split.
    """
    reader = _reader()
    quiet = SimpleNamespace(args=args, print=lambda *words: None, is_rank_0=lambda: False)
    reader.loaded.clear()
    try:
        dataset = reader.blending_datasets(
            files, probabilities, quiet, args.train.seed, max_count=most, dataset_split=split
        )
    except AttributeError as error:  # the host goes on with all splits if there is none of that name
        if not (reader.loaded and isinstance(reader.loaded[-1], dict) and split not in reader.loaded[-1]):
            raise
        raise ValueError(
            f"{split_flag} needs a split of {files!r} ({flag}), got {split!r}; splits are "
            f"{sorted(reader.loaded[-1])}: correct it"
        ) from error
    return dataset.select(range(min(most, len(dataset))))


@cache
def _reader():
    """The host's file with `blending_datasets`, under a name of its own: the package around it imports for a minute.

    `loaded` keeps what was read, because the host does not say which splits there are.
    """
    path = script.path_of("openrlhf.datasets.utils")
    spec = importlib.util.spec_from_file_location("openrlhf_pgrpo reader of the host", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    columns.install(module)
    module.loaded = []
    for name in ("load_dataset", "load_from_disk"):
        setattr(module, name, _kept(getattr(module, name), module.loaded))
    return module


def _kept(function: Callable, results: list) -> Callable:
    def call(*args, **kwargs):
        results.append(function(*args, **kwargs))
        return results[-1]

    return call
