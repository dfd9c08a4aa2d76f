"""Which rank this process is, how ranks meet, and how one that fails ends them all with one line (board.py).

    torchrun --nproc-per-node=N run_dlrm.py ...      CPU (gloo), CUDA (nccl)
    mpirun -n N python run_dlrm.py ...               the same; MASTER_ADDR says where rank 0 is, if not on this host
    python run_dlrm.py --device=xla ...              a process for each chip of a TPU host; on a pod the same command on every host

One process alone is a Ranks too, of which nothing below has to know.
"""

import os
import socket
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from dlrm_xla import backends
from dlrm_xla.board import GRACE, INTERRUPTED, LOST, WRONG, Board, RankFailed, Reason, Terminated, differing, leave_process, tell
from dlrm_xla.config import Config
from dlrm_xla.specs import UserError

# what launchers set, in the order in which upstream asks: Intel's and other MPIs', Open MPI's, MVAPICH's, torchrun's
SIZE = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "WORLD_SIZE")
RANK = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "RANK")
LOCAL_RANK = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "LOCAL_RANK")
LOCAL_SIZE = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE", "LOCAL_WORLD_SIZE")
PORT = 29500  # torch's own, and upstream's
PLANNED = 4  # ranks of --plan-only where neither --plan-ranks nor the launch says how many
JOIN = 60.0  # seconds for all ranks to come: hosts start apart, and torch is slow to import from a shared disk
CONNECT = timedelta(minutes=2)  # for gloo and nccl to connect
COLLECTIVE = timedelta(days=1)  # for one collective: another rank may save a large checkpoint meanwhile; the board knows sooner who is gone


@dataclass(frozen=True)
class Place:
    """Where this process stands among `world`. launcher: "environment" (torchrun, MPI) or "xla" (spawned here, a process for each chip)."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    master: str = ""  # address of rank 0, where the launcher knows it
    launcher: str = "environment"


def find_place() -> Place:
    """From the launcher's variables; alone where there are none."""
    world = _number(SIZE, 1)
    if world <= 1:
        return Place()
    rank = _number(RANK, 0)
    if rank >= world:
        raise UserError(f"the launcher's variables contradict each other: rank {rank} of {world} ranks, which are counted from 0")
    return Place(rank, world, _number(LOCAL_RANK, 0), _number(LOCAL_SIZE, world), os.environ.get("MASTER_ADDR", ""))


def _number(names: Sequence[str], default: int) -> int:
    # torchrun in a shell that SLURM or MPI has started finds their variables there too
    for name in names[-1:] if "TORCHELASTIC_RUN_ID" in os.environ else names:
        text = os.environ.get(name, "")
        if text and not text.lstrip("-").isdigit():
            raise UserError(f"{name}={text}: the launcher's variable must be a whole number")
        if text and int(text) >= 0:
            return int(text)
    return default


