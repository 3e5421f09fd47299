"""Commands of this toolkit that start warm: forks of one process that has torch, transformers and trl imported.

Three notebooks start two dozen commands, and each would import for five seconds. In the environment that `warm_up`
gives, Python still starts for each of them, hands its arguments, folder, environment and streams to the waiting process
(see `_hand_over`, called by a `sitecustomize`), and ends with the exit code that comes back. What runs is the command.
"""

from __future__ import annotations

import array
import contextlib
import gc
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

MODULES = {"dentalgemma", "accelerate.commands.accelerate_cli"}
SCRIPTS = {"stage1_vqa.py", "stage2_instruct.py"}
HEAVY = (
    "accelerate.commands.accelerate_cli",
    "bitsandbytes",
    "dentalgemma.evaluation.generation",
    "dentalgemma.merging",
    "dentalgemma.publishing.cards",
    "dentalgemma.training.doctor",
    "dentalgemma.training.trainer",
    "transformers.models.gemma3.modeling_gemma3",
)
ADDRESS = "DENTALGEMMA_TEST_WARM_PYTHON"
LARGEST = 1 << 17  # bytes of arguments and environment


@contextlib.contextmanager
def warm_up(folder: Path, environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """The same environment, in which commands start warm; `folder` is for the socket."""
    (folder / "sitecustomize.py").write_text(
        f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\n"
        "import warm_python\nsys.path.pop()\nwarm_python._hand_over()\n"
    )
    address = str(folder / "socket")
    server = subprocess.Popen([sys.executable, "-P", __file__, address], env=environment, stdout=subprocess.PIPE)
    try:
        assert server.stdout.readline() == b"ready\n"
        yield environment | {ADDRESS: address, "PYTHONPATH": str(folder)}
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()


def _hand_over() -> None:
    """In the process of a command: let the waiting one do it, and end as it ended."""
    words = [word for number, word in enumerate(sys.orig_argv) if number and word not in ("-P", "-u")]
    is_ours = words and (Path(words[0]).name in SCRIPTS or (words[0] == "-m" and words[1] in MODULES))
    if ADDRESS not in os.environ or not is_ours:
        return
    request = json.dumps({"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[ADDRESS])
        streams = array.array("i", [0, 1, 2])
        connection.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
        code = connection.recv(16)
    os._exit(int(code or 1) & 255)


def _serve(address: str) -> None:
    for module in HEAVY:
        importlib.import_module(module)
    gc.freeze()  # forks neither look through what was imported nor take it apart when they end
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        print("ready", flush=True)
        while True:
            connection, _ = listening.accept()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if os.fork() == 0:  # waits for the command, so that its exit code can be told
                listening.close()
                request, streams, _, _ = socket.recv_fds(connection, LARGEST, 3)
                command = os.fork()
                if command == 0:
                    connection.close()
                    break
                status = os.waitpid(command, 0)[1]
                connection.sendall(b"%d" % os.waitstatus_to_exitcode(status))
                os._exit(0)
            connection.close()
    _run(json.loads(request), streams)


def _run(request: dict, streams: list[int]) -> None:
    """Be the command: whatever it raises ends this process as it would end its own."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    first, *rest = request["words"]
    if first == "-m":
        module, *rest = rest
        sys.argv = [module, *rest]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    _serve(sys.argv[1])
