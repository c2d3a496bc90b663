"""Real processes for distributed tests: ``ranks(4).run(function, *args)``.

``function`` stands at the top level of the test's file. Every rank calls it
inside a process group, and ``run`` returns the answers by rank; ``device()``
is where a rank keeps its tensors. Ranks are CPU processes that speak Gloo; in
a test marked ``multi_gpu`` they hold a GPU each and speak NCCL. Processes are
kept for later tests, except after a failure, which leaves the others waiting.
"""

import faulthandler
import importlib.util
import inspect
import multiprocessing
import pickle
import tempfile
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path

import pytest

TIMEOUT = 60.0  # seconds a job may take


class RankError(Exception):
    """A rank raised, died or hangs; the message says which and where."""


class Pool:
    """``size`` processes in one process group, started at the first job."""

    def __init__(self, size, backend="gloo"):
        self.size, self.backend = size, backend
        self._ranks = {}  # from connection to (number, process)

    def run(self, function, *args, timeout=TIMEOUT):
        """What ``function(*args)`` returned on each rank, as a list."""
        path, name = inspect.getsourcefile(function), function.__qualname__
        if not name.isidentifier():
            raise ValueError(f"expected a function of a module, got {name}")
        job = pickle.dumps((path, name, args, timeout))
        try:
            if not self._ranks:
                self._open()
                self._answers(TIMEOUT)  # all have joined
            for connection in self._ranks:
                connection.send_bytes(job)
            return self._answers(timeout)
        except BaseException:
            self.close(kill=True)
            raise

    def close(self, kill=False):
        """End the processes; the next job starts new ones."""
        for connection, (_, process) in self._ranks.items():
            connection.close()  # an idle rank takes this for the end
            if kill:
                process.kill()
        for _, process in self._ranks.values():
            process.join(5)
            process.kill()
            process.join()
        if self._ranks:
            self._folder.cleanup()
        self._ranks = {}

    def _open(self):
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        for rank in range(self.size):
            ours, theirs = multiprocessing.Pipe()
            args = (theirs, self._folder.name, rank, self.size, self.backend)
            process = _context().Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()  # so that a rank's death closes the connection
            self._ranks[ours] = rank, process

    def _answers(self, timeout):
        deadline = time.monotonic() + timeout
        answers, waiting = {}, dict(self._ranks)
        while waiting:
            ready = wait(list(waiting), max(0, deadline - time.monotonic()))
            if not ready:
                raise RankError(self._hanging(waiting))
            for connection in ready:
                rank, process = waiting.pop(connection)
                try:
                    ok, answer = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    process.join(5)
                    ok, answer = False, f"died, exit code {process.exitcode}"
                if not ok:
                    raise RankError(f"rank {rank} of {self.size}: {answer}")
                answers[rank] = answer
        return [answers[rank] for rank in range(self.size)]

    def _hanging(self, waiting):
        time.sleep(0.5)  # each rank writes where it is
        report = "no answer in time"
        for rank, _ in waiting.values():
            stack = Path(self._folder.name, f"{rank}.txt").read_text()
            report += f"\nrank {rank} of {self.size} hangs: {stack}"
        return report


@cache
def _context():
    """A server that has imported PyTorch and forks ranks in milliseconds."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # read when PyTorch is loaded
        forkserver.ensure_running()
    return context


def _serve(connection, folder, *place):
    """A rank's life: join the others, then do one job after another."""
    with Path(folder, f"{place[0]}.txt").open("w") as stack:
        connection.send_bytes(_attempt(_join, folder, *place))
        with suppress(EOFError):
            while True:
                *job, timeout = pickle.loads(connection.recv_bytes())
                faulthandler.dump_traceback_later(timeout, file=stack)
                answer = _attempt(_call, *job)
                faulthandler.cancel_dump_traceback_later()
                connection.send_bytes(answer)
    _leave()


def _attempt(function, *args):
    try:
        return pickle.dumps((True, function(*args)))
    except BaseException:
        return pickle.dumps((False, traceback.format_exc()))


def _join(folder, rank, size, backend):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # as in conftest, new tensors hold NaN; this way imports less
    torch.set_deterministic_debug_mode("warn")
    gpu = torch.device("cuda", rank) if backend == "nccl" else None
    if gpu:
        torch.cuda.set_device(gpu)
    dist.init_process_group(
        backend,
        init_method=Path(folder, "store").as_uri(),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=TIMEOUT),
        device_id=gpu,
    )


def _leave():
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _call(path, name, args):
    import torch
    import torch.distributed as dist

    torch.manual_seed(dist.get_rank())
    return getattr(_module(path), name)(*args)


@cache
def _module(path):
    """A test's file, which pytest does not make importable by name."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def device():
    """Within a job: the device of this rank."""
    import torch
    import torch.distributed as dist

    if dist.get_backend() == "nccl":
        return torch.device("cuda", dist.get_rank())
    return torch.device("cpu")


@cache
def _pool(size, backend, config):
    pool = Pool(size, backend)
    config.add_cleanup(pool.close)
    return pool


@pytest.fixture
def ranks(request):
    """``ranks(n)``: ``n`` processes, each with a GPU under ``multi_gpu``."""
    on_gpus = request.node.get_closest_marker("multi_gpu")
    backend = "nccl" if on_gpus else "gloo"
    return lambda size: _pool(size, backend, request.config)
