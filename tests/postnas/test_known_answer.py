"""`search.py` finds the two layers that a teacher needs, wherever they are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs import search_quickstart

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", search_quickstart.TEACHERS)
def test_the_search_keeps_the_two_layers_that_are_needed(name, tmp_path):
    """All stages, as typed, on one device."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_DISABLE"))}
    subprocess.run(
        [
            sys.executable, "search.py", f"--config=configs/search_quickstart.py:{name}",
            f"--workdir={tmp_path}",
        ],
        cwd=ROOT, env=env | {"JAX_PLATFORMS": "cpu"}, check=True,
    )  # fmt: skip
    done = ("align", "supernet", "placement", "hybrid", "evaluate", "report")
    assert all((tmp_path / f"{stage}.json").exists() for stage in done)
    needed = [int(x) for x in name.split("-")]
    decision = json.loads((tmp_path / "placement.json").read_text())
    assert decision["full"]["layers"] == needed
    kinds = decision["layer_types"]
    assert [i for i, kind in enumerate(kinds) if kind == "attn"] == needed
    assert kinds.count("gdn") == 4
    # Not by a hair: every other pair is much worse.
    table = json.loads((tmp_path / "placement" / "table.json").read_text())
    kept = {tuple(i for i, x in enumerate(row["path"]) if x != 1): row["kl"] for row in table}
    pairs = {layers: kl for layers, kl in kept.items() if len(layers) == 2}
    best = pairs.pop(tuple(needed))
    assert len(pairs) == 14 and best < 0.75 * min(pairs.values())
