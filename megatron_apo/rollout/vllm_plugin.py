"""What vLLM loads of ours: the weight-transfer engine and the token check on every route.

`register` is the entry point `megatron_apo` of the group `vllm.general_plugins`; vLLM calls it in the API server,
in the engine core and in each worker, sometimes more than once a process. Importing this file imports nothing heavy.
"""

from __future__ import annotations

import hmac
import os
from typing import Any

BACKEND = "megatron_apo"
TOKEN_VARIABLE = "MEGATRON_APO_ROLLOUT_TOKEN"


def register() -> None:
    """Make `--weight-transfer-config '{"backend": "megatron_apo"}'` known to vLLM; does nothing the second time."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    # register_engine raises on a name it has, and offers no question to ask first (factory.py:64).
    engine = ("megatron_apo.rollout.transport.receiver", "BucketTransferEngine")
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, *engine)


class TokenCheck:
    """ASGI middleware for `--middleware`: refuses every request without the server's bearer token.

    vLLM's own `--api-key` leaves the weight-transfer routes, /pause and /collective_rpc open. The token comes from the
    environment, so it is on no command line; a server started without one serves nobody.
    """

    def __init__(self, app: Any):
        self.app = app
        token = os.environ.get(TOKEN_VARIABLE)
        if not token:
            raise ValueError(f"{TOKEN_VARIABLE} is not set: the rollout server would be open to anyone")
        self.expected = f"Bearer {token}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif hmac.compare_digest(dict(scope["headers"]).get(b"authorization", b""), self.expected):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"error": "missing or wrong bearer token"}'})
