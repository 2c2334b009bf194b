"""A door: one script of the host, opened to our flags and classes. Each trainer's folder makes its own."""

import argparse
import importlib
import os
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NoReturn

import wrapt

from openrlhf_pgrpo.core.estimator import load_plugin
from openrlhf_pgrpo.host import device, flags, hooks, one_run
from openrlhf_pgrpo.host.cpu import launch
from openrlhf_pgrpo.host.script import host_parser, is_patched
from openrlhf_pgrpo.host.versions import check_version
from openrlhf_pgrpo.models import remote_code


@dataclass(frozen=True)
class Door:
    """One script of the host, with what we replace there and what we add.

    Its verbs, in the order in which a script needs them: `activate`, `parse_args`, `prepare`. `open` does all of it
    for a script that is left as it is, and `run` also runs that script.

    Attributes:
        script: the host's module.
        own_flag: a flag that tells the script's own parser from parsers of libraries.
        seams: what is replaced, by the host's module.
        extend: puts our flags on the host's parser.
        check: raises ValueError for a wrong value in the flat namespace of that parser.
        look: looks at files and rows, from nested arguments; returns sentences, or raises ValueError or OSError. With
            `tokens` also at what a run sees once it has a tokenizer.
        start: runs after parsing and before the script's own work, on nested arguments.
        trains: whether the script writes checkpoints and a model, into folders of its own.
        on_ray: whether Ray runs it, so that its devices may be on other machines.
    """

    script: str
    own_flag: str
    seams: dict[str, hooks.Seam]
    extend: Callable[[argparse.ArgumentParser], None]
    check: Callable[[argparse.Namespace], None]
    look: Callable[..., list[str]]
    start: Callable[[SimpleNamespace], None]
    trains: bool = True
    on_ray: bool = False

    def activate(self) -> None:
        """Prepares this process before it imports the host.

        Exits with a message if `--pgrpo.plugin` cannot be found.

        Raises:
            SeamError: the host is missing, of another version, or already imported; or there is no such device.
        """
        check_version()
        self.choose(sys.argv[1:])
        hooks.register(self.seams)

    def choose(self, argv: list[str]) -> None:
        """Heeds the flags that must be known first: plugin, device, and whether code of models may run.

        Exits with a message if the plugin cannot be found.

        Raises:
            SeamError: there is no such device.
        """
        early = flags.early(argv)
        if early[flags.TRUST]:
            remote_code.trust()
        if early[flags.PLUGIN] is not None:
            try:
                load_plugin(early[flags.PLUGIN])
            except ValueError as refusal:
                self._refuse(f"--{flags.PLUGIN}: {refusal}: correct it")
        os.environ[hooks.DEVICE] = device.choose(early[flags.DEVICE], self.on_ray)
        os.environ.update(device.environment())

    def parse_args(self, parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
        """`parser.parse_args(argv)` for the script's own parser, with our flags.

        Exits with a usage message, as argparse does, if a value is refused.
        """
        of_host = set(parser._option_string_actions)
        try:
            self.extend(parser)
            known = parser._option_string_actions
            flags.refuse_other_spellings(sys.argv[1:] if argv is None else argv, known.keys() - of_host, known)
            args = parser.parse_args(argv)
            self.check(args)
            if device.is_cpu():
                nested = flags.nest(args)
                launch.replace_gpu_defaults(nested)
                launch.refuse_unsupported(nested)
                for name in vars(args):
                    setattr(args, name, flags.value(nested, name))
        except (ValueError, OSError) as refusal:
            parser.error(str(refusal))
        return args

    def prepare(self, args: argparse.Namespace) -> None:
        """Does what comes between parsing and the script's own work; the arguments are those of `parse_args`.

        For the reward server that is all of the work: it serves a factorized model, and the script's own work never
        begins. Exits with a message if something is refused.

        Raises:
            SeamError: a function of the host has another shape than the one we replace.
        """
        self._say(self._look(args))
        self._begin(args)

    def seen(self, argv: list[str]) -> list[str]:
        """What there is to say of a command with these words, also of the tokens of its rows; starts nothing. Exits
        with a message if it is refused.

        Raises:
            SeamError: as `activate`.
        """
        check_version()
        self.choose(argv)
        hooks.register(self.seams)  # they count what the tokens show
        return self._look(self.parse_args(host_parser(self.script), argv), tokens=True)

    def run(self) -> None:
        """Runs the host's script, untouched, as `python -m` would."""
        self.open()
        runpy.run_module(self.script, run_name="__main__")

    def open(self) -> None:
        """Makes all calls for a script that is left as it is and begins after this.

        Looks at flags and files now, before the script's own imports, which take most of a minute.
        """
        if is_patched(self.script):  # it makes the three calls itself
            return
        self.activate()
        parsed = self.parse_args(host_parser(self.script))
        self._say(self._look(parsed))

        def begin(parse, parser, args, kwargs):
            if f"--{self.own_flag}" not in parser._option_string_actions:
                return parse(*args, **kwargs)
            self._begin(parsed)
            return parsed

        wrapt.wrap_function_wrapper(argparse, "ArgumentParser.parse_args", begin)

    def _look(self, args: argparse.Namespace, tokens: bool = False) -> list[str]:
        return self._or_refuse(self.look, flags.nest(args), tokens=tokens)

    def _say(self, sentences: list[str]) -> None:
        if os.environ.get("RANK", "0") == "0":  # of a launcher's processes one speaks
            for sentence in sentences:
                print(f"[pgrpo] {sentence}", flush=True)

    def _begin(self, args: argparse.Namespace) -> None:
        nested = flags.nest(args)
        if self.trains:
            self._or_refuse(one_run.hold_folders, nested)
        for module in self.seams:
            importlib.import_module(module)  # a seam that does not fit is refused now, not after Ray and vLLM started
        self._or_refuse(self.start, nested)

    def _or_refuse(self, step: Callable, *args, **kwargs):
        try:
            return step(*args, **kwargs)
        except (ValueError, OSError) as refusal:
            self._refuse(refusal)

    def _refuse(self, refusal) -> NoReturn:
        """Ends the process. Of a launcher's processes one on each machine speaks: a file may be missing on one."""
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{self.script}: error: {refusal}", file=sys.stderr)
        sys.exit(2)
