import subprocess
import sys
import threading

import pytest

from server.backend.worker import Worker

SECONDS = 30


def test_a_job_gives_what_it_returns_or_raises() -> None:
    worker = Worker()
    assert worker.is_free
    assert worker.submit(divmod, 7, 2).result(SECONDS) == (3, 1)
    assert worker.is_free
    with pytest.raises(ZeroDivisionError):
        worker.submit(divmod, 7, 0).result(SECONDS)
    assert worker.submit(threading.get_ident).result(SECONDS) != threading.get_ident()


def test_a_job_that_hangs_is_given_up_and_others_follow() -> None:
    worker, may_end = Worker(), threading.Event()
    hanging = worker.submit(may_end.wait, SECONDS)
    assert not worker.is_free
    worker.give_up()
    assert worker.submit(abs, -2).result(SECONDS) == 2
    assert not hanging.done()
    may_end.set()
    assert hanging.result(SECONDS) is True


def test_a_job_that_hangs_does_not_hold_up_the_end_of_the_process() -> None:
    code = "import threading; from server.backend.worker import Worker; Worker().submit(threading.Event().wait)"
    assert subprocess.run([sys.executable, "-c", code], timeout=SECONDS, capture_output=True).returncode == 0
