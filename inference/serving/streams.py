"""Sending an answer while its client may leave."""

import asyncio
from collections.abc import AsyncIterator

from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from serving.engine_thread import Answer, EngineThread

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
SILENCE_SECONDS = 10.0  # in a stream, until a comment is sent: many proxies close what is silent for a minute or half
COMMENT = b": still working\n\n"


async def until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def token_counts(answer: Answer) -> str:
    """Of the prompts and of the answers, for the access log."""
    prompts = sum(map(len, answer.plan.prompts))
    return f" {prompts}+{sum(len(request.tokens) for request in answer.requests)} tokens"


class Streamed(StreamingResponse):
    """Server-sent events, with comments in silences, which clients skip. However they end, the answer is closed."""

    def __init__(self, engine_thread: EngineThread, answer: Answer, events: AsyncIterator[str]):
        super().__init__(events, headers=STREAM_HEADERS, media_type="text/event-stream")
        self._engine_thread, self._answer = engine_thread, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop, one_at_a_time = asyncio.get_running_loop(), asyncio.Lock()
        sent, has_begun, has_ended = loop.time(), False, False

        async def send_on(message: Message) -> None:
            nonlocal sent, has_begun, has_ended
            async with one_at_a_time:
                if not has_ended:
                    await send(message)
                has_begun, sent = True, loop.time()
                has_ended = message["type"] == "http.response.body" and not message.get("more_body")

        async def comment() -> None:
            while True:
                await asyncio.sleep(max(sent + SILENCE_SECONDS - loop.time(), 0.01))
                if has_begun and loop.time() - sent >= SILENCE_SECONDS:
                    await send_on({"type": "http.response.body", "body": COMMENT, "more_body": True})

        commenting = loop.create_task(comment())
        try:
            await super().__call__(scope, receive, send_on)
        finally:
            commenting.cancel()
            scope["tokens"] = token_counts(self._answer)
            self._engine_thread.close(self._answer)
