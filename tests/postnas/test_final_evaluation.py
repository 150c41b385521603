"""How the evaluation at a search's end is shown."""

from jet_jax.postnas.final_evaluation import caption, table

SIZES = {"context": 4096, "batch": 8, "prefill_length": 1024, "chunk": 512, "prefill_batch": 1}


def model(**speeds):
    figures = {"text": {"value": 0.25, "difference": None}}
    return {"parameters": 2_000_000, "cache_bytes": 2**20, "figures": figures, **speeds}


def evaluation(teacher, last):
    return {
        "split": "test",
        "objectives": {"text": {"figure": "kl", "more_is_better": False, "items": 64}},
        "context": 4096,
        "models": {"teacher": teacher, "hybrid": model(), "distill": last},
        "measure": SIZES,
    }


def test_what_could_not_be_measured_is_said_with_its_reason():
    full = {"decode_tokens_s": None, "prefill_tokens_s": 50.0, "device": "a card"}
    fast = {"decode_tokens_s": 80.0, "prefill_tokens_s": 100.0, "device": "a card", "note": None}
    made = evaluation(model(**full, note="decode: out of memory"), model(**fast))
    assert caption(made).endswith(", on a card. teacher: decode: out of memory.")
    assert "| distill | 0.25 | 2.0 | 1.0 | 80 | 100 |  | 2.00 |" in table(made)
    made = evaluation(model(**fast), model(**fast))
    assert caption(made).endswith(", on a card.")
