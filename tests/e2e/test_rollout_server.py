"""A vLLM server that does not start: what is said, and that nothing of it is left."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path

import pytest

from megatron_apo.config import RolloutConfig
from megatron_apo.rollout.server import ServerError, VLLMServer
from tests.e2e.conftest import tiny_model


def new_server(tmp_path: Path, **options: object) -> VLLMServer:
    return VLLMServer(
        RolloutConfig(kv_cache_gib=0.1, **options),
        tmp_path / "model",
        log_path=tmp_path / "vllm.log",
        seed=0,
        max_model_len=96,
        shm_dir=tmp_path / "shared",
    )


def test_a_port_in_use_is_said_before_anything_starts(tmp_path: Path) -> None:
    tiny_model("qwen3", True, 0).save_pretrained(tmp_path / "model")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = new_server(tmp_path, port=port)
        with pytest.raises(ServerError, match=rf"^rollout.port: .*127.0.0.1:{port}: Address already in use.*$"):
            server.start()
    assert not (tmp_path / "vllm.log").exists() and not (tmp_path / "shared").exists()
    assert not server.alive()


def test_a_model_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"^model: .*/model has no config.json; give a Hugging Face folder$"):
        new_server(tmp_path).start()


def test_a_server_that_does_not_start_shows_the_end_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("qwen3", True, 0).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    server = new_server(tmp_path, extra_args=["--no-such-option"])
    with pytest.raises(ServerError, match=r"ended with status 2 (.|\n)*unrecognized arguments: --no-such-option"):
        server.start()
    assert not server.alive()
    assert [*(tmp_path / "shared").iterdir(), *(tmp_path / "scratch").iterdir()] == []


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    tiny_model("qwen3", True, 0).save_pretrained(tmp_path / "model")
    server = new_server(tmp_path)
    server.shm_dir = Path("/proc")
    with pytest.raises(ServerError, match=r"ended with status 1 (.|\n)*'/proc/megatron-apo-"):
        server.start()
