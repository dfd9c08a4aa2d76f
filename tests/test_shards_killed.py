"""kill -9 of ranks at every step of a save that reaches the disk: the newest whole checkpoint loads, nothing is lost that a rank knew of, and the
next save leaves nothing else behind."""

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import torch
from killing import Steps
from saves import ORDER, State, assert_same, checkpoint_of, copied, made, pieces_of, save, the_save

from dlrm_xla import shards
from dlrm_xla.shards import Writers

ROOT = Path(__file__).resolve().parent.parent  # conftest's; a process that forks does not want what conftest starts
STEPS = ("fsync", "replace", "unlink", "rmdir", "mkdir", "stat")


def kill_at(step: int) -> None:
    """This process dies before its step number `step`; half of a file is written then."""
    save_file = torch.save

    def write_half(content, file) -> None:
        whole = io.BytesIO()
        save_file(content, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()

    steps = Steps(step)
    steps.at(STEPS)
    torch.save = steps.half(save_file, write_half)


def save_in_processes(path: Path, state: State, world: int, victim: int | None, step: int, all_die: bool) -> tuple[bool, list[int]]:
    """A save by `world` processes, of which one dies at a step of its own and the others with it, or when they next wait for it. Whether it
    has died, and how the others have ended: 0, 3 (they were told), or -9."""
    children, ends = [], []
    for rank in range(world):
        mine, theirs = socket.socketpair()
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                for end in (mine, *ends):
                    end.close()
                rank_process(path, state, rank, world, theirs, step if rank == victim else None)
            os._exit(1)
        theirs.close()
        children.append(child)
        ends.append(mine)
    readers, gone = [end.makefile("r") for end in ends], False
    while not gone:
        said = [reader.readline() for reader in readers]
        gone = not all(said)
        for end in ends if not gone else ():
            with contextlib.suppress(OSError):
                end.sendall(("[" + ",".join(line.strip() for line in said) + "]\n").encode())
    if all_die:
        for child in children:
            os.kill(child, signal.SIGKILL)  # all are zombies at the least until they are waited for
    for end, reader in zip(ends, readers, strict=True):
        end.shutdown(socket.SHUT_RDWR)
        reader.close()
        end.close()
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert set(codes) <= {0, 3, -signal.SIGKILL}, codes
    return victim is not None and codes[victim] == -signal.SIGKILL, codes


def rank_process(path: Path, state: State, rank: int, world: int, hub: socket.socket, step: int | None) -> None:
    reader = hub.makefile("r")

    def gather(numbers):
        try:
            hub.sendall((json.dumps(numbers) + "\n").encode())
            line = reader.readline()
        except OSError:
            line = ""
        if not line:
            os._exit(3)  # a rank is gone
        return json.loads(line)

    if step is not None:
        kill_at(step)
    shards.write(checkpoint_of(path, state, 3, meta=True), ORDER, pieces_of(state, rank, world), Writers(rank, world, gather))
    os._exit(0)


def serve(folder: Path, world: int) -> None:
    """Kills one rank, alone and together with all others, at every step of a save. Prints what it found in JSON."""
    path, found, kills, new = folder / "model", folder / "found", 0, 0
    before, after, later = made(1), made(2), made(3)
    os.fsync = lambda file: None  # the system outlives a killed process
    for state in (made(4), before):
        save(found, state, world % 4 + 1)
    for all_die in (False, True):
        for victim in range(world):
            for step in range(1000):
                shutil.rmtree(path, ignore_errors=True)
                shutil.copytree(found, path)
                died, codes = save_in_processes(path, after, world, victim, step, all_die)
                what = f"victim {victim}, step {step}, all die {all_die}"
                loaded = copied(shards.read(path))
                is_new = torch.equal(loaded["emb_l.0.weight", ""], after["emb_l.0.weight", ""])
                assert_same(loaded, after if is_new else before)
                assert is_new or 0 not in codes, f"{what}: a rank has returned, and the checkpoint is the old one"
                save(path, later, world % 3 + 1)
                assert_same(copied(shards.read(path)), later)
                assert len(list(path.iterdir())) == 1 and len(list(the_save(path).iterdir())) == world % 3 + 2, f"{what}: leftovers"
                kills += died
                new += died and is_new
                if not died:
                    break
    print(json.dumps({"kills": kills, "new": new}))


def test_killed_at_every_step(tmp_path):
    """The newest whole checkpoint loads, nothing is lost that a rank knew of, and the next save leaves nothing else behind."""
    code = f"from pathlib import Path; from tests.test_shards_killed import serve; serve(Path({str(tmp_path)!r}), 3)"
    path = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] >= 60 and found["new"] >= 3, found
