"""Import it in a process that the kernel shall kill when its parent ends: the fork server of the tests' ranks imports it.

A rank that is stopped does not see that the tests are gone, and a fork server stays as long as one of its ranks.
"""

import ctypes
import signal

PR_SET_PDEATHSIG = 1  # of Linux' prctl


def end_with_parent() -> None:
    """The same for this process; a fork does not inherit it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


end_with_parent()
