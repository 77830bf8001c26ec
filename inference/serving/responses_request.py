"""A body of /v1/responses as the body of the chat that it asks for.

Nothing is kept between two requests: the whole conversation comes as `input`, and what refers to an earlier answer is
refused by name. What both APIs share goes on as it is, and is judged by the chat's schema.
"""

from typing import Any

from serving.errors import ApiError
from serving.plan import Plan, Served, plan_chat
from serving.schema import shown

STATELESS = "this server keeps no answers; send the whole conversation as input, and leave this out"
REFERRING = ("previous_response_id", "conversation", "prompt")  # to what a server would have kept
CHATS_OWN = ("messages", "n", "functions", "logprobs", "max_tokens", "max_completion_tokens", "response_format")
IDLE = {"truncation": "disabled", "background": False}  # the only value, which is what is done anyway
IGNORED = ("include", "store", "max_tool_calls", "stream_options")
TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
LOGPROBS = "message.output_text.logprobs"  # in `include`
# What a chat calls them, where an error names a field.
NAMES = {"messages": "input", "max_completion_tokens": "max_output_tokens", "response_format": "text.format",
         "reasoning_effort": "reasoning.effort", "logprobs": "include"}  # fmt: skip


def plan_response(data: dict[str, Any], served: Served) -> Plan:
    """Raises ApiError."""
    chat = chat_body(data)
    try:
        return plan_chat(chat, served, data)
    except ApiError as e:
        field, _, rest = (e.param or "").partition(".")
        if field in NAMES:
            e.param = ".".join([NAMES[field], rest]).rstrip(".")
            e.args = (str(e).replace(field, NAMES[field], 1),)
        raise


def chat_body(data: dict[str, Any]) -> dict[str, Any]:
    """Raises ApiError."""
    given = {name: value for name, value in data.items() if value is not None}
    for name in REFERRING:
        if name in given:
            raise ApiError(f"{name} is not supported: {STATELESS}", name)
    for name in CHATS_OWN:
        if name in given:
            raise ApiError(f"{name} is not supported", name)
    for name, idle in IDLE.items():
        if name in given and given.pop(name) != idle:
            raise ApiError(f"{name} is {shown(data[name])}: expected {shown(idle)}", name)
    messages = messages_of(given.pop("input", None))
    if "instructions" in given:
        messages.insert(0, {"role": "system", "content": given.pop("instructions")})
    if LOGPROBS in (given.get("include") or []):
        given["logprobs"] = True
    chat = {name: value for name, value in given.items() if name not in IGNORED}
    if "max_output_tokens" in chat:
        chat["max_completion_tokens"] = chat.pop("max_output_tokens")
    if "reasoning" in chat:
        effort = object_of(chat.pop("reasoning"), "reasoning", ("effort", "summary", "generate_summary")).get("effort")
        chat["reasoning_effort"] = effort
    if "text" in chat:
        wanted = object_of(chat.pop("text"), "text", ("format", "verbosity"))
        chat["verbosity"], form = wanted.get("verbosity"), wanted.get("format")
        if isinstance(form, dict) and form.get("type") == "json_schema":
            form = {"type": "json_schema", "json_schema": {name: form[name] for name in form if name != "type"}}
        chat["response_format"] = form
    if isinstance(chat.get("tools"), list):
        chat["tools"] = [tool_of(tool, f"tools.{i}") for i, tool in enumerate(chat["tools"])]
    if isinstance(choice := chat.get("tool_choice"), dict) and choice.get("type") == "function" and "name" in choice:
        chat["tool_choice"] = {"type": "function", "function": {"name": choice["name"]}}
    return chat | {"messages": messages}


def tool_of(tool: Any, path: str) -> dict[str, Any]:
    fields = object_of(tool, path)
    if fields.get("type") != "function":
        raise ApiError(f'{path}.type is {shown(fields.get("type"))}: expected "function"', path)
    return {"type": "function", "function": {name: fields[name] for name in fields if name != "type"}}


def messages_of(given: Any) -> list[dict[str, Any]]:
    """The messages of `input`: an assistant's reasoning, text and calls, each an item, become one message."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list):
        says = "is missing" if given is None else f"is {shown(given)}: expected a string or an array"
        raise ApiError(f"input {says}", "input")
    messages: list[dict[str, Any]] = []
    for i, item in enumerate(given):
        path = f"input.{i}"
        fields = object_of(item, path)
        kind = fields.get("type", "message")
        if kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": fields.get("call_id"),
                             "content": text_of(fields.get("output"), f"{path}.output")})  # fmt: skip
        elif kind == "message" and fields.get("role") != "assistant":
            messages.append({"role": fields.get("role"), "content": text_of(fields.get("content"), f"{path}.content")})
        elif kind in ("message", "function_call", "reasoning"):
            add_to_assistant(messages, kind, fields, path)
        elif kind == "item_reference":
            raise ApiError(f"{path} is an item_reference: {STATELESS}", path)
        else:
            known = '"message", "function_call", "function_call_output" or "reasoning"'
            raise ApiError(f"{path}.type is {shown(kind)}: expected {known}", f"{path}.type")
    return messages


def add_to_assistant(messages: list[dict[str, Any]], kind: str, fields: dict[str, Any], path: str) -> None:
    """Adds to the last message what goes on with it, which reasoning never does, nor text after text or calls."""
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    if last is None or kind == "reasoning" or (kind == "message" and (last["content"] or "tool_calls" in last)):
        last = {"role": "assistant", "content": None}
        messages.append(last)
    if kind == "reasoning":
        last["reasoning_content"] = text_of(fields.get("content") or fields.get("summary") or "", f"{path}.content")
        last["content"] = ""
    elif kind == "message":
        last["content"] = text_of(fields.get("content"), f"{path}.content")
    else:
        call = {"name": fields.get("name"), "arguments": fields.get("arguments")}
        last.setdefault("tool_calls", []).append({"id": fields.get("call_id"), "type": "function", "function": call})


def text_of(content: Any, path: str) -> Any:
    """A content's text; what is neither a string nor parts is left to the schema."""
    if not isinstance(content, list):
        return content
    texts = []
    for i, part in enumerate(content):
        fields = object_of(part, f"{path}.{i}")
        kind = fields.get("type")
        text = fields.get("refusal") if kind == "refusal" else fields.get("text")
        if kind not in (*TEXTS, "refusal"):
            says = 'expected "input_text" or "output_text"'
            raise ApiError(f"{path}.{i}.type is {shown(kind)}: {says}", f"{path}.{i}.type")
        if not isinstance(text, str):
            raise ApiError(f"{path}.{i}.text is {shown(text)}: expected a string", f"{path}.{i}.text")
        texts.append(text)
    return "".join(texts)


def object_of(value: Any, path: str, known: tuple[str, ...] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ApiError(f"{path} is {shown(value)}: expected an object", path)
    for name in value:
        if known is not None and name not in known:
            raise ApiError(f"{path}.{shown(name)[1:-1]} is not supported", path)
    return value
