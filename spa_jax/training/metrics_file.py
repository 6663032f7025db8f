"""The metrics that a run leaves, step by step."""

import json
from collections.abc import Mapping
from pathlib import Path

from spa_jax.files import is_remote, write_bytes
from spa_jax.training.processes import is_main_process


class MetricsFile:
    """metrics.jsonl, one JSON object a line, written by the main process.

    A resumed run drops the lines of steps that it is about to repeat. In a Cloud Storage bucket, where nothing can be
    appended, lines are kept until `flush`.
    """

    def __init__(self, path: Path, resumed_at: int) -> None:
        """Opens or creates the file, and keeps its lines up to the step at which the run resumes."""
        kept = []
        if path.exists():
            for line in path.read_bytes().decode(errors="replace").splitlines():
                try:
                    if json.loads(line)["step"] <= resumed_at:
                        kept.append(line + "\n")
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue
        if is_main_process():
            write_bytes(path, "".join(kept).encode())
        self._path, self._lines = path, kept

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends the metrics of a step."""
        if not is_main_process():
            return
        line = json.dumps({"step": step, **metrics}) + "\n"
        if is_remote(self._path):
            self._lines.append(line)
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line)

    def flush(self) -> None:
        """Writes what is not on disk yet."""
        if is_remote(self._path) and is_main_process():
            write_bytes(self._path, "".join(self._lines).encode())

    def close(self) -> None:
        """Writes what is not on disk yet."""
        self.flush()
