"""Named systems: each a policy with its options, as anybody could write it on the command line.

They differ in what they load and evict, and share everything else of a run: predictor (where none is named, the run's),
quantization, kernels, planning time. What a system does beyond that is missing, and its source says so.
"""

from __future__ import annotations

from typing import NamedTuple


class Preset(NamedTuple):
    """``spec`` is the string the name stands for; ``source`` says what it describes and where that was read."""

    spec: str
    source: str


DESCRIBED = "re-implementation from a description of "

PRESETS = {
    "mixtral_offloading": Preset(
        "on_demand:cache=lru,write_back=1,copy_stream=0,chunk_bytes=0",
        "as released (dvmazur/mixtral-offloading @ ce545188): per-layer LRU, every victim copied "
        "back to the host, both copies on the compute stream, no speculative loading",
    ),
    "mixtral_offloading_no_write_back": Preset(
        "on_demand:cache=lru,copy_stream=0,chunk_bytes=0",
        "mixtral_offloading without the copies back to the host (weights never change)",
    ),
    "mixtral_offloading_copy_stream": Preset(
        "on_demand:cache=lru,chunk_bytes=0",
        "mixtral_offloading_no_write_back with its copies, one an expert, on a stream of their own",
    ),
    "mixtral_offloading_paper": Preset(
        "next_layer:lookahead=1,count=2,cache=lru,landing_slots=4,stale=keep,chunk_bytes=0",
        DESCRIBED + "the paper's speculative loading (Eliseev and Mazur 2023), on top of "
        "mixtral_offloading_copy_stream: after the demand loads the two likeliest experts of the next layer, into the "
        "four buffers all layers share; one joins the cache only when it is used, a started copy is never called back. "
        "Its guesses are the next router's on this layer's input: predictor=router where the trace records them",
    ),
    "adapmoe": Preset(
        "next_missing:lookahead=1,count=1,cache=sized_lru,chunk_bytes=-3",
        DESCRIBED + "AdapMoE (Zhong et al. 2024): first missing expert of the next layer, layers sized by dynamic "
        "programming, an expert copied in three parts. Missing: computing a part before the others are there, its "
        "correction of guesses for the first layers, and fewer experts for easy tokens (which changes outputs)",
    ),
    "promoe": Preset(
        "two_class:lookahead=3,cache=lru",
        DESCRIBED + "ProMoE (Song et al. 2024): demand before speculative copies, three chunks an expert, queued ones "
        "purged when their layer is routed. Missing: its learned predictors, for which the run's stand in",
    ),
    "seqmoe": Preset(
        "deadline:lookahead=4,cache=predicted_next_use",
        DESCRIBED + "SeqMoE: the most probability that still meets each layer's deadline on the link, eviction of the "
        "farthest predicted next use. Missing: its forecasts of whole sequences, which reach much farther than the "
        "four layers guessed here: on a slow link nothing four layers ahead meets its deadline, and little is issued",
    ),
    "firm_moe": Preset(
        "agreement:lookahead=3,cache=lru",
        DESCRIBED + "FIRM-MoE: an expert is prefetched when the guesses of several layers agree on it. Missing: "
        "anything else it does",
    ),
    "hobbit": Preset(
        "walk_forward:lookahead=3,cache=protected_lru,landing_slots=0",
        DESCRIBED + "HOBBIT (Tang et al. 2024): the first layer ahead with a missing predicted expert, predicted "
        "experts protected from eviction. Missing: low-precision copies of unimportant experts (changes outputs), its "
        "eviction by a weighted mix of recency, frequency, precision and layer",
    ),
    "moe_infinity": Preset(
        "all_positive:lookahead=3,predictor=(popularity:per_sequence=1),cache=(lfu:per_sequence=1)",
        DESCRIBED + "MoE-Infinity (Xue et al. 2024): every expert the present request makes likely, nearer layers "
        "first, eviction by its counts. Missing: forecasts from the nearest of earlier requests' activation matrices; "
        "the present request's own counts stand in. Early loads have slots of their own; evicting for them at once, "
        "as it does, is landing_slots=0 and slower here",
    ),
    "finemoe": Preset(
        "cumulative:lookahead=3,cache=lfu",
        DESCRIBED + "FineMoE (Yu et al. 2025): guesses by probability until a share of it is covered, ordered by "
        "probability / distance, eviction by frequency. Missing: the guess's part in eviction; a store of expert maps "
        "searched by prompt and trajectory, for which the run's predictor stands in. Early loads as for moe_infinity",
    ),
    "fate": Preset(
        "confidence:lookahead=1,cache=lru",
        DESCRIBED + "Fate (Fang et al. 2025): the next layer's experts by its router on this layer's input, above a "
        "confidence. Missing: a cache that favours shallow layers, mixed precision, and overlap in prefill",
    ),
    "fiddler": Preset(
        "on_demand:cache=static_hot,miss=cpu",
        DESCRIBED + "Fiddler (Kamahori et al. 2024): the most used experts stay on the device, the host computes the "
        "others. Missing: loading an expert after all when many tokens share it (prefill)",
    ),
    "freetoken": Preset(
        "on_demand:cache=lru,miss=split",
        "re-implementation from a summary of FreeToken: misses are split between link and host by their speeds. "
        "Missing: anything else it does",
    ),
}


def table() -> str:
    """The presets as a Markdown table."""
    rows = [f"| `{name}` | `{preset.spec}` | {preset.source} |" for name, preset in PRESETS.items()]
    return "\n".join(["| preset | stands for | source, and what is missing |", "| --- | --- | --- |", *rows])
