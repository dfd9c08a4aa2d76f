"""Runs what replicas.py has traced on four CPU devices of jaxlib, one for each replica, as a TPU's runtime would run it on four chips.

    python replicas_execute.py FOLDER NUMBER ...     reads FOLDER/NUMBER.RANK.pt, writes FOLDER/NUMBER.results.pt

A process of its own: torch_xla must not meet a second XLA.
"""

import os
import sys
from pathlib import Path

os.environ.update(JAX_PLATFORMS="cpu", JAX_ENABLE_X64="1", XLA_FLAGS="--xla_force_host_platform_device_count=4")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402
from jaxlib import xla_client as xc  # noqa: E402


class Program:
    """One HLO text, loaded for `world` devices."""

    def __init__(self, hlo: str, world: int):
        module = xc._xla.hlo_module_from_text(hlo)
        mlir = xc._xla.mlir.xla_computation_to_mlir_module(xc.XlaComputation(module.as_serialized_hlo_module_proto()))
        options = xc.CompileOptions()
        options.num_replicas, options.num_partitions = world, 1
        self.devices = jax.devices()[:world]
        self.sharding = NamedSharding(Mesh(np.array(self.devices), ("replica",)), PartitionSpec())
        code = mlir if isinstance(mlir, bytes) else mlir.encode()
        self.executable = self.devices[0].client.compile_and_load(code, xc.DeviceList(tuple(self.devices)), options)

    def __call__(self, arguments: list[list[np.ndarray]]) -> list[list[np.ndarray]]:
        """Of each rank its arguments -> of each rank its outputs."""
        handed = []
        for values in zip(*arguments, strict=True):
            pieces = [jax.device_put(value, device) for value, device in zip(values, self.devices, strict=True)]
            # "the same everywhere" is what the array says of itself; each device is given its own
            handed.append(jax.make_array_from_single_device_arrays(values[0].shape, self.sharding, pieces))
        outputs = self.executable.execute_sharded(handed).disassemble_into_single_device_arrays()
        return [[np.asarray(output[rank]) for output in outputs] for rank in range(len(self.devices))]


def execute(ranks: list[dict]) -> dict:
    """Predictions of the test step on the first batch; then the training steps one after the other, each given what the last one left."""
    world = len(ranks)
    results: dict = {}
    test = ranks[0]["test step"]
    if test:
        outputs = Program(test["hlo"], world)([[np.asarray(value) for value in rank["test step"]["arguments"]] for rank in ranks])
        results["test outputs"] = [[torch.from_numpy(np.array(value)) for value in of_rank] for of_rank in outputs]
    step = ranks[0]["training step"]
    program, losses, before = Program(step["hlo"], world), [], (0.0, 0.0)
    arguments = [[np.asarray(value) for value in rank["training step"]["arguments"]] for rank in ranks]
    places = {name: number for number, name in enumerate(step["parameters"]) if name}
    fed = {number: places[name] for number, name in enumerate(step["outputs"]) if name}
    batch = [place_of(arguments[0], piece.numpy()) for piece in ranks[0]["sent"][0]]
    for index in range(len(ranks[0]["sent"])):
        for rank in range(world):
            for place, piece in zip(batch, ranks[rank]["sent"][index], strict=True):
                arguments[rank][place] = piece.numpy()
        outputs = program(arguments)
        for rank in range(world):
            for number, place in fed.items():
                arguments[rank][place] = outputs[rank][number]
        totals = [arguments[rank][places["meter"]].tolist() for rank in range(world)]
        assert all(one == totals[0] for one in totals), f"ranks disagree about the loss of step {index}: {totals}"
        losses.append((totals[0][0] - before[0]) / (totals[0][1] - before[1]))
        before = totals[0][:2]
    results["losses"] = losses
    results["state"] = [{name: torch.from_numpy(np.array(of_rank[place])) for name, place in places.items()} for of_rank in arguments]
    return results


def place_of(arguments: list[np.ndarray], piece: np.ndarray) -> int:
    """Which argument a piece of the batch is."""
    (place,) = [n for n, value in enumerate(arguments) if value.dtype == piece.dtype and np.array_equal(value, piece)]
    return place


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for number in sys.argv[2:]:
        count = len(list(folder.glob(f"{number}.[0-9].pt")))
        torch.save(execute([torch.load(folder / f"{number}.{rank}.pt") for rank in range(count)]), folder / f"{number}.results.pt")
