"""Where the rewards of PPO come from: one agent, one function, servers or a model. Python is read and not run."""

import ast
import re
from collections.abc import Iterator

from openrlhf_pgrpo.host import here

ARGUMENTS = ("queries", "prompts", "labels")


def check(args, remote: bool) -> list[str]:
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
        return here.python_file("train.agent_func_path", agent, _agent, remote)
    if url:
        sources = url.split(",")
        files = [source for source in sources if source.endswith(".py")]
        if files and len(sources) > 1:
            raise ValueError(
                f"--reward.remote_url needs one file or any number of URLs, got {url!r}: call the one function from "
                "the other, because the host would read the first file alone"
            )
        if files:
            return here.python_file("reward.remote_url", files[0], _reward_function, remote)
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
    return here.model("reward.model_name_or_path", name, remote)


def _reward_function(tree: ast.Module) -> str | None:
    need = f"a function reward_func({', '.join(ARGUMENTS)}) at the top level"
    found = _names(tree)
    if "reward_func" not in found:
        return None if "*" in found else f"{need}, got none"
    made = found["reward_func"]
    if isinstance(made, ast.AsyncFunctionDef):
        return f"{need}, got an async one in line {made.lineno}"
    if isinstance(made, ast.FunctionDef) and not made.decorator_list and not _takes(made.args, len(ARGUMENTS)):
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
