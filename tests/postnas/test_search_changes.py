"""What a search's workdir allows to change."""

from jet_jax.postnas.search_changes import changes

THERE = {
    "seed": 0,
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
    assert changed(tmp_path, seed=1, **everything) == ["seed"]
    assert changed(tmp_path, placement={"window": 32}) == ["placement.window"]

    (tmp_path / "align").mkdir()  # begun
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
