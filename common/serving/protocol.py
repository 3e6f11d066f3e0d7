"""The bodies of requests and answers, in OpenAI's words, with vLLM's additions. They make the OpenAPI page, too.

A field that vLLM knows and this server does not have is refused if it would change the answer (`REFUSED`). Any other
field that is not listed here is accepted and ignored, as vLLM does. A listed field with a wrong value is refused with
status 400. None gives any field its default.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
LARGEST_SEED = 2**63 - 1
REFUSED = {
    "use_beam_search": False,
    "include_stop_str_in_output": False,
    "skip_special_tokens": True,
    "truncate_prompt_tokens": None,
    "allowed_token_ids": None,
    "bad_words": None,
    "prompt_logprobs": None,
    "logprob_token_ids": None,
    "return_token_ids": False,
    "return_tokens_as_token_ids": False,
    "prompt_embeds": None,
    "documents": None,
    "chat_template": None,
    "thinking_token_budget": None,
    "repetition_detection": None,
    "echo": False,  # of a chat
}
"""Fields with which vLLM gives another answer, and which this server does not have; and the value that asks for
nothing. Ignoring them would be a wrong answer without an error.
"""


class Body(BaseModel):
    """Unknown fields are kept in `model_extra` and otherwise ignored."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def leave_out_nulls(cls, values: Any) -> Any:
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values


# --- Errors -----------------------------------------------------------------------------------------------------------


class ErrorInfo(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    error: ErrorInfo


# --- What completions and chats have in common ------------------------------------------------------------------------


class StreamOptions(Body):
    include_usage: bool | None = Field(False, description="add a chunk with the usage")
    continuous_usage_stats: bool | None = Field(False, description="with include_usage: the usage so far in each chunk")


class StructuredOutputs(Body):
    """What the answer must match; exactly one of them. vLLM's field `structured_outputs`."""

    json_: dict[str, Any] | str | None = Field(None, alias="json", description="a JSON schema")
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1)
    grammar: str | None = Field(None, description="a grammar in the Lark syntax of llguidance")
    json_object: bool | None = None


class JsonSchema(Body):
    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def has_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise ValueError("json_schema must have a schema where type is json_schema.")
        return self


class SamplingBody(Body):
    """Fields that say how tokens are chosen and when an answer ends."""

    model: str | None = Field(None, description="a name that /v1/models lists; default: the model that is served")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = Field(1, ge=1, le=128)
    temperature: float | None = Field(1.0, ge=0, le=100)
    top_p: float | None = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(0, ge=-1, lt=2**31, description="0 and -1: all tokens")
    min_p: float | None = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-LARGEST_SEED, le=LARGEST_SEED)
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = False
    min_tokens: int | None = Field(0, ge=0, lt=2**31)
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    repetition_penalty: float | None = Field(1.0, gt=0, le=100)
    logit_bias: dict[str, float] | None = Field(None, description="token id -> what is added to its score")
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: int | None = Field(0, ge=-(2**31), lt=2**31, description="lower is served first, with policy priority")
    cache_salt: str | None = Field(None, min_length=1, description="only requests with the same salt share a prefix")
    user: str | None = Field(None, description="not used")

    @model_validator(mode="after")
    def fits_together(self) -> SamplingBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true.")
        for name, value in (self.model_extra or {}).items():
            if name in REFUSED and value not in (REFUSED[name], []):
                raise ValueError(f"{name} is not supported by this server; leave it out.")
        if any(not text for text in ([self.stop] if isinstance(self.stop, str) else self.stop or ())):
            raise ValueError("stop must not hold an empty string.")
        return self


class PromptTokensDetails(BaseModel):
    cached_tokens: int = 0


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


# --- /v1/completions --------------------------------------------------------------------------------------------------


class CompletionRequest(SamplingBody):
    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    max_tokens: int | None = Field(16, ge=0, lt=2**31)
    echo: bool | None = Field(False, description="begin each answer with its prompt")
    logprobs: int | None = Field(None, ge=0, le=20)
    suffix: str | None = Field(None, description="refused unless it is empty")
    add_special_tokens: bool | None = True

    @model_validator(mode="after")
    def is_supported(self) -> CompletionRequest:
        if self.suffix:
            raise ValueError("suffix is not supported: this model continues a text and does not fill a gap.")
        if not self.prompt:
            raise ValueError("prompt must not be empty.")
        if not self.max_tokens and not self.echo and self.max_tokens is not None:
            raise ValueError("max_tokens must be at least 1, unless echo is true.")
        return self


class CompletionLogprobs(BaseModel):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class CompletionResponse(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


# --- /v1/chat/completions ---------------------------------------------------------------------------------------------


class TextPart(Body):
    type: Literal["text"]
    text: str


class FunctionCall(Body):
    name: str
    arguments: str = Field(description="a JSON object, as text")


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class FunctionDefinition(Body):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"] = "function"
    function: FunctionDefinition


class NamedFunction(Body):
    name: str


class NamedToolChoice(Body):
    type: Literal["function"] = "function"
    function: NamedFunction


class ChatRequest(SamplingBody):
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, lt=2**31, description="default: as many as the context has left")
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = True
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = Field(False, description="beyond those that the chat template writes")
    add_generation_prompt: bool | None = Field(None, description="default: true, unless the final message is continued")
    continue_final_message: bool | None = False

    @model_validator(mode="after")
    def chooses_well(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true.")
        names = [tool.function.name for tool in self.tools or ()]
        if isinstance(self.tool_choice, NamedToolChoice) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is not among tools.")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice is required, and tools is empty.")
        return self


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class AnswerToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Answer(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[AnswerToolCall] = Field([], exclude_if=lambda calls: not calls)  # OpenAI's own is never null


class ChatChoice(BaseModel):
    index: int
    message: Answer
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatResponse(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


# --- The small ones ---------------------------------------------------------------------------------------------------


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeRequest(Body):
    """Either a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = Field(None, description="default: true for a prompt, false for messages")
    add_generation_prompt: bool | None = Field(None, description="default: true, unless the final message is continued")
    continue_final_message: bool | None = False
    return_token_strs: bool | None = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None

    @model_validator(mode="after")
    def is_one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages.")
        return self


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[TokenId]


class DetokenizeResponse(BaseModel):
    prompt: str


class Version(BaseModel):
    version: str
