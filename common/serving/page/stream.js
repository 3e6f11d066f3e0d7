// Talks to an OpenAI-compatible server. Addresses are relative, so the page also works below a path of a proxy.

// What went wrong, in a sentence for the user. status: the HTTP status, or 0 if there was no answer at all.
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

// Fetches a path. Throws ServerError, or AbortError if the signal was aborted.
export async function ask(path, { key = "", body, signal } = {}) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const options = { method: body === undefined ? "GET" : "POST", headers, signal, cache: "no-store" };
  if (body !== undefined) options.body = JSON.stringify(body);
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer. Is it still running? See the terminal of make serve.");
  }
  if (response.status === 401) throw new ServerError(`The server ${key ? "does not know this" : "wants an"} API key.`, 401);
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let said = "";
  try {
    said = String(JSON.parse(await response.text()).error.message);
  } catch {
    // A proxy, perhaps, whose error is not JSON: the status has to do.
  }
  const wait = response.headers.get("Retry-After");
  const message = {
    429: `The server is full${wait ? `; try again in ${wait} s` : ""}.`,
    503: "The engine does not run.",
  }[response.status] ?? `The server answered with status ${response.status}.`;
  return new ServerError(said ? `${message} ${said}` : message, response.status);
}

// Yields the chunks of a streamed chat completion. Throws ServerError if the stream breaks off or holds an error.
export async function* streamChat(body, options) {
  const request = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await ask("v1/chat/completions", { ...options, body: request });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(String(chunk.error.message ?? chunk.error), Number(chunk.error.code) || 500);
    yield chunk;
  }
  throw new ServerError("The server broke the answer off before its end.");
}

// Yields the data of each server-sent event; the other fields of an event are not used here.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines.map((each) => each.replace(/\r$/, ""))) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } catch (error) {
    if (error instanceof ServerError || error.name === "AbortError") throw error;
    throw new ServerError("The connection to the server broke in the middle of the answer.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
