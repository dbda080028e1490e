"""One thread, here and in the processes that tests start; pytest reads this before torch is loaded.

Then sums are made in one order, results can be compared bit for bit, and tests side by side do not
wait for one another's cores.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
