"""Life and death of a vLLM server: clear errors before it runs, nothing left after it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from megatron_apo.config import RolloutConfig
from megatron_apo.rollout.client import GenerateRequest, RolloutClient, Sampling
from megatron_apo.rollout.server import ServerDied, ServerError, VLLMServer
from tests.e2e.conftest import assert_all_gone, tiny_model, traces


def new_server(tmp_path: Path, **options: object) -> VLLMServer:
    config = RolloutConfig(kv_cache_gib=0.1, **options)
    return VLLMServer(config, tmp_path / "model", log_path=tmp_path / "vllm.log", seed=0, max_model_len=96)


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("megatron-apo-")}


def test_a_port_in_use_is_said_before_anything_starts(tmp_path: Path) -> None:
    tiny_model("qwen3", True, 0).save_pretrained(tmp_path / "model")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = new_server(tmp_path, port=port)
        with pytest.raises(ServerError, match=rf"^rollout.port: .*127.0.0.1:{port}: Address already in use.*$"):
            server.start()
    assert not (tmp_path / "vllm.log").exists()
    assert not server.alive()


def test_a_model_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"^model: .*/model has no config.json; give a Hugging Face folder$"):
        new_server(tmp_path).start()


def test_a_server_that_does_not_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    tiny_model("qwen3", True, 0).save_pretrained(tmp_path / "model")
    before = shared_memory()
    server = new_server(tmp_path, extra_args=["--no-such-option"])
    with pytest.raises(ServerError, match=r"ended with status 2 (.|\n)*unrecognized arguments: --no-such-option"):
        server.start()
    assert not server.alive()
    assert shared_memory() <= before


def test_a_server_does_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    tiny_model("qwen3", True, 0).save_pretrained(tmp_path / "model")
    script = f"""
        import json, sys, time
        from pathlib import Path
        from tests.e2e.test_rollout_server import new_server
        server = new_server(Path({str(tmp_path)!r}))
        server.start()
        print(json.dumps([server.url, server.token, server.pids(), str(server.payload_dir)]), flush=True)
        time.sleep(600)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    try:
        url, token, pids, folder = json.loads(parent.stdout.readline())
        everything = traces(pids, Path(folder))
        client = RolloutClient(url, token)
        client.pause()  # so that the request below waits
        threading.Timer(1.0, parent.kill).start()
        with pytest.raises(ServerDied):
            client.generate([GenerateRequest([2, 3, 4], seed=1)], Sampling(max_tokens=4, stop_token_ids=(1,)))
        client.close()
        assert_all_gone(everything)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
