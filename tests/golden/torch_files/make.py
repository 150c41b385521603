"""Writes the PyTorch files of this folder (run once with PyTorch 2.x; the tests need no torch).

Every tensor is a simple ramp, so that the tests can state the values themselves.
"""

import torch


def ramp(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """0, 1/4, 2/4, ... in row-major order: exact in every floating dtype used here."""
    n = torch.Size(shape).numel()
    return (torch.arange(n, dtype=torch.float64) / 4).reshape(shape).to(dtype)


base = ramp(6, 8, dtype=torch.float32)
module = torch.nn.Linear(4, 3)
with torch.no_grad():
    module.weight.copy_(ramp(3, 4, dtype=torch.float32))
    module.bias.zero_()
content = {
    "bf16": ramp(5, 3, dtype=torch.bfloat16),
    "fp16": ramp(5, 3, dtype=torch.float16),
    "fp32": base,
    "fp64": ramp(2, 2, dtype=torch.float64),
    "int64": torch.arange(4),
    "bool": torch.tensor([True, False]),
    "shared": base,  # the storage of fp32 once more
    "rows": base[2:4],  # an offset into it
    "transposed": base.T,  # strides against the storage's order
    "stepped": base[::2, 1::3],
    "expanded": ramp(3, dtype=torch.float32).expand(4, 3),  # stride 0
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "parameter": torch.nn.Parameter(ramp(3, dtype=torch.bfloat16)),
}
torch.save(content, "tensors.bin")
torch.save(module.state_dict(), "state_dict.bin")  # an OrderedDict with an attribute
torch.save({"step": 3, "model": module.state_dict()}, "nested.pt")
torch.save(module, "module.pt")  # a whole module: asks for its class
torch.save(module.state_dict(), "legacy.bin", _use_new_zipfile_serialization=False)
