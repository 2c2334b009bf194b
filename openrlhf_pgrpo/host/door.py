"""A door: one script of the host, opened to our flags and classes. Each trainer's folder makes its own."""

import argparse
import importlib
import os
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from types import SimpleNamespace

import wrapt

from openrlhf_pgrpo.core.estimator import load_plugin
from openrlhf_pgrpo.host import device, flags, hooks
from openrlhf_pgrpo.host.cpu import launch
from openrlhf_pgrpo.host.versions import check_version


@dataclass(frozen=True)
class Door:
    """One script of the host, with what we replace there and what we add.

    Its verbs, in the order in which a script needs them: `activate`, `parse_args`, `prepare`. `run` does all of it for
    a script that is left as it is.

    Attributes:
        script: the host's module.
        own_flag: a flag that tells the script's own parser from parsers of libraries.
        seams: what is replaced, by the host's module.
        extend: puts our flags on the host's parser.
        check: raises ValueError for a wrong value in the flat namespace of that parser.
        start: runs after parsing and before the script's own work, on nested arguments.
    """

    script: str
    own_flag: str
    seams: dict[str, hooks.Seam]
    extend: Callable[[argparse.ArgumentParser], None]
    check: Callable[[argparse.Namespace], None]
    start: Callable[[SimpleNamespace], None]

    def activate(self) -> None:
        """Prepares this process before it imports the host.

        Raises:
            SeamError: the host is missing, of another version, or already imported; or there is no such device.
            ValueError: `--pgrpo.plugin` cannot be found.
        """
        check_version()
        early = flags.early(sys.argv[1:])
        if early[flags.PLUGIN] is not None:
            load_plugin(early[flags.PLUGIN])
        os.environ[hooks.DEVICE] = device.choose(early[flags.DEVICE])
        os.environ.update(device.environment())
        hooks.register(self.seams)

    def parse_args(self, parser: argparse.ArgumentParser, argv=None, parse=argparse.ArgumentParser.parse_args):
        """`parser.parse_args(argv)` for the script's own parser, with our flags.

        Exits with a usage message, as argparse does, if a value is refused.
        """
        of_host = set(parser._option_string_actions)
        try:
            self.extend(parser)
            known = parser._option_string_actions
            flags.refuse_other_spellings(sys.argv[1:] if argv is None else argv, known.keys() - of_host, known)
            args = parse(parser, argv)
            self.check(args)
            if device.is_cpu():
                nested = nest(args)
                launch.replace_gpu_defaults(nested)
                launch.refuse_unsupported(nested)
                for name in vars(args):
                    setattr(args, name, reduce(getattr, name.split("."), nested))
        except ValueError as refusal:
            parser.error(str(refusal))
        return args

    def prepare(self, args: argparse.Namespace) -> None:
        """Does what comes between parsing and the script's own work; the arguments are those of `parse_args`.

        For the reward server that is all of the work: it serves a factorized model, and the script's own work never
        begins. Exits with a message if something is refused.

        Raises:
            SeamError: a function of the host has another shape than the one we replace.
        """
        for module in self.seams:
            importlib.import_module(module)  # a seam that does not fit is refused now, not after Ray and vLLM started
        try:
            self.start(nest(args))
        except (ValueError, OSError) as refusal:
            print(f"{self.script}: error: {refusal}", file=sys.stderr)
            sys.exit(2)

    def run(self) -> None:
        """Runs the host's script, untouched, as `python -m` would."""
        self.activate()

        def parse_and_prepare(parse, parser, args, kwargs):
            if f"--{self.own_flag}" not in parser._option_string_actions:
                return parse(*args, **kwargs)
            parsed = self.parse_args(parser, *args, **kwargs, parse=lambda _parser, argv: parse(argv))
            self.prepare(parsed)
            return parsed

        wrapt.wrap_function_wrapper(argparse, "ArgumentParser.parse_args", parse_and_prepare)
        runpy.run_module(self.script, run_name="__main__")


def nest(args: argparse.Namespace) -> SimpleNamespace:
    """Arguments as the host nests them: `args.data.max_len` of the flag `--data.max_len`."""
    from openrlhf.utils.config import hierarchize

    return hierarchize(args)
