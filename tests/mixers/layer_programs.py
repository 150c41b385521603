"""The recurrent mixers token by token in float64 numpy, written from their equations.

Each function takes x [T, D], weights `w` under the published names and layouts, and options; a row
is one sequence. They share no code with the project.
"""

import numpy as np


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def silu(z):
    return z * sigmoid(z)


def softplus(z):
    return np.log1p(np.exp(z))


def elu1(z):
    return np.where(z > 0, z + 1, np.exp(np.minimum(z, 0)))


GATES = {
    "swish": silu,
    "sigmoid": sigmoid,
    "relu": lambda z: np.maximum(z, 0),
    "gelu": lambda z: z / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
}


def rms(z, weight, eps):
    return z / np.sqrt(np.mean(z**2, axis=-1, keepdims=True) + eps) * weight


def l2(z):
    return z / np.sqrt(np.sum(z**2, axis=-1, keepdims=True) + 1e-6)


def conv(u, w, name):
    """Causal, depthwise; taps [C, 1, W], the last for the current token."""
    taps = w[f"{name}.weight"][:, 0]
    width = taps.shape[1]
    padded = np.concatenate([np.zeros((width - 1, u.shape[1])), u])
    out = sum(padded[j : j + len(u)] * taps[:, j] for j in range(width))
    return out + w.get(f"{name}.bias", 0.0)


def heads(row, count):
    return row.reshape(len(row), count, -1)


def row(x, w, name, options, after_conv=silu, without_conv=silu):
    u = x @ w[f"{name}_proj.weight"].T
    if f"{name}_conv1d.weight" in w:
        return after_conv(conv(u, w, f"{name}_conv1d"))
    return without_conv(u)


def delta_rule(q, k, v, g, beta):
    """g [T, H] or [T, H, K]; value head j uses query and key head j // (HV / H)."""
    repeats = v.shape[1] // q.shape[1]
    q, k = np.repeat(q, repeats, axis=1), np.repeat(k, repeats, axis=1)
    g = np.broadcast_to(g if g.ndim == 3 else g[..., None], k.shape)
    state, out = np.zeros((*k.shape[1:], v.shape[2])), []
    for t in range(len(q)):
        state = np.exp(g[t])[..., None] * state
        error = v[t] - np.einsum("hkv,hk->hv", state, k[t])
        state = state + k[t][..., None] * (beta[t][..., None] * error)[:, None]
        out.append(np.einsum("hkv,hk->hv", state, q[t]) / np.sqrt(q.shape[-1]))
    return np.stack(out)


def linear_attention(q, k, v, g, scale):
    state, out = np.zeros((*k.shape[1:], v.shape[2])), []
    for t in range(len(q)):
        state = np.exp(g[t])[..., None] * state + k[t][..., None] * v[t][:, None]
        out.append(scale * np.einsum("hkv,hk->hv", state, q[t]))
    return np.stack(out)


def output(o, x, w, options, gated, norm, act):
    y = rms(o, w[f"{norm}.weight"], options.norm_eps).reshape(len(x), -1)
    if gated:
        y = y * act(x @ w["g_proj.weight"].T)
    return y @ w["o_proj.weight"].T


def retnet(x, w, o, gla=False):
    def kept(z):
        return z

    q = heads(row(x, w, "q", o, without_conv=kept), o.num_heads)
    k, v = (heads(row(x, w, n, o, without_conv=kept), o.kv_heads) for n in "kv")
    if gla:
        f = x @ w["gk_proj.0.weight"].T @ w["gk_proj.1.weight"].T + w["gk_proj.1.bias"]
        g = heads(np.log(sigmoid(f)) / o.gate_logit_normalizer, o.kv_heads)
        g = g if o.clamp_min is None else np.maximum(g, o.clamp_min)
    else:
        half = q.shape[-1] // 2
        angle = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(half) / half)
        turn = np.exp(1j * angle)[:, None]
        q, k = (
            np.concatenate([z.real, z.imag], axis=-1)
            for z in ((z[..., :half] + 1j * z[..., half:]) * turn for z in (q, k))
        )
    repeats = o.num_heads // o.kv_heads
    k, v = np.repeat(k, repeats, axis=1), np.repeat(v, repeats, axis=1)
    if gla:
        g = np.repeat(g, repeats, axis=1)
    else:
        decay = np.log(1 - 2.0 ** (-5 - np.arange(o.num_heads)))
        g = np.broadcast_to(decay[None, :, None], k.shape)
    mixed = linear_attention(q, k, v, g, q.shape[-1] ** -0.5)
    norm = "g_norm" if "g_norm.weight" in w else "g_norm_swish_gate"
    return output(mixed, x, w, o, o.use_output_gate, norm, GATES[o.gate_fn])


def gla(x, w, o):
    return retnet(x, w, o, gla=True)


def deltanet(x, w, o):
    act = {"silu": silu, "relu": lambda z: np.maximum(z, 0), "elu": elu1, "identity": lambda z: z}
    inside = act[o.qk_activation]
    q, k = (heads(row(x, w, n, o, inside, inside), o.num_heads) for n in "qk")
    v = heads(row(x, w, "v", o), o.num_heads)
    if o.qk_norm == "l2":
        q, k = l2(q), l2(k)
    else:
        q, k = (z / np.maximum(np.abs(z).sum(-1, keepdims=True), 1e-6) for z in (q, k))
    beta = sigmoid(x @ w["b_proj.weight"].T) if o.use_beta else np.ones(v.shape[:2])
    beta = beta * (2 if o.allow_neg_eigval else 1)
    mixed = delta_rule(q, k, v, np.zeros(v.shape[:2]), beta)
    return output(mixed, x, w, o, o.use_gate, "o_norm", silu)


