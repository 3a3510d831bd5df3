"""Run a program, with its arguments, as one rank of several.

An interpreter that ends while threads of gloo still run is aborted now and then ("terminate called
without an active exception"), also after ``destroy_process_group``: the process ends without the
clean-up of the interpreter. Its traceback, also of a crash, is written to stderr, or to a file per
rank in the folder ``RANK_ERRORS``: the stderr of several ranks ends with errors that follow from
the first.
"""

import faulthandler
import os
import runpy
import sys
import traceback
from pathlib import Path

import torch.distributed as dist


def main(errors) -> None:
    """Run the program and end the process."""
    faulthandler.enable(errors)
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        if dist.is_initialized():
            dist.barrier()  # gloo raises if one process ends before the other
            dist.destroy_process_group()
    except Exception:
        traceback.print_exc(file=errors)
        code = 1
    for stream in (sys.stdout, sys.stderr, errors):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    del sys.argv[0]
    if folder := os.environ.get("RANK_ERRORS"):
        with Path(folder, os.environ["RANK"]).open("w") as file:
            main(file)
    main(sys.stderr)
