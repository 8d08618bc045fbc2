"""Token ids in and out of a real vLLM server: log-probs, seeds, the EOS rule, the token check."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from megatron_apo.model.tokenizer import eos_token_ids
from megatron_apo.rollout.client import Completion, GenerateRequest, RolloutClient, Sampling
from megatron_apo.rollout.server import ServerError
from tests.e2e.conftest import EOS, MAX_MODEL_LEN, VOCABULARY, Rollouts, log_probs

PROMPTS = [[2 + (7 * row + 3 * column) % (VOCABULARY - 2) for column in range(5 + row % 4)] for row in range(32)]
REQUESTS = [GenerateRequest(prompt, seed=1000 + row) for row, prompt in enumerate(PROMPTS)]
SAMPLING = Sampling(max_tokens=24, stop_token_ids=(EOS,))


@pytest.fixture(scope="module", autouse=True)
def known_weights(shared_server: Callable[[], Rollouts]) -> None:
    """Whatever ran before, the server has the weights of seed 0."""
    rollouts = shared_server()
    rollouts.sync(rollouts.model(seed=0)).sync(version=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_sampled_distribution(rollouts: Rollouts, temperature: float) -> None:
    model = rollouts.model(seed=0)
    sampling = Sampling(max_tokens=24, stop_token_ids=(EOS,), temperature=temperature)
    for prompt, completion in zip(PROMPTS, rollouts.client.generate(REQUESTS, sampling), strict=True):
        expected = log_probs(model, prompt + completion.token_ids, temperature)[len(prompt) - 1 :]
        assert completion.log_probs == pytest.approx(expected, abs=1e-4)


def test_a_response_has_the_id_that_ended_it_and_nothing_else(rollouts: Rollouts) -> None:
    for stops in [(EOS,), (EOS, 5, 9)]:
        sampling = Sampling(max_tokens=24, stop_token_ids=stops)
        reasons = Counter()
        for completion in rollouts.client.generate(REQUESTS, sampling):
            *before, last = completion.token_ids
            assert not set(before) & set(stops)
            assert completion.finish_reason == ("stop" if last in stops else "length")
            assert completion.finish_reason == "stop" or len(completion.token_ids) == 24
            assert len(completion.log_probs) == len(completion.token_ids)
            reasons[last if last in stops else "length"] += 1
        assert set(reasons) >= set(stops) | {"length"}, "the case must see every way to end"


def test_the_models_own_eos_ends_nothing_when_it_is_not_a_stop_id(rollouts: Rollouts) -> None:
    completions = rollouts.client.generate(REQUESTS, Sampling(max_tokens=24, stop_token_ids=(5,)))
    assert any(EOS in completion.token_ids[:-1] for completion in completions)


def test_eos_ids_of_a_folder(rollouts: Rollouts, tmp_path) -> None:
    assert eos_token_ids(rollouts.server.model) == (EOS,)
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    assert eos_token_ids(tmp_path) == (3,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 3]}')
    assert eos_token_ids(tmp_path) == (7, 3)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="stop_token_ids"):
        eos_token_ids(tmp_path)


def test_seeds_repeat_and_differ(rollouts: Rollouts) -> None:
    first = rollouts.client.generate(REQUESTS, SAMPLING)
    backwards = rollouts.client.generate(REQUESTS[::-1], SAMPLING)[::-1]
    assert [one.token_ids for one in first] == [one.token_ids for one in backwards]
    same_prompt = [GenerateRequest(PROMPTS[0], seed=seed) for seed in range(16)]
    assert len({tuple(one.token_ids) for one in rollouts.client.generate(same_prompt, SAMPLING)}) > 12


def test_greedy_takes_the_likeliest_token(rollouts: Rollouts) -> None:
    greedy = Sampling(max_tokens=8, stop_token_ids=(), temperature=0.0)
    (completion,) = rollouts.client.generate(REQUESTS[:1], greedy)
    tokens = PROMPTS[0] + completion.token_ids
    with torch.no_grad():
        logits = rollouts.model(seed=0)(torch.tensor([tokens])).logits[0]
    assert completion.token_ids == logits.argmax(-1)[len(PROMPTS[0]) - 1 : -1].tolist()


def test_completions_are_told_as_they_arrive_in_the_callers_thread(rollouts: Rollouts) -> None:
    told: dict[int, Completion] = {}
    threads = set()

    def tell(index: int, completion: Completion) -> None:
        told[index] = completion
        threads.add(threading.current_thread())

    completions = rollouts.client.generate(REQUESTS, SAMPLING, tell)
    assert [told[index] for index in range(len(REQUESTS))] == completions
    seconds = [completion.seconds for completion in told.values()]
    assert seconds[0] > 0 and seconds == sorted(seconds)
    assert threads == {threading.current_thread()}


def test_scores_reach_the_longest_sequence(rollouts: Rollouts) -> None:
    sequences = [[2 + (5 * i * i) % (VOCABULARY - 2) for i in range(length)] for length in (2, 17, MAX_MODEL_LEN)]
    for sequence, scores in zip(sequences, rollouts.client.score(sequences), strict=True):
        assert scores == pytest.approx(log_probs(rollouts.model(seed=0), sequence), abs=1e-4)


def test_a_refused_request_is_one_clear_line(rollouts: Rollouts) -> None:
    too_long = [*REQUESTS[:3], GenerateRequest([2] * (MAX_MODEL_LEN + 9), seed=0)]
    with pytest.raises(ServerError, match=r"400.*maximum.*length") as caught:
        rollouts.client.generate(too_long, SAMPLING)
    assert "\n" not in str(caught.value)
    rollouts.client.health()


def test_every_route_wants_the_token(rollouts: Rollouts) -> None:
    log = rollouts.server.log_path.read_text()
    routes = {line.split("Route: ")[1].split(",")[0] for line in log.splitlines() if "Route: " in line}
    assert {"/health", "/pause", "/update_weights", "/collective_rpc", "/inference/v1/generate", "/metrics"} <= routes

    def status(path: str, method: str, headers: dict[str, str]) -> int:
        request = urllib.request.Request(rollouts.server.url + path, method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status
        except urllib.error.HTTPError as error:
            return error.code

    for path in [*sorted(routes), "/no/such/route"]:
        for method in ("GET", "POST", "OPTIONS"):
            assert status(path, method, {}) == 401, path
            assert status(path, method, {"Authorization": "Bearer wrong"}) == 401, path
    assert status("/health", "GET", {"Authorization": f"Bearer {rollouts.server.token}"}) == 200
    stranger = RolloutClient(rollouts.server.url, "wrong")
    with pytest.raises(ServerError, match="401: missing or wrong bearer token"):
        stranger.pause()
    stranger.close()


def test_the_token_is_on_no_command_line(rollouts: Rollouts) -> None:
    for pid in rollouts.server.pids():
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            assert rollouts.server.token.encode() not in file.read()