def gdn(x, w, o):
    q, k = (l2(heads(row(x, w, n, o), o.num_heads)) for n in "qk")
    v = heads(row(x, w, "v", o), o.value_heads)
    g = -np.exp(w["A_log"]) * softplus(x @ w["a_proj.weight"].T + w["dt_bias"])
    beta = sigmoid(x @ w["b_proj.weight"].T) * (2 if o.allow_neg_eigval else 1)
    mixed = delta_rule(q, k, v, g, beta)
    return output(mixed, x, w, o, o.use_gate, "o_norm", GATES[o.output_gate_activation])


def kda(x, w, o):
    q, k = (l2(heads(row(x, w, n, o), o.num_heads)) for n in "qk")
    v = heads(row(x, w, "v", o), o.value_heads)
    f = heads(x @ w["f_proj.0.weight"].T @ w["f_proj.1.weight"].T + w["dt_bias"], o.value_heads)
    rate = np.exp(w["A_log"])[:, None]
    g = o.lower_bound * sigmoid(rate * f) if o.safe_gate else -rate * softplus(f)
    beta = sigmoid(x @ w["b_proj.weight"].T) * (2 if o.allow_neg_eigval else 1)
    mixed = rms(delta_rule(q, k, v, g, beta), w["o_norm.weight"], o.norm_eps)
    gate = x @ w["g_proj.0.weight"].T @ w["g_proj.1.weight"].T + w["g_proj.1.bias"]
    return (mixed.reshape(len(x), -1) * sigmoid(gate)) @ w["o_proj.weight"].T


def mamba2(x, w, o):
    projected = x @ w["in_proj.weight"].T + w.get("in_proj.bias", 0.0)
    count = len(w["A_log"])
    inner, shared = count * o.head_dim, o.n_groups * o.state_size
    z, xbc, dt = np.split(projected, [inner, 2 * inner + 2 * shared], axis=1)
    u, b, c = np.split(silu(conv(xbc, w, "conv1d")), [inner, inner + shared], axis=1)
    dt = np.clip(softplus(dt + w["dt_bias"]), *o.dt_limit)
    u = heads(u, count)
    b, c = (np.repeat(heads(part, o.n_groups), count // o.n_groups, axis=1) for part in (b, c))
    g = np.broadcast_to((-np.exp(w["A_log"]) * dt)[..., None], b.shape)
    mixed = linear_attention(c, b, dt[..., None] * u, g, 1.0)
    mixed = (mixed + w["D"].reshape(count, -1) * u).reshape(len(x), -1)
    if not o.rmsnorm:
        return (mixed * silu(z)) @ w["out_proj.weight"].T + w.get("out_proj.bias", 0.0)
    mixed = mixed if o.norm_before_gate else mixed * silu(z)
    mixed = rms(heads(mixed, o.n_groups), 1.0, o.norm_eps).reshape(mixed.shape)
    mixed = mixed * w["norm.weight"] * (silu(z) if o.norm_before_gate else 1.0)
    return mixed @ w["out_proj.weight"].T + w.get("out_proj.bias", 0.0)


def rwkv7(x, w, o):
    """The first layer, whose values are its own."""
    count = w["r_k"].shape[0]
    before = np.concatenate([np.zeros_like(x[:1]), x[:-1]])

    def mix(use):
        return x + (before - x) * w[f"x_{use}"][0, 0]

    def lora(use, act):
        hidden = act(mix(use) @ w[f"{use}_lora.lora.0.weight"].T)
        return hidden @ w[f"{use}_lora.lora.2.weight"].T + w.get(f"{use}_lora.lora.2.bias", 0.0)

    r, k, v = (mix(n) @ w[f"{n}_proj.weight"].T for n in "rkv")
    g = -np.exp(-0.5) * sigmoid(lora("w", np.tanh))
    a = sigmoid(lora("a", lambda z: z))
    kappa = heads(k * w["k_k"], count)
    if o.fuse_norm:
        kappa = l2(kappa)
    else:
        kappa = kappa / np.maximum(np.linalg.norm(kappa, axis=-1, keepdims=True), 1e-12)
    k = k * (1 + (a - 1) * w["k_a"])
    r, k, v, g, a = (heads(z, count) for z in (r, k, v, g, a))
    state, out = np.zeros((*k.shape[1:], v.shape[2])), []
    for t in range(len(x)):
        removed = np.einsum("hkv,hk->hv", state, kappa[t])
        state = np.exp(g[t])[..., None] * state + k[t][..., None] * v[t][:, None]
        state = state - (kappa[t] * a[t])[..., None] * removed[:, None]
        out.append(np.einsum("hkv,hk->hv", state, r[t]))
    y = np.stack(out)
    y = y - y.mean(-1, keepdims=True)
    y = rms(y, 1.0, k.shape[-1] * o.norm_eps).reshape(len(x), -1)
    y = y * w["g_norm.weight"] + w["g_norm.bias"]
    bonus = np.sum(r * k * w["r_k"], axis=-1, keepdims=True) * v
    return ((y + bonus.reshape(len(x), -1)) * lora("g", sigmoid)) @ w["o_proj.weight"].T
