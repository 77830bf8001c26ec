"""The answers' shapes in OpenAI's Responses API: events, and the response that they add up to."""

import json
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from serving.engine_thread import Answer
from serving.errors import ApiError
from serving.plan import Served
from serving.responses import Part, Reply

Event = dict[str, Any]
ECHOED: dict[str, Any] = {  # of the request, with what stands for a field that it leaves out
    "instructions": None, "max_output_tokens": None, "metadata": {}, "parallel_tool_calls": True, "reasoning": None,
    "temperature": None, "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [], "top_p": None,
    "truncation": "disabled", "user": None,
}  # fmt: skip
TEXTS = {"reasoning": "reasoning_text", "message": "output_text"}  # what an item's content is


class ResponsesReply(Reply):
    """An answer of /v1/responses, whole or as server-sent events."""

    def __init__(self, answer: Answer, served: Served):
        super().__init__(answer, served)
        asked = answer.plan.asked or {}
        echoed = {name: asked[name] if asked.get(name) is not None else default for name, default in ECHOED.items()}
        self._response: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": self._created, "model": self._model,
            "status": "in_progress", "error": None, "incomplete_details": None, "output": [], "usage": None,
            "previous_response_id": None, "store": False, "background": False, **echoed,
        }  # fmt: skip
        self._open: dict[str, Any] | None = None  # the last item of the output, while more comes to it

    async def whole(self) -> dict[str, Any]:
        async for _ in self._events():
            pass
        return self._response

    async def events(self) -> AsyncIterator[str]:
        number = 0
        try:
            async for event in self._events():
                yield sent(event, number)
                number += 1
        except ApiError as e:  # the status has long been sent
            self._response |= {"status": "failed", "error": {"code": e.code or "server_error", "message": str(e)}}
            yield sent({"type": "response.failed", "response": self._response}, number)

    async def _events(self) -> AsyncIterator[Event]:
        """Raises ApiError where the answer fails."""
        for moment in ("created", "in_progress"):
            yield {"type": f"response.{moment}", "response": self._response}
        reason = None
        async for part in self._parts():
            for event in self._of(part):
                yield event
            reason = part["finish_reason"] or reason
        if not any(item["type"] != "reasoning" for item in self._response["output"]):
            for event in self._begin("message"):
                yield event
        is_whole = reason != "length"
        for event in self._end("completed" if is_whole else "incomplete"):
            yield event
        self._response |= {
            "status": "completed" if is_whole else "incomplete",
            "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
            "usage": self._tokens(),
        }
        yield {"type": f"response.{self._response['status']}", "response": self._response}

    def _of(self, part: Part) -> Iterator[Event]:
        """What a part of a chat's stream is here."""
        delta = part["delta"]
        for name, kind in (("reasoning_content", "reasoning"), ("content", "message")):
            if delta.get(name):
                if self._open is None or self._open["type"] != kind:
                    yield from self._begin(kind)
                yield from self._add_text(delta[name], (part["logprobs"] or {}).get("content") or [])
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                yield from self._begin("function_call", call_id=call["id"], name=call["function"]["name"], arguments="")
            if (more := call["function"].get("arguments")) and self._open is not None:
                self._open["arguments"] += more
                yield self._event("response.function_call_arguments.delta", delta=more)

    def _begin(self, kind: str, **fields: str) -> Iterator[Event]:
        yield from self._end("completed")
        prefix = {"reasoning": "rs", "message": "msg", "function_call": "fc"}[kind]
        item: dict[str, Any] = {"id": f"{prefix}_{uuid.uuid4().hex}", "type": kind, "status": "in_progress", **fields}
        if kind != "function_call":
            item |= {"role": "assistant", "content": []} if kind == "message" else {"summary": [], "content": []}
        self._open = item
        self._response["output"].append(item)
        yield self._event("response.output_item.added", item=item)
        if kind in TEXTS:
            content: dict[str, Any] = {"type": TEXTS[kind], "text": ""}
            item["content"].append(content | ({"annotations": [], "logprobs": []} if kind == "message" else {}))
            yield self._event("response.content_part.added", content_index=0, part=item["content"][0])

    def _add_text(self, text: str, logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        assert self._open is not None
        content = self._open["content"][0]
        content["text"] += text
        scored = {}
        if content["type"] == "output_text":
            content["logprobs"] += logprobs
            scored = {"logprobs": logprobs}
        yield self._event(f"response.{content['type']}.delta", content_index=0, delta=text, **scored)

    def _end(self, status: str) -> Iterator[Event]:
        """Of the open item."""
        if (item := self._open) is None:
            return
        item["status"] = status
        if item["type"] == "function_call":
            item["arguments"] = item["arguments"] or "{}"
            yield self._event("response.function_call_arguments.done", name=item["name"], arguments=item["arguments"])
        else:
            content = item["content"][0]
            scored = {"logprobs": content["logprobs"]} if "logprobs" in content else {}
            yield self._event(f"response.{content['type']}.done", content_index=0, text=content["text"], **scored)
            yield self._event("response.content_part.done", content_index=0, part=content)
        yield self._event("response.output_item.done", item=item)
        self._open = None

    def _event(self, kind: str, **fields: Any) -> Event:
        place = {"output_index": len(self._response["output"]) - 1}
        if self._open is not None and "item" not in fields:
            place["item_id"] = self._open["id"]
        return {"type": kind, **place, **fields}

    def _tokens(self) -> dict[str, Any]:
        chats = self._usage()
        return {
            "input_tokens": chats["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": chats["prompt_tokens_details"]["cached_tokens"]},
            "output_tokens": chats["completion_tokens"],
            "output_tokens_details": chats["completion_tokens_details"],
            "total_tokens": chats["total_tokens"],
        }


def sent(event: Event, number: int) -> str:
    """As a server-sent event."""
    data = json.dumps(event | {"sequence_number": number}, ensure_ascii=False, separators=(",", ":"))
    return f"event: {event['type']}\ndata: {data}\n\n"
