#!/usr/bin/env python3
"""`kubectl sgpu` as krew installs it: this file as kubectl-sgpu, and lib/ beside it, which has all that it imports.

An older Python than sgpu needs must be able to read this file: macOS calls 3.9 `python3`.
"""

import os
import shutil
import subprocess
import sys

if sys.version_info < (3, 11):  # noqa: UP036  # this Python is the user's
    for minor in range(19, 10, -1):
        newer = shutil.which("python3.%d" % minor)  # noqa: UP031
        if newer and not subprocess.call([newer, "-c", ""], stderr=subprocess.DEVNULL):  # pyenv's may run nothing
            os.execv(newer, [newer] + sys.argv)  # noqa: RUF005
    sys.exit("kubectl sgpu: needs Python 3.11 or later; %s is %s" % (sys.executable, sys.version.split()[0]))  # noqa: UP031

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), "lib"))

from sgpu.__main__ import kubectl_sgpu

kubectl_sgpu()
