"""The operations and their derivatives in float64 NumPy, one document at a time.

Rows are taken apart into their documents first and every document runs alone, so that packing and
padding are right by construction.
"""

import numpy as np

NAMES = ("o", "state", "dq", "dk", "dv", "dg", "dbeta", "dinitial_state")
# Largest relative Frobenius error of the gated delta rule. float32: rounding times the condition
# of the recurrence; a decay's gradient is a sum of terms that partly cancel. bfloat16: the rounding
# of operands (2^-9 each) and of results.
LIMITS = {
    "float32": dict.fromkeys(NAMES, 3e-6) | {"dg": 2e-5},
    "bfloat16": dict.fromkeys(NAMES, 8e-3) | {"dg": 1e-2},
}


def runs(segment_ids):
    """Returns the (start, stop) of each segment of one row."""
    found, start = [], None
    for t, value in enumerate(list(segment_ids) + [0]):
        if start is not None and value != segment_ids[start]:
            found.append((start, t))
            start = None
        if start is None and value != 0:
            start = t
    return found


def _normalised(x, use_l2norm):
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) if use_l2norm else x


def _normalised_gradient(x, dy, use_l2norm):
    if not use_l2norm:
        return dy
    norm = np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)
    return dy / norm - x * (x * dy).sum(-1, keepdims=True) / norm**3


def _document(q, k, v, g, beta, state, do=None, dstate=None):
    """Runs one head of one document, forward and, given do and dstate, backward."""
    states, decayed, deltas, o = [state], [], [], np.zeros_like(v)
    for t in range(len(v)):
        decayed.append(np.exp(g[t]) * states[-1])
        deltas.append(beta[t] * (v[t] - decayed[-1].T @ k[t]))
        states.append(decayed[-1] + np.outer(k[t], deltas[-1]))
        o[t] = states[-1].T @ q[t]
    if do is None:
        return o, states[-1]
    dq, dk, dv, dg, dbeta = (np.zeros_like(x) for x in (q, k, v, g, beta))
    for t in reversed(range(len(v))):
        dq[t] = states[t + 1] @ do[t]
        dstate = dstate + np.outer(q[t], do[t])
        ddelta = dstate.T @ k[t]
        dk[t] = dstate @ deltas[t] - beta[t] * decayed[t] @ ddelta
        dv[t] = beta[t] * ddelta
        dbeta[t] = ddelta @ (v[t] - decayed[t].T @ k[t])
        ddecayed = dstate - beta[t] * np.outer(k[t], ddelta)
        dg[t] = (ddecayed * decayed[t]).sum()
        dstate = np.exp(g[t]) * ddecayed
    return dq, dk, dv, dg, dbeta, dstate


def gated_delta_rule(inputs, segment_ids, cotangents, *, scale=None, use_qk_l2norm=True):
    """Returns o, the state and the gradients of q, k, v, g, beta and the initial state."""
    q, k, v, g, beta, initial = (np.asarray(x, np.float64) for x in inputs)
    do, dstate = (np.asarray(x, np.float64) for x in cotangents)
    batch, length, heads, width = q.shape
    value_heads = v.shape[2]
    scale = width**-0.5 if scale is None else scale
    if segment_ids is None:
        segment_ids = np.ones((batch, length), np.int32)
    qn, kn = scale * _normalised(q, use_qk_l2norm), _normalised(k, use_qk_l2norm)
    o, state = np.zeros_like(v), initial.copy()
    dqn, dkn, dv, dg, dbeta = (np.zeros_like(x) for x in (q, k, v, g, beta))
    dinitial = np.zeros_like(initial)
    for b in range(batch):
        documents = runs(segment_ids[b])
        if not documents:
            dinitial[b] = dstate[b]
        for index, (start, stop) in enumerate(documents):
            for h in range(value_heads):
                s, at = h // (value_heads // heads), slice(start, stop)
                first = initial[b, h] if index == 0 else np.zeros_like(initial[b, h])
                args = (qn[b, at, s], kn[b, at, s], v[b, at, h], g[b, at, h], beta[b, at, h], first)
                o[b, at, h], state[b, h] = _document(*args)
                last = index == len(documents) - 1
                back = _document(*args, do[b, at, h], dstate[b, h] if last else 0 * first)
                dqn[b, at, s] += back[0]
                dkn[b, at, s] += back[1]
                dv[b, at, h], dg[b, at, h], dbeta[b, at, h] = back[2:5]
                if index == 0:
                    dinitial[b, h] = back[5]
    dq = _normalised_gradient(q, scale * dqn, use_qk_l2norm)
    dk = _normalised_gradient(k, dkn, use_qk_l2norm)
    return o, state, dq, dk, dv, dg, dbeta, dinitial


