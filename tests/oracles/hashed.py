"""Vectors of hashed tables, id by id in Python integers and float64, from the formulas in the heads of compression/*.py. Imports none of them."""

import math

import torch

MASK = 0xFFFFFFFF


def mix(number: int, seeds) -> int:
    """32 bits, without a sign."""
    first, second = (int(seed) & MASK for seed in seeds)
    x = ((number ^ first) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 16)) * second) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def row(number: int, seeds, num_rows: int) -> int:
    return (mix(number, seeds) & 0x7FFFFFFF) % num_rows


def sign(number: int, seeds) -> float:
    return -1.0 if mix(number, seeds) >> 31 else 1.0


def vector(method: str, knobs: dict, number: int, num_ids: int, dim: int, state: dict, parts: dict) -> torch.Tensor:
    """[D] float64. state: the table's buffers and, in float64, parameters; parts: its rows in float64. Differentiable in both."""
    return VECTORS[method](knobs, number, num_ids, dim, state, list(parts.values()))


def _hash(knobs, number, num_ids, dim, state, parts):
    (rows,) = parts
    if len(rows) >= num_ids:
        return rows[number]
    return rows[number % len(rows) if knobs["function"] == "mod" else row(number, state["hashes.seeds"][0], len(rows))]


def _double_hash(knobs, number, num_ids, dim, state, parts):
    first, second = parts
    places = (number, number) if len(first) >= num_ids else [row(number, state["hashes.seeds"][j], len(first)) for j in (0, 1)]
    pair = first[places[0]], second[places[1]]
    return torch.cat(pair) if knobs["combine"] == "concat" else pair[0] + pair[1]


def _hash_embeddings(knobs, number, num_ids, dim, state, parts):
    rows, importance = parts
    mine = importance[number if len(importance) >= num_ids else row(number, state["importance_hash.seeds"][0], len(importance))]
    return sum(mine[j] * rows[row(number, state["hashes.seeds"][j], len(rows))] for j in range(len(mine)))


def _compositional(knobs, number, num_ids, dim, state, parts):
    picked = []
    for rows in parts:
        picked.append(rows[number % len(rows)])
        number //= len(rows)
    assert number == 0, "the digits do not reach"
    if knobs["operation"] == "concat":
        return torch.cat(picked)
    result = picked[0]
    for other in picked[1:]:
        result = result + other if knobs["operation"] == "add" else result * other
    return result


def _memcom(knobs, number, num_ids, dim, state, parts):
    shared, own = parts
    result = shared[number % len(shared)] * own[number, 0]
    return result + own[number, 1] if knobs["bias"] else result


def _dhe(knobs, number, num_ids, dim, state, parts):
    bits = [mix(number, seeds) for seeds in state["hashes.seeds"]]
    x = torch.tensor([(b - (1 << 32) if b >> 31 else b) / 2**31 for b in bits], dtype=torch.float64)
    for layer in range(knobs["depth"] + 1):
        x = state[f"layers.{layer}.weight"] @ x + state[f"layers.{layer}.bias"]
        if layer < knobs["depth"]:
            x = x.clamp(min=0) if knobs["activation"] == "relu" else x * torch.tanh(torch.log1p(torch.exp(x)))
    return x


def _robe(knobs, number, num_ids, dim, state, parts):
    (array,) = parts
    block = knobs["block"] or math.gcd(dim, 128)
    numbers = []
    for j in range(dim // block):
        seeds = state["places.seeds"][j]
        place = row(number, seeds, len(array))
        for t in range(block):
            if knobs["aligned"]:
                step = int(knobs["step"])
                value = array[place, (mix(number, state["offsets.seeds"][j]) % (128 // step) * step + t) % 128]
            else:
                value = array[(place + t) % len(array), 0]
            numbers.append(value * (sign(number, seeds) if knobs["sign"] else 1.0))
    return torch.stack(numbers)


def _hot_cold(knobs, number, num_ids, dim, state, parts):
    (rows,) = parts
    keys = state["hot_ids.keys"].reshape(-1).tolist()
    return rows[keys.index(number) if number in keys else len(keys) + row(number, state["hashes.seeds"][0], len(rows) - len(keys))]


VECTORS = {
    "hash": _hash, "double_hash": _double_hash, "hash_embeddings": _hash_embeddings, "compositional": _compositional, "memcom": _memcom,
    "dhe": _dhe, "robe": _robe, "hot_cold": _hot_cold,
}  # fmt: skip
