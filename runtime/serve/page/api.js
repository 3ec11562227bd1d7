// Talks to the server: OpenAI's chat completions as a stream, and what this page asks beside.

let key = sessionStorage.getItem("qvl-key") ?? "";

/** An answer that is no success: its HTTP status and the server's own message. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function setKey(value) {
  key = value;
  sessionStorage.setItem("qvl-key", value);
}

async function send(path, body, signal) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal };
  const response = await fetch(path, options);
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message ?? message;
  } catch { /* not JSON: the status says it */ }
  throw new ApiError(response.status, message);
}

export const models = async () => (await (await send("/v1/models")).json()).data;
export const cost = async (picture) => (await send("/v1/vision/cost", picture)).json();
export const healthy = async () => {
  try {
    return (await fetch("/health")).status;
  } catch {
    return 0;
  }
};

/** The chunks of a streamed reply, as the server sends them. */
export async function* complete(body, signal) {
  const request = { ...body, stream: true, stream_options: { include_usage: true }, return_progress: true };
  const response = await send("/v1/chat/completions", request, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ApiError(0, "The server ended the reply early.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.code ?? 500, chunk.error.message);
      yield chunk;
    }
  }
}