def dynamic_conv(inputs, segment_ids, cotangents):
    """Returns v, the tail and the gradients of u, h, w2, b2 and the incoming tail."""
    u, h, w2, b2, tail = (np.asarray(x, np.float64) for x in inputs)
    do, dtail_out = (np.asarray(x, np.float64) for x in cotangents)
    width = w2.shape[1]
    taps = np.einsum("btr,rjd->btjd", h, w2) + b2
    v, new_tail = np.zeros_like(u), tail.copy()
    du, dtaps, dtail = np.zeros_like(u), np.zeros_like(taps), np.zeros_like(tail)
    if segment_ids is None:
        segment_ids = np.ones(u.shape[:2], np.int32)
    for b in range(len(u)):
        documents = runs(segment_ids[b])
        if not documents:
            dtail[b] = dtail_out[b]
        for index, (start, stop) in enumerate(documents):
            before = tail[b] if index == 0 else np.zeros_like(tail[b])
            x = np.concatenate([before, u[b, start:stop]])
            dx = np.zeros_like(x)
            if index == len(documents) - 1:
                new_tail[b] = x[len(x) - (width - 1) :]
                dx[len(x) - (width - 1) :] += dtail_out[b]
            for t in range(start, stop):
                at = slice(t - start, t - start + width)
                total = (taps[b, t] * x[at]).sum(0)
                sigmoid = 1 / (1 + np.exp(-total))
                v[b, t] = total * sigmoid
                dtotal = do[b, t] * sigmoid * (1 + total * (1 - sigmoid))
                dtaps[b, t] = dtotal * x[at]
                dx[at] += dtotal * taps[b, t]
            du[b, start:stop] = dx[width - 1 :]
            if index == 0:
                dtail[b] = dx[: width - 1]
    dh = np.einsum("btjd,rjd->btr", dtaps, w2)
    dw2, db2 = np.einsum("btjd,btr->rjd", dtaps, h), dtaps.sum((0, 1))
    return v, new_tail, du, dh, dw2, db2, dtail


def short_conv(inputs, segment_ids, cotangents, activation):
    """Returns y, the tail and the gradients of u, w, b and the incoming tail."""
    u, w, b, tail = (np.asarray(x, np.float64) for x in inputs)
    dy, dtail_out = (np.asarray(x, np.float64) for x in cotangents)
    width = len(w)
    y, new_tail = np.zeros_like(u), tail.copy()
    du, dw, db, dtail = (np.zeros_like(x) for x in (u, w, b, tail))
    if segment_ids is None:
        segment_ids = np.ones(u.shape[:2], np.int32)
    for row in range(len(u)):
        documents = runs(segment_ids[row])
        if not documents:
            dtail[row] = dtail_out[row]
        for index, (start, stop) in enumerate(documents):
            before = tail[row] if index == 0 else np.zeros_like(tail[row])
            x = np.concatenate([before, u[row, start:stop]])
            dx = np.zeros_like(x)
            if index == len(documents) - 1:
                new_tail[row] = x[len(x) - (width - 1) :]
                dx[len(x) - (width - 1) :] += dtail_out[row]
            for t in range(start, stop):
                at = slice(t - start, t - start + width)
                total, dtotal = (w * x[at]).sum(0) + b, dy[row, t]
                y[row, t] = total
                if activation == "silu":
                    sigmoid = 1 / (1 + np.exp(-total))
                    y[row, t] = total * sigmoid
                    dtotal = dtotal * sigmoid * (1 + total * (1 - sigmoid))
                dw += dtotal * x[at]
                db += dtotal
                dx[at] += dtotal * w
            du[row, start:stop] = dx[width - 1 :]
            if index == 0:
                dtail[row] = dx[: width - 1]
    return y, new_tail, du, dw, db, dtail