class Ranks:
    """This process among the ranks of its run; alone it meets nobody.

    first        the one that speaks and writes
    collectives  of the step; None where the backend brings its own (XLA) or there is one rank
    """

    def __init__(self, place: Place = Place()):  # noqa: B008 (frozen)
        self.place = place
        self.rank, self.world, self.local_rank = place.rank, place.world, place.local_rank
        self.first = place.rank == 0
        self.collectives = None
        self._board: Board | None = None

    def join(self) -> None:
        """Meets the others. UserError where that fails; only rank 0, and where rank 0 is on another host the first of this one, says so."""
        if self.world > 1:
            with self._in_time():
                store, host = _reach_store(self.place)
            _wait_for_all(store, self.place, host)
            self._board = Board(store, self.rank, self.world, host)
            self._board.start()

    def meet(self) -> None:
        """Every rank comes so far, or none goes on. Where one may fail by itself (a file that its host lacks), before the others wait for it."""
        if self._board is not None:
            self._board.facts({})

    def agree(self, facts: dict, what: str = "{name}", without: tuple[str, ...] = ()) -> None:
        """The same facts on all ranks, or one UserError on all. what: how to show a name, as "--{name}"."""
        if self._board is not None:
            error = differing(self._board.facts(facts), what, without)
            if error is not None:
                raise error

    def connect(self, config: Config, device: str) -> str:
        """The process group of a CPU or CUDA run; gives what connects the ranks: "gloo", "nccl", "xla", or "" where there is one.

        device: "cpu" | "cuda" | "xla"
        """
        place, wished = self.place, config.ranks.dist_backend
        if self.world == 1 or place.launcher == "xla":
            return "" if self.world == 1 else "xla"
        if device == "xla":
            raise UserError(
                "--device=xla: torchrun and MPI start processes for gloo and nccl, which leave tensors on XLA as they are without a word; on a TPU "
                "run python run_dlrm.py --device=xla, which starts a process for each chip; elsewhere take --device=cpu, or one process with --spmd"
            )
        if wished == "nccl" and device == "cpu":
            raise UserError("--dist-backend=nccl: nccl connects CUDA devices and this run is on the CPU; use --dist-backend=gloo or leave it out")
        if wished == "gloo" and device == "cuda":
            raise UserError("--dist-backend=gloo: connects ranks on the CPU and this run is on CUDA; use --dist-backend=nccl or leave it out")
        import torch
        import torch.distributed as dist

        from dlrm_xla.backends.collectives import TorchCollectives

        if config.ranks.local_rank >= 0:
            self.local_rank = config.ranks.local_rank
        if device == "cuda":
            check_devices(place.local_world, self.local_rank)
            torch.cuda.set_device(self.local_rank)
        backend = wished or ("nccl" if device == "cuda" else "gloo")
        store = dist.PrefixStore("group", self._board.store)
        try:
            with _without_stdout():
                dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world, timeout=CONNECT)
            dist.distributed_c10d._set_pg_timeout(COLLECTIVE, dist.group.WORLD)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"--dist-backend={backend}: does not start ({_first_line(error)})") from None
        self.collectives = TorchCollectives()
        return backend

    def advise(self, text: str) -> None:
        """What follows the line about a rank that was lost: how to go on."""
        if self._board is not None:
            self._board.advice = f"; {text}"

    def close(self) -> None:
        """The end of a run that went well."""
        if self._board is not None:
            self._board.close()
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()

    def fault(self, error: BaseException) -> int:
        """The end after an error that is none of the user's: of this program, or of a collective because another rank is gone."""
        if self._board is None:
            raise error
        return self.end(LOST, "", error)

    def end(self, code: int, message: str, error: BaseException | None = None) -> int:
        """The end of one that did not: prints the line, on one rank only, and gives the exit code; with several ranks the process ends here.

        error: what this rank met; a fault of the program's own (no UserError) shows its traceback
        """
        if self._board is None:
            if self._speaks():
                tell(message)
            return code
        reason = _reason(code, message, error)
        if reason.kind == "crash":
            traceback.print_exception(error)
        code, line = self._board.end(reason)
        tell(line)
        self._board.leave()
        leave_process(code)

    def _speaks(self) -> bool:
        """Before ranks have met: rank 0, and where that is on another host the first one of this host."""
        return self.rank == 0 or (self.local_rank == 0 and self.rank >= self.place.local_world)

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        """torch waits without a limit for a port that something else serves."""

        def give_up():
            if self._speaks():
                tell(f"error: {_address(self.place)[2]}: what answers there is no store of this run; set MASTER_PORT to a free port")
            leave_process(WRONG)

        timer = threading.Timer(JOIN + GRACE, give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


@contextmanager
def _without_stdout() -> Iterator[None]:
    """gloo writes a line from C++ onto stdout, which belongs to upstream's lines."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def check_devices(local_world: int, local_rank: int) -> None:
    """UserError where this host has fewer CUDA devices than ranks."""
    import torch

    found, count = torch.cuda.device_count(), max(local_world, local_rank + 1)
    if found == 0:
        raise UserError("--device=cuda: this PyTorch sees no CUDA device; use --device=cpu")
    if count > found:
        raise UserError(
            f"--device=cuda: {count} ranks on this host need {count} CUDA devices and it has {found}; start {found} with torchrun "
            f"--nproc-per-node={found}, or use --device=cpu"
        )


def _reason(code: int, message: str, error: BaseException | None) -> Reason:
    if isinstance(error, RankFailed):
        return Reason("lost")
    if isinstance(error, Terminated):
        return Reason("terminated")
    if code == INTERRUPTED:
        return Reason("interrupted", "interrupted")
    if code == WRONG:
        return Reason("error", message.removeprefix("error: "))
    if _is_broken(error):
        return Reason("broken", _first_line(error))
    return Reason("crash", f"{type(error).__name__}: {_first_line(error)} (a fault of the program; its traceback is above)")


def _is_broken(error: BaseException | None) -> bool:
    """Whether a collective failed because another rank is gone: gloo has no exception of its own."""
    names = {kind.__name__ for kind in type(error).__mro__}
    signs = ("gloo", "Connection closed by peer", "NCCL")
    return "DistError" in names or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _address(place: Place) -> tuple[str, int, str]:
    """Where ranks meet: address, port, both in words. Upstream's defaults."""
    address, port = place.master or "127.0.0.1", os.environ.get("MASTER_PORT") or str(PORT)
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"MASTER_PORT={port}: must be a port, a number from 1 to 65535")
    return address, int(port), f"MASTER_ADDR={address} MASTER_PORT={port}"


