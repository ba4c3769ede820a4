"""Run a command of raydpo that kills itself at one file: ``kill_at.py before|after FILE ARGUMENT ...``.

FILE is the name under which ``Storage.write`` writes it, or ``final``, the link to the last policy.
"""

import os
import signal
import sys

from raydpo.cli.entry import main
from raydpo.storage.files import Storage


def killing(act, name_of):
    """``act``, with a kill before or after the call whose file has the name."""

    def acted(*arguments, **named):
        reached = name_of(*arguments) == file
        if reached and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = act(*arguments, **named)
        if reached:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return acted


if __name__ == "__main__":
    when, file, *arguments = sys.argv[1:]
    Storage.write = killing(Storage.write, lambda storage, name, *rest: f"{os.path.basename(storage.root)}/{name}")
    os.symlink = killing(os.symlink, lambda target, link: "final" if target.startswith("round-") else "")
    sys.exit(main(arguments))
