// What openai's package for Node and the AI SDK make of the server: node clients.mjs http://127.0.0.1:8000/v1 MODEL
// Prints a JSON object: for each client, the answer to one question, whole and streamed.
import OpenAI from "openai";
import { generateText, streamText } from "ai";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";

const [url, model] = process.argv.slice(2);
const question = "What is 347 + 285?";
const messages = [{ role: "user", content: question }];

async function openai() {
  const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
  const whole = await client.chat.completions.create({ model, messages, temperature: 0 });
  let streamed = "";
  for await (const part of await client.chat.completions.create({ model, messages, temperature: 0, stream: true }))
    streamed += part.choices[0]?.delta?.content ?? "";
  const responses = await client.responses.create({ model, input: question, temperature: 0 });
  return { whole: whole.choices[0].message.content, streamed, responses: responses.output_text };
}

async function aiSdk() {
  const compatible = createOpenAICompatible({ name: "local", baseURL: url, apiKey: "none" });
  const asked = { model: compatible(model), prompt: question, temperature: 0, maxRetries: 0 };
  const whole = await generateText(asked);
  const streamed = await streamText(asked).text;
  const responses = await generateText({ ...asked, model: createOpenAI({ baseURL: url, apiKey: "none" }).responses(model) });
  return { whole: whole.text, streamed, reasoning: whole.reasoningText, responses: responses.text };
}

console.log(JSON.stringify({ openai: await openai(), ai_sdk: await aiSdk() }));
