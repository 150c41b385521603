"""The shipped searches build, with what their users have to give."""

import pytest

import jet_jax
from configs import search_jet2b, search_quickstart, search_smollm
from jet_jax.postnas.search_config import STAGES, SearchConfig
from jet_jax.postnas.shapes import Shape
from jet_jax.postnas.stages import is_asked


def built(config, tmp_path):
    config.teacher = str(tmp_path)
    config.data.tokenizer = str(tmp_path)
    config.data.train = config.data.train or ("text.jsonl",)
    return SearchConfig.from_dict(config.to_dict())


@pytest.mark.parametrize("arg", ["", "small"])
def test_the_papers_search(arg, tmp_path):
    config = search_jet2b.get_config(arg)
    config.placement.objectives.choice.task = "questions.jsonl"
    search = built(config, tmp_path)
    tokens = search.data.seq_len * search.data.batch_size
    scale = 200 if arg else 1
    assert search.supernet.steps * tokens == pytest.approx(50e9 / scale, rel=1e-3)
    assert search.finetune["steps"] == pytest.approx(7 * search.distill["steps"], rel=1e-3)
    assert len(search.blocks.arms) == 8 and len(search.shapes.arms) == 9
    assert {Shape(*map(int, name.split("-"))).product for name in search.shapes.arms} == {294_912}
    assert search.final == "jet" and (search.placement.full, search.placement.windows) == (2, 2)


@pytest.mark.parametrize("arg", ["", "all", "smoke"])
def test_the_search_on_smollm(arg, tmp_path):
    search = built(search_smollm.get_config(arg), tmp_path)
    assert search.distill is not None and (search.blocks is not None) == (arg == "all")
    if arg == "all":
        assert "64-64-9" in search.shapes.arms and "static-v" in search.ablations.arms


def test_the_quick_start_has_every_stage(tmp_path):
    search = built(search_quickstart.get_config(), tmp_path)
    assert all(is_asked(search, stage) for stage in STAGES) and search.final == "blocks"


@pytest.mark.parametrize("name", search_quickstart.TEACHERS)
def test_the_quick_starts_teachers_load(name):
    model = jet_jax.load(search_quickstart.get_config(name).teacher)
    full = [i for i, kind in enumerate(model.config.layer_types) if kind == "attn"]
    assert full == [int(x) for x in name.split("-")]


def test_unknown_variants_are_named():
    for module in (search_jet2b, search_quickstart, search_smollm):
        with pytest.raises(ValueError, match=r":no"):
            module.get_config("no")
