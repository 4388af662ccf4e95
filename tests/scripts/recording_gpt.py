"""The packaged training script, noting in the file RECORD which tokens each step reads and has as labels."""

import json
import os

from megatron.training import get_args
from packaged import train

from megatron_bliss.mcore import pretrain_gpt


class Recorder:
    def __init__(self, iterator):
        self.iterator = iterator

    def __next__(self):
        batch = next(self.iterator)
        for tokens, labels in zip(batch["tokens"].tolist(), batch["labels"].tolist(), strict=True):
            with open(os.environ["RECORD"], "a") as stream:
                record = {"step": get_args().curr_iteration + 1, "tokens": [*tokens, labels[-1]]}
                stream.write(json.dumps(record) + "\n")
        return batch


def forward_step(data_iterator, model):
    return pretrain_gpt.forward_step(Recorder(data_iterator), model)


if __name__ == "__main__":
    train(forward_step)
