"""A cloud in a process of its own, on this machine."""

import contextlib
import dataclasses
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from spa_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class LocalCloud:
    """The process of a running cloud, and the port that it listens on."""

    process: "subprocess.Popen[str]"
    port: int

    @property
    def address(self) -> str:
        """Where a device reaches it, `host:port`."""
        return f"127.0.0.1:{self.port}"


@contextlib.contextmanager
def cloud_process(
    backbone: str, *flags: str, log: Path | None = None, inside: Sequence[str] = ()
) -> Iterator[LocalCloud]:
    """Runs a cloud while this context lasts, and no longer than this process, however that ends.

    Args:
        backbone: name, directory or .gguf file.
        flags: more flags of `python -m spa_jax.serve cloud`.
        log: file for its log; by default it goes to this process's stderr.
        inside: command that runs it, such as `ip netns exec NAME`.

    Raises:
        UserError: it does not come up.
    """
    serve = (sys.executable, "-m", "spa_jax.serve", "cloud", f"--backbone={backbone}", "--port=0")
    command = [*inside, *serve, "--until_input_ends", "--drain=0", *flags]
    pipe = subprocess.PIPE
    with contextlib.ExitStack() as stack:
        stderr = stack.enter_context(log.open("w")) if log is not None else None
        process = stack.enter_context(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=stderr, text=True))
        stack.callback(_stop, process)
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("serving on port "):
            where = f"in {log}" if log is not None else "above"
            raise UserError(f"the cloud did not start on this machine: its own message is {where}")
        yield LocalCloud(process, int(line.split()[-1]))


def _stop(process: "subprocess.Popen[str]") -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
