"""Run a program, with its arguments, as one rank of several.

An interpreter that ends while threads of gloo still run is aborted now and then ("terminate called
without an active exception"), also after ``destroy_process_group``: the process ends without the
clean-up of the interpreter.
"""

import os
import runpy
import sys

import torch.distributed as dist

if __name__ == "__main__":
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
    if dist.is_initialized():
        dist.barrier()  # gloo raises if one process ends before the other
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
