"""The closest name to what somebody typed: the last part of a good error line."""

from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches

# What other trainers call the same thing.
OTHER_NAMES = {
    "batch_size": "schedule.global_batch_size",
    "d_model": "model.hidden_size",
    "dtype": "precision",
    "epochs": "schedule.max_steps",
    "learning_rate": "optimizer.lr",
    "logger": "logging.sinks",
    "num_experts": "model.n_routed_experts",
    "num_heads": "model.num_attention_heads",
    "num_layers": "model.num_hidden_layers",
    "num_steps": "schedule.max_steps",
    "output_dir": "run_dir",
    "seq_len": "data.sequence_length",
    "steps": "schedule.max_steps",
    "top_k": "model.num_experts_per_tok",
}


def nearest_name(name: str, names: Iterable[str]) -> str:
    """The member of ``names`` (not empty) that is spelled most like ``name``."""
    return get_close_matches(name, list(names), n=1, cutoff=0.0)[0]


def nearest_key(key: str, keys: Iterable[str]) -> str:
    """The dotted key that ``key`` most likely means.

    The last part weighs most, since a key is often right but for its group; a name that
    other trainers use counts as the key it stands for.
    """
    known = list(keys)
    last = key.rpartition(".")[2]
    other = OTHER_NAMES.get(last)
    if other in known:
        return other

    def closeness(candidate: str) -> float:
        whole = SequenceMatcher(None, key, candidate).ratio()
        tail = SequenceMatcher(None, last, candidate.rpartition(".")[2]).ratio()
        return whole + 2 * tail

    return max(known, key=closeness)
