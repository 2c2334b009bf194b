"""Draws runs as one page that opens offline: how every preference group did, and how the runs differ.

    write_report([Path("demo-run")], Path("demo-run/report.html"))

It reads metrics files, which a training run writes step by step. The run may be finished, killed or still running.
"""

from collections.abc import Sequence
from pathlib import Path

from openrlhf_pgrpo.files import check_folder, whole_file


def write_report(runs: Sequence[Path], output: Path) -> Path:
    """Writes one self-contained HTML page about `runs` to `output`, whole or not at all. Returns `output`.

    Args:
        runs: metrics files, run folders, or folders with several runs at any depth.

    Raises:
        ValueError: a path does not exist, a folder has no metrics.jsonl, a file has no whole step, or a line in the
            middle of a file is not a step, or `output` is one of these files. An incomplete last line is no error.
        OSError: a file cannot be read or written.
        ModuleNotFoundError: plotly or Jinja2 is not installed.
    """
    try:
        from openrlhf_pgrpo.report.page import render
    except ModuleNotFoundError as missing:
        if (missing.name or "").split(".")[0] not in ("plotly", "jinja2"):
            raise
        advice = f'a report needs {missing.name}, which is not installed: pip install "openrlhf-pgrpo[report]"'
        raise ModuleNotFoundError(advice, name=missing.name) from None
    from openrlhf_pgrpo.report.runs import find, read_runs

    output = Path(output)
    if output.is_dir():
        raise ValueError(f"a report needs the name of a file to write, got the folder {output}: add report.html to it")
    given = [Path(run) for run in runs]
    for _, metrics in find(given):
        if output.exists() and output.samefile(metrics):
            raise ValueError(f"a report needs a file of its own, got {output}, which it reads: name another")
    read = read_runs(given)
    output.parent.mkdir(parents=True, exist_ok=True)
    check_folder(output, "a report")
    page = render(*read)
    with whole_file(output) as file:
        file.write(page.encode("utf-8", "replace"))  # a lone surrogate in the data has no UTF-8
    return output
