import json
import os
import selectors
import signal
import sys
from pathlib import Path

import pytest
import torch
from _pytest.runner import runtestprotocol

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared"  # real checkpoints and photographs, where they are at hand
FEW = 60  # tests that one process runs sooner than two


def pytest_collection_modifyitems(items):
    for item in items:
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


# ---------------------------------------------------------------------------------------------------------
# Two processes, each with one thread: most tests are small, and leave the second core idle

def pytest_runtestloop(session):
    """Has two forks of this process run the tests: each takes the next one, and reports it."""
    config = session.config
    alone = (len(session.items) < FEW or not hasattr(os, "fork") or torch.cuda.is_available()
             or config.option.collectonly or config.option.usepdb or session.testsfailed)
    if alone:
        return None
    config._tmp_path_factory.getbasetemp()  # one folder for both
    queue, writer = os.pipe()
    for number in range(len(session.items)):
        os.write(writer, number.to_bytes(4, "big"))  # sixteen thousand fit in a pipe
    os.close(writer)
    forks = [start_fork(session, queue) for _ in range(2)]

    # Relay what they report, line by line, until both have ended
    ended = 0  # tests
    with selectors.DefaultSelector() as ready:
        for _, pipe in forks:
            ready.register(pipe, selectors.EVENT_READ)
        while ready.get_map():
            for key, _ in ready.select():
                if line := key.fileobj.readline():
                    report = config.hook.pytest_report_from_serializable(config=config, data=json.loads(line))
                    if isinstance(report.longrepr, list):  # JSON's of a tuple, the place and reason of a skip
                        report.longrepr = tuple(report.longrepr)
                    config.hook.pytest_runtest_logreport(report=report)
                    ended += report.when == "teardown"
                    if session.shouldfail:  # -x, --maxfail
                        for pid, _ in forks:
                            os.kill(pid, signal.SIGTERM)
                        raise session.Failed(session.shouldfail)
                else:
                    ready.unregister(key.fileobj)
    for pid, _ in forks:
        os.waitpid(pid, 0)
    if ended < len(session.items):
        session.shouldfail = f"a process ended before its tests: {len(session.items) - ended} were not run"
        raise session.Failed(session.shouldfail)
    if session.testsfailed:
        raise session.Failed(f"{session.testsfailed} tests failed")
    return True


def start_fork(session, queue: int) -> tuple:
    """Runs in a fork the tests whose numbers it reads from `queue`. Returns the fork's id, and the pipe to
    which it writes a line for each report."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, open(reader, buffering=1)
    os.close(reader)
    config = session.config

    def next_item():
        number = os.read(queue, 4)
        return session.items[int.from_bytes(number, "big")] if number else None

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    capture = config.pluginmanager.getplugin("capturemanager")
    capture.stop_global_capturing()  # or both would write to one file
    capture.start_global_capturing()
    try:
        with open(writer, "w", buffering=1) as pipe:
            item = next_item()
            while item:
                following = next_item()
                for report in runtestprotocol(item, nextitem=following, log=False):
                    data = config.hook.pytest_report_to_serializable(config=config, report=report)
                    pipe.write(json.dumps(data) + "\n")
                item = following
    finally:  # whatever ends it: the rest of pytest is the other process's affair
        os._exit(0)


@pytest.fixture
def fixtures() -> Path:
    return Path(__file__).resolve().parent / "fixtures"


@pytest.fixture
def shared() -> Path:
    if not (SHARED / "checkpoints").is_dir():
        pytest.skip("the shared test material is not here")
    return SHARED
