"""What is said about a comparison, from results made by hand."""

from jet_jax.postnas.comparison_report import caption
from jet_jax.postnas.shape_comparison import rows_of
from jet_jax.postnas.shapes import Shape


def summary(**arm) -> dict:
    """One arm's results, of which `arm` are changed."""
    result = {"tuned": {}, "learning_rate": 0.002, "seeds": {}}
    return {
        "seeds": [0, 1],
        "tokens": {"steps": 64},
        "tuned_by": {"name": "text", "figure": "kl"},
        "teacher": {"text": 0.0},
        "arms": {"gla": result | arm},
    }


def test_the_caption_says_where_the_learning_rates_are_from():
    assert "All arms ran at the one learning rate 0.002. The teacher" in caption(summary())
    tuned = {"0.001": None, "0.002": 0.5}
    assert "Learning rates by kl of items set apart. The" in caption(summary(tuned=tuned))
    nowhere = summary(tuned={"0.001": None}, learning_rate=None)  # diverged
    assert "Learning rates by kl of items set apart." in caption(nowhere)


def test_shapes_have_the_figures_that_the_comparison_has():
    sizes = dict.fromkeys(("parameters", "cache_bytes", "decode_tokens_s", "prefill_tokens_s"), 7)
    arm = {"figures": {"text": {"mean": 0.25}}, "speeds": {"note": None}, "note": "seed 1 slow"}
    (row,) = rows_of(summary(**sizes, **arm), {"gla": Shape(8, 8, 4)})
    about = {"arm": "gla", "shape": "8-8-4", "note": "seed 1 slow"}
    assert row == {**about, **sizes, "text": 0.25}
