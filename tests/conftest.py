"""One thread, here and in the processes that tests start; pytest reads this before torch is loaded.

Then tests side by side do not wait for one another's cores, and a server of processes can be
forked. ``OMP_NUM_THREADS=2`` in the environment tests with two.

Files with slow tests come first, so that no process waits for another's last long one.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items):
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
