"""What a search's workdir allows to change."""

from unittest import mock

from jet_jax.postnas.search_changes import changes, forget, reopened, to_keep
from jet_jax.postnas.search_config import SearchConfig

THERE = {
    "seed": 0,
    "dtype": None,
    "align": {"steps": 10},
    "supernet": {"steps": 10, "remat": "mixer"},
    "placement": {"selector": "beam", "window": 64, "objectives": {"text": {"task": "perplexity"}}},
    "blocks": {"steps": 5, "arms": {"gdn": {"kind": "gdn"}}},
    "shapes": None,
    "final": "",
}


def changed(workdir, **settings):
    """The names that are refused when one setting of each section is another."""
    here = {k: {**v, **settings[k]} if isinstance(settings.get(k), dict) and isinstance(v, dict)
            else settings.get(k, v) for k, v in THERE.items()}  # fmt: skip
    return [line.split(":")[0].strip() for line in changes(THERE, here, workdir)]


def test_what_no_result_depends_on_may_change(tmp_path):
    everything = {
        "align": {"steps": 11}, "supernet": {"steps": 11}, "placement": {"selector": "single"},
        "blocks": {"steps": 6}, "final": "gdn",
    }  # fmt: skip
    assert changed(tmp_path, seed=1, dtype="float32", **everything) == []

    (tmp_path / "align").mkdir()  # begun
    assert changed(tmp_path, seed=1, dtype="float32") == ["seed", "dtype"]
    assert changed(tmp_path, placement={"window": 32}) == ["placement.window"]
    assert changed(tmp_path, supernet={"steps": 11}) == []
    (tmp_path / "supernet.json").write_text("{}")
    assert changed(tmp_path, **everything) == ["align.steps", "supernet.steps"]
    assert changed(tmp_path, supernet={"remat": "layer"}) == []

    (tmp_path / "placement").mkdir()
    (tmp_path / "placement" / "scores.jsonl").write_text("[]")
    other = {"text": {"task": "mqar"}}
    assert changed(tmp_path, placement={"selector": "single"}) == []
    assert changed(tmp_path, placement={"objectives": other}) == ["placement.objectives.text.task"]

    for stage in ("placement", "blocks", "hybrid"):
        (tmp_path / f"{stage}.json").write_text("{}")
    assert changed(tmp_path, placement={"selector": "single"}) == ["placement.selector"]
    assert changed(tmp_path, blocks={"steps": 6}) == ["blocks.steps"]
    assert changed(tmp_path, blocks={"arms": {"jet": {"kind": "jet"}}}) == []
    assert changed(tmp_path, final="gdn") == ["final"]


def test_a_section_that_one_of_them_has_not_is_no_change(tmp_path):
    assert changed(tmp_path, shapes={"steps": 4}) == []
    assert changed(tmp_path, blocks=None) == []


def test_what_is_left_out_for_once_is_not_forgotten():
    here = {**THERE, "blocks": None, "seed": 1}
    assert to_keep(THERE, here) == {**THERE, "seed": 1}
    other = {**THERE, "blocks": {"steps": 6}}
    assert to_keep(THERE, other) == other


def test_a_comparison_with_another_arm_is_to_be_run_again(tmp_path):
    """And what was made of the arm that it chose; a setting of memory alone changes nothing."""
    more = {**THERE["blocks"], "arms": {"gdn": {"kind": "gdn"}, "jet": {"kind": "jet"}}}
    assert reopened(THERE, {**THERE, "blocks": more}) == ["blocks"]
    assert reopened(THERE, {**THERE, "blocks": THERE["blocks"] | {"remat": "full"}}) == []
    assert reopened(THERE, {**THERE, "blocks": None}) == []
    assert reopened(THERE, {**THERE, "measure": {"context": 8}}) == ["evaluate"]

    names = ("placement", "blocks", "ablations", "hybrid", "distill", "evaluate", "report")
    for final, gone in (("blocks", set(names[3:]) | {"blocks"}), ("jet", {"blocks", "report"})):
        for name in names:
            (tmp_path / f"{name}.json").write_text("{}")
        config = mock.Mock(spec=SearchConfig, final=final)
        forget(THERE, {**THERE, "blocks": more}, tmp_path, config)
        assert {x for x in names if not (tmp_path / f"{x}.json").exists()} == gone
