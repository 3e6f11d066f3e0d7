"""Errors as OpenAI's API words them: a status code, and a JSON body with message, type, param and code."""

from __future__ import annotations

import logging
import math
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from common.serving.protocol import ErrorInfo, ErrorResponse

LOG = logging.getLogger("common.serving")

TYPES = {401: "authentication_error", 429: "rate_limit_error"}
DOCUMENTED = {status: {"model": ErrorResponse} for status in (400, 401, 404, 413, 429, 500, 503)}
NOT_FOLLOWED = "the grammar cannot be followed any further"  # begins the error of a request whose grammar is to blame


class ApiError(Exception):
    """An answer other than success. message: a sentence. code: a word for programs, such as model_not_found."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, headers: dict | None = None
    ):
        message = message if message.endswith((".", "?", "!")) else f"{message}."
        super().__init__(message)
        self.status = status
        kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.info = ErrorInfo(message=message, type=kind, param=param, code=code)
        self.headers = headers

    @property
    def body(self) -> dict:
        return {"error": self.info.model_dump()}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


class EngineDead(ApiError):
    """The engine has failed or was closed, and computes nothing any more; the text says why."""

    def __init__(self, message: str):
        super().__init__(503, message, code="engine_dead")


class QueueFull(ApiError):
    """The request was not accepted, because too many wait. retry_after: seconds until it is worth another try."""

    def __init__(self, message: str, retry_after: float = 1.0):
        super().__init__(429, message, code="queue_full", headers={"Retry-After": str(math.ceil(retry_after))})


class RequestFailed(ApiError):
    """The engine could not compute this request; others go on. reason: the engine's."""

    def __init__(self, reason: str):
        status = 400 if NOT_FOLLOWED in reason else 500
        super().__init__(status, f"The engine could not compute this request: {reason}", code="request_failed")


class ClientGone(ApiError):
    """The client has closed its connection and will not read this answer."""

    def __init__(self):
        super().__init__(499, "The client has closed the connection.")


def as_api_error(error: Exception) -> ApiError:
    """The answer that a failure becomes. A mistake of ours is logged, and its answer does not say what it was."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return validation_error(error)
    if isinstance(error, ValueError):  # the engine's own words, which name the field
        return ApiError(400, str(error))
    if isinstance(error, RecursionError):
        return ApiError(400, "The body is nested too deeply.")
    LOG.error("A request has failed.", exc_info=error)
    return ApiError(500, "The server has failed in this request; its log says how.", code="internal_error")


def validation_error(error: RequestValidationError) -> ApiError:
    """Status 400 for a body that does not fit, naming the first field that is wrong.

    Where a field may have several types, the one that fits the longest part of it says what is wrong.
    """
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not JSON: {first['ctx']['error']}, at character {first['loc'][-1]}.")
    *before, _ = first["loc"]
    near = [each for each in error.errors() if list(each["loc"][: len(before)]) == before]
    chosen = max(near, key=lambda each: len(each["loc"]))
    where = [str(each) for each in chosen["loc"][1:]]
    where = [each for each in where if not (each == "str" or "[" in each or each[:1].isupper())]  # the name of a type
    message = chosen["msg"].removeprefix("Value error, ")
    if not where and chosen["type"] == "value_error":  # a validator of ours, which names the fields itself
        return ApiError(400, message)
    if not where:
        return ApiError(400, "The body must be a JSON object, and the header Content-Type must be application/json.")
    given = chosen["input"]
    if isinstance(given, (str, int, float)) and chosen["type"] != "value_error":
        message += f"; it is {repr(given)[:80]}"
    return ApiError(400, f"{'.'.join(where)}: {message}", param=where[0])


def handle_errors(app: FastAPI) -> None:
    """Let every failure in a route become an answer of this form."""

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> JSONResponse:
        message = error.detail
        if message == HTTPStatus(error.status_code).phrase:  # FastAPI's own words
            message = f"{request.method} {request.url.path}: {message}. /docs lists what there is."
        return ApiError(error.status_code, message, headers=error.headers).response()

    async def on_failure(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    for kind in (ApiError, RequestValidationError, ValueError, RecursionError, Exception):
        app.exception_handler(kind)(on_failure)
