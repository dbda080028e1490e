"""One thread, here and in the processes that tests start; pytest reads this before torch is loaded.

Then tests side by side do not wait for one another's cores, and a server of processes can be
forked. ``OMP_NUM_THREADS=2`` in the environment tests with two.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
