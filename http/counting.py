"""How many tokens the prompt of a chat has: what the counting routes of all APIs share, and OpenAI's two of them."""

from starlette.requests import Request
from starlette.responses import Response

from llamaherd.http.connection import while_connected
from llamaherd.http.front import Front, json_response
from llamaherd.http.schema import ChatBody, parse
from llamaherd.http.text import render

__all__ = ["chat_input_tokens", "count_tokens", "counted_json"]


async def count_tokens(front: Front, request: Request, body: ChatBody) -> int:
    """Return how many tokens the prompt has that a chat becomes. The model is loaded for it.

    Raises as :meth:`~llamaherd.http.front.Front.find_ready` and the pool.
    """
    model = front.find_ready(request, body)

    async def count() -> int:
        prompt = await render(front, model, body)
        return len(await front.pool.tokenize(model, prompt, add_special=True))

    return await while_connected(request.receive, count())


async def chat_input_tokens(front: Front, request: Request) -> Response:
    """Answer with the tokens of a chat's prompt."""
    body = parse(await front.read(request), ChatBody)
    return counted_json(await count_tokens(front, request, body))


def counted_json(count: int) -> Response:
    """Return OpenAI's answer to a request that counts."""
    return json_response({"object": "response.input_tokens", "input_tokens": count})
