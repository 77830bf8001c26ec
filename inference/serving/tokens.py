"""/tokenize and /detokenize, in vLLM's shape: what the server makes of a text, and of token ids."""

from dataclasses import replace
from typing import Any, Literal

from core.errors import UserError
from serving.errors import ApiError
from serving.plan import Served, check_model, encode_messages, read_body, too_long
from serving.schema import ChatBody, CompletionBody, shown
from text.limits import TooLong

MOST = 1 << 18  # tokens that are told, of a text that may be longer than the model's context


class TokenizeChat(ChatBody):
    """What a conversation becomes."""

    add_generation_prompt: bool = True
    continue_final_message: Literal[False] = False
    add_special_tokens: bool = False  # the template writes them
    return_token_strs: bool = False


class TokenizeText(CompletionBody):
    """What a raw prompt becomes; `add_special_tokens` with what the tokenizer itself puts around it."""

    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


def tokenize(data: dict[str, Any], served: Served) -> dict[str, Any]:
    """Raises ApiError."""
    generous = replace(served, context=max(served.context, MOST))
    body: ChatBody | CompletionBody
    if "messages" in data:
        body = read_body(TokenizeChat, data, served)
        assert isinstance(body, TokenizeChat)
        ids = encode_messages(body, generous, body.add_generation_prompt)
    else:
        body = read_body(TokenizeText, data, served)
        assert isinstance(body, TokenizeText)
        try:
            ids = served.tokenizer.encode_text(body.prompt, generous.context, alone=not body.add_special_tokens)
        except TooLong as e:
            raise too_long("prompt", generous, e.n, e.is_all) from None
        except UserError as e:
            raise ApiError(str(e), "prompt") from None
    names = [served.tokenizer.name(i).decode("utf-8", "replace") for i in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": served.context, "tokens": ids, "token_strs": names}


def detokenize(data: dict[str, Any], served: Served) -> dict[str, Any]:
    """The text of `tokens`, control tokens by their names. Raises ApiError."""
    tokens, model = data.pop("tokens", None), data.pop("model", None)
    if data:
        raise ApiError(f"{shown(next(iter(data)))[1:-1]} is not supported", next(iter(data)))
    if not (model is None or isinstance(model, str)):
        raise ApiError(f"model is {shown(model)}: expected a string", "model")
    check_model(model, served)
    if not isinstance(tokens, list):
        raise ApiError(f"tokens is {shown(tokens)}: expected an array of token ids", "tokens")
    for i, token in enumerate(tokens):
        if type(token) is not int or not 0 <= token < served.vocab_size:
            raise ApiError(f"tokens.{i} is {shown(token)}: expected an id from 0 to {served.vocab_size - 1}", "tokens")
    return {"prompt": b"".join(map(served.tokenizer.name, tokens)).decode("utf-8", "replace")}
