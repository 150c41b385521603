r"""One point of the hardware-aware search at 2B: Gated DeltaNet of a given shape in 24 layers.

    jet-jax info configs/grid2b.py:96-256-12
    python train.py --config=configs/grid2b.py:96-256-12 --workdir=runs/grid-96-256-12 \
        --config.data.train="('corpus/*.jsonl.zst',)" --config.data.tokenizer=PATH/TO/TOKENIZER

The argument is key width, value width and heads of the state; their product is 294,912 in every
point, so all caches are equally large. The other layers (2 full attention, 2 windows of 1152), the
sizes and the settings of training are those of `configs/jet2b.py`. The nine points of
arXiv 2508.15884, table 2: 256-288-4, 192-384-4, 128-576-4, 256-144-8, 192-192-8, 128-288-8,
128-192-12, 96-256-12, 64-384-12.
"""

from configs import jet2b
from jet_jax.postnas.shapes import check_shapes, shape_options

PRODUCT = 294_912


def get_config(shape="192-384-4"):
    """The settings; `shape` is KEY-VALUE-HEADS, by default the design that the search began with.

    Raises ValueError for a shape of another product.
    """
    config = jet2b.get_config()
    model = config.model.to_dict()
    del model["mixers"]["jet"]
    model["mixers"]["gdn"] = shape_options(check_shapes(PRODUCT, [shape])[0])
    model["layer_types"] = tuple("gdn" if k == "jet" else k for k in model["layer_types"])
    config.model = model
    return config
