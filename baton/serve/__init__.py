"""`baton serve`: models behind an HTTP interface that OpenAI's clients know (docs/serve.md).

    run.py         the command: which models, which engine, the port, signals
    settings.py    the limits of a server, and its key
    vllm.py        the command that starts vLLM in place of this server
    served.py      one model, and the thread that all of them compute in
    app.py         the routes
    guard.py       who may ask: key, size, origin, load; what is logged
    errors.py      a request that is refused
    fields.py      what requests may say, checked field by field
    generation.py  the answers to one request, from the thread that computes to the one that sends
    replies.py     the JSON of answers
    grammar.py     answers that follow a JSON schema
    chat.py, completions.py, embeddings.py   the routes' work
    tools.py       tool calls, separated from text
    call_forms.py  the forms in which templates write calls
    page.py        the page to chat on (page.html, page.css, page.js), and preferences from it
    preferences.py the file that they are appended to
    metrics.py     what /metrics shows

An answer depends on the request and its seed alone: sampling is keyed, and the rows beside it do not matter.
"""
