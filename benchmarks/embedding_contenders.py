"""The contenders of embedding_step.py, each served in a process of its own: `python embedding_contenders.py NAME UPSTREAM THREADS`, a request a line.

Imports nothing of ours at its top: TorchRec's interpreter runs it too.
"""

import argparse
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

KAGGLE = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15,
    286181, 105, 142572,
)  # fmt: skip
SEED, RATE, ADAGRAD_RATE = 123, 0.1, 0.01
CHECKED_STEPS = 3


@dataclass(frozen=True)
class Case:
    """A model and a batch. bottom: layers of the bottom MLP, input and D included; top: of the top MLP without its input. hotness: ids in a bag."""

    name: str
    rows: tuple[int, ...]
    hotness: int
    bottom: tuple[int, ...]
    top: tuple[int, ...]
    batch: int
    num_batches: int

    @property
    def dim(self) -> int:
        return self.bottom[-1]

    @property
    def top_layers(self) -> tuple[int, ...]:
        features = len(self.rows) + 1
        return (features * (features - 1) // 2 + self.dim, *self.top)

    def batches(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of each batch: dense [B, num_dense] and labels [B, 1] float32, ids [T, B, H] int64."""
        rng = np.random.RandomState(SEED + 1)
        found = []
        for _ in range(self.num_batches):
            dense = rng.rand(self.batch, self.bottom[0]).astype(np.float32)
            ids = np.stack([rng.randint(0, rows, (self.batch, self.hotness)) for rows in self.rows])
            found.append((dense, ids, rng.randint(0, 2, (self.batch, 1)).astype(np.float32)))
        return found

    def weights(self) -> tuple[list[np.ndarray], list[tuple[np.ndarray, np.ndarray]], list[tuple[np.ndarray, np.ndarray]]]:
        """Tables, bottom and top layers, as upstream and we draw them."""
        rng = np.random.RandomState(SEED)
        tables = [rng.uniform(-math.sqrt(1 / n), math.sqrt(1 / n), (n, self.dim)).astype(np.float32) for n in self.rows]

        def mlp(sizes):
            pairs = zip(sizes[:-1], sizes[1:], strict=True)
            layers = [(rng.normal(0, math.sqrt(2 / (n + m)), (m, n)), rng.normal(0, math.sqrt(1 / m), m)) for n, m in pairs]
            return [(weight.astype(np.float32), bias.astype(np.float32)) for weight, bias in layers]

        return tables, mlp(self.bottom), mlp(self.top_layers)

    def pooled_gradient(self) -> torch.Tensor:
        """[B, T, D]: what the embedding part alone receives from above."""
        return torch.from_numpy(np.random.RandomState(SEED + 2).randn(self.batch, len(self.rows), self.dim).astype(np.float32) * 1e-5)


def cases(names: list[str], row_caps: list[int], batch_sizes: list[int]) -> list[Case]:
    found = []
    for cap in row_caps if "kaggle" in names else ():
        rows = tuple(min(n, cap) for n in KAGGLE)
        for size in batch_sizes:
            found.append(Case(f"kaggle-{cap}-b{size}", rows, 1, (13, 512, 256, 64, 16), (512, 256, 1), size, max(8, 16384 // size)))
    if "multihot" in names:
        found.append(Case("multihot", (1_000_000,) * 8, 100, (13, 512, 64), (512, 1), 256, 8))
    return found


class Ours:
    """Tables, model and trainer as run_dlrm.py puts them together."""

    def __init__(self, case: Case, device: str, optimizer: str):
        from dlrm_xla import backends, flags
        from dlrm_xla.batch import Batch
        from dlrm_xla.config import Config

        def dashed(numbers):
            return "-".join(str(number) for number in numbers)

        rate = RATE if optimizer == "sgd" else ADAGRAD_RATE
        config = Config.from_args(flags.parse([
            f"--arch-sparse-feature-size={case.dim}", f"--arch-embedding-size={dashed(case.rows)}", f"--arch-mlp-bot={dashed(case.bottom)}",
            f"--arch-mlp-top={dashed(case.top)}", "--loss-function=bce", f"--mini-batch-size={case.batch}", f"--learning-rate={rate}",
            f"--num-indices-per-lookup={case.hotness}", "--num-indices-per-lookup-fixed", f"--device={device}", f"--optimizer={optimizer}",
        ]))  # fmt: skip
        self.backend = backends.make(device)
        self.trainer = self.build(case, config)
        self.data = []
        for dense, ids, labels in case.batches():
            slots = torch.from_numpy(ids).transpose(0, 1).reshape(case.batch, -1).int()
            self.data.append(Batch(torch.from_numpy(dense), slots, None, torch.from_numpy(labels), case.batch))
        self.gradient = case.pooled_gradient().to(self.backend.device)
        self.wait = self.backend.wait

    def build(self, case: Case, config):
        """The only place that knows how an EmbeddingCollection is made."""
        from compression.registry import create_tables
        from dlrm_xla.embeddings import EmbeddingCollection
        from dlrm_xla.models.dlrm import DLRM
        from dlrm_xla.optim import RULES
        from dlrm_xla.specs import TableSpec
        from dlrm_xla.train import Trainer

        rng = np.random.RandomState(SEED)
        specs = [TableSpec(f"emb_l.{index}", rows, case.dim, case.hotness) for index, rows in enumerate(case.rows)]
        created, layout = create_tables(specs, config.method, rng, False, False), self.backend.layout(config.table_layout)
        tables = EmbeddingCollection(created, config.model.weighted_pooling, RULES[config.train.optimizer](), layout)
        model = DLRM(config.model, len(specs), config.loss.threshold, rng)
        return Trainer(config, self.backend.place(model), self.backend.place(tables), self.backend)

    def step(self, index: int) -> None:
        self.trainer.step(self.backend.to_device(self.data[index]), index, last_of_epoch=False)

    def loss(self, index: int) -> float:
        self.trainer.meter.reset()
        self.step(index)
        return self.trainer.meter.mean()

    def embedding(self, index: int) -> None:
        batch = self.backend.to_device(self.data[index])
        lookup = self.trainer.tables.lookup(batch.ids, batch.weights)
        # a gradient that does not depend on the rows read would let XLA run the update before the read, which takes a copy of the table
        lookup.pooled.backward(self.gradient * lookup.pooled.detach())
        self.trainer._pending.append(lookup)  # the dense parameters have no gradient: update() leaves them as they are
        self.trainer.update()
        self.backend.end_step()


class Upstream:
    """DLRM_Net and the body of dlrm_s_pytorch.py's training loop, without the log."""

    def __init__(self, case: Case, checkout: str):
        sys.dont_write_bytecode = True  # the checkout is the user's
        sys.path.insert(0, checkout)
        import dlrm_s_pytorch as module

        np.random.seed(SEED)
        top = np.array(case.top_layers)
        self.net = module.DLRM_Net(
            case.dim, np.array(case.rows), np.array(case.bottom), top, arch_interaction_op="dot", sigmoid_bot=-1, sigmoid_top=top.size - 2
        )
        module.dlrm, module.args = self.net, argparse.Namespace(loss_function="bce")  # its functions read these globals
        self.module, self.device = module, torch.device("cpu")
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=RATE)
        self.scheduler = module.LRPolicyScheduler(self.optimizer, 0, 0, 0)
        offsets = torch.arange(0, case.batch * case.hotness, case.hotness).repeat(len(case.rows), 1)
        self.data = [
            (torch.from_numpy(dense), offsets, torch.from_numpy(ids).flatten(1), torch.from_numpy(labels)) for dense, ids, labels in case.batches()
        ]
        self.gradients = [gradient.contiguous() for gradient in case.pooled_gradient().unbind(1)]

    def step(self, index: int) -> float:
        dense, offsets, ids, labels = self.data[index]
        prediction = self.module.dlrm_wrap(dense, offsets, ids, False, self.device, ndevices=-1)
        loss = self.module.loss_fn_wrap(prediction, labels, False, self.device)
        value = loss.detach().cpu().numpy()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        return float(value)

    loss = step

    def embedding(self, index: int) -> None:
        _, offsets, ids, _ = self.data[index]
        self.optimizer.zero_grad()
        torch.autograd.backward(self.net.apply_emb(offsets, ids, self.net.emb_l, self.net.v_W_l), self.gradients)
        self.optimizer.step()

    def wait(self) -> None:
        pass


class Port2020(nn.Module):
    """Tables as autograd parameters on XLA: a table-shaped gradient and a table-shaped update each. Inputs are packed as ours are."""

    def __init__(self, case: Case):
        super().__init__()
        import torch_xla
        import torch_xla.core.xla_model as xm

        self.xla, self.xm, self.device, self.case = torch_xla, xm, torch_xla.device(), case
        tables, bottom, top = case.weights()
        self.tables = nn.ParameterList(nn.Parameter(torch.from_numpy(table)) for table in tables)
        self.bottom, self.top = _mlp(bottom, nn.ReLU()), _mlp(top, nn.Sigmoid())
        self.to(self.device)
        self.lower = torch.tril_indices(len(tables) + 1, len(tables) + 1, -1).to(self.device)
        self.optimizer = torch.optim.SGD(self.parameters(), lr=RATE)
        self.data = [
            (torch.from_numpy(np.concatenate([dense, labels], axis=1)), torch.from_numpy(ids).flatten(1)) for dense, ids, labels in case.batches()
        ]
        self.gradient = case.pooled_gradient().to(self.device)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [T, B * H] -> [B, T, D]."""
        rows = [nn.functional.embedding(index, table) for index, table in zip(ids, self.tables, strict=True)]
        return torch.stack([row.view(self.case.batch, self.case.hotness, -1).sum(1) for row in rows], dim=1)

    def step(self, index: int) -> torch.Tensor:
        floats, ids = (part.to(self.device) for part in self.data[index])
        dense, labels = floats[:, :-1], floats[:, -1:]
        self.optimizer.zero_grad()
        vector = self.bottom(dense)
        features = torch.cat([vector.unsqueeze(1), self.lookup(ids)], dim=1)
        products = torch.bmm(features, features.transpose(1, 2))[:, self.lower[0], self.lower[1]]
        loss = nn.functional.binary_cross_entropy(self.top(torch.cat([vector, products], dim=1)), labels)
        loss.backward()
        self.optimizer.step()
        self.xla.sync()
        return loss.detach()

    def loss(self, index: int) -> float:
        return self.step(index).item()

    def embedding(self, index: int) -> None:
        ids = self.data[index][1].to(self.device)
        self.optimizer.zero_grad()
        self.lookup(ids).backward(self.gradient)
        self.optimizer.step()
        self.xla.sync()

    def wait(self) -> None:
        self.xla.sync(wait=True)
        self.xm.wait_device_ops()


class TorchRec:
    """Its DLRM with fused SGD inside the backward pass of the tables; torch.optim.SGD for the MLPs. Offsets of bags are kept between steps."""

    def __init__(self, case: Case):
        from torchrec.models.dlrm import DLRM
        from torchrec.modules.embedding_configs import EmbeddingBagConfig
        from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
        from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

        keys = [f"f{index}" for index in range(len(case.rows))]
        configs = [
            EmbeddingBagConfig(name=f"t{index}", feature_names=[key], num_embeddings=rows, embedding_dim=case.dim)
            for index, (key, rows) in enumerate(zip(keys, case.rows, strict=True))
        ]
        self.tables = FusedEmbeddingBagCollection(configs, torch.optim.SGD, {"lr": RATE}, device=torch.device("cpu"))
        self.model = DLRM(self.tables, case.bottom[0], list(case.bottom[1:]), list(case.top))
        self.load(*case.weights())
        dense_part = [*self.model.dense_arch.parameters(), *self.model.over_arch.parameters()]
        self.optimizer = torch.optim.SGD(dense_part, lr=RATE)
        lengths = torch.full((len(keys) * case.batch,), case.hotness)
        self.data = []
        for dense, ids, labels in case.batches():
            bags = KeyedJaggedTensor(keys=keys, values=torch.from_numpy(ids).flatten(), lengths=lengths)
            self.data.append((torch.from_numpy(dense), bags, torch.from_numpy(labels)))
        self.gradient = case.pooled_gradient().flatten(1)

    @torch.no_grad()
    def load(self, tables, bottom, top) -> None:
        """Our weights. Its interaction takes the pairs in another order, so the first top layer's columns are put in that order."""
        for (_, parameter), table in zip(self.tables.state_dict().items(), tables, strict=True):
            parameter.copy_(torch.from_numpy(table))
        features, dim = len(tables) + 1, bottom[-1][0].shape[0]
        place = {pair: column for column, pair in enumerate((i, j) for i in range(features) for j in range(i))}
        order = [place[(int(j), int(i))] for i, j in self.model.inter_arch.triu_indices.T]
        weight, bias = top[0]
        top = [(weight[:, [*range(dim), *(dim + column for column in order)]], bias), *top[1:]]
        parameters = [*self.model.dense_arch.parameters(), *self.model.over_arch.parameters()]
        for parameter, value in zip(parameters, [value for layer in (*bottom, *top) for value in layer], strict=True):
            parameter.copy_(torch.from_numpy(value))

    def step(self, index: int) -> torch.Tensor:
        dense, bags, labels = self.data[index]
        self.optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(self.model(dense, bags), labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def loss(self, index: int) -> float:
        return self.step(index).item()

    def embedding(self, index: int) -> None:
        self.tables(self.data[index][1]).values().backward(self.gradient)

    def wait(self) -> None:
        pass


def _mlp(layers: list[tuple[np.ndarray, np.ndarray]], last: nn.Module) -> nn.Sequential:
    modules: list[nn.Module] = []
    for weight, bias in layers:
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.weight.data, linear.bias.data = torch.from_numpy(weight), torch.from_numpy(bias)
        modules += [linear, nn.ReLU()]
    return nn.Sequential(*modules[:-1], last)


def make_contender(name: str, case: Case, upstream: str):
    if name.startswith("ours-"):
        _, device, *optimizer = name.split("-")
        return Ours(case, device, optimizer[0] if optimizer else "sgd")
    return {"upstream": lambda: Upstream(case, upstream), "port2020": lambda: Port2020(case), "torchrec": lambda: TorchRec(case)}[name]()


def timed_product(device: torch.device, wait) -> tuple[float, float]:
    """Least seconds of a 2048 x 2048 x 2048 product, and of reading its result afterwards."""
    best, read_back = math.inf, math.inf
    for _ in range(5):
        left = torch.rand(2048, 2048).to(device)
        wait()
        start = time.perf_counter()
        result = left @ left
        wait()
        best, start = min(best, time.perf_counter() - start), time.perf_counter()
        result.cpu()
        read_back = min(read_back, time.perf_counter() - start)
    return best, read_back


def check_barrier(contender) -> dict:
    """The product must take a plausible time, and its result must be there when the barrier lets us pass."""
    import torch_xla

    (product, read_back), (eager, _) = timed_product(torch_xla.device(), contender.wait), timed_product(torch.device("cpu"), lambda: None)
    if not eager / 5 < product < eager * 5 or read_back > product:
        raise SystemExit(f"error: the barrier does not wait: product {product:.4f} s, eager {eager:.4f} s, reading it {read_back:.4f} s")
    return {"xla_gflop_per_s": round(2**34 / product / 1e9, 1), "eager_gflop_per_s": round(2**34 / eager / 1e9, 1)}


def serve(name: str, upstream: str, threads: int) -> None:
    """Answer the requests on stdin, a line of JSON each; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if threads:
        torch.set_num_threads(threads)
    contender, position = None, 0
    for line in sys.stdin:
        request = json.loads(line)
        if "case" in request:
            case = Case(**{key: tuple(value) if isinstance(value, list) else value for key, value in request["case"].items()})
            contender = make_contender(name, case, upstream)
            answer = [contender.loss(index) for index in range(CHECKED_STEPS)]
        elif "check" in request:
            answer = check_barrier(contender)
        else:
            action, wall, cpu = getattr(contender, request["part"]), time.perf_counter(), time.process_time()
            for _ in range(request["steps"]):
                action(position % case.num_batches)
                position += 1
            contender.wait()
            answer = [(time.perf_counter() - wall) * 1e3 / request["steps"], (time.process_time() - cpu) * 1e3 / request["steps"]]
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
