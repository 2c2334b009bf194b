"""Training in one process, without a launcher."""

import importlib.util
import os


def allow() -> None:
    """Lets `python -m`, without a launcher, train in this one process.

    Without a launcher DeepSpeed asks mpi4py for its rank. If mpi4py is missing, the host can only fail, so nothing
    that works depends on it.
    """
    if "RANK" not in os.environ and importlib.util.find_spec("mpi4py") is None:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        os.environ.update(alone)
