"""OpenAI's API over HTTP.

An HTTP body becomes a token through nine representations:

  1. bytes                            bodies.Bodies reads them
  2. JSON values                      plan.read_json
  3. ChatBody or CompletionBody       schema.parse
  4. a rendered chat template         text.chat_template, for chats
  5. Plan: token ids, SamplingParams  plan.plan_chat, plan.plan_completion; formats.answer_format, text.grammar
  6. Request                          Engine.add
  7. the scheduler's sequence         on every rank
  8. Batch                            the tokens of one step, of all sequences
  9. logits                           the model's; sampling takes the token from them

On the way back the engine's thread collects a request's TokenEvents as Updates, and `responses` makes JSON of them.
"""
