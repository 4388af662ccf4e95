"""The package's training script, slowed down: a step takes SLOW_STEP seconds longer, so that tests can disturb it."""

import os
import runpy
import time

from megatron.training import training

from megatron_bliss.mcore.script import PACKAGED_SCRIPT

_train_step = training.train_step


def _slow_train_step(*args, **kwargs):
    time.sleep(float(os.environ.get("SLOW_STEP", "0")))
    return _train_step(*args, **kwargs)


training.train_step = _slow_train_step
runpy.run_path(str(PACKAGED_SCRIPT), run_name="__main__")
