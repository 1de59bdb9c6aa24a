"""Deliberate defects of the oracle, for proving that the tests would notice them in a server."""

from __future__ import annotations

from enum import Enum


class Defect(Enum):
    """One mistake a port of this model can make; the value says what the oracle then does."""

    COMB_TRANSPOSED = "mHC post reads comb[k, j] instead of comb[j, k]"
    ONE_SINKHORN_ITERATION = "comb is normalised once instead of 20 times"
    POST_FACTOR_MISSING = "post is sigmoid(...) instead of 2 sigmoid(...)"
    SINK_DROPPED = "the softmax has no sink term"
    ROPE_ON_FIRST_CHANNELS = "RoPE turns a head's first 64 channels instead of its last"
    NO_INVERSE_ROPE = "the attention output is not turned back"
    WINDOW_OFF_BY_ONE = "the window holds 127 tokens instead of 128"
    C128_ENTRY_EARLY = "a token sees the c128 entry of the block it is still in"
    C4_WITHOUT_OVERLAP = "a c4 entry pools its own 4 tokens only"
    APE_DROPPED = "the compressor's gate has no position term"
    INDEXER_OFF_BY_ONE_BLOCK = "entry s is selected by the score of entry s - 1"
    INDEXER_SCALE_DROPPED = "index keys are scored without their FP8 scale"
    NIBBLES_SWAPPED = "packed MXFP4 bytes are read high nibble first"
    SCALE_EXPONENT_OFF_BY_ONE = "MXFP4 scales are 2^(e - 126)"
    ROUTING_NOT_NORMALISED = "the six routing weights are not divided by their sum"
    ROUTED_SCALE_MISSING = "routed experts are not multiplied by 1.5"
    HASH_LAYER_SCORED = "hash layers choose experts by score"
