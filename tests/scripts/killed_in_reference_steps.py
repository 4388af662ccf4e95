"""The user's training script, whose process is killed at the second reference step of the second synchronisation."""

import os
import runpy
import signal
from pathlib import Path

from megatron_bliss.mcore.online_training import Trainee

step = Trainee.step


def killing(self, objective, position, original):
    if position == 5:  # four in each
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, objective, position, original)


if __name__ == "__main__":
    Trainee.step = killing
    runpy.run_path(str(Path(__file__).with_name("pretrain_gpt.py")), run_name="__main__")
