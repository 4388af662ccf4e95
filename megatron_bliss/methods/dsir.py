"""DSIR (arXiv 2302.03169): how much likelier a sequence is by the validation set's n-grams than by the
slice's."""

from typing import Literal

from megatron_bliss.methods.offline import OfflineMethod


class Dsir(OfflineMethod):
    name = "dsir"
    scored_by: Literal["ngrams"] = "ngrams"
    learns: Literal["ngrams"] = "ngrams"
