"""The user's training script, whose process is killed once, at the sixth of all reference steps.

With four in each synchronisation, that is the second step of the second one. The file KILLED is made then; where it is
there already, the script trains to its end.
"""

import os
import runpy
import signal
from pathlib import Path

from megatron_bliss.mcore.online_training import Trainee

step = Trainee.step


def killing(self, objective, position, original):
    killed = Path(os.environ["KILLED"])
    if position == 5 and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, objective, position, original)


if __name__ == "__main__":
    Trainee.step = killing
    runpy.run_path(str(Path(__file__).with_name("pretrain_gpt.py")), run_name="__main__")