def _reach_store(place: Place):
    """(store, the rank that serves it or None) for Board. torchrun serves one already; else rank 0 does."""
    import torch.distributed as dist

    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and place.launcher == "environment"
    address, port, where = _address(place)
    hosts = place.rank == 0 and not served
    if hosts and _in_use(port):
        raise UserError(f"MASTER_PORT={port}: is in use on this host; set MASTER_PORT to a free port, the same for all ranks")
    try:
        store = dist.TCPStore(address, port, None, hosts, timedelta(seconds=JOIN), wait_for_workers=False)
        # a launch that torchrun repeats finds a new board; what PMI and the like start is new anyway
        store = dist.PrefixStore(f"dlrm/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        store.set(f"joined/{place.rank}", "")
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{where}: cannot be reached within {JOIN:.0f} s from rank {place.rank} ({_first_line(error)})") from None
    return store, None if served else 0


def _wait_for_all(store, place: Place, host: int | None) -> None:
    where = _address(place)[2]
    try:
        store.wait([f"joined/{rank}" for rank in range(place.world)], timedelta(seconds=JOIN))
    except RuntimeError as error:
        if host == place.rank or (host is None and place.rank == 0):
            missing = [str(rank) for rank in range(place.world) if not store.check([f"joined/{rank}"])]
            raise UserError(f"rank {', '.join(missing)} of {place.world} did not come to {where} within {JOIN:.0f} s; start all ranks") from None
        raise UserError(f"{where}: not all ranks came within {JOIN:.0f} s ({_first_line(error)})") from None


def _in_use(port: int) -> bool:
    """torch's own error is a page long, and is not raised where the port is served on IPv6 only."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False


def device_of(config: Config, ranks: Ranks) -> str:
    """"cpu", "cuda" or "xla". UserError for a process of xla_spawn that is to run elsewhere."""
    if ranks.place.launcher != "xla":
        return backends.resolve(config.device)
    if config.device not in ("auto", "xla"):
        raise UserError(f"--device={config.device}: xla_spawn starts processes for XLA; start this one with python or torchrun")
    return "xla"


def spawns(config: Config) -> bool:
    """Whether this process is to start one for each chip of a TPU host. UserError where the chips are not those that were asked for."""
    wished = config.ranks.tpu_cores
    if backends.resolve(config.device) != "xla":
        if wished > 1:
            raise UserError(f"--tpu-cores={wished}: is for --device=xla; add it or leave --tpu-cores out")
        return False
    return check_cores("--tpu-cores", wished) > 1 and not config.ranks.spmd


def check_cores(flag: str, wished: int) -> int:
    """How many processes to start for the chips of this host. wished: 0, all. UserError where that cannot be.

    Nothing here may start the runtime: processes that are spawned afterwards would not get the chips.
    """
    if not backends.runs_on_tpu():
        if wished > 1:
            raise UserError(
                f"{flag}={wished}: this is XLA's CPU backend, where collectives between several devices of one process never end; use "
                f"torchrun --nproc-per-node={wished} run_dlrm.py --device=cpu, or --spmd, which takes several devices"
            )
        return 1
    chips = max(backends.tpu_chips(), 1)
    if wished > chips:
        raise UserError(f"{flag}={wished}: this host has {chips} TPU chip(s); use {flag}={chips}, or leave it out to take all")
    if wished not in (0, 1, chips):
        raise UserError(f"{flag}={wished}: a run takes one chip of this host or all {chips}; leave it out, and set TPU_VISIBLE_CHIPS for some")
    if wished == 1 and "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        raise UserError(f"{flag}=1: every host of this pod would train alone and write the same files; leave it out")
    return wished or chips


def facts_of(data) -> dict:
    """What all ranks must have found alike in a Dataset."""
    rows = [int(rows) for rows in data.table_rows]
    return {
        "columns of numbers": data.num_dense, "rows of the tables": rows, "sizes of bags": list(data.hotness),
        "training rows": data.train.num_rows, "training batches": data.train.num_batches,
        "test rows": data.test.num_rows, "test batches": data.test.num_batches,
    }  # fmt: skip


def how_to_go_on(save_model: str) -> str:
    """After a rank was lost."""
    if not save_model:
        return "nothing was saved (--save-model=FILE --save-every=N saves); start again"
    return f"go on from the last checkpoint, if one was written, with --load-model={save_model}, on any number of ranks"
