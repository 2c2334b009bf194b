"""`openrlhf-pgrpo`: tools for before and after training."""

import argparse
import os
import signal
import sys
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path

from openrlhf_pgrpo.cli import compare, evaluate, export_user, factorize, pairs, people
from openrlhf_pgrpo.models.remote_code import trust
from openrlhf_pgrpo.progress import progress

WITHOUT_MODELS = ("patch", "doctor", "report", "pairs")
BEGINS_AGAIN = "no file is half-written, and the same command begins again"


def main(argv=None) -> None:
    args = command_line().parse_args(argv)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # no bars of the libraries either, here and in child processes
    sys.exit(run(args))


def run(args) -> int | str:
    """Runs a command, and says what is kept if it is interrupted. Returns its exit code, or what is wrong as its last
    words.

    A command that keeps something raises the KeyboardInterrupt again, with what to say about that.
    """
    terminate, unraisable = signal.signal(signal.SIGTERM, interrupt), sys.unraisablehook
    sys.unraisablehook = interrupt_again
    try:
        if getattr(args, "trust_remote_code", False):
            trust()
        if args.command not in WITHOUT_MODELS:
            with progress("starting"), suppress(ImportError):  # the command will meet it, too
                import openrlhf_pgrpo.models.scoring  # noqa: F401  torch and transformers take many seconds
        ended = args.run(args)
        sys.stdout.flush()
        return ended or 0
    except KeyboardInterrupt as stopped:
        kept = str(stopped) or BEGINS_AGAIN
    except BrokenPipeError:  # whoever reads our output has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it ends
        return 128 + signal.SIGPIPE
    except (ValueError, OSError, ArithmeticError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("openrlhf_pgrpo"):
            raise  # a fault of ours, and no extra that is not installed
        return f"openrlhf-pgrpo {args.command}: {error}"
    finally:
        signal.signal(signal.SIGTERM, terminate)
        sys.unraisablehook = unraisable
    print(f"openrlhf-pgrpo {args.command}: stopped; {kept}", file=sys.stderr)
    return 128 + signal.SIGINT


def interrupt(*_) -> None:
    """Ends a command that is told to terminate as Ctrl-C does, also one that a shell put into the background: that one
    is deaf to SIGINT itself."""
    raise KeyboardInterrupt


def interrupt_again(unraisable) -> None:
    """Repeats what came where no exception can rise and Python drops it: in a destructor, or in a callback from C, of
    which scikit-learn makes many."""
    if unraisable.exc_type is KeyboardInterrupt:
        threading.Timer(0.05, signal.pthread_kill, [threading.main_thread().ident, signal.SIGTERM]).start()
    else:
        sys.__unraisablehook__(unraisable)


def command_line() -> argparse.ArgumentParser:
    parser_class = partial(argparse.ArgumentParser, allow_abbrev=False)
    parser = parser_class(prog="openrlhf-pgrpo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=parser_class)

    patching = commands.add_parser("patch", help="let the host's own train scripts take our flags, or undo that")
    choice = patching.add_mutually_exclusive_group()
    choice.add_argument("--check", action="store_true", help="only show the state; exit code 0 if the host is patched")
    choice.add_argument("--revert", action="store_true", help="restore the host's files byte by byte")
    patching.set_defaults(run=patch)

    doctor = commands.add_parser("doctor", help="check whether a training run can start here, and if not, say why")
    doctor.add_argument("--device", choices=("auto", "gpu", "cpu"), default="auto", help="as --pgrpo.device")
    doctor.add_argument(
        "--model",
        help="Folder or hub name of the policy to train. Default on a CPU: the policy of make demo.",
    )
    doctor.add_argument(
        "--cluster",
        action="store_true",
        help="instead of this machine, check every node of the Ray cluster at RAY_ADDRESS, or of the one running here",
    )
    doctor.add_argument(
        "--like",
        metavar="COMMAND",
        help="instead of trying the parts, look at one training command, as one quoted text with all its flags: would "
        "it start, and how many updates would it make? Takes seconds.",
    )
    doctor.add_argument("--nodes", help="With --cluster: nodes that must be there, as names or hosts with commas.")
    doctor.add_argument("--wait", type=float, help="With --cluster: seconds to wait for it and --nodes. Default: 0")
    doctor.add_argument("--gpus", type=int, help="With --cluster: GPUs that must be free on every node.")
    doctor.add_argument(
        "--checkpoints", type=Path, help="With --cluster: folder of --ckpt.path, which every node must see and write."
    )
    doctor.set_defaults(run=diagnose)

    report = commands.add_parser("report", help="draw one or several runs as a single HTML page")
    report.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folder, folder with several, or metrics file"
    )
    report.add_argument("--output", type=Path, default=Path("report.html"), help="Default: report.html")
    report.set_defaults(run=draw)

    factorize.add_to(commands)
    pairs.add_to(commands)
    evaluate.add_to(commands)
    people.add_to(commands)
    compare.add_to(commands)
    export_user.add_to(commands)
    return parser


def patch(args) -> int | str:
    from openrlhf_pgrpo.host import hooks
    from openrlhf_pgrpo.ops import patching

    try:
        if not args.check:
            state = patching.RELEASED if args.revert else patching.PATCHED
            for target in patching.set_state(state):
                print(f"{target.path}: was {target.state}, is {state}")
        found = patching.targets()
    except (hooks.SeamError, patching.PatchError) as error:
        return f"openrlhf-pgrpo patch: {error}"
    if not args.check:
        return 0
    for target in found:
        print(f"{target.path}: {target.state}")
    return int(any(target.state != patching.PATCHED for target in found))


def diagnose(args) -> int:
    from openrlhf_pgrpo.ops.doctor import FAULT

    of_cluster = {f"--{name}": getattr(args, name) for name in ("nodes", "wait", "gpus", "checkpoints")}
    given = [flag for flag, value in of_cluster.items() if value is not None]
    if given and not args.cluster:
        raise ValueError(f"{given[0]} needs --cluster, got a check of this machine alone: add --cluster")
    if args.cluster and args.model is not None:
        raise ValueError("--model is looked up on this machine, not with --cluster: leave one of them out")
    if args.like is not None and (args.cluster or args.model is not None):
        raise ValueError("--like looks at one command and its own model: leave --cluster and --model out")
    faults, found = 0, iter(findings(args))
    while True:
        with progress("checking"):
            if (finding := next(found, None)) is None:
                break
        faults += finding.level == FAULT
        print(f"{finding.level:5}  {finding.subject:12}  {finding.found}", flush=True)
        if finding.remedy:
            print(f"{'':21}do: {finding.remedy}")
    run = "training run" if args.like is None else "run with this command"
    print(f"\nfaults: {faults}; {'no' if faults else 'a'} {run} can start")
    return int(faults > 0)


def findings(args):
    from openrlhf_pgrpo.ops import cluster, doctor

    if args.like is not None:
        return doctor.diagnose_like(args.like)
    if not args.cluster:
        return doctor.diagnose(args.device, args.model)
    return cluster.diagnose(
        cluster.Questions(
            device=args.device,
            nodes=tuple(name for name in (args.nodes or "").split(",") if name),
            wait=args.wait or 0,
            gpus=args.gpus,
            checkpoints=None if args.checkpoints is None else str(args.checkpoints.absolute()),
        )
    )


def draw(args) -> None:
    from openrlhf_pgrpo.report import write_report

    with progress("drawing"):
        path = write_report(args.runs, args.output)
    print(path)


if __name__ == "__main__":
    main()
