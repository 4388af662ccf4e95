"""The packaged training script, noting in the file RECORD each sample's dataset, summed loss and tokens with loss."""

import json
import os

from megatron.training import get_args
from packaged import train

from megatron_bliss.mcore import pretrain_gpt


def forward_step(data_iterator, model):
    batch = next(data_iterator)
    output, loss_function = pretrain_gpt.forward_step(iter([batch]), model)
    with open(os.environ["RECORD"], "a") as stream:
        rows = zip(batch["dataset_id"].tolist(), output.tolist(), batch["loss_mask"].tolist(), strict=True)
        for dataset, losses, mask in rows:
            loss = sum(value * weight for value, weight in zip(losses, mask, strict=True))
            record = {"step": get_args().curr_iteration + 1, "dataset": dataset, "loss": loss, "tokens": sum(mask)}
            stream.write(json.dumps(record) + "\n")
    return output, loss_function


if __name__ == "__main__":
    train(forward_step)
