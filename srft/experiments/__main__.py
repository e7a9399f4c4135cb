"""``python -m srft.experiments <suite>``."""

# ruff: noqa: E402
from srft.launch import share_cores
from srft.stop import leave_at_once

leave_at_once()  # the imports below take seconds, in which a signal would end in a traceback of theirs
share_cores()  # for the runs, which are forks of this process

from srft.experiments.command import main

main()
