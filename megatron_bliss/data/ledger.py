"""How often each sequence was taken by earlier rounds.

The selections on disk are the ledger: what a round took is what its selection holds, whether or not the training came
to read all of it. So nothing has to be kept up to date, and a selection that is made again finds the same ledger.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_bliss.artifacts import digest_json
from megatron_bliss.data.selection import Selection
from megatron_bliss.data.shards import ShardRecord
from megatron_bliss.errors import UserError


class Ledger:
    """The sequences of some selections, read from their files a span at a time.

    Shards are told apart by their content, so a selection of the same shards in another place counts too.

    :param selections: of earlier rounds; at most 255.
    """

    def __init__(self, selections: Sequence[Selection] = ()) -> None:
        if len(selections) > np.iinfo(np.uint8).max:
            raise UserError(f"{len(selections)} earlier selections are given; the ledger counts up to 255")
        self.num_rounds = len(selections)
        self.digest = digest_json([selection.digest for selection in selections])
        self._files: dict[str, list[Path]] = {}  # by the shard's digest
        for selection in selections:
            for shard in selection.shards:
                if len(shard.ids):
                    path = selection.directory / f"{shard.record.name}.npy"
                    self._files.setdefault(shard.record.digest, []).append(path)

    def uses(self, record: ShardRecord, start: int, stop: int) -> np.ndarray:
        """How many rounds took each of the sequences with ids in [start, stop): uint8 [stop - start]."""
        uses = np.zeros(stop - start, dtype=np.uint8)
        for path in self._files.get(record.digest, ()):
            ids = np.load(path, mmap_mode="r", allow_pickle=False)
            first, last = np.searchsorted(ids, np.array([start, stop], ids.dtype))  # else all ids would be converted
            uses[np.asarray(ids[first:last]) - start] += 1
        return uses
