"""Starts commands as `python -m` does, but each forked from this process, which has done their imports already.

Standard input has a JSON object a line: module, arguments, and a folder whose file `stdin` the command reads and where
it leaves `stdout` and `stderr`. For each the process id is answered, and when the process has ended its exit status.
"""

import gc
import json
import os
import runpy
import sys

import spa_jax.decoding.fused
import spa_jax.training.run  # noqa: F401 (not the commands themselves: they define flags)


def become(module: str, arguments: list[str], folder: str) -> None:
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        file = os.open(os.path.join(folder, name), os.O_RDWR | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 (forget what was read ahead)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit()


gc.freeze()  # or every child would look through all that was imported before it ends
while line := sys.stdin.readline():
    child = os.fork()
    if not child:
        become(**json.loads(line))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
