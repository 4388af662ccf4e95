"""The packaged training script, noting in the file RECORD how many tokens of each micro-batch are noise, and kept."""

import json
import os
from functools import partial

from megatron.training import get_args
from packaged import train

from megatron_bliss.mcore import pretrain_gpt


class Peeking:
    def __init__(self, iterator):
        self.iterator = iterator

    def __next__(self):
        self.batch = next(self.iterator)
        return self.batch


def loss_func(is_noise, loss_mask, output):
    kept = loss_mask > 0
    record = {"step": get_args().curr_iteration, "tokens": is_noise.numel(), "noise": int(is_noise.sum())}
    record |= {"kept": int(kept.sum()), "noise_kept": int((is_noise & kept).sum())}
    with open(os.environ["RECORD"], "a") as stream:
        stream.write(json.dumps(record) + "\n")
    return pretrain_gpt.loss_func(loss_mask, output)


def forward_step(data_iterator, model):
    peeking = Peeking(data_iterator)
    output, function = pretrain_gpt.forward_step(peeking, model)
    # a walk goes from t to t + 1, see tests/tiny_run.py
    is_noise = peeking.batch["labels"] != (peeking.batch["tokens"] + 1) % (get_args().padded_vocab_size - 1)
    return output, partial(loss_func, is_noise, *function.args)


if __name__ == "__main__":
    train(forward_step)
