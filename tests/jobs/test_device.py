"""What a process does before it computes."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

from jobs.training.device import NICENESS, give_way


def test_what_trains_gives_way_with_all_its_threads_and_its_process_does_not() -> None:
    def started() -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())).result()

    def train() -> list[int]:
        give_way()
        give_way()
        return [os.getpriority(os.PRIO_PROCESS, 0), started()]

    own = os.getpriority(os.PRIO_PROCESS, 0)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train).result() == [max(NICENESS, own)] * 2
    assert os.getpriority(os.PRIO_PROCESS, 0) == own
