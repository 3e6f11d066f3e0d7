"""The routes, and who may use them."""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.serving import protocol
from common.serving.chat import chat, encode_chat
from common.serving.completions import complete
from common.serving.errors import DOCUMENTED, ApiError, handle_errors
from common.serving.generation import Server
from common.serving.tenants import Tenants
from common.serving.tokens import token_text

PAGE = Path(__file__).parent / "page"
OPEN = ("/", "/health", "/ping", "/favicon.ico")
"""Paths that need no key: a browser cannot send one when it opens the page, nor can most load balancers."""
REVALIDATE = {"Cache-Control": "no-cache"}
LARGEST_BODY = 32 * 2**20  # bytes


class Gate:
    """Refuses requests without a key and bodies that are too large. The tenant is left in the request's state."""

    def __init__(self, app: ASGIApp, tenants: Tenants):
        self.app = app
        self.tenants = tenants

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        tenant = self.tenants.find(headers.get(b"authorization", b"").decode("latin-1"))
        if tenant is None and scope["path"] not in OPEN and not scope["path"].startswith("/static/"):
            message = "No key, or one that is not known. Send it in the header Authorization: Bearer KEY."
            wanted = {"WWW-Authenticate": "Bearer"}
            return await ApiError(401, message, code="invalid_api_key", headers=wanted).response()(scope, receive, send)
        scope.setdefault("state", {})["tenant"] = tenant
        num_bytes = 0

        async def receive_within_limit() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > LARGEST_BODY:
                raise HTTPException(413, f"The body has more than {LARGEST_BODY} bytes.")
            return message

        await self.app(scope, receive_within_limit, send)


def create_app(server: Server) -> FastAPI:
    """The application for an engine that runs already. When it ends, the engine is closed."""

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        server.loop.close()

    app = FastAPI(
        title="inference-course",
        version=version("inference-course"),
        description="An OpenAI-compatible server. Fields that are not listed are ignored, as vLLM ignores them.",
        responses=DOCUMENTED,
        lifespan=lifespan,
    )
    app.add_middleware(Gate, tenants=server.tenants)
    handle_errors(app)
    add_routes(app, server)
    document(app)
    return app


def add_routes(app: FastAPI, server: Server) -> None:
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    stream = {200: {"content": {"text/event-stream": {"schema": event}}}}  # before 3.2 a schema is that of each event

    name, limit = server.model_name, server.config.max_model_len
    card = protocol.ModelCard(
        id=name, created=int(time.time()), owned_by="inference-course", root=name, max_model_len=limit
    )

    @app.post("/v1/completions", responses=stream, response_model=protocol.CompletionResponse)
    async def completions(request: Request, body: protocol.CompletionRequest):
        """Continue a prompt, or several."""
        return await complete(server, request, body)

    @app.post("/v1/chat/completions", responses=stream, response_model=protocol.ChatResponse)
    async def chat_completions(request: Request, body: protocol.ChatRequest):
        """Answer a conversation."""
        return await chat(server, request, body)

    @app.get("/v1/models")
    async def models() -> protocol.ModelList:
        return protocol.ModelList(data=[card])

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> protocol.ModelCard:
        server.check_model(model)
        return card

    @app.post("/tokenize")
    async def tokenize(body: protocol.TokenizeRequest) -> protocol.TokenizeResponse:
        """The token ids of a prompt, or of a conversation as the chat template writes it."""
        server.check_model(body.model)
        if body.prompt is None:
            token_ids = encode_chat(server, body, body.tools or [])
        else:
            token_ids = server.encode(body.prompt, body.add_special_tokens is not False)
        texts = [token_text(server.tokenizer, each)[0] for each in token_ids] if body.return_token_strs else None
        return protocol.TokenizeResponse(count=len(token_ids), max_model_len=limit, tokens=token_ids, token_strs=texts)

    @app.post("/detokenize")
    async def detokenize(body: protocol.DetokenizeRequest) -> protocol.DetokenizeResponse:
        server.check_model(body.model)
        size = server.config.model_config.vocab_size
        if wrong := [token_id for token_id in body.tokens if token_id >= size]:
            raise ApiError(400, f"tokens has token id {wrong[0]}; the vocabulary ends at {size - 1}.", param="tokens")
        return protocol.DetokenizeResponse(prompt=server.tokenizer.decode(body.tokens))

    @app.get("/health", response_class=Response)
    @app.get("/ping", response_class=Response)
    @app.post("/ping", response_class=Response)
    async def health() -> Response:
        """Status 200 while the engine computes, 503 once it does not. Needs no key."""
        server.loop.check()
        return Response()

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> Response:
        """What the server measures, in Prometheus' text format, under vLLM's names."""
        return Response(server.loop.metrics.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    @app.get("/version")
    async def show_version() -> protocol.Version:
        return protocol.Version(version=version("inference-course"))

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers=REVALIDATE)

    app.mount("/static", PageFiles(directory=PAGE), name="static")


class PageFiles(StaticFiles):
    """The page's files, which a browser asks for again each time, so that they are of one version."""

    def file_response(self, *arguments, **options) -> Response:
        response = super().file_response(*arguments, **options)
        response.headers.update(REVALIDATE)
        return response


def document(app: FastAPI) -> None:
    """Take status 422, which this server never answers, out of FastAPI's OpenAPI page."""
    schema = app.openapi()
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
