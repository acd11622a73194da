"""A stage's model in a form that other programs read, proven to answer as the stage did: `baton export`, `baton push`.

commands.py         the two commands
run.py              what an export does, from its parent to its folder
source.py           the model that is exported: opened, merged, loaded
place.py            the folder of an export: built beside, hashed, renamed
record.py           export.json: what was exported, from what, and how it was checked
lineage.py          the stages from which a model comes
evaluations.py      what evaluations have found about a model
card.py             the model card
push.py             uploads an export to the hub
probes.py           texts by which two programs that should be the same are compared
answers.py          what a model says to them, and the differences between two models
check.py            whether an export answers as the stage did
gguf_vocabulary.py  a tokenizer in GGUF
gguf_settings.py    settings and tensors in GGUF
gguf_file.py        writes a GGUF file
llama_cpp.py        asks llama.cpp (llama_cpp.mjs runs it)
ollama.py           a Modelfile, with the chat template in Go's syntax
onnx_file.py        writes and checks ONNX
"""
