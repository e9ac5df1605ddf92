"""A job's command in the foreground: its signals, its end, and whether it is started again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from stablemoe_ds.answers import descriptor, stream
from stablemoe_ds.distributed.signals import handling
from stablemoe_ds.errors import BAD_INPUT, FINISHED, INTERRUPTED, OWN_FAULT, UserError
from stablemoe_ds.launch.job import Job, Probe
from stablemoe_ds.launch.logs import Tail, set_aside
from stablemoe_ds.launch.restart import decide
from stablemoe_ds.run_directory.progress import newest_saved, refusals

REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SAVE_SECONDS, LEFTOVER_SECONDS, LOOK_SECONDS = 60.0, 5.0, 0.2


class Supervisor:
    """Runs one job until it is finished, is asked to stop, or no longer makes progress."""

    def __init__(self, job: Job) -> None:
        """job: written already, and one that does not submit."""
        self.job, self.order = job, job.orders[0]
        self.folder = job.folders[0]
        self.run_dir = Path(job.directory, self.order.run.directory)
        self.logs = Path(job.directory, self.order.logs)
        self._tail = Tail(self.logs, 0)  # of all attempts: what was shown is not shown again
        self._requests = 0
        self._ranks_stopped = False
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def stopped(self) -> bool:
        """Whether it, or the ranks themselves (by the supervisor of another machine), were asked to stop."""
        return self._requests > 0 or self._ranks_stopped

    def run(self) -> int:
        """Returns the exit status of the last attempt. If it was asked to stop: 0 if all ranks ended well, else 130."""
        attempt = 0
        with handling(self._request, *REQUESTS):
            code = self._attempt(attempt)
            while not self.stopped and self._again(code):
                set_aside(self.logs, attempt)
                attempt += 1
                code = self._attempt(attempt)
        state = "stopped" if self.stopped else "failed" if code else "finished"
        note_state(self.folder, state=state, exit_code=code, attempt=attempt)
        if self.stopped:
            _say("stopped on request; the same command continues from the newest checkpoint")
            return INTERRUPTED if code else FINISHED
        if code:
            _say(f"ended with {code}; the ranks' logs are in {self.logs}")
        return code

    def _attempt(self, attempt: int) -> int:
        """Start the command and wait until nothing of it is left."""
        environment = {**os.environ, **self.job.environment}
        refused = refusals(self.run_dir)
        try:
            # A session of its own: Ctrl-C reaches this process alone, which knows what the ranks should be sent.
            process = subprocess.Popen(
                self.job.command, cwd=self.job.directory, env=environment, stdout=descriptor(), start_new_session=True
            )
        except OSError as error:
            raise UserError(
                f"cannot start {self.job.command[0]}: {error.strerror}; is it installed and on PATH?"
            ) from error
        self._process = process
        if self.stopped:  # a moment ago, before the process existed
            process.send_signal(self.job.stop)
        note_state(self.folder, state="running", pid=process.pid, host=socket.gethostname(), attempt=attempt)
        with self._showing():
            code = process.wait()
        self._clear(process.pid)
        if self._torchrun and code == OWN_FAULT and refusals(self.run_dir) - refused:
            return BAD_INPUT  # torchrun itself ends with 1, whatever its ranks ended with
        return code if code >= 0 else 128 - code

    @property
    def _torchrun(self) -> bool:
        """Whether every machine has a supervisor of its own, which notes its own attempts."""
        return self.job.cluster.launcher == "torchrun"

    def _again(self, code: int) -> bool:
        cluster, run = self.job.cluster, self.order.run
        if isinstance(run, Probe):
            return False
        if code == FINISHED:
            saved = newest_saved(self.run_dir)
            self._ranks_stopped = saved is None or saved.step < run.schedule.steps
        if self._ranks_stopped or cluster.restarts == 0:
            return False
        host = socket.gethostname() if self._torchrun else None
        decision = decide(self.run_dir, code, cluster.restarts, cluster.world_size, run, host)
        _say(f"{'starting again' if decision.again else 'not starting again'}: {decision.reason}")
        return decision.again

    def _clear(self, group: int) -> None:
        """Wait for what the command has left behind, ranks that are still saving say, then end it."""
        end = time.monotonic() + (SAVE_SECONDS if self.stopped else LEFTOVER_SECONDS)
        while _alive(group):
            if time.monotonic() > end:
                os.killpg(group, signal.SIGKILL)
                return
            time.sleep(LOOK_SECONDS)

    def _request(self, _number: int, _frame: FrameType | None) -> None:
        """First: save and stop. Second: SIGTERM to all of the group. Third: kill it."""
        self._requests += 1
        process = self._process
        if process is None:
            return
        if self._requests == 1 and not self.job.stop_group:
            if process.poll() is None:
                process.send_signal(self.job.stop)
            return
        number = self.job.stop if self._requests == 1 else signal.SIGTERM if self._requests == 2 else signal.SIGKILL
        if _alive(process.pid):
            os.killpg(process.pid, number)

    @contextmanager
    def _showing(self) -> Iterator[None]:
        """Show rank 0 where the command itself does not."""
        if not self.job.tail:
            yield
            return
        done = threading.Event()

        def show() -> None:
            over = False
            while not over:
                over = done.wait(LOOK_SECONDS)
                for text in self._tail.new():
                    stream().buffer.write(text)
                    stream().flush()

        reader = threading.Thread(target=show, daemon=True)
        reader.start()
        try:
            yield
        finally:
            done.set()
            reader.join()


def note_state(folder: Path, **state: Any) -> None:
    """Keep what changes about a launch in ``state.json``, for ``stablemoe status``."""
    passing = folder / "state.json.new"
    passing.write_text(json.dumps(state) + "\n", encoding="utf-8")
    passing.replace(folder / "state.json")


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _say(text: str) -> None:
    print(f"stablemoe launch: {text}", file=sys.stderr, flush=True)
