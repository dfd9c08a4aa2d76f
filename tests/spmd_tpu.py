"""python spmd_tpu.py HLO TOPOLOGY RESULT.json: a program as the partitioner gets it, with its marks, compiled for all chips of a TPU topology.

Writes {"text": the optimized program of one chip, "arguments", "aliased", "temporaries": bytes}. For tests/test_spmd.py; as
dlrm_xla/tpu_compiler.py, but with partitions instead of replicas.
"""

import json
import os
import re
import sys
from pathlib import Path

os.environ |= {
    "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip

import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jaxlib import xla_client  # noqa: E402

program, topology, result = sys.argv[1:]
text = Path(program).read_text()
donors = set(re.findall(r"\((\d+), \{\}\)", re.search(r"buffer_donor=\{(.*?) \}", text.split("\n", 1)[0])[1]))
computation = xla_client.XlaComputation(xla_client._xla.hlo_module_from_text(text).as_serialized_hlo_module_proto())
mlir = xla_client._xla.mlir.xla_computation_to_mlir_module(computation)
mlir = mlir if isinstance(mlir, str) else mlir.decode()


def donate(match: re.Match) -> str:
    return f"{match[1]}{match[3]}, jax.buffer_donor = true}}" if match[2] in donors else match[0]


mlir = re.sub(r'(%arg(\d+): tensor<[^>]*>)( \{mhlo\.sharding = "[^"]*")\}', donate, mlir)
devices = tuple(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
options = xla_client.CompileOptions()
options.num_replicas, options.num_partitions = 1, len(devices)
options.executable_build_options.use_spmd_partitioning = True
options.executable_build_options.num_partitions = len(devices)
options.executable_build_options.allow_spmd_sharding_propagation_to_output = [True]
options.device_assignment = xla_client.DeviceAssignment.create(np.array([[device.id for device in devices]]))
executable = devices[0].client.compile(mlir.encode(), xla_client.DeviceList(devices), options)
memory = executable.get_compiled_memory_stats()
answer = {
    "text": executable.hlo_modules()[0].to_string(), "arguments": memory.argument_size_in_bytes, "aliased": memory.alias_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
}  # fmt: skip
Path(result).write_text(json.dumps(answer))
