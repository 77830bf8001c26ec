"""What LangChain, LiteLLM and pydantic-ai make of the server. Run in an environment that `environments.py` made:

    python python_clients.py http://127.0.0.1:8000/v1 MODEL

Prints a JSON object: for each client, the answer to one question, whole and streamed, and its reasoning where the client
tells it.
"""

import json
import sys
from typing import Any

QUESTION = "What is 347 + 285?"


def langchain(url: str, model: str) -> dict[str, Any]:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=url, api_key="none", model=model, temperature=0, max_retries=0)  # type: ignore[arg-type]
    whole = chat.invoke(QUESTION)
    streamed = "".join(str(part.content) for part in chat.stream(QUESTION))
    responses = ChatOpenAI(base_url=url, api_key="none", model=model, temperature=0, use_responses_api=True)  # type: ignore[arg-type]
    try:
        chat.invoke("word " * 20_000)
        too_long = "answered"
    except Exception as e:
        too_long = type(e).__name__
    return {"whole": whole.content, "streamed": streamed, "responses": responses.invoke(QUESTION).text, "too_long": too_long}


def litellm(url: str, model: str) -> dict[str, Any]:
    import litellm as library

    asked: dict[str, Any] = dict(model=f"openai/{model}", api_base=url, api_key="none", temperature=0,
                                 messages=[{"role": "user", "content": QUESTION}])  # fmt: skip
    whole = library.completion(**asked)
    streamed = "".join(part.choices[0].delta.content or "" for part in library.completion(**asked, stream=True))
    try:
        library.completion(**asked | {"messages": [{"role": "user", "content": "word " * 20_000}]})
        too_long = "answered"
    except Exception as e:
        too_long = type(e).__name__
    message = whole.choices[0].message
    return {"whole": message.content, "streamed": streamed, "reasoning": message.reasoning_content, "too_long": too_long}


def pydantic_ai(url: str, model: str) -> dict[str, Any]:
    import asyncio

    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=url, api_key="none")
    agent = Agent(OpenAIChatModel(model, provider=provider), model_settings={"temperature": 0})
    whole = agent.run_sync(QUESTION).output

    async def stream() -> str:
        async with agent.run_stream(QUESTION) as run:
            return await run.get_output()

    responses = Agent(OpenAIResponsesModel(model, provider=provider), model_settings={"temperature": 0})
    return {"whole": whole, "streamed": asyncio.run(stream()), "responses": responses.run_sync(QUESTION).output}


if __name__ == "__main__":
    _, url, model = sys.argv
    print(json.dumps({client.__name__: client(url, model) for client in (langchain, litellm, pydantic_ai)}))
