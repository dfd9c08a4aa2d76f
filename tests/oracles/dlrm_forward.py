"""DLRM's prediction row by row in float64, from a checkpoint's weights by upstream's names. Nothing of the project is imported."""

import numpy as np


def predict(weights: dict, dense, bags, interaction="dot", itself=False, operation="mult", pools_first=False) -> np.ndarray:
    """weights: name -> array; dense [n, num_dense]; bags[row][table]: list of ids. [n] probabilities.

    operation, pools_first: of quotient-remainder tables; pools_first sums the parts of a bag before they are combined.
    """
    weights = {name: np.asarray(value, dtype=np.float64) for name, value in weights.items()}
    return np.array([_row(weights, x, ids, interaction, itself, operation, pools_first) for x, ids in zip(dense, bags, strict=True)])


def _row(weights, x, bags, interaction, itself, operation, pools_first) -> float:
    bottom = _mlp(weights, "bot_l", np.asarray(x, dtype=np.float64), last_relu=True)
    features = [bottom] + [_table(weights, table, ids, operation, pools_first) for table, ids in enumerate(bags)]
    if interaction == "cat":
        crossed = np.concatenate(features)
    else:
        products = [features[i] @ features[j] for i in range(len(features)) for j in range(i + 1 if itself else i)]
        crossed = np.concatenate([bottom, products])
    return (1 + np.tanh(_mlp(weights, "top_l", crossed, last_relu=False)[0] / 2)) / 2  # the logistic function, without overflow


def _mlp(weights, name, x, last_relu):
    layers = sorted(int(key.split(".")[1]) for key in weights if key.startswith(name) and key.endswith("bias"))
    for layer in layers:
        x = weights[f"{name}.{layer}.weight"] @ x + weights[f"{name}.{layer}.bias"]
        if last_relu or layer != layers[-1]:
            x = np.maximum(x, 0)
    return x


def _table(weights, table, ids, operation, pools_first):
    name = f"emb_l.{table}"
    importance = [weights[f"v_W_l.{table}"][i] if f"v_W_l.{table}" in weights else 1.0 for i in ids]
    if f"{name}.weight_q" in weights:
        quotient, remainder = weights[f"{name}.weight_q"], weights[f"{name}.weight_r"]
        collisions = len(remainder)
        combine = {"mult": np.multiply, "add": np.add, "concat": lambda a, b: np.concatenate([a, b])}[operation]
        if pools_first:
            return combine(_sum([quotient[i // collisions] for i in ids], quotient), _sum([remainder[i % collisions] for i in ids], remainder))
        pairs = [combine(quotient[i // collisions], remainder[i % collisions]) for i in ids]
        return np.sum(pairs, axis=0) if pairs else 0 * combine(quotient[0], remainder[0])
    if f"{name}.embs.weight" in weights:
        rows = weights[f"{name}.embs.weight"]
        pooled = _sum([rows[i] for i in ids], rows)
        return weights[f"{name}.proj.weight"] @ pooled if f"{name}.proj.weight" in weights else pooled
    rows = weights[f"{name}.weight"]
    return _sum([w * rows[i] for w, i in zip(importance, ids, strict=True)], rows)


def _sum(vectors, rows):
    return np.sum(vectors, axis=0) if vectors else np.zeros(rows.shape[1])
